"""RankRule: how much of a merge is kept, as a user writes it. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

from adapterhub_local.errors import InputError
from adapterhub_local.sizes import parse_size


@dataclass(frozen=True)
class RankRule:
    """What decides the rank: `exact` and `lossless` lose nothing, the others up to `value`.

    `auto` is exact up to the largest rank that a server takes, and that rank above; `size` is as much as fits in so
    many bytes. Both become one of the others once the adapters are known: `merge.plan`.
    """

    kind: Literal["auto", "exact", "lossless", "rank", "energy", "max_error", "size"] = "exact"
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("auto", "exact", "lossless") else f"{self.kind} {self.value:g}"


def parse_rule(
    rank: str | int | None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: str | int | None = None,
) -> RankRule:
    """The rule that `--rank`, `--energy`, `--max-error` and `--max-size` spell; `auto` without. Raises InputError."""
    options = {"rank": rank, "energy": energy, "max_error": max_error, "max_size": max_size}
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
    if max_size is not None:
        size = parse_size(str(max_size))
        if size == 0:
            raise InputError("max_size is 0: give the bytes that the weights may take, such as 50MB")
        return RankRule("size", size)
    if rank is None or rank in ("auto", "exact", "lossless"):
        return RankRule(rank or "auto")  # type: ignore[arg-type]
    if isinstance(rank, bool) or not re.fullmatch("[0-9]{1,6}", str(rank)) or int(rank) == 0:
        raise InputError(f"rank is {str(rank)[:40]!r}: give a whole number from 1, 'lossless', 'exact' or 'auto'")
    return RankRule("rank", int(rank))
