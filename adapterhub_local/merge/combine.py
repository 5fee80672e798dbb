"""One module of a merge: its deltas become one by the formula, and that one is stored with its loss measured."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import Spectrum, decompose, distance, is_finite, pad_rank, rounding
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.space import merge_aligned, merge_in_core, merge_whole
from adapterhub_local.merge.stack import Grams, Stack, narrow

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

    Either `exact` with its Gram matrices, to keep all of, or `spectrum`, to be reduced, with `gap` the measured
    squared distance between what the method gives and all that the spectrum has. `products` are the inner
    products of the parents, zero for those without the module.
    """

    module: str
    products: torch.Tensor
    total: float
    exact: tuple[Stack, Grams] | None
    spectrum: Spectrum | None
    gap: float = 0.0

    @property
    def width(self) -> int:
        """The largest rank that can be kept."""
        if self.spectrum is not None:
            return self.spectrum.U.shape[1]
        assert self.exact is not None, "there are factors or a spectrum"
        return self.exact[0].rank


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
    row, parameters = formula.row, formula.parameters
    stack = Stack.of(deltas, [term.index for term in terms])
    # what is kept whole needs no digits for a small remainder
    grams = stack.grams(precise=formula.rule.kind != "exact" and row.linear is not None)
    products = stack.products(grams, len(weights))
    if row.linear is not None:
        exact = stack.weighted(row.linear(weights, products, parameters))
    else:
        mine, entrywise = [weights[term.index] for term in terms], row.on_entries()
        draws = [_draw(parameters.get("seed", 0), term.digest, module) for term in terms]

        def merge(matrices: torch.Tensor) -> torch.Tensor:
            return entrywise(matrices, mine, parameters, draws)

        if formula.space == "full":
            draw = _draw(parameters.get("seed", 0), "range", module)
            sizes = deltas[0].B.shape[0], deltas[0].A.shape[1]
            spectrum = merge_whole(deltas, merge, min(rank or LARGEST_RANK, *sizes), draw)
            # what is left of a whole matrix is orthogonal to the directions that are kept
            return Combined(module, products, spectrum.total, None, spectrum, spectrum.lost(spectrum.U.shape[1]))
        exact = Stack.of([merge_in_core(deltas, merge) if formula.space == "core" else merge_aligned(deltas, merge)])
        grams = exact.grams(precise=True)
    total = exact.square(grams)
    if not total < torch.finfo(torch.float32).max ** 2:  # NaN too
        raise InputError(f"the merge of {module} is too large for float32: give smaller weights")
    if formula.rule.kind == "exact":
        return Combined(module, products, total, (exact, grams), None)
    if formula.rule.kind == "lossless":  # which values are zero shows in digits that squares do not keep
        spectrum = narrow(decompose(exact.delta()))
        gap = distance(spectrum.truncate(len(spectrum.values)), exact.delta()) ** 2
    else:
        spectrum = exact.decompose(grams, rank)
        gap = exact.gap(spectrum.truncate(spectrum.U.shape[1]), grams, total)
    return Combined(module, products, total, None, spectrum, gap)


def store(combined: Combined, rank: int, padded: int, dtype: torch.dtype) -> Stored:
    """The module at `rank`, padded with zeros to `padded`, in `dtype`. Raises InputError if it overflows."""
    stored, rounded = _round(combined, rank, dtype)
    if not is_finite(stored):
        raise InputError(f"the merge of {combined.module} is too large for {dtype}: give smaller weights")
    truncated, error = 0.0, rounded
    if combined.spectrum is not None:
        truncated = combined.spectrum.lost(rank)
        # the directions cut off are orthogonal to those kept
        error += combined.gap + truncated - combined.spectrum.lost(combined.width)
    place = pad_rank(stored, padded)
    return Stored(combined.module, place, stored.rank, combined.total, truncated, rounded, error, combined.products)


def rounding_loss(combined: Combined, rank: int, dtype: torch.dtype) -> float:
    """The squared error of storing the module at `rank` in `dtype`, infinite if it does not fit."""
    stored, rounded = _round(combined, rank, dtype)
    return rounded if is_finite(stored) else math.inf


def _round(combined: Combined, rank: int, dtype: torch.dtype) -> tuple[Delta, float]:
    """The module at `rank` in `dtype`, and the squared error of rounding it."""
    if combined.spectrum is None:
        assert combined.exact is not None, "there are factors or a spectrum"
        exact, grams = combined.exact
        return exact.store(dtype, grams)
    kept = combined.spectrum.truncate(rank)
    stored = Delta(kept.A.to(dtype), kept.B.to(dtype), 1.0)
    return stored, rounding(stored, kept) ** 2


def _draw(seed: int, digest: str, module: str) -> torch.Generator:
    """A generator that depends on nothing but these three, so order of modules and threads do not matter."""
    key = hashlib.sha256(f"{seed}|{digest}|{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") % 2**63)
