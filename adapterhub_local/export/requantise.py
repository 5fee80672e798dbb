"""A fused model rounded to 4 bits again, as a new base, with how much of the adapter came through.

NF4's steps are often larger than a delta: what does not move a weight over the border to the next step is lost.
"""

from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.merge.dora import weight_change
from adapterhub_local.settings import Home


@dataclass(frozen=True)
class Loss:
    """Of the delta D and what is there instead, E = W' - W, over all adapted modules, Frobenius products and norms.

    `projection` is <E, D> / <D, D>: 1 if all of D came through, 0 if none; `relative_error` is |E - D| / |D|.
    """

    projection: float
    relative_error: float

    def __str__(self) -> str:
        return f"{self.projection:.1%} of the adapter came through, relative error {self.relative_error:.2f}"


def add_requantised(
    name: str, fused: Path, base: BaseInfo, adapter: AdapterFile, home: Home, *, source_name: str
) -> tuple[BaseInfo, Loss]:
    """Add the folder `fused` as base `name`, and measure what became of `adapter`. Raises what `add_base` raises."""
    new = add_base(name, fused, home, source_name=source_name)
    return new, measure_loss(base, new, adapter)


def measure_loss(base: BaseInfo, new: BaseInfo, adapter: AdapterFile) -> Loss:
    """How much of `adapter` is in the difference of the bases' dequantised weights."""
    before, after = BaseWeights(base), BaseWeights(new)
    inner = squares = errors = 0.0
    for module in adapter.modules:
        delta = weight_change(adapter, module, before.of).double()
        moved = after.of(module)[0].double() - before.of(module)[0].double()
        inner += float((moved * delta).sum())
        squares += float(delta.square().sum())
        errors += float((moved - delta).square().sum())
    return Loss(inner / squares, (errors / squares) ** 0.5) if squares else Loss(1.0, 0.0)
