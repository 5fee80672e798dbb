"""The searches on known bowls: what they find, that a seed decides all, groups, methods, budgets and the front."""

import math
from collections.abc import Callable
from contextlib import suppress

import pytest

from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.tuning import Scored, Tuning
from adapterhub_local.tune.candidate import Candidate, Space
from adapterhub_local.tune.front import front
from adapterhub_local.tune.pattern import by_pattern
from adapterhub_local.tune.sampled import by_sampler
from adapterhub_local.tune.scorer import Spent


class Bowl:
    """A scorer without a model: values of a candidate by a function, `evaluations` of them."""

    def __init__(self, value: Callable[[Candidate], tuple[float, ...] | None], evaluations: int) -> None:
        self.value, self.evaluations = value, evaluations
        self.asked: dict[str, tuple[float, ...] | None] = {}
        self.candidates: list[Candidate] = []
        self.repeats = 0

    @property
    def share(self) -> float:
        return len(self.asked) / self.evaluations

    def __call__(self, candidate: Candidate) -> tuple[float, ...] | None:
        if candidate.key not in self.asked:
            if len(self.asked) == self.evaluations:
                raise Spent
            self.candidates.append(candidate)
            self.asked[candidate.key] = self.value(candidate)
        else:
            self.repeats += 1
            if self.repeats > 200:
                raise Spent
        return self.asked[candidate.key]

    @property
    def best(self) -> float:
        return min(sum(values) for values in self.asked.values() if values is not None)


def run(value: Callable, evaluations: int, search: str, space: Space, **settings: object) -> Bowl:
    """Search to the end of the budget, or of the search."""
    bowl = Bowl(value, evaluations)
    data = {"a": None, "b": None}
    tuning = Tuning(Scored(data), search=search, evaluations=evaluations, **settings)  # type: ignore[arg-type]
    with suppress(Spent):
        by_pattern(space, bowl) if search == "pattern" else by_sampler(space, bowl, tuning)
    return bowl


def plain(candidate: Candidate) -> tuple[float]:
    """Lowest at 0.7, 0.3, with the value 0."""
    one, two = (weight if isinstance(weight, float) else sum(weight) / len(weight) for weight in candidate.weights)
    return ((one - 0.7) ** 2 + (two - 0.3) ** 2 + (one - 0.7) * (two - 0.3),)


TWO = Space((1.0, 1.0), Formula(), 0.0, 1.5, 1, ("weighted_sum",))


@pytest.mark.parametrize(("search", "near"), [("pattern", 1e-3), ("gp", 1e-3), ("tpe", 0.05), ("cmaes", 0.05)])
def test_every_search_comes_near_the_lowest_point(search: str, near: float) -> None:
    """From the plan's own weights, in the bounds, within the budget; the same seed asks the same, another does not."""
    found = run(plain, 30, search, TWO)
    assert found.best < near < plain(found.candidates[0])[0]
    assert found.candidates[0].weights == (1.0, 1.0)
    assert len(found.candidates) <= 30
    assert all(0 <= weight <= 1.5 for candidate in found.candidates for weight in candidate.weights)
    assert run(plain, 30, search, TWO).candidates == found.candidates
    other = run(plain, 30, search, TWO, seed=1).candidates
    assert (other == found.candidates) is (search == "pattern")


@pytest.mark.parametrize("search", ["pattern", "gp", "tpe", "cmaes"])
def test_groups_of_layers_are_searched_after_one_weight_for_all(search: str) -> None:
    """Equal weights first, then each its own, and what only those reach is found."""

    def split(candidate: Candidate) -> tuple[float]:
        first, second = candidate.weights[0], candidate.weights[1]
        assert isinstance(first, tuple)
        assert isinstance(second, tuple)
        return ((first[0] - 0.9) ** 2 + (first[1] - 0.4) ** 2 + (second[0] - 0.5) ** 2 + (second[1] - 0.5) ** 2,)

    space = Space((1.0, 1.0), Formula(), 0.0, 1.5, 2, ("weighted_sum",))
    found = run(split, 40, search, space)
    tied = [all(len(set(weight)) == 1 for weight in candidate.weights) for candidate in found.candidates]
    assert all(tied[:16])
    assert not all(tied[16:])
    assert found.best < 0.125  # the least that equal weights can have


@pytest.mark.parametrize("search", ["gp", "tpe"])
def test_the_method_is_chosen_with_its_density(search: str) -> None:
    """The one with the lowest values, at a density near the best; what cannot be merged does no harm."""

    def by_method(candidate: Candidate) -> tuple[float] | None:
        if candidate.method == "slerp":
            return None
        density = dict(candidate.given).get("density")
        assert (density is None) is (candidate.method == "weighted_sum")
        return (plain(candidate)[0] + (0.5 if density is None else abs(density - 0.6)),)

    space = Space((1.0, 1.0), Formula(), 0.0, 1.5, 1, ("weighted_sum", "ties", "slerp"))
    found = run(by_method, 40, search, space)
    best = min((c for c in found.candidates if by_method(c)), key=lambda c: by_method(c) or (math.inf,))
    assert (found.candidates[0].method, best.method) == ("weighted_sum", "ties")
    assert dict(best.given)["density"] == pytest.approx(0.6, abs=0.25)


@pytest.mark.parametrize("search", ["gp", "tpe"])
def test_a_front_reaches_what_is_best_for_each_task(search: str) -> None:
    """Two tasks that want other weights: the front has points near both, and none is beaten by another."""

    def tasks(candidate: Candidate) -> tuple[float, float]:
        one, two = candidate.weights
        assert isinstance(one, float)
        assert isinstance(two, float)
        return ((one - 1) ** 2 + two**2, one**2 + (two - 1) ** 2)

    found = run(tasks, 24, search, TWO, pareto=True)
    values = [found.asked[candidate.key] for candidate in found.candidates]
    kept = front(found.candidates, values)  # type: ignore[arg-type]
    told = [tasks(candidate) for candidate in kept]
    assert min(first for first, _ in told) < 0.2
    assert min(second for _, second in told) < 0.2
    assert not any(a[0] <= b[0] and a[1] <= b[1] for a in told for b in told if a != b)


def test_the_front_is_what_nothing_beats() -> None:
    """Of equal ones the first; one task has one best."""
    values = [(1, 5), (2, 2), (2, 2), (3, 3), (5, 1), (1, 6)]
    assert front(list("abcdef"), values) == ["a", "b", "e"]
    assert front(list("abc"), [(2,), (1,), (1,)]) == ["b"]
    assert front([], []) == []
