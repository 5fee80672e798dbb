"""How many singular values a merge keeps: one rank for all modules, or a budget spread over them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adapterhub_local.errors import InputError

NOTHING = 1.2e-7  # singular values below this share of the largest are float32 rounding


@dataclass(frozen=True)
class RankRule:
    """What decides the rank: `exact` and `lossless` lose nothing, the others up to `value`."""

    kind: Literal["exact", "lossless", "rank", "energy", "max_error"] = "exact"
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("exact", "lossless") else f"{self.kind} {self.value:g}"


def parse_rule(rank: str | int | None, energy: float | None = None, max_error: float | None = None) -> RankRule:
    """The rule that `--rank`, `--energy` and `--max-error` spell. Raises InputError."""
    options = {"rank": rank, "energy": energy, "max_error": max_error}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other: give one")
    if energy is not None:
        if not 0 < energy <= 1:
            raise InputError(f"energy is {energy}: give the share of the squared norm to keep, above 0 and up to 1")
        return RankRule("energy", energy)
    if max_error is not None:
        if not 0 <= max_error < 1:
            raise InputError(f"max_error is {max_error}: give a relative error from 0 up to, not including, 1")
        return RankRule("max_error", max_error)
    if rank is None or rank in ("exact", "lossless"):
        return RankRule(rank or "exact")  # type: ignore[arg-type]
    if isinstance(rank, bool) or not re.fullmatch("[0-9]{1,6}", str(rank)) or int(rank) == 0:
        raise InputError(f"rank is {str(rank)[:40]!r}: give a whole number from 1, 'lossless' or 'exact'")
    return RankRule("rank", int(rank))


def check_kept(rule: RankRule, lost: float, total: float, rank: int) -> None:
    """Raises InputError if, at the largest rank there is, more of the squared norm `total` is lost than allowed."""
    allowed = {"energy": 1 - rule.value, "max_error": rule.value**2, "lossless": 0.0}.get(rule.kind, math.inf)
    if lost > (allowed + 1e-5) * total:
        raise InputError(
            f"{rule} cannot be had: rank {rank}, the largest that is stored, keeps {1 - lost / total:.2%} of energy "
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
