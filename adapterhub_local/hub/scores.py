"""The scores a model card shows: of the lineage and later evaluations, with the base's where another version has it."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.catalog import SHARES


def with_base_scores(registry: Registry, version: Version) -> dict[str, Any]:
    """Task -> scores of a version. Where the base was not scored beside it, as for a merge, its score is taken
    from another version of the same base on the same data and rows.
    """
    metrics = registry.metrics(version)
    if not version.base_fingerprint or all(_table(scores).get("base") for scores in metrics.values()):
        return metrics
    known = {}
    for other in registry.versions_on_base(version.base_fingerprint):
        for scores in registry.metrics(other).values():
            base = _table(_table(scores).get("base"))
            if base and _table(scores).get("data"):
                known[scores["data"], base.get("rows")] = base
    return {task: _completed(_table(scores), known) for task, scores in metrics.items()}


def _completed(scores: Mapping[str, Any], known: Mapping[tuple[Any, Any], Any]) -> dict[str, Any]:
    rows = _table(scores.get("adapter")).get("rows")
    base = known.get((scores.get("data"), rows))
    return {"base": base, **scores} if base and "base" not in scores else dict(scores)


def interval(metric: str, value: float, rows: Any) -> tuple[float, float] | None:
    """The 95 % interval of a share of `rows` held-out rows; None for a metric that is not one.

    Wilson's score interval, which stays within [0, 1] and holds for few rows: Wilson (1927), J. Am. Stat. Assoc. 22.
    """
    if metric not in SHARES or not isinstance(rows, int) or rows < 1 or not 0 <= value <= 1:
        return None
    from adapterhub_local.intervals import wilson

    return wilson(value * rows, rows)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
