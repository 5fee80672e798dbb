"""One module of a merge: its deltas become one by the formula, and that one is stored with its loss measured."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import (
    Spectrum,
    decompose,
    distance,
    gram,
    is_finite,
    norm,
    pad_rank,
    rounding,
    weighted_sum,
    widen,
)
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.space import merge_aligned, merge_in_core, merge_whole

LARGEST_RANK = 512  # of a whole merged matrix; no server takes more


@dataclass(frozen=True)
class Term:
    """One parent's part in a module: its place among the plan's parents, the digest of its file, its delta."""

    index: int
    digest: str
    delta: Delta


@dataclass(frozen=True)
class Combined:
    """The merged delta of one module, before a rank is chosen.

    Either `exact`, the factors to keep all of, or `spectrum`, to be reduced, with `gap` the measured squared
    distance between what the method gives and all that the spectrum has. `products` are the inner products of
    the parents, zero for those without the module.
    """

    module: str
    products: torch.Tensor
    total: float
    exact: Delta | None
    spectrum: Spectrum | None
    gap: float = 0.0

    @property
    def width(self) -> int:
        """The largest rank that can be kept."""
        if self.spectrum is not None:
            return self.spectrum.U.shape[1]
        assert self.exact is not None, "there are factors or a spectrum"
        return self.exact.rank


@dataclass(frozen=True)
class Stored:
    """What is written for one module, and squared Frobenius norms of what was lost on the way."""

    module: str
    delta: Delta
    rank: int
    total: float
    truncated: float  # predicted from the singular values
    rounded: float
    error: float  # measured, both together
    products: torch.Tensor


def combine(
    module: str, terms: Sequence[Term], weights: Sequence[float], formula: Formula, rank: int | None
) -> Combined:
    """Merge one module. With `rank`, no more singular vectors than that are made.

    `weights` are those of all parents of the plan. Raises InputError if the sum overflows.
    """
    deltas = [term.delta for term in terms]
    index = torch.tensor([term.index for term in terms])
    products = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    wide = [widen(delta) for delta in deltas]
    products[index[:, None], index] = gram(wide)
    row, parameters = formula.row, formula.parameters
    if row.linear is not None:
        factors = row.linear(weights, products, parameters)
        exact = weighted_sum(wide, [factors[term.index] for term in terms])
        _check_finite(exact, module)
        total = _square(exact, products, factors)
    else:
        assert row.elementwise is not None, "a method is linear or elementwise"
        mine, entrywise = [weights[term.index] for term in terms], row.elementwise
        draws = [_draw(parameters.get("seed", 0), term.digest, module) for term in terms]

        def merge(stack: torch.Tensor) -> torch.Tensor:
            return entrywise(stack, mine, parameters, draws)

        if formula.space == "full":
            draw = _draw(parameters.get("seed", 0), "range", module)
            sizes = deltas[0].B.shape[0], deltas[0].A.shape[1]
            spectrum = merge_whole(deltas, merge, min(rank or LARGEST_RANK, *sizes), draw)
            # what is left of a whole matrix is orthogonal to the directions that are kept
            return Combined(module, products, spectrum.total, None, spectrum, spectrum.lost(spectrum.U.shape[1]))
        exact = merge_in_core(wide, merge) if formula.space == "core" else merge_aligned(wide, merge)
        _check_finite(exact, module)
        total = norm(exact) ** 2
    if formula.rule.kind == "exact":
        return Combined(module, products, total, exact, None)
    narrow = exact if formula.rule.kind == "lossless" else Delta(exact.A.float(), exact.B.float(), 1.0)
    spectrum = decompose(narrow, rank)
    gap = distance(spectrum.truncate(spectrum.U.shape[1]), exact) ** 2
    return Combined(module, products, total, None, spectrum, gap)


def store(combined: Combined, rank: int, padded: int, dtype: torch.dtype) -> Stored:
    """The module at `rank`, padded with zeros to `padded`, in `dtype`. Raises InputError if it overflows."""
    kept, truncated, cut = _keep(combined, rank), 0.0, 0.0
    if combined.spectrum is not None:
        truncated = combined.spectrum.lost(rank)
        cut = truncated - combined.spectrum.lost(combined.width)
    stored = Delta(kept.A.to(dtype), kept.B.to(dtype), 1.0)
    if not is_finite(stored):
        raise InputError(f"the merge of {combined.module} is too large for {dtype}: give smaller weights")
    rounded = rounding(stored, kept) ** 2
    error = combined.gap + cut + rounded  # the directions cut off are orthogonal to those kept
    place = pad_rank(stored, padded)
    return Stored(combined.module, place, kept.rank, combined.total, truncated, rounded, error, combined.products)


def rounding_loss(combined: Combined, rank: int, dtype: torch.dtype) -> float:
    """The squared error of storing the module at `rank` in `dtype`, infinite if it does not fit."""
    kept = _keep(combined, rank)
    stored = Delta(kept.A.to(dtype), kept.B.to(dtype), 1.0)
    return rounding(stored, kept) ** 2 if is_finite(stored) else math.inf


def _keep(combined: Combined, rank: int) -> Delta:
    if combined.spectrum is not None:
        return combined.spectrum.truncate(rank)
    assert combined.exact is not None, "there are factors or a spectrum"
    return combined.exact


def _check_finite(delta: Delta, module: str) -> None:
    if not is_finite(delta, torch.finfo(torch.float32).max):
        raise InputError(f"the merge of {module} is too large for float32: give smaller weights")


def _square(exact: Delta, products: torch.Tensor, factors: Sequence[float]) -> float:
    """|sum c_i D_i|^2 from the inner products, or from the factors where the terms nearly cancel."""
    column = torch.tensor(list(factors), dtype=torch.float64)
    square = float(column @ products @ column)
    terms = float((column.abs() * products.diagonal().clamp(min=0).sqrt()).sum()) ** 2
    if square > 1e-6 * terms:
        return square
    nothing = Delta(exact.A[:1] * 0, exact.B[:, :1] * 0, 1.0)
    return distance(exact, nothing) ** 2


def _draw(seed: int, digest: str, module: str) -> torch.Generator:
    """A generator that depends on nothing but these three, so order of modules and threads do not matter."""
    key = hashlib.sha256(f"{seed}|{digest}|{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") % 2**63)
