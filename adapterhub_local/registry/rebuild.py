"""Make the database again from the manifests and records among the blobs, and keep what the old one still says.

Versions, evaluations, removals, and records about versions (journal.py) come from blobs; the ledger says which
of them were committed, and in which order. What an older qhub kept in the database only is taken over as far as it can
be read. What is lost is named, and a number that is lost stays taken.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from adapterhub_local.digests import Digest, from_hex, short
from adapterhub_local.durable import alone, digest_bytes, sync_folder
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.database import DAMAGED
from adapterhub_local.registry.fill import fill
from adapterhub_local.registry.found import KEPT, Found, Rebuilt, Record
from adapterhub_local.registry.journal import is_record, parse
from adapterhub_local.registry.ledger import Ledger, is_complete, last_entered
from adapterhub_local.registry.manifests import MAX_MANIFEST_BYTES
from adapterhub_local.registry.migrations import apply_migrations
from adapterhub_local.registry.registry import Registry, unchecked
from adapterhub_local.registry.version import ARTIFACT_TYPES, Version, version_of_row
from adapterhub_local.settings import make_folder


def rebuild(registry: Registry) -> Rebuilt:
    """Replace the database by one made from the blobs; the old one is kept in `quarantine/` if it was damaged.

    A database that SQLite can still read is replaced in one transaction, which others wait for. A damaged
    one is set aside first.
    """
    make_folder(registry.home.root)
    with alone(registry.home.repair_lock):
        return rebuild_alone(registry)


def rebuild_alone(registry: Registry) -> Rebuilt:
    """`rebuild` for who holds the lock of repairs."""
    with unchecked(registry.home) as plain:
        return _rebuild(plain)


def _rebuild(registry: Registry) -> Rebuilt:
    home = registry.home
    ledger = registry.database.ledger
    found = Found(ledger=ledger.read()[0])
    _read_blobs(registry, found)
    has_database = home.database.exists() and home.database.stat().st_size > 0
    if has_database and registry.database.is_sound():
        with registry.database.writing() as db:
            found.is_complete = is_complete(db, ledger)
            found.ledger = ledger.read()[0]  # others may have published meanwhile
            _add_received(found, ledger)
            _salvage(db, found)
            found.is_whole = True
            _clear(db)
            return fill(db, registry, found)
    has_ledger = bool(found.ledger)
    found.is_complete = not _add_received(found, ledger) and has_ledger
    if has_database:
        _salvage_damaged(home.database, found)
    registry.database.close()
    for suffix in ("", "-wal", "-shm"):
        path = Path(f"{home.database}{suffix}")
        if path.exists():
            registry.blobs.set_aside(path)
    sync_folder(home.root)
    with registry.database.writing() as db:
        return fill(db, registry, found)


def _add_received(found: Found, ledger: Ledger) -> bool:
    """Add the versions that have a receipt and no line in the ledger; whether there are any."""
    lines = ledger.beyond(found.ledger)
    found.ledger += lines
    found.received = {line.subject for line in lines}
    return bool(lines)


def _read_blobs(registry: Registry, found: Found) -> None:
    """Every sound manifest, evaluation, removal and record among the blobs."""
    manifests: dict[Digest, dict[str, Any]] = {}
    others: list[tuple[int, Digest, dict[str, Any]]] = []
    for path, value in _json_blobs(registry):
        digest = from_hex(path.name)
        if value.get("artifactType") in ARTIFACT_TYPES:
            manifests[digest] = value
        else:
            others.append((path.stat().st_mtime_ns, digest, value))
    # a file or lineage of a version may look like one of these, whoever wrote it: it is no more than that
    owned = {digest for manifest in manifests.values() for digest in _owned(manifest)}
    for _, digest, value in sorted(others, key=lambda item: item[0]):
        if digest in owned:
            continue
        if value.keys() == {"evaluation", "manifest", "task"}:
            found.evaluations[digest] = value
        elif value.keys() == {"removed", "removed_at"}:
            found.removals[digest] = (value["removed"], value["removed_at"])
        elif is_record(value):
            found.records.append(Record(digest, value))
    for digest in manifests.keys() - owned:
        data = registry.blobs.path(digest).read_bytes()
        try:
            lineage = registry.blobs.path(json.loads(data)["config"]["digest"])
            version = Version.from_manifest(data, lineage.read_bytes())
            if not is_sound(lineage, version.lineage_file.digest, version.lineage_file.size):
                raise Corrupt("its lineage is damaged")
        except (Corrupt, KeyError, TypeError, OSError, ValueError) as error:
            found.lost.append(f"the version of manifest {short(digest)}: {error}")
            continue
        found.manifests[digest] = version


def _owned(manifest: dict[str, Any]) -> Iterator[str]:
    """The digests of the lineage and the files that a manifest names, whatever else is in it."""
    config, layers = manifest.get("config"), manifest.get("layers")
    for part in (config, *(layers if isinstance(layers, list) else ())):
        if isinstance(part, dict) and isinstance(part.get("digest"), str):
            yield part["digest"]


def _json_blobs(registry: Registry) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in registry.blobs.paths():
        try:
            size = path.stat().st_size
            if size > MAX_MANIFEST_BYTES or not is_sound(path, from_hex(path.name), size):
                continue
            data = path.read_bytes()
            value = json.loads(data) if data.startswith(b"{") else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield path, value


def _salvage(db: sqlite3.Connection, found: Found) -> None:
    """Add what the old database says, table by table, row by row."""
    for row in _rows(db, "versions", found):
        try:
            version = version_of_row(row)
        except (Corrupt, KeyError, IndexError, AttributeError, TypeError) as error:
            found.lost.append(f"a row of the old database: {error}")
            continue
        # the row was committed, so it counts whatever other manifest lies about
        found.rows[version.name, version.number] = version
    for table in (*KEPT, "evaluations"):
        found.tables[table] = [dict(row) for row in _rows(db, table, found)]
    marks = (str(row.get("record")) for row in found.tables.pop("marks"))
    found.recorded = [Record(digest_bytes(text.encode()), parsed) for text in marks if (parsed := parse(text))]


def _rows(db: sqlite3.Connection, table: str, found: Found) -> list[sqlite3.Row]:
    rows: list[sqlite3.Row] = []
    try:
        cursor = db.execute(f"SELECT * FROM {table}")  # noqa: S608 - a name of ours
        while row := cursor.fetchone():
            rows.append(row)
    except DAMAGED as error:
        if "no such table" not in str(error):
            found.lost.append(f"rows of {table}, of which {len(rows)} could be read: {error}")
    return rows


def _salvage_damaged(path: Path, found: Found) -> None:
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            _salvage(db, found)
    except DAMAGED as error:
        found.lost.append(f"aliases, their log, tags, descriptions and removals: {error}")


def _clear(db: sqlite3.Connection) -> None:
    """Drop everything, newest first, so that no row is left that refers to a dropped one."""
    last = last_entered(db)
    query = "SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid DESC"
    virtual = [row["name"] for row in db.execute("SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'")]
    names = [row["name"] for row in db.execute(query) if not row["name"].startswith("sqlite_")]
    # a virtual table drops its own shadow tables, named after it
    own = [name for name in names if not any(name.startswith(f"{table}_") for table in virtual)]
    for name in own:
        db.execute(f'DROP TABLE "{name}"')
    db.execute("PRAGMA user_version = 0")
    apply_migrations(db, 0)
    # numbers go on, or what is entered now would look older than the transaction
    db.execute("INSERT INTO ledger_pending (id, line) VALUES (?, '')", (max(last, 1),))
    db.execute("DELETE FROM ledger_pending")
