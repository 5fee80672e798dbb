"""A base's tensors with an adapter in them, one at a time: what every fused format writes.

The weights are those that were trained: the NF4 base dequantised, plus the delta (or what DoRA makes of both), and the
adapter's own rows of embeddings in the place of the base's.
"""

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import check_shapes
from adapterhub_local.base.source import Source, check_finite
from adapterhub_local.base.vocabulary import Vocabulary, fit_rows
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.merge.dora import weight_change


class Fusion:
    """`base` with `adapter` added (or alone); `onto` is a 16-bit model to add to instead of the dequantised base.

    Tensors that share one weight are one name, until the adapter changes one of them: then each has its own, as an
    output head that was tied to the embeddings and is adapted, but for rows that both have. Raises Incompatible if the
    adapter's modules are not the base's, or `onto` is another model.
    """

    def __init__(self, base: BaseInfo, adapter: AdapterFile | None, onto: Source | None = None) -> None:
        if adapter is not None:
            check_shapes(adapter, base)
        self._rows: dict[str, str] = {}  # name of a tensor -> the module whose rows the adapter has for it
        if adapter is not None and adapter.tokens:
            vocabulary = Vocabulary.of_base(base)
            adapter = fit_rows(adapter, vocabulary, base.name)
            self._rows = {f"{module}.weight": module for module in adapter.tokens}
        self.base, self.adapter = base, adapter
        self._weights = BaseWeights(base)
        if onto is not None and (missing := sorted(set(self._weights.names) - onto.names)):
            raise Incompatible(
                f"the model to add to has no {missing[0]}: it is not what base '{base.name}' was made from"
            )
        self._read = (onto or self._weights).read
        self._changed = {f"{module}.weight" for module in adapter.shapes} if adapter else set()
        self._met: set[str] = set()
        tied = self._weights.tied if self._changed else {}
        # rows of embeddings that a tied head has as well are in the one tensor; of a head apart from them, in another
        apart = self._changed | (self._rows.keys() & tied.keys())
        self._shares = {name: other for name, other in tied.items() if {name, other} & apart}
        self._changed |= self._rows.keys()

    @property
    def names(self) -> list[str]:
        """The tensors to write."""
        return [*self._weights.names, *self._shares]

    @property
    def unties(self) -> bool:
        """Whether a weight that the base shares has to be written twice: its config must not tie the two again."""
        return bool(self._shares)

    def read(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tensor as it is stored, or in float32 if the adapter changes it, and that change (None if it does not).
        Rows that the adapter has are put into what is stored, and are no change to add.

        `dtype` is the base's 16-bit one, in which DoRA took its norms.
        """
        weight = self._read(self._shares.get(name, name))
        check_finite(name, weight, "the model")
        if self.adapter is None or name not in self._changed:
            return weight, None
        if name in self._rows:
            self._met.add(name)
            rows = self.adapter.tokens[self._rows[name]]
            return weight.index_copy(0, torch.tensor(rows.ids), self.adapter.rows(self._rows[name]).to(weight)), None
        module = name.removesuffix(".weight")
        shape = self.adapter.shapes[module]
        if weight.shape != (shape.out_features, shape.in_features):
            there = f"({shape.out_features}, {shape.in_features})"
            raise Incompatible(f"{name} is {tuple(weight.shape)} there, in base '{self.base.name}' {there}")
        change = weight_change(self.adapter, module, lambda module: (weight.float(), dtype))
        self._met.add(name)
        return weight.to(change.dtype) + change, change

    def check_complete(self) -> None:
        """Raises Incompatible if a module of the adapter has not been read: nothing of it may be left out."""
        if missing := sorted(self._changed - self._met):
            raise Incompatible(
                f"{missing[0]} (and {len(missing) - 1} more) of the adapter has no place in what is written from base "
                f"'{self.base.name}': without it the model would not be base and adapter"
            )
