"""Rows of embeddings and head that an adapter has of its own: looked up for its tokens, and multiplied with for its
logits. The base's matrices stay as they are, and are not copied."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Rows:
    """Vectors (n, hidden) of the tokens `ids` (n,) int64, which ascend."""

    ids: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, ids: Sequence[int], vectors: torch.Tensor) -> "Rows":
        """Rows in whatever order."""
        ordered, order = torch.tensor(ids).sort()
        return cls(ordered, vectors[order])

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.vectors.nbytes

    def empty_on(self, device: torch.device) -> "Rows":
        """Room for the same on another device."""
        return Rows(torch.empty_like(self.ids, device=device), torch.empty_like(self.vectors, device=device))

    def copy_from(self, other: "Rows") -> None:
        self.ids.copy_(other.ids, non_blocking=True)
        self.vectors.copy_(other.vectors, non_blocking=True)


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The rows of one adapter: of what its tokens are looked up in, and of what its logits are made with.

    `inputs` are multiplied already by what the embeddings multiply with what they look up.
    """

    inputs: Rows | None
    outputs: Rows | None

    def __iter__(self) -> Iterator[Rows]:
        return (each for each in (self.inputs, self.outputs) if each is not None)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self)

    def empty_on(self, device: torch.device) -> "OwnRows":
        """Room for the same on another device."""
        return OwnRows(*(None if each is None else each.empty_on(device) for each in (self.inputs, self.outputs)))

    def copy_from(self, other: "OwnRows") -> None:
        """Copy rows of the same shapes."""
        for ours, theirs in zip(self, other, strict=True):
            ours.copy_from(theirs)


class WithRows(dict[str, tuple[torch.Tensor, ...]]):
    """The factors of an adapter that has rows as well, or may have some."""

    def __init__(self, factors: Mapping[str, tuple[torch.Tensor, ...]], rows: OwnRows | None) -> None:
        super().__init__(factors)
        self.rows = rows


def rows_of(factors: Mapping[str, tuple[torch.Tensor, ...]]) -> OwnRows | None:
    """The rows that come with an adapter's factors, if it has some."""
    return factors.rows if isinstance(factors, WithRows) else None


class Embeddings:
    """The base's own rows, for a model whose layers nothing is wrapped around yet."""

    def __init__(self, model: BaseModel) -> None:
        self.vocabulary = Vocabulary.of(model)
        self._layer, self._head = model.get_input_embeddings(), model.get_output_embeddings()

    def own_rows(self, tokens: Mapping[str, tuple[Sequence[int], torch.Tensor]], dtype: torch.dtype) -> OwnRows:
        """Rows as the model computes with them: `tokens` are module -> (ids, rows), as an adapter has them."""
        inputs, outputs = tokens.get(self.vocabulary.embeddings), tokens.get(self.vocabulary.of_head(tokens) or "")
        return OwnRows(
            None if inputs is None else Rows.of(inputs[0], self._scaled(inputs[1].to(dtype))),
            None if outputs is None else Rows.of(outputs[0], outputs[1].to(dtype)),
        )

    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        """The base's vectors (n, hidden) of tokens, on the CPU."""
        # not by the layer, which a step may be using now
        weight = self._layer.weight
        return self._scaled(weight.detach()[ids.to(weight.device)]).cpu()

    def outputs(self, ids: torch.Tensor) -> torch.Tensor:
        """The base's rows (n, hidden) that logits are made with, on the CPU."""
        assert self._head is not None, "an adapter has rows of the head only where there is one"
        weight = self._head.weight
        return weight.detach()[ids.to(weight.device)].cpu()

    def changes(self, rows: OwnRows) -> bool:
        """Whether rows differ from the base's."""
        sides = ((rows.inputs, self.inputs), (rows.outputs, self.outputs))
        return any(own is not None and not torch.equal(own.vectors, base(own.ids)) for own, base in sides)

    def mixed(self, parts: Sequence[tuple[OwnRows | None, float]]) -> OwnRows | None:
        """The rows of a weighted sum: base + sum of w_i (row_i - base), over all tokens that a part has a row of.

        A part without a row of a token has the base's. None if no part has any.
        """
        known = [(rows, weight) for rows, weight in parts if rows is not None]
        if not known:
            return None
        inputs = [(rows.inputs, weight) for rows, weight in known if rows.inputs is not None]
        outputs = [(rows.outputs, weight) for rows, weight in known if rows.outputs is not None]
        return OwnRows(_sum(inputs, self.inputs), _sum(outputs, self.outputs))

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        scale = getattr(self._layer, "embed_scale", None)  # of Gemma 3, whose layer multiplies what it looks up
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)


def _sum(parts: Sequence[tuple[Rows, float]], base: Any) -> Rows | None:
    if not parts:
        return None
    ids = torch.cat([rows.ids for rows, _ in parts]).unique()
    own = base(ids)
    total = own.to(torch.float32, copy=True)
    for rows, weight in parts:
        places = torch.searchsorted(ids, rows.ids)
        total[places] += weight * (rows.vectors.float() - own[places].float())
    return Rows(ids, total.to(own.dtype))


def look_up(vectors: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> None:
    """Put an adapter's rows in the place of the base's `vectors` (n, hidden) of `tokens` (n,)."""
    places = torch.searchsorted(rows.ids, tokens).clamp_(max=len(rows.ids) - 1)
    found = rows.ids[places] == tokens
    torch.where(found[:, None], rows.vectors[places], vectors, out=vectors)


def make_logits(logits: torch.Tensor, states: torch.Tensor, rows: Rows) -> None:
    """Put the logits that an adapter's rows make of `states` (n, hidden) into `logits` (n, vocabulary)."""
    logits.index_copy_(-1, rows.ids, states @ rows.vectors.T)
