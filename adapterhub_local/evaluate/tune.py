"""Search the weights of a merge that do best on held-out data of several tasks, without gradients.

Every trial is the real merge scored on the real base (LoraHub, https://arxiv.org/abs/2307.13269, does the same with
another search). What was scored is kept in `runs/`, so a stopped search continues where it stopped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.durable import canonical_json, digest_bytes, staging
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.gate import Bench, record
from adapterhub_local.evaluate.metrics import Score
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.plan_file import Tuning
from adapterhub_local.settings import Home

Weights = tuple[float, ...]
PlanOf = Callable[[Sequence[float]], MergePlan]
Told = Callable[["Trial", "Trial"], None]  # (this one, the best so far)
STEP, SMALLEST = 0.25, 0.02  # of a weight: the first step of the search, and the last


@dataclass(frozen=True)
class Trial:
    """Weights with the scores of their merge; `objective` is what is made small."""

    weights: Weights
    objective: float
    scores: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": list(self.weights),
            "objective": round(self.objective, 6),
            "scores": {task: score.to_json() for task, score in self.scores.items()},
        }


def tune(
    plan_of: PlanOf, start: Sequence[float], tuning: Tuning, bench: Bench, home: Home, told: Told | None = None
) -> tuple[list[Trial], Trial]:
    """Every trial in order, the first with the weights of `start`, and the best of them.

    The objective is the mean over tasks of the loss, or of 1 - exact match with the loss to decide between equals.
    """
    plan = plan_of(start)
    decisive = {
        "parents": [[parent.digest, parent.converted] for parent in plan.parents],
        "formula": {**plan.formula.to_json(), "dtype": plan.formula.dtype},
        "base": bench.base.info.fingerprint,
        "data": record(bench.held),
        "limit": bench.held.limit,
    }
    identity = digest_bytes(canonical_json(decisive)).removeprefix("sha256:")[:12]
    log = home.runs / f"tune-{identity}" / "trials.jsonl"
    known = _read(log)
    trials: list[Trial] = []

    def score(weights: Weights) -> float:
        scores = known.get(weights)
        if scores is None:
            try:
                with staging(home.tmp) as folder:
                    merge_to_path(plan_of(weights), folder / "merged")
                    scores = bench.score(folder / "merged")
            except InputError:  # all zero, or what the method has no answer for
                return math.inf
            _append(log, weights, scores)
        trial = Trial(weights, objective(scores, tuning.metric), scores)
        trials.append(trial)
        if told:
            told(trial, min(trials, key=lambda one: one.objective))
        return trial.objective

    search(score, start, tuning.low, tuning.high, tuning.evaluations)
    if not trials:
        raise InputError("no weights of this plan can be merged: change the start or the method")
    return trials, min(trials, key=lambda one: one.objective)


def objective(scores: dict[str, Score], metric: str) -> float:
    """What is made small: the mean loss of the tasks, or the mean share of wrong answers."""
    loss = sum(score.loss for score in scores.values()) / len(scores)
    if metric == "loss":
        return loss
    wrong = sum(1 - score.exact_match for score in scores.values()) / len(scores)
    return wrong + 1e-6 * loss  # one example in a thousand weighs more than any loss


def search(
    objective: Callable[[Weights], float], start: Sequence[float], low: float, high: float, evaluations: int
) -> Weights:
    """Hooke and Jeeves' pattern search (https://doi.org/10.1145/321062.321069) in the box [low, high]^n.

    Each coordinate is tried a step up and down; a round that improved is repeated as a whole in its direction;
    a round that did not halves the step. It ends after `evaluations` points or with a step below 0.02.
    Nothing is random.
    """
    seen: dict[Weights, float] = {}

    def value(point: Sequence[float]) -> float:
        rounded = tuple(round(min(high, max(low, weight)), 6) for weight in point)
        if rounded not in seen:
            if len(seen) == evaluations:
                raise _Spent
            seen[rounded] = objective(rounded)
        return seen[rounded]

    def explore(point: list[float], step: float) -> list[float]:
        for index in range(len(point)):
            for move in (step, -step):
                tried = [*point]
                tried[index] = min(high, max(low, tried[index] + move))
                if value(tried) < value(point):
                    point = tried
                    break
        return point

    point, step = [min(high, max(low, weight)) for weight in start], STEP
    try:
        value(point)
        while step >= SMALLEST:
            better = explore(point, step)
            if value(better) >= value(point):
                step /= 2
                continue
            while value(better) < value(point):
                ahead = [2 * now - before for now, before in zip(better, point, strict=True)]
                point, better = better, explore([min(high, max(low, weight)) for weight in ahead], step)
    except _Spent:
        pass
    return min(seen, key=lambda weights: seen[weights])


class _Spent(Exception):
    """All evaluations were used."""


def lineage(tuning: Tuning, bench: Bench, trials: Sequence[Trial], best: Trial) -> dict[str, Any]:
    """What the tuned version records of the search."""
    return {
        **{key: getattr(tuning, key) for key in ("metric", "low", "high", "evaluations")},
        "search": "hooke-jeeves",
        "data": record(bench.held),
        "limit": bench.held.limit,
        "best": trials.index(best),
        "trail": [trial.to_json() for trial in trials],
    }


def _read(log: Path) -> dict[Weights, dict[str, Score]]:
    """The trials of an earlier run; a last line that was cut off is left out."""
    known = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
            known[tuple(entry["weights"])] = {task: Score(**score) for task, score in entry["scores"].items()}
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(log: Path, weights: Weights, scores: dict[str, Score]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        entry = {"weights": list(weights), "scores": {task: asdict(score) for task, score in scores.items()}}
        file.write(json.dumps(entry) + "\n")
