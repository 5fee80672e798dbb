"""Make the database again from the manifests and records among the blobs, and keep what the old one still tells.

Versions, evaluations, removals, and what was said about versions (journal.py) come from blobs. What an older
qhub kept in the database only is taken over as far as it can be read, and what is lost is said.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.durable import sync_folder
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.fsck import version_of_row
from adapterhub_local.registry.journal import in_order, is_record, parse, replay
from adapterhub_local.registry.migrations import apply_migrations
from adapterhub_local.registry.registry import Registry, insert_evaluation, insert_version
from adapterhub_local.registry.version import ARTIFACT_TYPE, Version

MAX_MANIFEST_BYTES = 16 << 20
# In the order in which rows may refer to each other. All but the first are made from records where there are some.
KEPT = ("removals", "aliases", "alias_log", "tags", "descriptions", "marks", "splits")


@dataclass
class Rebuilt:
    """What the new database holds, and, in `lost`, one line for everything that could not be made again."""

    num_versions: int = 0
    num_evaluations: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """What blobs and the old database tell."""

    versions: dict[tuple[str, int], Version] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    removed: dict[str, str] = field(default_factory=dict)  # manifest digest -> when
    records: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    is_whole: bool = False  # all tables of the old database could be read
    lost: list[str] = field(default_factory=list)


def rebuild(registry: Registry) -> Rebuilt:
    """Replace the database by one made from the blobs; the old one is kept in `quarantine/` if it was damaged.

    A database that SQLite can still read is replaced in one transaction, which others wait for. A damaged
    one is set aside first.
    """
    found = _Found()
    _read_blobs(registry, found)
    if registry.home.database.exists() and registry.database.is_sound():
        with registry.database.writing() as db:
            _salvage(db, found)
            found.is_whole = True
            _clear(db)
            return _fill(db, found)
    if registry.home.database.exists():
        _salvage_damaged(registry.home.database, found)
        registry.database.close()
        for suffix in ("", "-wal", "-shm"):
            path = Path(f"{registry.home.database}{suffix}")
            if path.exists():
                registry.blobs.set_aside(path)
        sync_folder(registry.home.root)
    with registry.database.writing() as db:
        return _fill(db, found)


def _read_blobs(registry: Registry, found: _Found) -> None:
    """Every sound manifest, evaluation, removal and record among the blobs."""
    manifests: dict[str, dict[str, Any]] = {}
    others: list[tuple[int, str, dict[str, Any]]] = []
    for path, value in _json_blobs(registry):
        digest = f"sha256:{path.name}"
        if value.get("artifactType") == ARTIFACT_TYPE:
            manifests[digest] = value
        else:
            others.append((path.stat().st_mtime_ns, digest, value))
    # a file or lineage of a version may look like one of these, whoever wrote it: it is no more than that
    owned = {digest for manifest in manifests.values() for digest in _owned(manifest)}
    for _, digest, value in sorted(others, key=lambda item: item[0]):
        if digest in owned:
            continue
        if value.keys() == {"evaluation", "manifest", "task"}:
            found.evaluations.append({**value, "digest": digest})
        elif value.keys() == {"removed", "removed_at"}:
            found.removed[value["removed"]] = value["removed_at"]
        elif is_record(value):
            found.records.append(value)
    for digest in manifests.keys() - owned:
        data = registry.blobs.path(digest).read_bytes()
        try:
            lineage = registry.blobs.path(json.loads(data)["config"]["digest"])
            version = Version.from_manifest(data, lineage.read_bytes())
            if not is_sound(lineage, version.lineage_file.digest, version.lineage_file.size):
                raise Corrupt("its lineage is damaged")
        except (Corrupt, KeyError, TypeError, OSError, ValueError) as error:
            found.lost.append(f"the version of manifest {digest[:19]}: {error}")
            continue
        _add(found, version)


def _owned(manifest: dict[str, Any]) -> Iterator[str]:
    """The digests of the lineage and the files that a manifest names, whatever else is in it."""
    config, layers = manifest.get("config"), manifest.get("layers")
    for part in (config, *(layers if isinstance(layers, list) else ())):
        if isinstance(part, dict) and isinstance(part.get("digest"), str):
            yield part["digest"]


def _add(found: _Found, version: Version) -> None:
    # Of two manifests with one number the later counts: the earlier was never committed, or its number
    # would not have been free.
    known = found.versions.get((version.name, version.number))
    if known is None or known.created_at < version.created_at:
        found.versions[version.name, version.number] = version


def _json_blobs(registry: Registry) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in registry.blobs.paths():
        try:
            size = path.stat().st_size
            if size > MAX_MANIFEST_BYTES or not is_sound(path, f"sha256:{path.name}", size):
                continue
            data = path.read_bytes()
            value = json.loads(data) if data.startswith(b"{") else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield path, value


def _salvage(db: sqlite3.Connection, found: _Found) -> None:
    """Add what the old database tells, table by table, row by row."""
    for row in _rows(db, "versions", found):
        try:
            version = version_of_row(row)
        except (Corrupt, KeyError, AttributeError, TypeError) as error:
            found.lost.append(f"a row of the old database: {error}")
            continue
        # the row was committed, so it counts whatever other manifest lies about
        found.versions[version.name, version.number] = version
    for table in KEPT:
        found.tables[table] = [dict(row) for row in _rows(db, table, found)]


def _rows(db: sqlite3.Connection, table: str, found: _Found) -> list[sqlite3.Row]:
    rows: list[sqlite3.Row] = []
    try:
        cursor = db.execute(f"SELECT * FROM {table}")  # noqa: S608 - a name of ours
        while row := cursor.fetchone():
            rows.append(row)
    except sqlite3.DatabaseError as error:
        if "no such table" not in str(error):
            found.lost.append(f"rows of {table}, of which {len(rows)} could be read: {error}")
    return rows


def _salvage_damaged(path: Path, found: _Found) -> None:
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            _salvage(db, found)
    except sqlite3.DatabaseError as error:
        found.lost.append(f"aliases, their log, tags, descriptions and removals: {error}")


def _clear(db: sqlite3.Connection) -> None:
    """Drop everything, newest first, so that no row is left that refers to a dropped one."""
    query = "SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid DESC"
    virtual = [row["name"] for row in db.execute("SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'")]
    names = [row["name"] for row in db.execute(query) if not row["name"].startswith("sqlite_")]
    # a virtual table drops its own shadow tables, named after it
    own = [name for name in names if not any(name.startswith(f"{table}_") for table in virtual)]
    for name in own:
        db.execute(f'DROP TABLE "{name}"')
    db.execute("PRAGMA user_version = 0")
    apply_migrations(db, 0)


def _fill(db: sqlite3.Connection, found: _Found) -> Rebuilt:
    rebuilt = Rebuilt(lost=found.lost)
    by_manifest = {version.manifest_digest: version for version in found.versions.values()}
    for key in sorted(found.versions):
        insert_version(db, found.versions[key])
    for record in found.evaluations:
        if version := by_manifest.get(record["manifest"]):
            insert_evaluation(db, version, record["task"], record["digest"], record["evaluation"])
            rebuilt.num_evaluations += 1
    for digest, when in found.removed.items():
        if version := by_manifest.get(digest):
            db.execute("INSERT INTO removals VALUES (?, ?, ?)", (version.name, version.number, when))
    # rows were committed, so they count before blobs that a crash left behind
    rows = [said for row in found.tables.get("marks", []) if (said := parse(str(row.get("record"))))]
    told = {said["id"] for said in rows}
    records = in_order([said for said in found.records if said["id"] not in told] + rows)
    if not found.is_whole:
        found.lost += replay(db, records, set(found.versions))
        found.tables = _without_records(found.tables, records)
    for table in KEPT:
        for row in found.tables.get(table, []):
            if table != "alias_log" and "number" in row and (row["name"], row["number"]) not in found.versions:
                found.lost.append(f"{table}: {row['name']}@{row['number']} is not there any more")
                continue
            columns = ", ".join(row)
            marks = ", ".join("?" * len(row))
            db.execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))  # noqa: S608
    rebuilt.num_versions = len(found.versions)
    numbers: dict[str, set[int]] = {}
    for name, number in found.versions:
        numbers.setdefault(name, set()).add(number)
    for name, present in sorted(numbers.items()):
        gone = sorted(set(range(1, max(present))) - present)
        rebuilt.lost += [f"{name}@{number}: neither its manifest nor its row is left" for number in gone[:20]]
    return rebuilt


def _without_records(tables: dict[str, list[dict[str, Any]]], records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows of which no record speaks: those an older qhub wrote."""
    aliases = {(record["name"], record["alias"]) for record in records if record["mark"] == "alias"}
    tags = {(record["name"], record["number"], record["tag"]) for record in records if record["mark"] == "tag"}
    described = {(record["name"], record["number"]) for record in records if record["mark"] == "description"}

    def left(table: str, row: dict[str, Any]) -> bool:
        match table:
            case "aliases" | "alias_log":
                return (row["name"], row["alias"]) not in aliases
            case "tags":
                return (row["name"], row["number"], row["tag"]) not in tags
            case "descriptions":
                return (row["name"], row["number"]) not in described
        return table != "marks"

    # ids are given anew: those of rows and of records are not of one row
    return {
        table: [{key: value for key, value in row.items() if key != "id"} for row in rows if left(table, row)]
        for table, rows in tables.items()
    }
