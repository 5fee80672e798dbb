"""What merging keeps: two adapters merged by each method, exact match of each task, beside PEFT's own merges.

    python -m benchmarks.merge_methods                      # the demo's adapters and held-out texts, in $QHUB_HOME
    python -m benchmarks.merge_methods --limit 20           # a first look
    python -m benchmarks.merge_methods --only ties,knots

Every row is the whole way: merge, plain PEFT on the NF4 base, greedy answers compared token for token. Weights are
0.5 and 0.5 where a method sums, 1 and 1 where it averages what agrees. Prints a Markdown table; the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

DATA = Path(__file__).parent.parent / "recipes" / "data"
HALF, ONE = (0.5, 0.5), (1.0, 1.0)
ROWS: list[tuple[str, tuple[float, float], dict[str, Any], str | None]] = [  # method, weights, parameters, space
    ("weighted_sum", HALF, {}, None),
    ("weighted_sum", ONE, {}, None),
    ("weighted_average", ONE, {}, None),
    ("task_arithmetic", ONE, {"scale": 0.7}, None),
    ("slerp", HALF, {}, None),
    ("ties", ONE, {}, "core"),
    ("ties", ONE, {"density": 0.5}, "core"),
    ("ties", ONE, {"variant": "peft"}, "core"),
    ("ties", ONE, {}, "full"),
    ("dare_linear", HALF, {}, "core"),
    ("dare_ties", ONE, {}, "core"),
    ("della", ONE, {}, "core"),
    ("magnitude_prune", HALF, {}, "core"),
    ("breadcrumbs", HALF, {}, "core"),
    ("knots", ONE, {}, None),
]
PEFT = [("cat", HALF, {}), ("linear", HALF, {}), ("ties", ONE, {"density": 0.2})]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score merges of two adapters by each method.")
    parser.add_argument("--adapters", default="sentiment@1,origin@1", help="two references, of the tasks in order")
    parser.add_argument("--tasks", default="sentiment,origin", help="names of recipes/data/TASK.test.jsonl")
    parser.add_argument("--limit", type=int, default=200, help="held-out examples of each task")
    parser.add_argument("--only", help="methods to score, by name, separated by commas")
    arguments = parser.parse_args()
    references, tasks = arguments.adapters.split(","), arguments.tasks.split(",")
    only = set(arguments.only.split(",")) if arguments.only else None

    from adapterhub_local.base.load import load_base
    from adapterhub_local.evaluate.gate import base_for, open_bench
    from adapterhub_local.evaluate.metrics import evaluate
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.merge import merge_to_path
    from adapterhub_local.merge.plan import make_plan
    from adapterhub_local.merge.tuning import Scored
    from adapterhub_local.registry import Registry

    registry = Registry()
    versions = [registry.resolve(reference) for reference in references]
    base = load_base(base_for(versions[0].lineage["base"], registry.home))
    held = Scored({task: DATA / f"{task}.test.jsonl" for task in tasks}, arguments.limit)
    bench = open_bench(base, held)
    results: list[dict[str, Any]] = []

    def note(name: str, start: float, scores: dict[str, Any], **more: Any) -> None:
        row = {"name": name, **{task: score.to_json() for task, score in scores.items()}, **more}
        results.append({**row, "seconds": round(time.perf_counter() - start, 1)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)

    start = time.perf_counter()
    note("base", start, {task: evaluate(base.model, tests, 16) for task, tests in bench.tests.items()})
    for version in versions:
        start = time.perf_counter()
        note(f"{version.name} alone", start, bench.score(version.path))
    for method, weights, parameters, space in ROWS:
        if only is not None and method not in only:
            continue
        start = time.perf_counter()
        plan = make_plan(references, weights, registry, formula=Formula(method, parameters, space))
        with tempfile.TemporaryDirectory() as folder:
            report = merge_to_path(plan, Path(folder) / "merged")
            scores = bench.score(Path(folder) / "merged")
        said = [f"{key} {value}" for key, value in parameters.items()] + ([space] if space == "full" else [])
        name = " ".join([f"`{method}`", *said])  # `weighted_sum` comes twice, with other weights
        note(name, start, scores, weights=weights, rank=report.rank, relative_error=report.relative_error)
    for kind, weights, parameters in PEFT:
        if only is not None and "peft" not in only:
            continue
        start = time.perf_counter()
        with peft_merge(base.model, [version.path for version in versions], kind, weights, parameters) as model:
            scores = {task: evaluate(model, tests, 16) for task, tests in bench.tests.items()}
        note(f"PEFT `{kind}`", start, scores, weights=weights)

    print(table(results, tasks))
    figures = {
        f"{row['name']} {row.get('weights', '')}".strip(): {task: row[task]["exact_match"] for task in tasks}
        for row in results
    }
    document = {
        "hardware": machine(),
        "workload": f"{' and '.join(map(str, versions))} on {base.info.name}, {arguments.limit} examples of each task",
        "exact_match": figures,
        "rows": results,
        "ratio": _ratio(results, tasks),
    }
    print(json.dumps(document))


def _ratio(results: list[dict[str, Any]], tasks: list[str]) -> float | None:
    """Mean exact match of our best merge over that of PEFT's best."""

    def mean(row: dict[str, Any]) -> float:
        return sum(row[task]["exact_match"] for task in tasks) / len(tasks)

    ours = [mean(row) for row in results if row["name"].startswith("`")]
    theirs = [mean(row) for row in results if row["name"].startswith("PEFT")]
    return round(max(ours) / max(theirs), 3) if ours and theirs and max(theirs) else None


def table(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """The rows as Markdown."""
    lines = [f"| merge | weights | {' | '.join(tasks)} | mean |", "| --- | --- |" + " --- |" * (len(tasks) + 1)]
    for row in results:
        matches = [row[task]["exact_match"] for task in tasks]
        weights = ", ".join(f"{weight:g}" for weight in row.get("weights", ()))
        cells = " | ".join(f"{match:.1%}" for match in (*matches, sum(matches) / len(matches)))
        lines.append(f"| {row['name']} | {weights} | {cells} |")
    return "\n".join(lines)


@contextmanager
def peft_merge(
    model: Any, folders: list[Path], kind: str, weights: tuple[float, ...], parameters: dict[str, Any]
) -> Iterator[Any]:
    """The base with the adapters of the folders merged by `add_weighted_adapter`; the base is as before afterwards."""
    from peft import PeftModel

    names = [f"part{number}" for number in range(len(folders))]
    peft = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        peft.load_adapter(str(folder), name)
    peft.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, **parameters)
    peft.set_adapter("merged")
    try:
        yield peft.eval()
    finally:
        peft.unload()


if __name__ == "__main__":
    main()
