"""Which adapters change a base in the same direction: the cosine of all their deltas, from the factors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.merge.algebra import inner
from adapterhub_local.registry import Version


@dataclass(frozen=True)
class Similar:
    """A version, and the cosine of all its deltas with those of another: 1 for the same direction."""

    version: Version
    cosine: float


def rank_by_similarity(
    version: Version, others: Sequence[Version], skipped: Callable[[Version, str], None] = lambda _one, _why: None
) -> list[Similar]:
    """`others` by the cosine of their deltas with those of `version`, the most similar first; exact, no dense matrix.

    The modules' deltas count as one long vector; a module that one of the two leaves alone is zero there. `skipped`
    is called with each version that has no deltas of its own, such as one with DoRA, and the reason. Raises BadFile if
    `version` has none, InputError if they are all zero.
    """
    ours = open_adapter(version.path)
    norm = _norm(ours)
    if not norm:
        raise InputError(f"{version} changes nothing, its deltas are zero: nothing is similar to it")
    found = []
    for other in others:
        try:
            theirs = open_adapter(other.path)
        except InputError as error:
            skipped(other, str(error).rpartition(": ")[2])
            continue
        shared = tuple(
            module
            for module, shape in ours.shapes.items()
            if module in theirs.shapes
            and (shape.in_features, shape.out_features)
            == (theirs.shapes[module].in_features, theirs.shapes[module].out_features)
        )
        pairs = zip(ours.deltas(shared), theirs.deltas(shared), strict=True)
        product = math.fsum(inner(one, two) for (_, one), (_, two) in pairs)
        size = norm * _norm(theirs)
        found.append(Similar(other, max(-1.0, min(1.0, product / size)) if size else 0.0))
    return sorted(found, key=lambda one: (-one.cosine, str(one.version)))


def _norm(adapter: AdapterFile) -> float:
    return math.sqrt(max(0.0, math.fsum(inner(delta, delta) for _, delta in adapter.deltas())))
