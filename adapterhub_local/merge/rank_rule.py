"""RankRule: how much of a merge is kept, as a user writes it. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

from adapterhub_local.errors import InputError


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
