"""A candidate becomes a number: merged, scored part by part on the base, given up early, counted against the budget."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterhub_local.base.model import CausalModel
from adapterhub_local.durable import staging
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.evaluate import adapted
from adapterhub_local.evaluate.gate import Bench
from adapterhub_local.evaluate.metrics import Score as TaskScore
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.tuning import Tuning
from adapterhub_local.tune import log
from adapterhub_local.tune.candidate import Candidate
from adapterhub_local.tune.front import front
from adapterhub_local.tune.race import Answers, Part, forecast, parts, together, value

PlanOf = Callable[[Candidate], MergePlan]
REPEATS = 200  # proposals in a row of what was scored already: the search has nothing new


class Spent(Exception):
    """The budget is used."""


class Score(Protocol):
    """Values of a candidate, one a task for a Pareto front, else one: less is better; None if it cannot be merged.

    Raises Spent. `share` is how much of the budget is used, from 0 to 1.
    """

    def __call__(self, candidate: Candidate) -> tuple[float, ...] | None: ...

    @property
    def share(self) -> float: ...


@dataclass(frozen=True)
class Trial:
    """A candidate with its scores on what was scored of the examples; `values` are what each task comes to.

    `share` is how many of the examples were scored, from 0 to 1; where it is less than 1 the values are a forecast.
    """

    candidate: Candidate
    values: Mapping[str, float]
    scores: Mapping[str, TaskScore]
    share: float

    @property
    def is_whole(self) -> bool:
        return self.share == 1

    @property
    def objective(self) -> float:
        """The mean over tasks."""
        return sum(self.values.values()) / len(self.values)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.candidate.to_json(),
            "objective": round(self.objective, 6),
            "share": round(self.share, 4),
            "scores": {task: score.to_json() for task, score in self.scores.items()},
        }


class Scorer:
    """Scores candidates within a budget: as much as `evaluations` whole ones, and `minutes`.

    What the log has is not computed again but counts all the same, so that a search that was stopped continues as if it
    never had. `on_trial` gets every trial.
    """

    def __init__(
        self, plan_of: PlanOf, tuning: Tuning, bench: Bench, tmp: Path, path: Path, on_trial: Callable[[Trial], None]
    ) -> None:
        self.plan_of, self.tuning, self.bench, self.tmp, self.path = plan_of, tuning, bench, tmp, path
        self.on_trial = on_trial
        self.labels = {task: [test.num_labels for test in tests] for task, tests in bench.tests.items()}
        counts = {task: len(tests) for task, tests in bench.tests.items()}
        self.parts = parts(counts, early=tuning.early_stop)
        self.size = sum(counts.values())
        self.log = log.read(path, counts)
        self.trials: list[Trial] = []
        self.whole: dict[str, Answers] = {}
        self.seen: dict[str, tuple[float, ...] | None] = {}
        self.spent = 0.0  # in whole candidates
        self.repeats = 0
        self.begun = time.monotonic()

    @property
    def share(self) -> float:
        return self.spent / self.tuning.evaluations

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def best(self) -> Trial:
        """Of those scored whole, the one with the least mean."""
        return min((trial for trial in self.trials if trial.is_whole), key=lambda trial: trial.objective)

    @property
    def front(self) -> list[Trial]:
        """Of those scored whole, what no other beats in all tasks."""
        whole = [trial for trial in self.trials if trial.is_whole]
        return front(whole, [list(trial.values.values()) for trial in whole])

    def __call__(self, candidate: Candidate) -> tuple[float, ...] | None:
        if candidate.key in self.seen:
            self.repeats += 1
            if self.repeats > REPEATS:
                raise Spent
            return self.seen[candidate.key]
        self._check_budget()
        self.repeats = 0
        try:
            trial = self._score(candidate)
        except InputError:  # all zero, or what the method has no answer for
            if not self.trials:
                raise  # the plan's own: its message says what is wrong
            self.spent += 1
            self.seen[candidate.key] = None
            return None
        self.spent += trial.share
        self.trials.append(trial)
        values = tuple(trial.values.values()) if self.tuning.pareto else (trial.objective,)
        self.seen[candidate.key] = values
        self.on_trial(trial)
        return values

    def pay(self, cost: float) -> None:
        """Count what is computed beside scoring, in whole candidates. Raises Spent if not one could be scored after."""
        self._check_budget(cost)
        self.spent += cost

    def _check_budget(self, cost: float = 0.0) -> None:
        minutes = self.tuning.minutes
        is_late = minutes is not None and self.trials and self.seconds >= 60 * minutes
        if is_late or self.spent + cost + 1 > self.tuning.evaluations + 1e-9:
            raise Spent

    def _score(self, candidate: Candidate) -> Trial:
        answers, done, model = self.log.get(candidate.key, Answers()), 0, None
        is_new = False
        values: dict[str, float] | None = None
        with self._merged(candidate) as merged:
            for number, part in enumerate(self.parts):
                if not answers.has(part):
                    model = model or merged()
                    answers, is_new = self._evaluated(model, answers, part), True
                done = number + 1
                if done < len(self.parts):
                    values = forecast(
                        answers,
                        self._rivals(),
                        self.labels,
                        self.tuning.metric,
                        together(self.parts[:done]),
                        each=self.tuning.pareto,
                    )
                if values is not None:
                    break
        if is_new:
            log.append(self.path, candidate, answers)
            self.log[candidate.key] = answers
        part = together(self.parts[:done])
        share = sum(len(indices) for indices in part.values()) / self.size
        if values is None:
            self.whole[candidate.key] = answers
            values = {task: value(answers, self.labels, self.tuning.metric, task, part) for task in part}
        return Trial(candidate, values, {task: self._task_score(answers, task, part) for task in part}, share)

    def _rivals(self) -> list[Answers]:
        """What a candidate has to be worse than to be given up: the best, or any of the front."""
        if not self.whole:
            return []
        rivals = self.front if self.tuning.pareto else [self.best]
        return [self.whole[rival.candidate.key] for rival in rivals]

    @contextmanager
    def _merged(self, candidate: Candidate) -> Iterator[Callable[[], CausalModel]]:
        """A function that merges the candidate and gives the model with it, for as long as the block."""
        plan = self.plan_of(candidate)  # what cannot be merged raises here, known or not
        with staging(self.tmp) as folder, ExitStack() as stack:

            def model() -> CausalModel:
                merge_to_path(plan, folder / "merged")
                return stack.enter_context(adapted(self.bench.base, folder / "merged"))

            yield model

    def _evaluated(self, model: CausalModel, answers: Answers, part: Part) -> Answers:
        losses, hits = dict(answers.losses), dict(answers.hits)
        for task, indices in part.items():
            tests = self.bench.tests[task]
            missing = [None] * len(tests)
            mine, right = list(losses.get(task, missing)), list(hits.get(task, missing))
            score = evaluate(model, [tests[index] for index in indices], self.bench.held.batch_size)
            for index, loss, hit in zip(indices, score.losses, score.hits["exact_match"], strict=True):
                mine[index], right[index] = loss, hit
            losses[task], hits[task] = tuple(mine), tuple(right)
        return Answers(losses, hits)

    def _task_score(self, answers: Answers, task: str, part: Part) -> TaskScore:
        losses = tuple(answers.losses[task][index] or 0.0 for index in part[task])
        hits = tuple(bool(answers.hits[task][index]) for index in part[task])
        labels = tuple(self.labels[task][index] for index in part[task])
        share = sum(hits) / len(hits)
        return TaskScore(len(losses), sum(losses) / sum(labels), share, losses, labels, {"exact_match": hits})
