"""Placement: which replica answers a request, decided by names alone: every gateway decides alike, without a state."""

import hashlib
from collections.abc import Collection, Sequence
from typing import TypeVar

Place = TypeVar("Place")
FIRST = 3  # replicas that are tried one after the other; of the others the least busy


def ranked(affinity: str, replicas: Collection[str]) -> list[str]:
    """The replicas in the order in which this one content prefers them (rendezvous hashing).

    When a replica comes or goes, only what it is first for moves. D. Thaler, C. Ravishankar: Using name-based mappings
    to increase hit rates, 1998.
    """
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{affinity}\0{name}".encode()).digest(), reverse=True)


def tiers(affinity: str | None, replicas: Collection[str], avoid: Sequence[str] = ()) -> list[list[str]]:
    """Groups of replicas, the first preferred; within a group the least busy answers.

    What has an adapter goes to the one replica that comes first for it, and on to the next only while that one is full.
    What has none goes to the least busy. Replicas to avoid are not among them, unless there are no others.
    """
    left = [name for name in replicas if name not in avoid] or list(replicas)
    if affinity is None:
        return [left] if left else []
    order = ranked(affinity, left)
    return [[name] for name in order[:FIRST]] + ([order[FIRST:]] if order[FIRST:] else [])
