"""Find versions: filters, sorting and full text. Conditions run in SQLite, so that only what is shown is parsed."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.bounds import Bound, split_bound
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.registry.registry import LIVE, Registry
from adapterhub_local.registry.version import Version

SHARES = (
    "exact_match",
    "accuracy",
    "reward_accuracy",
    "regex_match",
    "json_valid",
    "valid_calls",
    "right_tools",
    "exact_calls",
)  # metrics that are shares of the examples
_METRIC = re.compile(r"[A-Za-z_][\w.]*")
_ORDERS = {"name": "v.name, v.number", "created": "v.created_at DESC, v.name, v.number"}
# probed version by version, so that the first hundred names do not wait for all
_NEWEST = (
    "NOT EXISTS (SELECT 1 FROM versions w LEFT JOIN removals x USING (name, number)"
    " WHERE w.name = v.name AND w.number > v.number AND x.name IS NULL)"
)
# of a score: that its version was not removed
_KEPT = "NOT EXISTS (SELECT 1 FROM removals x WHERE x.name = s.name AND x.number = s.number)"


@dataclass(frozen=True)
class Condition:
    """A bound on a score of the adapter: `exact_match>0.8`."""

    metric: str
    bound: Bound

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """The condition that `text` spells. Raises InputError."""
        found = split_bound(text)
        if found is None or not _METRIC.fullmatch(found[0]):
            shown = text.encode("unicode_escape").decode()[:80]
            raise InputError(f"'{shown}' is not a condition: write a metric and a bound, such as 'exact_match>0.8'")
        return cls(*found)


def find(
    registry: Registry,
    *,
    name: str | None = None,
    base: str | None = None,
    tags: Sequence[str] = (),
    conditions: Sequence[Condition] = (),
    task: str | None = None,
    sort: str = "name",
    limit: int | None = None,
) -> list[Version]:
    """The versions that fit all of what is given; the newest of each name if nothing is.

    `base` is a base's name, Hub id or the first digits of its fingerprint. A condition holds for the scores of
    `task`, or of any task. `sort` is name, created (newest first) or a metric (highest first, loss and perplexity
    lowest first, versions without it last). Raises NotFound for a metric that no version has.
    """
    where: list[str] = []
    values: list[str | int | float] = []
    if name is not None:
        where.append("v.name = ?")
        values.append(name)
    if base is not None:
        named = "json_extract(v.lineage, '$.base.name') = ? OR json_extract(v.lineage, '$.base.hub_id') = ?"
        where.append(f"({named} OR substr(v.base_fingerprint, 1, ?) = ?)")
        values += [base, base, max(len(base), 15), base]
    for tag in tags:
        where.append("EXISTS (SELECT 1 FROM tags t WHERE t.tag = ? AND t.name = v.name AND t.number = v.number)")
        values.append(tag)
    own = "s.name = v.name AND s.number = v.number" + (" AND s.task = ?" if task is not None else "")
    of_task = [task] if task is not None else []
    for condition in conditions:
        held = f"s.metric = ? AND s.value {condition.bound.operator} ?" + (" AND s.task = ?" if of_task else "")
        where.append(f"(v.name, v.number) IN (SELECT s.name, s.number FROM scores s WHERE {held})")  # noqa: S608
        values += [condition.metric, condition.bound.number, *of_task]
    if task is not None and not conditions:
        where.append(f"(json_extract(v.lineage, '$.task') = ? OR EXISTS (SELECT 1 FROM scores s WHERE {own}))")  # noqa: S608
        values += [task, task]
    order = _ORDERS.get(sort)
    for metric in [condition.metric for condition in conditions] + ([sort] if order is None else []):
        check_metric(registry, metric)
    if order is None:
        best, direction = ("min", "ASC") if is_lower_better(sort) else ("max", "DESC")
        # +: else SQLite walks all values of the metric in their order, for every version
        score = f"SELECT {best}(+s.value) FROM scores s WHERE {own} AND s.metric = ?"  # noqa: S608
        order = f"({score}) {direction} NULLS LAST, v.name"
        values += [*of_task, sort]
    if not where:
        where.append(_NEWEST)
    query = f"SELECT v.* {LIVE} AND {' AND '.join(where)} ORDER BY {order} LIMIT ?"
    rows = registry.database.rows(query, (*values, limit if limit is not None else -1))
    return [registry.version(row) for row in rows]


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is more: losses and perplexity."""
    return "loss" in metric or metric == "perplexity"


def metrics_in(registry: Registry, names: Sequence[str] | None = None) -> list[str]:
    """The metrics that versions, or those of `names`, have scores of. What was removed does not count."""
    if names is not None:
        query = (
            f"SELECT DISTINCT metric FROM scores s WHERE name IN (SELECT value FROM json_each(?)) AND {_KEPT}"  # noqa: S608
            " ORDER BY metric"
        )
        return [row["metric"] for row in registry.database.rows(query, (json.dumps(list(names)),))]
    # from each to the next in the index: DISTINCT would read the scores of every version
    query = (
        "WITH RECURSIVE met (metric) AS (SELECT min(metric) FROM scores UNION ALL"  # noqa: S608
        " SELECT (SELECT min(metric) FROM scores WHERE metric > met.metric) FROM met WHERE met.metric IS NOT NULL)"
        " SELECT metric FROM met WHERE metric IS NOT NULL"
        f" AND EXISTS (SELECT 1 FROM scores s WHERE s.metric = met.metric AND {_KEPT}) ORDER BY metric"
    )
    return [row["metric"] for row in registry.database.rows(query)]


def check_metric(registry: Registry, metric: str, names: Sequence[str] | None = None) -> None:
    """Raise NotFound with the nearest metrics if no version, or none of `names`, has this one, but others."""
    known = metrics_in(registry, names)
    if known and metric not in known:
        near = difflib.get_close_matches(metric, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known[:5])}"
        raise NotFound(f"no version has a score '{metric}': {hint}")


def search(registry: Registry, text: str, *, limit: int = 50) -> list[Version]:
    """The versions whose name, description, tags or recipe hold all the words of `text`, the best first.

    A word also fits where it is the beginning of one. Raises InputError if there is no word in it.
    """
    words = re.findall(r"\w+", text)
    if not words:
        raise InputError("there is no word to search for")
    quoted = " ".join(f'"{word}"*' for word in words)
    query = (
        "SELECT v.* FROM (SELECT rowid, bm25(search, 10, 5, 5, 1) AS score FROM search WHERE search MATCH ?"
        " ORDER BY score, rowid DESC LIMIT ?) f JOIN versions v ON v.id = f.rowid ORDER BY f.score, f.rowid DESC"
    )
    return [registry.version(row) for row in registry.database.rows(query, (quoted, limit))]


def aliases_of(registry: Registry, versions: Sequence[Version]) -> dict[str, dict[str, int]]:
    """Name -> alias -> number, of the names of these versions, in one question."""
    names = sorted({version.name for version in versions})
    query = "SELECT * FROM aliases WHERE name IN (SELECT value FROM json_each(?)) ORDER BY name, alias"
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in registry.database.rows(query, (json.dumps(names),)):
        found[row["name"]][row["alias"]] = row["number"]
    return found


def metrics_of(registry: Registry, versions: Sequence[Version]) -> dict[tuple[str, int], dict[str, Any]]:
    """(name, number) -> what `Registry.metrics` says of that version, in one question."""
    found = {(version.name, version.number): dict(version.lineage.get("metrics", {})) for version in versions}
    query = (
        "SELECT name, number, task, evaluation FROM evaluations"
        " WHERE name IN (SELECT value FROM json_each(?)) ORDER BY id"
    )
    for row in registry.database.rows(query, (json.dumps(sorted({name for name, _ in found})),)):
        if (key := (row["name"], row["number"])) in found:
            found[key][row["task"]] = json.loads(row["evaluation"])
    return found
