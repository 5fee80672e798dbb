"""The rows of versions, evaluations and aliases, as a transaction writes them, whoever brings them."""

import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import InputError, InUse
from adapterhub_local.refs import MAX_NUMBER
from adapterhub_local.registry.gates import check_move
from adapterhub_local.registry.journal import log_move, note
from adapterhub_local.registry.version import Version

NOTHING = 0  # where an alias points that is expected not to be there


def now() -> str:
    """The time as ISO 8601 in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def next_number(db: sqlite3.Connection, name: str) -> int:
    """The number after the highest that a version of `name` ever had. Raises InputError if there is none left."""
    query = (
        "SELECT max(coalesce((SELECT max(number) FROM versions WHERE name = ?), 0),"
        " coalesce((SELECT max(number) FROM lost WHERE name = ?), 0))"
    )
    (newest,) = db.execute(query, (name, name)).fetchone()
    if newest >= MAX_NUMBER:
        raise InputError(f"'{name}@{newest}' has the highest number there can be: publish under another name")
    return int(newest) + 1


def is_number_taken(db: sqlite3.Connection, name: str, number: int) -> bool:
    """Whether a version of `name` ever had this number."""
    tables = (
        "SELECT 1 FROM versions WHERE name = ? AND number = ?",
        "SELECT 1 FROM lost WHERE name = ? AND number = ?",
    )
    return any(db.execute(query, (name, number)).fetchone() is not None for query in tables)


def insert_version(db: sqlite3.Connection, version: Version) -> None:
    """The row of a version, inside a transaction."""
    db.execute(
        "INSERT INTO versions (name, number, manifest_digest, content_digest, base_fingerprint, created_at,"
        " manifest, lineage) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(version.name, version.number, version.manifest_digest, version.content_digest),
            *(version.base_fingerprint, version.created_at, version.manifest.decode()),
            canonical_json(version.lineage).decode(),
        ),
    )


def note_version(db: sqlite3.Connection, version: Version, action: str) -> None:
    """The record that a version came: published here, or received from elsewhere."""
    fields = {"name": version.name, "number": version.number, "manifest": version.manifest_digest}
    kind = version.lineage.get("kind")
    note(db, "version", action=action, kind=kind if isinstance(kind, str) else None, at=now(), **fields)


def insert_evaluation(
    db: sqlite3.Connection, version: Version, task: str, digest: str, evaluation: Mapping[str, Any]
) -> None:
    """The row of an evaluation whose blob is `digest`, inside a transaction."""
    db.execute(
        "INSERT INTO evaluations (name, number, task, digest, evaluation) VALUES (?, ?, ?, ?, ?)",
        (version.name, version.number, task, digest, canonical_json(evaluation).decode()),
    )


def point_alias(
    db: sqlite3.Connection, name: str, alias: str, number: int | None, *, expect: int | None = None, action: str = "set"
) -> None:
    """Move an alias inside a transaction of `marking`, or remove it if `number` is None, and log it.

    Every move of an alias is made here, so that a protected one (gates.py) has no other door.
    """
    old = check_expected(db, name, alias, expect)
    if number != old:
        check_move(db, name, alias, number)
    if number is None:
        for table in ("aliases", "splits"):
            db.execute(f"DELETE FROM {table} WHERE name = ? AND alias = ?", (name, alias))  # noqa: S608
    else:
        db.execute("INSERT OR REPLACE INTO aliases (name, alias, number) VALUES (?, ?, ?)", (name, alias, number))
    log_move(db, name=name, alias=alias, old=old, new=number, at=now(), action=action)


def check_expected(db: sqlite3.Connection, name: str, alias: str, expect: int | None) -> int | None:
    """Where an alias points now, None for nowhere. Raises InUse if something else is expected."""
    row = db.execute("SELECT number FROM aliases WHERE name = ? AND alias = ?", (name, alias)).fetchone()
    now_at: int | None = row["number"] if row else None
    if expect is not None and (now_at or NOTHING) != expect:
        shown, wanted = (number or "nothing" for number in (now_at, expect))
        raise InUse(f"{name}@{alias} points to {shown}, not to {wanted}: nothing was changed")
    return now_at
