"""Of several tasks: what no other candidate beats in one without losing in another."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def front(found: Sequence[T], values: Sequence[Sequence[float]]) -> list[T]:
    """The candidates that no other dominates, in their order; of equal ones the first. Less is better.

    One dominates another if it is no worse in any task and better in one.
    """
    kept = []
    for number, mine in enumerate(values):
        beaten = any(
            all(one <= own for one, own in zip(other, mine, strict=True))
            and (tuple(other) != tuple(mine) or place < number)
            for place, other in enumerate(values)
            if place != number
        )
        if not beaten:
            kept.append(found[number])
    return kept
