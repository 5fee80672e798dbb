"""Everything that changed in a home, newest first: what the journal holds, and versions from before it held all.

The order is that in which changes were committed, whatever the clocks showed. A page continues after the last entry of
the page before, so what changes meanwhile moves nothing on later pages.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.digests import short
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.refs import check_name
from adapterhub_local.registry.journal import KINDS
from adapterhub_local.registry.registry import Registry

MAX_PAGE = 1000
_OLD_VERSIONS, _OLD_REMOVALS = 1 << 41, 1 << 42  # below all others, the older the lower
_ALL = f"""
SELECT id, record FROM marks
UNION ALL
SELECT v.id - {_OLD_VERSIONS}, json_object('mark', 'version', 'action', 'published', 'name', v.name, 'number', v.number,
    'kind', json_extract(v.lineage, '$.kind'), 'manifest', v.manifest_digest, 'at', v.created_at)
FROM versions v WHERE NOT EXISTS (
    SELECT 1 FROM marks m WHERE json_extract(m.record, '$.mark') = 'version'
    AND json_extract(m.record, '$.name') = v.name AND json_extract(m.record, '$.manifest') = v.manifest_digest)
UNION ALL
SELECT r.rowid - {_OLD_REMOVALS}, json_object('mark', 'removal', 'name', r.name, 'number', r.number,
    'manifest', v.manifest_digest, 'at', r.removed_at)
FROM removals r JOIN versions v USING (name, number) WHERE NOT EXISTS (
    SELECT 1 FROM marks m WHERE json_extract(m.record, '$.mark') = 'removal'
    AND json_extract(m.record, '$.name') = r.name AND json_extract(m.record, '$.number') = r.number)
"""  # noqa: S608 - numbers of ours


@dataclass(frozen=True)
class History:
    """Changes, newest first, and where those before them begin, None if there are none."""

    entries: list[dict[str, Any]]
    after: str | None


def history(
    registry: Registry, *, name: str | None = None, events: Sequence[str] = (), actor: str | None = None,
    after: str | None = None, limit: int = 50, allowed: Sequence[str] | None = None,
) -> History:  # fmt: skip
    """The changes behind the cursor `after`, or the newest: of one name, of these kinds, by one actor.

    `allowed` are the names that may be seen, None for all and for what is about no name. Raises InputError, and
    NotFound for a name that nothing was ever recorded of.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InputError(f"limit is {limit}: a page has 1 to {MAX_PAGE} entries")
    if unknown := [event for event in events if event not in KINDS]:
        raise InputError(f"{unknown[0][:40]!a} is not a kind of change: there are {', '.join(sorted(KINDS))}")
    where, values = ["1"], list[Any]()
    if after is not None:
        if not (after.removeprefix("-").isascii() and after.removeprefix("-").isdigit() and len(after) < 18):
            raise InputError(f"{after[:40]!a} is not a place in the history: leave it out to begin with the newest")
        where.append("id < ?")
        values.append(int(after))
    for field, value in (("name", name), ("actor", actor)):
        if value is not None:
            where.append(f"json_extract(record, '$.{field}') = ?")
            values.append(value)
    for field, several in (("mark", list(events) or None), ("name", allowed)):
        if several is not None:
            where.append(f"json_extract(record, '$.{field}') IN (SELECT value FROM json_each(?))")  # noqa: S608
            values.append(json.dumps(list(several)))
    query = f"SELECT * FROM ({_ALL}) WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"  # noqa: S608
    rows = registry.database.rows(query, (*values, limit + 1))
    if not rows and name is not None:
        _check_recorded(registry, name, allowed)
    shown = rows[:limit]
    return History([entry(row["id"], row["record"]) for row in shown], str(shown[-1]["id"]) if rows[limit:] else None)


def _check_recorded(registry: Registry, name: str, allowed: Sequence[str] | None) -> None:
    """Raise NotFound, with the nearest names, unless something happened to `name`, which may be seen."""
    query = f"SELECT DISTINCT json_extract(record, '$.name') AS name FROM ({_ALL}) WHERE name IS NOT NULL"  # noqa: S608
    known = [row["name"] for row in registry.database.rows(query)]
    if allowed is not None:
        known = [one for one in known if one in set(allowed)]
    if check_name(name) not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`qhub list` shows what there is"
        raise NotFound(f"there is no adapter '{name}', and never was: {hint}")


def entry(number: int, record: str) -> dict[str, Any]:
    """A change as lists show it; `id` is None for what an older qhub did not record."""
    fields = json.loads(record)
    reference = f"{fields['name']}@{fields['number']}" if "number" in fields else None
    return {
        "id": number if number > 0 else None,
        "at": fields.pop("at"),
        "actor": fields.pop("actor", None),
        "event": fields.pop("mark"),
        **({"reference": reference} if reference else {}),
        "what": sentence(json.loads(record)),
        **{key: value for key, value in fields.items() if key != "id"},
    }


def sentence(record: dict[str, Any]) -> str:
    """What happened, in a line for people."""
    name, number = record.get("name"), record.get("number")
    reference = f"{name}@{number}"
    match record["mark"]:
        case "alias":
            points = {"new": f"{name}@{record['new']}", "old": record["old"] or "nothing"}
            if record["new"] is None:
                return f"removed {name}@{record['alias']}, which pointed to {points['old']}"
            word = "rolled back" if record["action"] == "rollback" else "moved"
            return f"{word} {name}@{record['alias']} from {points['old']} to {record['new']}"
        case "version":
            kind = f" ({record['kind']})" if record.get("kind") else ""
            return f"{record['action']} {reference}{kind}"
        case "removal":
            return f"removed {reference}"
        case "evaluation":
            return f"evaluated {reference} on {record['task']}"
        case "tag":
            return f"{'tagged' if record['is_set'] else 'took a tag off'} {reference}: {record['tag']}"
        case "description":
            return f"described {reference}: {record['description']}"
        case "split":
            shares = ",".join(f"{alias}={share}" for alias, share in record["shares"])
            return f"split the traffic of {name}: {shares}" if shares else f"ended the split of {name}"
        case "protection":
            if record["approvals"] is None:
                return f"unprotected {name}@{record['alias']}"
            asks = [*record["require"], *([f"{record['approvals']} approvals"] if record["approvals"] else [])]
            return f"protected {name}@{record['alias']}: {', '.join(asks)}"
        case "approval":
            word = "approved" if record["is_given"] else "took back the approval of"
            return f"{word} {reference} ({short(record['manifest'])}) for {record['alias']}"
        case "key":
            note = f": {record['note']}" if record.get("note") else ""
            return f"{record['action']} the API key {record['key']} ({', '.join(record['scopes'])}){note}"
    return str(record["mark"])
