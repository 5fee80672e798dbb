"""Hooke and Jeeves' pattern search of weights (https://doi.org/10.1145/321062.321069). Nothing is random."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from adapterhub_local.tune.candidate import DIGITS, TIED, Space
from adapterhub_local.tune.scorer import Score

Weights = tuple[float, ...]
STEP, SMALLEST = 0.25, 0.02  # of a weight: the first step of the search, and the last


class _Enough(Exception):
    """The part of the budget for one weight in all layers is used."""


def by_pattern(space: Space, score: Score) -> None:
    """Score candidates from the weights of the plan until the step is too small, or `score` raises Spent.

    Where groups of layers have weights of their own, equal ones are searched first.
    """
    start: Sequence[float] = space.flat(space.start)
    if space.is_split:
        start = space.flat(_tied(space, score))
    search(lambda weights: _value(score(space.candidate(weights))), start, space.low, space.high)


def _tied(space: Space, score: Score) -> Weights:
    """The best of one weight in all layers."""
    best = (math.inf, tuple(space.tied().flat(space.start)))

    def value(weights: Weights) -> float:
        nonlocal best
        if score.share >= TIED:
            raise _Enough
        found = _value(score(space.candidate(space.flat(weights))))
        best = min(best, (found, weights))
        return found

    with suppress(_Enough):
        search(value, best[1], space.low, space.high)
    return best[1]


def _value(values: tuple[float, ...] | None) -> float:
    return math.inf if values is None else sum(values)


def search(value: Callable[[Weights], float], start: Sequence[float], low: float, high: float) -> Weights:
    """The lowest point that was met in the box [low, high]^n.

    Each coordinate is tried a step up and down; a round that improved is repeated as a whole in its direction;
    a round that did not halves the step. It ends with a step below 0.02, or by what `value` raises.
    """
    seen: dict[Weights, float] = {}

    def at(point: Sequence[float]) -> float:
        rounded = tuple(round(min(high, max(low, weight)), DIGITS) for weight in point)
        if rounded not in seen:
            seen[rounded] = value(rounded)
        return seen[rounded]

    def explore(point: list[float], step: float) -> list[float]:
        for index in range(len(point)):
            for move in (step, -step):
                tried = [*point]
                tried[index] = min(high, max(low, tried[index] + move))
                if at(tried) < at(point):
                    point = tried
                    break
        return point

    point, step = [min(high, max(low, weight)) for weight in start], STEP
    at(point)
    while step >= SMALLEST:
        better = explore(point, step)
        if at(better) >= at(point):
            step /= 2
            continue
        while at(better) < at(point):
            ahead = [2 * now - before for now, before in zip(better, point, strict=True)]
            point, better = better, explore([min(high, max(low, weight)) for weight in ahead], step)
    return min(seen, key=lambda weights: seen[weights])
