"""How many singular values a merge keeps: one rank for all modules, or a budget spread over them."""

import math
from collections.abc import Mapping, Sequence

import torch

from adapterhub_local.errors import InputError
from adapterhub_local.merge.rank_rule import RankRule

NOTHING = 1.2e-7  # singular values below this share of the largest are float32 rounding


def check_kept(rule: RankRule, lost: float, total: float, rank: int) -> None:
    """Raises InputError if, at the largest rank there is, more of the squared norm `total` is lost than allowed."""
    allowed = {"energy": 1 - rule.value, "max_error": rule.value**2, "lossless": 0.0}.get(rule.kind, math.inf)
    if lost > (allowed + 1e-5) * total:
        raise InputError(
            f"{rule} cannot be reached: rank {rank}, the largest stored, keeps {1 - lost / total:.2%} of energy "
            f"(error {math.sqrt(lost / total):.3f}). Ask for less, or merge in core space, which loses nothing"
        )


def uniform_rank(rule: RankRule, values: Sequence[torch.Tensor], totals: Sequence[float]) -> int:
    """The least rank that, given to every module, keeps what `rule` demands over all modules together.

    `values` are each module's singular values, falling; `totals` the squared norms.
    """
    longest = max(len(one) for one in values)
    if rule.kind == "rank":
        return min(int(rule.value), longest)
    if rule.kind == "lossless":
        return max(numerical(one) for one in values)
    kept = torch.zeros(longest + 1, dtype=torch.float64)
    for one in values:
        kept[1 : len(one) + 1] += one.double().square()
    for rank, energy in enumerate(kept.cumsum(0).tolist()):
        if rank and energy >= _wanted(rule, sum(totals)):
            return rank
    return longest


def pooled_ranks(
    rule: RankRule, values: Mapping[str, torch.Tensor], totals: Sequence[float], costs: Mapping[str, int]
) -> dict[str, int]:
    """A rank for each module, by pooling the singular values of all: what keeps most energy a parameter is kept.

    `costs` are in + out features, the parameters of one rank. `rank k` is a budget: as many parameters as
    rank k in every module would take. Each module keeps rank 1 at least.
    """
    if rule.kind == "lossless":
        return {module: numerical(one) for module, one in values.items()}
    ranks = dict.fromkeys(values, 1)
    pool = [
        (-float(square) / costs[module], module, index, float(square))
        for module, one in values.items()
        for index, square in enumerate(one.double().square().tolist())
    ]
    energy = sum(square for _, _, index, square in pool if index == 0)
    budget = sum(int(rule.value) * costs[module] for module in values) if rule.kind == "rank" else math.inf
    spent = sum(costs.values())
    for _, module, index, square in sorted(entry for entry in pool if entry[2] > 0):
        if rule.kind != "rank" and energy >= _wanted(rule, sum(totals)):
            break
        if index != ranks[module] or spent + costs[module] > budget:
            continue  # a module keeps the first of its values, without gaps
        ranks[module] += 1
        energy += square
        spent += costs[module]
    return ranks


def numerical(values: torch.Tensor) -> int:
    """How many singular values are more than rounding; at least 1, for the format has no rank 0."""
    return max(1, int((values > NOTHING * values[0]).sum()))


def _wanted(rule: RankRule, total: float) -> float:
    share = rule.value if rule.kind == "energy" else 1 - rule.value**2
    return share * total * (1 - 1e-12)  # the sum of squares is rounded too
