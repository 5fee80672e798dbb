"""How two adapters differ: norm and cosine of each module's delta, and of what their rows of embeddings change."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.lora.adapter import AdapterFile, Delta
from adapterhub_local.merge.algebra import inner
from adapterhub_local.merge.dora import weight_change


@dataclass(frozen=True)
class ModuleDifference:
    """Frobenius norms of one module's two deltas, None where an adapter leaves it alone, and their cosine."""

    module: str
    left: float | None
    right: float | None
    cosine: float | None


def compare_deltas(
    left: AdapterFile, right: AdapterFile, bases: tuple[BaseInfo | None, BaseInfo | None] = (None, None)
) -> Iterator[ModuleDifference]:
    """One module at a time; modules of different shapes have no cosine.

    No dense matrix is made, but where one of the two has DoRA: its change of a module's weight depends on the weight
    and is not a low-rank product, so it needs its base in `bases`, as rows of embeddings do, which are compared over
    all tokens that one of the two has. Raises Incompatible if that is not its base.
    """
    sides = [(side, BaseWeights(base) if base else None) for side, base in zip((left, right), bases, strict=True)]
    is_dense = any(side.magnitudes for side, _ in sides)

    def change(side: AdapterFile, weights: BaseWeights | None, module: str) -> Delta | torch.Tensor | None:
        if module not in side.shapes:
            return None
        return weight_change(side, module, weights.of if weights else None).float() if is_dense else side.delta(module)

    for module in sorted({*left.shapes, *right.shapes}):
        changes = [change(side, weights, module) for side, weights in sides]
        yield _difference(module, changes, _dense_inner if is_dense else inner)
    for module in sorted({*left.tokens, *right.tokens}):
        ids = sorted({each for side, _ in sides for each in (side.tokens[module].ids if module in side.tokens else ())})
        yield _difference(module, [_moved(side, weights, module, ids) for side, weights in sides], _dense_inner)


def _moved(side: AdapterFile, weights: BaseWeights | None, module: str, ids: Sequence[int]) -> torch.Tensor | None:
    """What an adapter adds to the base's rows (tokens, hidden) of `ids`; zero where it has none, None if nowhere."""
    if module not in side.tokens:
        return None
    assert weights is not None, "rows are opened with their base at hand"
    own = list(side.tokens[module].ids)
    rows = side.rows(module).float()
    moved = torch.zeros(len(ids), rows.shape[1])
    moved[torch.searchsorted(torch.tensor(ids), torch.tensor(own))] = rows - weights.of(module)[0][own]
    return moved


def _difference(module: str, changes: Sequence[Any], product: Callable[[Any, Any], float]) -> ModuleDifference:
    """Of two changes of one module's weight, None where there is none, by the inner product that they have."""
    ours, theirs = changes
    norms = [math.sqrt(max(0.0, product(one, one))) if one is not None else None for one in changes]
    cosine = None
    if ours is not None and theirs is not None and norms[0] and norms[1] and _shape(ours) == _shape(theirs):
        cosine = max(-1.0, min(1.0, product(ours, theirs) / (norms[0] * norms[1])))
    return ModuleDifference(module, norms[0], norms[1], cosine)


def _dense_inner(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.vdot(left.flatten(), right.flatten()))


def _shape(change: Delta | torch.Tensor) -> tuple[int, ...]:
    return tuple(change.shape) if isinstance(change, torch.Tensor) else (change.B.shape[0], change.A.shape[1])
