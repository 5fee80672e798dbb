"""Early stopping: what is given up is clearly worse on the same examples, and what it comes to is foretold."""

import random
from collections.abc import Sequence

import pytest

from adapterhub_local.tune.race import Answers, difference, forecast, parts, together, value

COUNTS = {"a": 40, "b": 64}
LABELS = {task: [1 + index % 3 for index in range(count)] for task, count in COUNTS.items()}
EVERY = {task: range(count) for task, count in COUNTS.items()}


def answers(seed: int = 0, worse: float = 0.0, tasks: Sequence[str] = ("a", "b")) -> Answers:
    """Examples of very different losses, the same for every seed, with a little noise, and `worse` on some tasks."""
    hard, noise = random.Random(7), random.Random(seed)
    losses = {
        task: tuple(
            hard.expovariate(0.2) + noise.gauss(0, 0.05) + (worse if task in tasks else 0) for _ in range(count)
        )
        for task, count in COUNTS.items()
    }
    return Answers(losses, {task: tuple(loss < 3 for loss in losses[task]) for task in losses})


def test_the_parts_are_all_examples_once() -> None:
    """A quarter, a half, all, of every task, spread over the file; too few are one part."""
    three = parts(COUNTS, early=True)
    assert [len(part["a"]) for part in three] == [10, 10, 20]
    assert together(three) == {task: list(range(count)) for task, count in COUNTS.items()}
    assert [dict(part) for part in parts(COUNTS, early=False)] == [EVERY]
    assert len(parts({"a": 31, "b": 500}, early=True)) == 1


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_what_is_worse_on_the_same_examples_is_given_up(metric: str) -> None:
    """A small difference shows though losses differ by far more; the forecast is near what it really comes to."""
    part, best = parts(COUNTS, early=True)[0], answers()
    worse = answers(1, 0.5 if metric == "loss" else 4.0)
    told = forecast(worse, [best], LABELS, metric, part, each=False)
    assert told is not None
    for task in COUNTS:
        assert told[task] > value(best, LABELS, metric, task, EVERY)
        near = 0.05 if metric == "loss" else 0.3
        assert told[task] == pytest.approx(value(worse, LABELS, metric, task, EVERY), abs=near)


def test_equals_and_betters_are_scored_whole() -> None:
    """Of candidates that differ by chance few are given up, of better ones none; without a rival nothing is."""
    part, best = parts(COUNTS, early=True)[0], answers()
    given_up = [forecast(answers(seed), [best], LABELS, "loss", part, each=False) for seed in range(1, 101)]
    assert sum(told is not None for told in given_up) <= 10
    assert forecast(best, [best], LABELS, "loss", part, each=False) is None
    assert forecast(answers(1, -0.5), [best], LABELS, "loss", part, each=False) is None
    assert forecast(answers(1, 9.0), [], LABELS, "loss", part, each=False) is None


def test_for_a_front_it_has_to_be_worse_in_every_task() -> None:
    """Worse in one task and equal in another may be on the front; worse in both than one of it is not."""
    part, rivals = parts(COUNTS, early=True)[0], [answers(1, -3.0, "a"), answers()]
    half = answers(2, 0.5, "a")
    assert forecast(half, rivals, LABELS, "loss", part, each=False) is not None
    assert forecast(half, rivals, LABELS, "loss", part, each=True) is None
    told = forecast(answers(2, 0.5), rivals, LABELS, "loss", part, each=True)
    assert told is not None
    assert told["b"] == pytest.approx(value(answers(2, 0.5), LABELS, "loss", "b", EVERY), abs=0.1)


def test_of_all_examples_nothing_is_left_to_chance() -> None:
    """The standard error of a difference on all examples is zero, and that on a part is about what is seen."""
    one, two = answers(1), answers(2)
    assert difference(one, two, LABELS, "loss", "a", EVERY, COUNTS["a"])[1] == 0
    truth = difference(one, two, LABELS, "loss", "a", EVERY, COUNTS["a"])[0]
    within = 0
    for start in range(4):
        part = {"a": range(start, COUNTS["a"], 4)}
        told, error = difference(one, two, LABELS, "loss", "a", part, COUNTS["a"])
        within += abs(told - truth) < 2.5 * error
    assert within >= 3
