"""Pages of versions: filters, full text and order together, with a total and a cursor that holds while others write.

A cursor holds the newest row that its first page knew, and the last entry that was shown: what is published later is on
no later page, so nobody meets an entry twice, and none is left out. Only what is shown is read.
"""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.registry.catalog import Condition, check_metric, is_lower_better
from adapterhub_local.registry.registry import Registry

MAX_PAGE = 200  # entries
SORTS = ("name", "created")  # and every metric


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    words      all of them are in name, description, tags or recipe; each may be the beginning of one
    base       its name, its Hub id, or the first digits of its fingerprint
    every      all versions that fit; else one entry a name, the newest that fits
    sort       name, created (newest first) or a metric (the best first, versions without it last)
    allowed    the names that may be seen, None for all
    """

    words: str = ""
    name: str | None = None
    base: str | None = None
    kind: str | None = None
    task: str | None = None
    tags: Sequence[str] = ()
    conditions: Sequence[Condition] = ()
    every: bool = False
    sort: str = "name"
    allowed: Sequence[str] | None = None


@dataclass(frozen=True)
class Page:
    """Entries of a list, how many there are on all its pages, and where the next page begins, None after the last."""

    entries: list[dict[str, Any]]
    total: int
    after: str | None


def page(registry: Registry, wanted: Wanted, *, after: str | None = None, limit: int = 50) -> Page:
    """The page of `limit` entries that begins at the cursor `after`, or the first.

    Raises InputError for a cursor or limit that is none, NotFound for a metric that no version has.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InputError(f"limit is {limit}: a page has 1 to {MAX_PAGE} entries")
    place = _read_cursor(after)
    newest = place[0] if place else _newest(registry)
    where, values = _conditions(registry, wanted, newest)
    number = "v.number" if wanted.every else "max(v.number) AS number"  # SQLite takes the other columns of that row
    group = "" if wanted.every else "GROUP BY v.name"
    fitting = f"SELECT v.id, v.name, {number}, v.created_at FROM listed v WHERE {where} {group}"  # noqa: S608
    key, key_values, down = _order(wanted)
    keyed = f"SELECT f.*, {key} AS key FROM fitting f"  # noqa: S608
    behind, behind_values = _behind(place, down)
    order = f"ORDER BY key {down} NULLS LAST, name, number DESC"
    # what fits is found once, for the page and for the total; there is a row for the total where the page is empty
    query = (
        f"WITH fitting AS MATERIALIZED ({fitting}) SELECT * FROM (SELECT count(*) AS total FROM fitting)"  # noqa: S608
        f" LEFT JOIN (SELECT * FROM ({keyed}) WHERE {behind} {order} LIMIT ?) {order}"
    )
    found = registry.database.rows(query, (*values, *key_values, *behind_values, limit + 1))
    total = found[0]["total"] if found else 0
    rows = [row for row in found if row["id"] is not None]
    shown = rows[:limit]
    following = None
    if len(rows) > limit:
        last = shown[-1]
        following = _write_cursor(newest, last["key"], last["name"], last["number"])
    return Page(_entries(registry, [row["id"] for row in shown]), total, following)


def bases_in(registry: Registry, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The bases that versions were made for, each with name, hub_id, fingerprint and num_versions, most used first.

    names: of whose versions, None for all.
    """
    mine = "" if names is None else "AND name IN (SELECT value FROM json_each(?))"
    query = (
        "SELECT c.fingerprint, c.num_versions, s.base_name AS name, s.base_hub_id AS hub_id"  # noqa: S608
        " FROM (SELECT base_fingerprint AS fingerprint, count(*) AS num_versions, max(id) AS id FROM listed"
        f" WHERE base_fingerprint IS NOT NULL {mine} GROUP BY base_fingerprint) c JOIN listed s ON s.id = c.id"
        " ORDER BY c.num_versions DESC, name"
    )
    return [dict(row) for row in registry.database.rows(query, [] if names is None else [json.dumps(list(names))])]


def _newest(registry: Registry) -> int:
    rows = registry.database.rows("SELECT max(id) AS id FROM versions")
    return (rows[0]["id"] or 0) if rows else 0


def _conditions(registry: Registry, wanted: Wanted, newest: int) -> tuple[str, list[Any]]:
    """SQL about the listed versions `v`, and its values."""
    where, values = ["v.id <= ?"], [newest]

    def add(condition: str, *more: Any) -> None:
        where.append(condition)
        values.extend(more)

    if wanted.words:
        words = re.findall(r"\w+", wanted.words)
        quoted = " ".join(f'"{word}"*' for word in words)
        add("v.id IN (SELECT rowid FROM search WHERE search MATCH ?)" if words else "0", *([quoted] if words else []))
    if wanted.name is not None:
        add("v.name = ?", wanted.name)
    if wanted.base is not None:
        begins = wanted.base if len(wanted.base) >= 15 else None
        fits = [
            base["fingerprint"] for base in bases_in(registry, wanted.allowed)
            if wanted.base in (base["name"], base["hub_id"]) or (begins and base["fingerprint"].startswith(begins))
        ]  # fmt: skip
        named = "v.base_name = ? OR v.base_hub_id = ?"
        add(
            f"(v.base_fingerprint IN (SELECT value FROM json_each(?)) OR (v.base_fingerprint IS NULL AND ({named})))",  # noqa: S608
            *(json.dumps(fits), wanted.base, wanted.base),
        )
    if wanted.kind is not None:
        add("v.kind = ?", wanted.kind)
    for tag in wanted.tags:
        add("(v.name, v.number) IN (SELECT t.name, t.number FROM tags t WHERE t.tag = ?)", tag)
    of_task = " AND s.task = ?" if wanted.task is not None else ""
    task = [wanted.task] if wanted.task is not None else []
    for condition in wanted.conditions:
        check_metric(registry, condition.metric, wanted.allowed)
        held = f"s.metric = ? AND s.value {condition.bound.operator} ?{of_task}"
        add(
            f"(v.name, v.number) IN (SELECT s.name, s.number FROM scores s WHERE {held})",  # noqa: S608
            *(condition.metric, condition.bound.number, *task),
        )
    if wanted.task is not None and not wanted.conditions:
        scored = "SELECT 1 FROM scores s WHERE s.name = v.name AND s.number = v.number AND s.task = ?"
        add(f"(v.task = ? OR EXISTS ({scored}))", wanted.task, wanted.task)
    if wanted.allowed is not None:
        add("v.name IN (SELECT value FROM json_each(?))", json.dumps(list(wanted.allowed)))
    if wanted.sort not in SORTS:
        check_metric(registry, wanted.sort, wanted.allowed)
    return " AND ".join(where), values


def _order(wanted: Wanted) -> tuple[str, list[Any], str]:
    """The SQL of what is sorted by, its values, and the direction."""
    if wanted.sort == "name":
        return "NULL", [], "ASC"
    if wanted.sort == "created":
        return "f.created_at", [], "DESC"
    lower = is_lower_better(wanted.sort)
    of_task = " AND s.task = ?" if wanted.task is not None else ""
    task = [wanted.task] if wanted.task is not None else []
    # +: else SQLite walks all values of the metric in their order, for every version
    score = (
        f"(SELECT {'min' if lower else 'max'}(+s.value) FROM scores s"  # noqa: S608
        f" WHERE s.name = f.name AND s.number = f.number AND s.metric = ?{of_task})"
    )
    return score, [wanted.sort, *task], "ASC" if lower else "DESC"


def _behind(place: tuple[int, Any, str, int] | None, down: str) -> tuple[str, list[Any]]:
    """SQL that holds for what comes after the last entry of the page before."""
    if place is None:
        return "1", []
    _, key, name, number = place
    same = "(name > ? OR (name = ? AND number < ?))"
    if key is None:
        return f"(key IS NULL AND {same})", [name, name, number]
    further = "<" if down == "DESC" else ">"
    return f"(key {further} ? OR key IS NULL OR (key = ? AND {same}))", [key, key, name, name, number]


def _write_cursor(newest: int, key: Any, name: str, number: int) -> str:
    text = json.dumps([newest, key, name, number], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_cursor(text: str | None) -> tuple[int, Any, str, int] | None:
    if not text:
        return None
    try:
        value = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        newest, key, name, number = value
        is_sound = all(isinstance(each, int) and 0 <= each < 2**63 for each in (newest, number))
        if is_sound and isinstance(name, str) and (key is None or isinstance(key, int | float | str)):
            return newest, key, name, number
    except (ValueError, TypeError, binascii.Error, UnicodeError):
        pass
    raise InputError(f"{text[:40]!a} is not a place in a list: leave `after` out to begin at its start")


def _entries(registry: Registry, ids: Sequence[int]) -> list[dict[str, Any]]:
    """What a list shows of these versions, in this order; a merge's report stays where it is."""
    part = "json_extract(v.lineage, '$.{}') AS {}"
    fields = [("base.name", "base"), ("base.hub_id", "hub_id"), ("adapter.rank", "rank"), ("adapter.alpha", "alpha"),
              ("kind", "kind"), ("task", "task"), ("merge.method", "method")]  # fmt: skip
    query = (
        "SELECT v.id, v.name, v.number, v.created_at, v.content_digest, v.base_fingerprint,"  # noqa: S608
        f" {', '.join(part.format(path, name) for path, name in fields)},"
        " json_extract(v.lineage, '$.metrics') AS metrics,"
        " (SELECT sum(json_extract(l.value, '$.size')) FROM json_each(v.manifest, '$.layers') l) AS size,"
        " (SELECT json_group_array(tag) FROM tags t WHERE t.name = v.name AND t.number = v.number) AS tags,"
        " (SELECT json_group_object(alias, number) FROM aliases a WHERE a.name = v.name) AS aliases,"
        " (SELECT json_group_object(task, json(evaluation)) FROM (SELECT e.task, e.evaluation FROM evaluations e"
        "  WHERE e.name = v.name AND e.number = v.number ORDER BY e.id)) AS evaluations,"
        " coalesce((SELECT d.description FROM descriptions d WHERE d.name = v.name AND d.number = v.number),"
        " json_extract(v.lineage, '$.description')) AS description,"
        " (SELECT count(*) FROM versions w LEFT JOIN removals x USING (name, number)"
        "  WHERE w.name = v.name AND x.name IS NULL) AS num_versions"
        " FROM json_each(?) wanted JOIN versions v ON v.id = wanted.value ORDER BY wanted.key"
    )
    return [_entry(dict(row)) for row in registry.database.rows(query, (json.dumps(list(ids)),))]


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    metrics = json.loads(row["metrics"] or "{}")
    later = json.loads(row["evaluations"] or "{}")  # of a task that occurs again the last counts: the newest
    return {
        "reference": f"{row['name']}@{row['number']}",
        "name": row["name"],
        "version": row["number"],
        "num_versions": row["num_versions"],
        "created_at": row["created_at"],
        "content_digest": row["content_digest"],
        "base": {"name": row["base"], "hub_id": row["hub_id"], "fingerprint": row["base_fingerprint"]},
        "rank": row["rank"],
        "alpha": row["alpha"],
        "kind": row["kind"],
        "task": row["task"],
        "method": row["method"],
        "description": row["description"],
        "size": row["size"] or 0,
        "tags": sorted(json.loads(row["tags"] or "[]")),
        "aliases": json.loads(row["aliases"] or "{}"),
        "metrics": {**(metrics if isinstance(metrics, dict) else {}), **later},
    }
