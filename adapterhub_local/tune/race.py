"""Early stopping: a candidate is scored part by part, and given up once it is clearly worse than one scored whole.

Both are compared on the same examples, so the difference is known far better than either score: the examples that are
hard are hard for both. Pure functions; what is compared are losses and hits of single examples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST = 8  # examples of a task in the first part: of fewer nothing is clear
CLEAR = 2.0  # standard errors, one-sided: of equals one in forty is given up by chance
TIE = 1e-6  # of the loss, beside a share of wrong answers: decides between equals only


@dataclass(frozen=True)
class Answers:
    """Of each task's examples, in order, the loss (nats, summed over answer tokens) and whether the answer is exact.

    None for an example that was not scored.
    """

    losses: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    hits: Mapping[str, tuple[bool | None, ...]] = field(default_factory=dict)

    def has(self, part: Mapping[str, Sequence[int]]) -> bool:
        """Whether these examples of each task are scored."""
        return all(
            task in self.losses and all(self.losses[task][index] is not None for index in indices)
            for task, indices in part.items()
        )


Labels = Mapping[str, Sequence[int]]  # answer tokens of each example, by task
Part = Mapping[str, Sequence[int]]  # numbers of examples, by task


def parts(counts: Mapping[str, int], *, early: bool) -> list[Part]:
    """A quarter of the examples of each task, another quarter, and the rest; all at once if they are too few.

    Each part is spread over the file, whatever order that has.
    """
    if not early or min(counts.values()) < 4 * LEAST:
        return [{task: range(count) for task, count in counts.items()}]
    return [
        {task: range(start, count, step) for task, count in counts.items()} for start, step in ((0, 4), (2, 4), (1, 2))
    ]


def together(parts: Sequence[Part]) -> Part:
    """The examples of several parts."""
    return {task: sorted(index for part in parts for index in part[task]) for task in parts[0]}


def value(answers: Answers, labels: Labels, metric: str, task: str, part: Part) -> float:
    """What is made small, on a part of a task: loss a token, or the share of wrong answers and a trifle of the loss."""
    total, tokens = 0.0, 0
    for index in part[task]:
        total += answers.losses[task][index] or 0.0
        tokens += labels[task][index]
    if metric == "loss":
        return total / tokens
    wrong = sum(not answers.hits[task][index] for index in part[task])
    return wrong / len(part[task]) + TIE * total / tokens


def difference(
    answers: Answers, other: Answers, labels: Labels, metric: str, task: str, part: Part, count: int
) -> tuple[float, float]:
    """How much worse `answers` are than `other` on a part of a task, and the standard error of that for all `count`.

    The error of a ratio of sums, with the correction for a finite population: nothing is left to chance once all
    examples are in the part.
    """
    worse = value(answers, labels, metric, task, part) - value(other, labels, metric, task, part)
    deviations, tokens = [], 0
    for index in part[task]:
        if metric == "loss":
            size = labels[task][index]
            gap = (answers.losses[task][index] or 0.0) - (other.losses[task][index] or 0.0)
        else:
            size, gap = 1, float(bool(other.hits[task][index])) - float(bool(answers.hits[task][index]))
        deviations.append(gap - worse * size)
        tokens += size
    num = len(deviations)
    spread = math.fsum(deviation**2 for deviation in deviations) * num / max(num - 1, 1) * (1 - num / count)
    return worse, math.sqrt(max(0.0, spread)) / tokens


def forecast(
    answers: Answers, whole: Sequence[Answers], labels: Labels, metric: str, part: Part, *, each: bool
) -> dict[str, float] | None:
    """What a candidate that is clearly worse than one of `whole` will come to, by task; None if it is not.

    Worse in the mean over tasks, or with `each` in every one of them.
    """
    for other in whole:
        gaps = {task: difference(answers, other, labels, metric, task, part, len(labels[task])) for task in part}
        gap = sum(worse for worse, _ in gaps.values())
        error = math.sqrt(sum(error**2 for _, error in gaps.values()))
        is_clear = all(worse > CLEAR * error for worse, error in gaps.values()) if each else gap > CLEAR * error
        if is_clear and gap > 0:
            every = {task: range(len(labels[task])) for task in part}
            return {task: value(other, labels, metric, task, every) + worse for task, (worse, _) in gaps.items()}
    return None
