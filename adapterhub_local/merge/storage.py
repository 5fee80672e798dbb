"""What is stored of a merge: the rank of each module and the dtype, known from the plan or chosen by what is lost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from adapterhub_local.merge.combine import Combined, rounding_loss
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.rank import check_kept, pooled_ranks, uniform_rank
from adapterhub_local.merge.threads import in_order

FINE = 1e-3  # float16 rounds to 3e-4 where its range is wide enough
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """What is stored: the rank of each module, the rank it is padded to, and the dtype."""

    ranks: Mapping[str, int]
    padded: Mapping[str, int]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return max(self.padded.values())


def known_layout(plan: MergePlan, limit: int | None) -> Layout | None:
    """The layout, if it follows from the plan."""
    dtype = _known_dtype(plan)
    if dtype is None:
        return None
    if limit is not None:
        rank = min(limit, plan.largest_rank)
        return Layout(dict.fromkeys(plan.shapes, rank), dict.fromkeys(plan.shapes, rank), dtype)
    if plan.formula.rule.kind == "exact" and plan.formula.row.linear is not None:
        own = {module: shape.rank for module, shape in plan.shapes.items()}
        return Layout(own, own if plan.formula.compact else dict.fromkeys(own, plan.rank), dtype)
    return None


def _known_dtype(plan: MergePlan) -> torch.dtype | None:
    """float32 for what is exact, or where a parent is wider than 16 bits; None if it is to be measured."""
    if plan.formula.dtype != "auto":
        dtype: torch.dtype = getattr(torch, plan.formula.dtype)
        return dtype
    is_exact = plan.formula.rule.kind in ("exact", "lossless") and plan.formula.space != "full"
    if is_exact or any(parent.adapter.dtype not in NARROW for parent in plan.parents):
        return torch.float32
    return None


def choose_layout(plan: MergePlan, combined: list[Combined], limit: int | None) -> Layout:
    """The layout by the plan's rule, from what the merged modules would lose. Raises what `check_kept` does."""
    rule, compact = plan.formula.rule, plan.formula.compact
    if rule.kind == "exact" and limit is None:
        ranks = {one.module: one.width for one in combined}
    else:
        values = {one.module: one.spectrum.values for one in combined if one.spectrum is not None}
        totals = [one.total for one in combined]
        costs = {module: shape.in_features + shape.out_features for module, shape in plan.shapes.items()}
        if compact:
            ranks = pooled_ranks(rule, values, totals, costs)
        else:
            ranks = dict.fromkeys(values, limit or uniform_rank(rule, list(values.values()), totals))
    widest = max(min(ranks[one.module], one.width) for one in combined)
    own = {one.module: min(ranks[one.module], one.width) for one in combined}
    padded = own if compact else dict.fromkeys(own, widest)
    lost = sum(one.spectrum.lost(own[one.module]) for one in combined if one.spectrum is not None)
    check_kept(rule, lost, sum(one.total for one in combined), max(own.values()))
    dtype = _known_dtype(plan) or _measured_dtype(combined, own)
    return Layout(own, padded, dtype)


def _measured_dtype(combined: list[Combined], ranks: Mapping[str, int]) -> torch.dtype:
    """float16 if its rounding is as small as it can be, else the 16-bit dtype that rounds less."""
    total = sum(one.total for one in combined)
    losses = {}
    for dtype in NARROW:
        work = partial(_loss, ranks=ranks, dtype=dtype)
        losses[dtype] = sum(in_order(work, combined))
        if losses[dtype] <= FINE**2 * total:
            return dtype
    best = min(losses, key=lambda dtype: losses[dtype])
    return best if math.isfinite(losses[best]) else torch.float32


def _loss(one: Combined, ranks: Mapping[str, int], dtype: torch.dtype) -> float:
    return rounding_loss(one, ranks[one.module], dtype)
