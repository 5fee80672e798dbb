"""The tasks that versions have scores on."""

import json
from collections.abc import Sequence
from typing import Any

from adapterhub_local.registry.registry import LIVE, Registry


def tasks_in(registry: Registry, allowed: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Each task with its metrics, the most frequent first, and how many versions and names have scores on it.

    allowed: names that count, None for all. The task with the most versions is first.
    """
    live = f"SELECT v.name, v.number {LIVE}"
    mine = "" if allowed is None else "AND s.name IN (SELECT value FROM json_each(?))"
    values = [] if allowed is None else [json.dumps(list(allowed))]
    rows = registry.database.rows(
        "SELECT s.task, s.metric, count(DISTINCT s.name || '@' || s.number) AS versions,"  # noqa: S608
        " count(DISTINCT s.name) AS names FROM scores s"
        f" WHERE s.metric != 'rows' AND (s.name, s.number) IN ({live}) {mine}"
        " GROUP BY s.task, s.metric ORDER BY versions DESC, s.metric",
        values,
    )
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row["task"], {"task": row["task"], "num_versions": 0, "num_names": 0, "metrics": []})
        entry["metrics"].append(row["metric"])
        entry["num_versions"] = max(entry["num_versions"], row["versions"])
        entry["num_names"] = max(entry["num_names"], row["names"])
    return sorted(found.values(), key=lambda entry: (-entry["num_versions"], entry["task"]))
