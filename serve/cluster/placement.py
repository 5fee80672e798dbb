"""Placement: which replicas are asked for a content, and in which order.

The first of them are decided by names alone, so that every gateway decides alike, without a state. Of the others a few
are drawn: whoever asks them all, as Ray does for the length of each one's queue, asks a thousand for one request.
"""

import hashlib
import heapq
import random
from collections import OrderedDict
from collections.abc import Collection, Sequence

FIRST = 3  # replicas that are tried one after the other
CLOSE = 5  # those after them, of which the least busy answers: a content that is asked for much stays on these eight
DRAWN = 8  # of all others as many are drawn at a time; the least busy of a few is nearly the least busy of all
SPARE = 8  # how many of those to avoid leave the others' places as they are
REMEMBERED = 1 << 16  # contents whose order is known without hashing anew; half a kilobyte each


def ranked(affinity: str, replicas: Collection[str], most: int | None = None) -> list[str]:
    """The replicas in the order in which this one content prefers them (rendezvous hashing), at most so many.

    When a replica comes or goes, only what it is first for moves. D. Thaler, C. Ravishankar: Using name-based mappings
    to increase hit rates, 1998.
    """
    common = hashlib.sha256(f"{affinity}\0".encode())

    def weight(name: str) -> bytes:
        hashed = common.copy()
        hashed.update(name.encode())
        return hashed.digest()

    return heapq.nlargest(len(replicas) if most is None else most, replicas, key=weight)


class Placement:
    """Where contents go among these replicas; an order is found once for each content and remembered.

    `draw` is who draws the few of many.
    """

    def __init__(self, replicas: Collection[str], draw: random.Random | None = None) -> None:
        self.names = tuple(replicas)
        self._places = frozenset(self.names)
        self._draw = draw or random.Random()  # noqa: S311 - whoever foresees it gains nothing
        self._known: OrderedDict[str, tuple[str, ...]] = OrderedDict()  # the first of each content's order

    def tiers(self, affinity: str | None, avoid: Sequence[str] = ()) -> list[list[str]]:
        """Groups of replicas, the first preferred; within a group the least busy answers.

        What has an adapter goes to the one replica that comes first for it, and on to the next only while that one is
        full; once all of its first ones are, to the least busy of a few others. What has none goes to the least busy of
        a few. With up to DRAWN others these are all of them, else another draw may find one that is not full. Replicas
        to avoid are not among them, unless there are no others.
        """
        avoided = self._places.intersection(avoid)
        if len(avoided) == len(self._places):
            avoided = frozenset()
        first = [] if affinity is None else [name for name in self._first(affinity) if name not in avoided]
        first = first[: FIRST + CLOSE]
        groups = [*([name] for name in first[:FIRST]), first[FIRST:], self._few(avoided.union(first))]
        return [group for group in groups if group]

    def _first(self, affinity: str) -> tuple[str, ...]:
        known = self._known.get(affinity)
        if known is None:
            known = self._known[affinity] = tuple(ranked(affinity, self.names, FIRST + CLOSE + SPARE))
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return known

    def _few(self, without: Collection[str]) -> list[str]:
        """All that are left, or DRAWN of them, each as likely as any other."""
        wanted = DRAWN + len(without)
        drawn = self.names if wanted >= len(self.names) else self._draw.sample(self.names, wanted)
        left = [name for name in drawn if name not in without]
        return left if len(left) <= DRAWN else self._draw.sample(left, DRAWN)


def tiers(affinity: str | None, replicas: Collection[str], avoid: Sequence[str] = ()) -> list[list[str]]:
    """The tiers of one content among these replicas, for whoever asks once: see Placement."""
    return Placement(replicas).tiers(affinity, avoid)
