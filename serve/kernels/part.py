"""Part: what one adapter adds to the layers that are given one input, in the memory where it is kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Part:
    """Factors of the layers with one x: out_l += x A_l B_l, and with DoRA before that (1 + scale_l) W_l x.

    `a` (in_features, n * rank) holds A of the n layers that the adapter changes, side by side; `columns` where that of
    each layer begins in it, -1 for one that it leaves alone; `bs` B (rank, out_features) of each, with the scaling in
    it; `scales` (out_features,) float32 by how much more than once W x counts, or None. A and B may be in fewer bits
    than what is computed in: they are widened as they are read.
    """

    rank: int
    a: torch.Tensor
    columns: tuple[int, ...]
    bs: tuple[torch.Tensor | None, ...]
    scales: tuple[torch.Tensor | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.a, *self.bs, *self.scales) if each is not None)

    def add(self, outs: Sequence[torch.Tensor], x: torch.Tensor) -> None:
        """out_l += x A_l B_l in place: outs (tokens, out_features) of each layer, x (tokens, in_features)."""
        inner = x @ self.a.to(x.dtype)
        for out, b, column in zip(outs, self.bs, self.columns, strict=True):
            if b is not None:
                out.addmm_(inner[:, column : column + self.rank], b.to(x.dtype))

    def rescale(self, outs: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        """out_l += scale_l (out_l - bias_l) in place, while outs are W x + bias."""
        for out, scale, bias in zip(outs, self.scales, biases, strict=True):
            if scale is not None:
                out += (out if bias is None else out - bias) * scale.to(out.dtype)


class Parts:
    """All parts of one adapter, by the group of layers that each is for."""

    def __init__(self, by_group: Mapping[object, Part]) -> None:
        self._by_group = by_group
        self.widest = max((part.a.shape[1] for part in by_group.values()), default=0)  # columns of A

    def get(self, group: object) -> Part | None:
        return self._by_group.get(group)

    def __iter__(self) -> Iterator[Part]:
        return iter(self._by_group.values())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)
