"""Everything that changed and who changed it, as records that are never changed: what `history.py` reads.

Each record is a row and a blob, visible before the transaction ends and flushed after it, as manifests are. So
what the tables say can be made again from the blobs alone: the records in order, the later ones over the earlier.
"""

import contextlib
import json
import sqlite3
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from adapterhub_local.actor import current_actor
from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.registry.blobs import Blobs
from adapterhub_local.registry.database import Database
from adapterhub_local.registry.found import Record
from adapterhub_local.registry.hooks.wake import wake
from adapterhub_local.registry.ledger import enter

KINDS = {
    "alias": {"action", "alias", "at", "id", "mark", "name", "new", "old"},
    "tag": {"at", "id", "is_set", "mark", "name", "number", "tag"},
    "description": {"at", "description", "id", "mark", "name", "number"},
    "split": {"at", "id", "mark", "name", "shares"},
    "version": {"action", "at", "id", "kind", "manifest", "mark", "name", "number"},
    "removal": {"at", "id", "manifest", "mark", "name", "number"},
    "evaluation": {"at", "digest", "id", "mark", "name", "number", "task"},
    "protection": {"alias", "approvals", "at", "id", "mark", "name", "require"},
    "approval": {"alias", "at", "id", "is_given", "manifest", "mark", "name", "number"},
    "key": {"action", "at", "id", "key", "mark", "note", "scopes"},
}
_TABLES = ("alias", "tag", "description", "split")  # kinds that fill tables; the others are read as they are
_LOG = (
    "INSERT INTO alias_log (name, alias, old_number, new_number, changed_at, action, actor)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)


@contextmanager
def marking(database: Database, blobs: Blobs) -> Iterator[sqlite3.Connection]:
    """A transaction whose notes are blobs, too."""
    with database.writing() as db:
        (before,) = db.execute("SELECT coalesce(max(id), 0) FROM marks").fetchone()
        yield db
        records = db.execute("SELECT record FROM marks WHERE id > ? ORDER BY id", (before,)).fetchall()
        stored = blobs.put_all([("mark.json", row["record"].encode()) for row in records], durable=False)
    if stored:
        wake(database.home)
    for file in stored:
        with contextlib.suppress(OSError):  # the row holds it, and `fsck --repair` writes it again
            blobs.sync(file)


def note(db: sqlite3.Connection, kind: str, /, **fields: Any) -> None:
    """Append a record of what the current actor does, inside a transaction of `marking`."""
    (last,) = db.execute("SELECT coalesce(max(id), 0) FROM marks").fetchone()
    record = canonical_json({"id": last + 1, "mark": kind, "actor": current_actor(), **fields}).decode()
    db.execute("INSERT INTO marks (id, record) VALUES (?, ?)", (last + 1, record))
    enter(db, "mark", last + 1, digest_bytes(record.encode()))


def log_move(db: sqlite3.Connection, **move: Any) -> None:
    """Append the move of an alias to its log and to the records; `move` are the fields of such a record."""
    order = ("name", "alias", "old", "new", "at", "action")
    db.execute(_LOG, (*(move[field] for field in order), current_actor()))
    note(db, "alias", **move)


def is_record(value: dict[str, Any]) -> bool:
    """Whether a blob's JSON is such a record; those of an older qhub have no actor."""
    known = KINDS.get(value["mark"]) if isinstance(value.get("mark"), str) else None
    return known is not None and value.keys() - {"actor"} == known and type(value["id"]) is int


def in_order(records: Iterable[Record], committed: Container[str]) -> list[dict[str, Any]]:
    """The records, one for each id: of two the one in `committed` counts, else the later; the other was left behind."""
    chosen: dict[int, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: (record.digest in committed, str(record.value["at"]))):
        chosen[record.value["id"]] = record.value
    return [chosen[number] for number in sorted(chosen)]


def replay(db: sqlite3.Connection, records: list[dict[str, Any]], known: set[tuple[str, int]]) -> list[str]:
    """Fill the tables from the records, in a database that has the versions `known`; returns what could not be."""
    lost = []
    for record in records:
        kind, name = record["mark"], str(record.get("name"))
        db.execute("INSERT INTO marks (id, record) VALUES (?, ?)", (record["id"], canonical_json(record).decode()))
        if kind not in _TABLES:
            continue
        if kind == "split":
            replace_split(db, name, record["shares"])
            continue
        if kind == "alias":
            values = (name, record["alias"], record["old"], record["new"], record["at"], record["action"])
            db.execute(_LOG, (*values, record.get("actor")))
            number = record["new"]
            db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", values[:2])
        else:
            number = record["number"]
        if number is None:
            continue
        if (name, number) not in known:
            lost.append(f"{kind} of {name}@{number}, which is not there any more")
            if kind == "alias":
                db.execute(_LOG, (name, record["alias"], number, None, record["at"], "lost", None))
        elif kind == "alias":
            db.execute("INSERT INTO aliases (name, alias, number) VALUES (?, ?, ?)", (name, record["alias"], number))
        elif kind == "description":
            db.execute("DELETE FROM descriptions WHERE name = ? AND number = ?", (name, number))
            db.execute("INSERT INTO descriptions VALUES (?, ?, ?)", (name, number, record["description"]))
        elif record["is_set"]:
            db.execute("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", (name, number, record["tag"]))
        else:
            db.execute("DELETE FROM tags WHERE name = ? AND number = ? AND tag = ?", (name, number, record["tag"]))
    return lost


def replace_split(db: sqlite3.Connection, name: str, shares: Iterable[tuple[str, int]]) -> None:
    """How the traffic of a name is split from now on, in the caller's transaction."""
    db.execute("DELETE FROM splits WHERE name = ?", (name,))
    for place, (alias, share) in enumerate(shares):
        db.execute("INSERT INTO splits VALUES (?, ?, ?, ?)", (name, alias, share, place))


def parse(text: str) -> dict[str, Any] | None:
    """The record in a row, None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and is_record(value) else None
