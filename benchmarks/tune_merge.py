"""What searching a merge is worth: a grid, pattern search and samplers with equal budgets, on the demo's tasks.

    python -m benchmarks.tune_merge                      # the demo's adapters, in $QHUB_HOME
    python -m benchmarks.tune_merge --evaluations 9 --limit 32 --test 40 --seeds 1       # a first look
    python -m benchmarks.tune_merge --bowls 6            # without a model: on random bowls of 2 x 3 weights

Every way has the same budget of whole evaluations of the same examples, and its best by their mean loss is scored on
others that no search has seen. The grid is weights from 0.25 to 1.25 for each adapter. Scores of a merge that two ways
ask for are computed once, and counted for both. Prints a Markdown table; the last line is JSON.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.tuning import Scored, Tuning
from adapterhub_local.tune.candidate import Space
from adapterhub_local.tune.pattern import by_pattern
from adapterhub_local.tune.sampled import by_sampler
from adapterhub_local.tune.scorer import Scorer, Spent, Trial
from benchmarks.machine import machine

DATA = Path(__file__).parent.parent / "recipes" / "data"
START = (1.0, 1.0)
WAYS: dict[str, dict[str, Any]] = {  # name -> settings of the search
    "grid": {"early_stop": False},
    "pattern": {"early_stop": False},
    "pattern, early stopping": {},
    "gp": {"search": "gp"},
    "gp, 3 groups of layers": {"search": "gp", "groups": 3},
    "gradient, 30 groups": {"search": "gradient", "groups": 30},
    "gp, 3 groups, whole": {"search": "gp", "groups": 3, "early_stop": False},
    "tpe, 3 groups": {"search": "tpe", "groups": 3},
    "cmaes, 3 groups": {"search": "cmaes", "groups": 3},
    "gp, 3 groups, methods": {"search": "gp", "groups": 3, "methods": ("weighted_sum", "dare_linear", "ties")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the merge of two adapters in several ways.")
    parser.add_argument("--adapters", default="sentiment@1,origin@1", help="references, of the tasks in order")
    parser.add_argument("--tasks", default="sentiment,origin", help="names of recipes/data/TASK.test.jsonl")
    parser.add_argument(
        "--evaluations", type=int, default=25, help="whole evaluations for each way; a square for the grid"
    )
    parser.add_argument("--limit", type=int, default=64, help="examples of each task that a search sees")
    parser.add_argument("--test", type=int, default=200, help="others that the best is scored on")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way that draws at random")
    parser.add_argument("--only", help="ways, by name, separated by semicolons; the grid is always there")
    parser.add_argument("--bowls", type=int, help="search so many bowls instead, whose lowest point is known")
    parser.add_argument("--log", type=Path, help="where scores are kept, to go on after a stop")
    arguments = parser.parse_args()
    if arguments.bowls:
        bowls(arguments.bowls, arguments.evaluations)
        return
    references, tasks = arguments.adapters.split(","), arguments.tasks.split(",")
    only = [*arguments.only.split(";"), "grid"] if arguments.only else list(WAYS)

    from adapterhub_local.base.load import load_base
    from adapterhub_local.evaluate.gate import base_for, open_bench
    from adapterhub_local.hub.adapters import opening
    from adapterhub_local.merge.merge import merge_to_path
    from adapterhub_local.merge.plan_file import WrittenPlan
    from adapterhub_local.registry import Registry
    from adapterhub_local.tune.gradient import by_gradient

    registry = Registry()
    versions = [registry.resolve(reference) for reference in references]
    base = load_base(base_for(versions[0].lineage["base"], registry.home))
    results: list[dict[str, Any]] = []
    tested: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        halves = [_part(Path(scratch), task, 0, arguments.limit) for task in tasks]
        held = Scored(dict(zip(tasks, halves, strict=True)))
        rest = [_part(Path(scratch), task, arguments.limit, arguments.limit + arguments.test) for task in tasks]
        bench, test = open_bench(base, held), open_bench(base, Scored(dict(zip(tasks, rest, strict=True))))
        log = arguments.log or Path(scratch) / "trials.jsonl"
        for name in (name for name in WAYS if name in only):
            settings = WAYS[name]
            for seed in range(arguments.seeds if "search" in settings else 1):
                tuning = Tuning(held, evaluations=arguments.evaluations, seed=seed, **settings)
                written = WrittenPlan(tuple(references), START, (None,) * len(references), Formula(), tune=tuning)
                start = time.perf_counter()
                with opening(written, registry) as opened:

                    def plan_of(candidate: Any, opened: Any = opened) -> Any:
                        return opened(candidate.weights, candidate.formula(Formula()))

                    scorer = Scorer(plan_of, tuning, bench, registry.home.tmp, log, lambda trial: None)
                    space = Space.of(written)
                    with suppress(Spent):
                        if name == "grid":
                            for weights in _grid(arguments.evaluations, len(references)):
                                scorer(space.candidate(weights))
                        elif tuning.search == "pattern":
                            by_pattern(space, scorer)
                        elif tuning.search == "gradient":
                            by_gradient(space, scorer, plan_of(space.first()), bench, tuning)
                        else:
                            by_sampler(space, scorer, tuning)
                    best: Trial = scorer.best
                    if best.candidate.key not in tested:
                        merge_to_path(plan_of(best.candidate), Path(scratch) / f"best{len(tested)}")
                        tested[best.candidate.key] = test.score(Path(scratch) / f"best{len(tested)}")
                scores = tested[best.candidate.key]
                results.append(
                    {
                        "way": name,
                        "seed": seed,
                        "trials": len(scorer.trials),
                        "spent": round(scorer.spent, 2),
                        "best": str(best.candidate),
                        "searched": round(best.objective, 4),
                        "loss": {task: round(score.loss, 4) for task, score in scores.items()},
                        "exact_match": {task: round(score.exact_match, 4) for task, score in scores.items()},
                        "mean_loss": round(sum(score.loss for score in scores.values()) / len(tasks), 4),
                        "mean_exact_match": round(sum(score.exact_match for score in scores.values()) / len(tasks), 4),
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                )
                if name != "grid":
                    grid = next(row for row in results if row["way"] == "grid")
                    others = tested[grid["key"]]
                    results[-1]["against_grid"] = {
                        task: score.differences(others[task]) for task, score in scores.items()
                    }
                else:
                    results[-1]["key"] = best.candidate.key
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results, tasks))
    grid = next(row for row in results if row["way"] == "grid")
    print(
        json.dumps(
            {
                "hardware": machine(),
                "workload": f"{' and '.join(map(str, versions))} on {base.info.name}, {arguments.evaluations} "
                f"evaluations of {arguments.limit} examples a task, tested on {arguments.test} others",
                "rows": results,
                "loss_less_than_grid": {
                    f"{row['way']}, seed {row['seed']}": round(grid["mean_loss"] - row["mean_loss"], 4)
                    for row in results[1:]
                },
            }
        )
    )


class Bowl:
    """A scorer without a model: a convex quadratic function of the weights, 0 at its lowest point."""

    def __init__(self, seed: int, evaluations: int) -> None:
        draw = np.random.default_rng(seed)
        # groups of layers want weights that differ by 0.15 around what their adapter wants
        self.lowest = (draw.uniform(0.4, 0.9, (2, 1)) + draw.normal(scale=0.15, size=(2, 3))).ravel()
        mix = draw.normal(size=(6, 6))
        self.matrix = mix @ mix.T / 6 + 0.3 * np.eye(6)
        self.evaluations = evaluations
        self.seen: dict[str, tuple[float]] = {}

    @property
    def share(self) -> float:
        return len(self.seen) / self.evaluations

    def __call__(self, candidate: Any) -> tuple[float]:
        if candidate.key not in self.seen:
            if len(self.seen) == self.evaluations:
                raise Spent
            rows = [weight if isinstance(weight, tuple) else (weight,) * 3 for weight in candidate.weights]
            gap = np.array(rows).ravel() - self.lowest
            self.seen[candidate.key] = (float(gap @ self.matrix @ gap),)
        return self.seen[candidate.key]


def bowls(count: int, evaluations: int) -> None:
    """Every way on the same bowls; the mean of the lowest values found, and how often each was below the grid's."""
    found: dict[str, list[float]] = {}
    for seed in range(count):
        for name, settings in WAYS.items():
            if name == "gradient, 30 groups" or len(settings.get("methods", ())) > 1 or "whole" in name:
                continue  # these are about models
            bowl = Bowl(seed, evaluations)
            tuning = Tuning(Scored({}), evaluations=evaluations, **settings)
            space = Space(START, Formula(), tuning.low, tuning.high, tuning.groups, ("weighted_sum",))
            with suppress(Spent):
                if name == "grid":
                    for weights in _grid(evaluations, 2):
                        bowl(space.candidate(weights))
                elif tuning.search == "pattern":
                    by_pattern(space, bowl)
                else:
                    by_sampler(space, bowl, tuning)
            found.setdefault(name, []).append(min(values[0] for values in bowl.seen.values()))
    found.pop("pattern, early stopping")  # there are no examples to stop after
    print("| search | lowest found, mean | below the grid's |\n| --- | --- | --- |")
    for name, lowest in found.items():
        wins = sum(one < grid for one, grid in zip(lowest, found["grid"], strict=True))
        print(f"| {name} | {sum(lowest) / count:.4f} | {f'{wins} of {count}' if name != 'grid' else ''} |")
    print(json.dumps({"hardware": machine(), "bowls": count, "evaluations": evaluations, "lowest": found}))


def _part(folder: Path, task: str, start: int, end: int) -> Path:
    """Lines of a task's held-out texts as a file."""
    path = folder / f"{task}-{start}-{end}.jsonl"
    lines = (DATA / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()[start:end]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _grid(evaluations: int, adapters: int) -> list[tuple[float, ...]]:
    """Evenly spaced weights, as many for each adapter as the budget holds."""
    num = int(evaluations ** (1 / adapters) + 1e-9)
    axis = [0.25 + index / max(num - 1, 1) for index in range(num)]
    return list(itertools.product(axis, repeat=adapters))


def table(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| search | trials | loss searched on | loss on others | {' | '.join(tasks)} | exact match, mean |",
        "| --- | --- | --- | --- |" + " --- |" * (len(tasks) + 1),
    ]
    for row in results:
        name = f"{row['way']}, seed {row['seed']}" if row["seed"] else row["way"]
        cells = " | ".join(f"{row['loss'][task]:.4f}, {row['exact_match'][task]:.1%}" for task in tasks)
        lines.append(
            f"| {name} | {row['trials']} | {row['searched']:.4f} | {row['mean_loss']:.4f} | {cells} | "
            f"{row['mean_exact_match']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
