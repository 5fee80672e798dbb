"""Fill a new database with what was found: versions and their numbers, aliases, tags, evaluations, what is lost."""

import json
import sqlite3
from itertools import islice
from typing import Any

from adapterhub_local.digests import short
from adapterhub_local.durable import canonical_json
from adapterhub_local.registry.found import KEPT, Found, Rebuilt
from adapterhub_local.registry.journal import in_order, replay
from adapterhub_local.registry.ledger import Line, reconcile, unknown
from adapterhub_local.registry.records import evaluation_record
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import insert_evaluation, insert_version, next_number
from adapterhub_local.registry.version import File, Version


def fill(db: sqlite3.Connection, registry: Registry, found: Found) -> Rebuilt:
    """Fill the tables, inside a transaction that began with none."""
    rebuilt = Rebuilt(lost=found.lost)
    placed, spare = _placed(found)
    for key in sorted(placed):
        insert_version(db, placed[key])
    _insert_lost(db, [line for row in found.tables.get("lost", []) if (line := _line(row))])
    by_manifest = {version.manifest_digest: version for version in placed.values()}
    for version in spare:
        by_manifest[version.manifest_digest] = _renumbered(db, registry, version, rebuilt)
    _fill_evaluations(db, registry, found, by_manifest, rebuilt)
    for digest, (manifest, when) in found.removals.items():
        removed = by_manifest.get(manifest)
        if removed is not None and found.is_committed(digest):
            db.execute("INSERT OR IGNORE INTO removals VALUES (?, ?, ?)", (removed.name, removed.number, when))
    known = {(version.name, version.number) for version in by_manifest.values()}
    _fill_marks(db, found, known)
    missing = unknown(db, found.ledger)
    _insert_lost(db, missing)
    rebuilt.lost += [_described(line) for line in missing if line.digest not in by_manifest]
    db.execute("DELETE FROM lost WHERE digest IN (SELECT manifest_digest FROM versions)")
    reconcile(db, registry.database.ledger)
    rebuilt.num_versions = len(known)
    if not found.is_complete:
        rebuilt.lost += _gaps(db, known)
    return rebuilt


def _placed(found: Found) -> tuple[dict[tuple[str, int], Version], list[Version]]:
    """Which version has which number, and those whose number another one has."""
    placed, spare = dict(found.rows), []
    rows = {version.manifest_digest for version in found.rows.values()}
    order = {line.digest: place for place, line in enumerate(found.ledger)}
    others = [version for digest, version in found.manifests.items() if digest not in rows]
    # What was committed comes first, in its order. Where no ledger says so, the later of two counts: the earlier was
    # hardly committed, or its number would not have been free.
    others.sort(key=lambda one: one.created_at, reverse=True)
    others.sort(key=lambda one: order.get(one.manifest_digest, len(order)))
    for version in others:
        is_free = (version.name, version.number) not in placed
        is_unsaid = found.is_complete and (found.is_whole or not is_free)
        if version.manifest_digest not in order and (is_unsaid or str(version) in found.received):
            continue  # a crash left it
        if is_free:
            placed[version.name, version.number] = version
        else:
            spare.append(version)
    return placed, spare


def _renumbered(db: sqlite3.Connection, registry: Registry, version: Version, rebuilt: Rebuilt) -> Version:
    """Insert a version whose number another one has under the next one, as an import would."""
    origin = {"reference": str(version), "manifest_digest": version.manifest_digest}
    lineage = {**version.lineage, "imported_from": origin}
    raw = canonical_json(lineage)
    number = next_number(db, version.name)
    file = File.of("lineage.json", raw)
    moved = Version(version.name, number, version.created_at, version.files, file, lineage)
    registry.blobs.put_all([("lineage.json", raw), ("manifest.json", moved.manifest)])
    insert_version(db, moved)
    _insert_lost(db, [Line("version", str(version), version.manifest_digest)])
    rebuilt.moved.append(f"{version} ({short(version.manifest_digest)}) is {moved} now: there is another {version}")
    return moved


def _fill_evaluations(
    db: sqlite3.Connection, registry: Registry, found: Found, by_manifest: dict[str, Version], rebuilt: Rebuilt
) -> None:
    """Evaluations in the order in which they were committed: rows of the old database, then blobs."""
    manifests = {(version.name, version.number): version.manifest_digest for version in found.rows.values()}
    for row in found.tables.get("evaluations", []):
        manifest = manifests.get((str(row.get("name")), row["number"])) if "number" in row else None
        try:
            value = {"evaluation": json.loads(row["evaluation"]), "manifest": manifest, "task": row["task"]}
        except (KeyError, TypeError, ValueError):
            continue
        if manifest is not None and File.of("evaluation.json", canonical_json(value)).digest == row.get("digest"):
            found.evaluations.setdefault(row["digest"], value)
    places = {str(row.get("digest")): place for place, row in enumerate(found.tables.get("evaluations", []))}
    order = {line.digest: len(places) + place for place, line in enumerate(found.ledger)} | places
    for digest in sorted(found.evaluations, key=lambda digest: order.get(digest, -1)):
        value = found.evaluations[digest]
        version = by_manifest.get(value["manifest"])
        if version is None or not (digest in places or found.is_committed(digest)):
            continue
        if version.manifest_digest != value["manifest"]:  # it has another number now
            data = evaluation_record(version.manifest_digest, value["task"], value["evaluation"])
            digest = registry.blobs.put("evaluation.json", data).digest
        insert_evaluation(db, version, value["task"], digest, value["evaluation"])
        rebuilt.num_evaluations += 1


def _fill_marks(db: sqlite3.Connection, found: Found, known: set[tuple[str, int]]) -> None:
    """Aliases, tags, descriptions and splits: what a whole database has, and the records it does not know."""
    recorded = {record.value["id"] for record in found.recorded}  # rows were committed, so they count before blobs
    committed = found.committed
    blobs = [one for one in found.records if one.value["id"] not in recorded and found.is_committed(one.digest)]
    if found.is_whole:
        for record in found.recorded:
            text = canonical_json(record.value).decode()
            db.execute("INSERT INTO marks (id, record) VALUES (?, ?)", (record.value["id"], text))
        _insert_tables(db, found, known)
        found.lost += replay(db, in_order(blobs, committed), known)
        return
    records = in_order([*blobs, *found.recorded], committed)
    found.lost += replay(db, records, known)
    found.tables = _without_records(found.tables, records)
    _insert_tables(db, found, known)


def _insert_tables(db: sqlite3.Connection, found: Found, known: set[tuple[str, int]]) -> None:
    for table in KEPT:
        for row in found.tables.get(table, []) if table not in ("lost", "marks") else ():
            if table not in ("alias_log", "splits") and (row.get("name"), row.get("number")) not in known:
                found.lost.append(f"{table}: {row.get('name')}@{row.get('number')} is not there any more")
                continue
            columns, marks = ", ".join(row), ", ".join("?" * len(row))
            db.execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))  # noqa: S608


def _insert_lost(db: sqlite3.Connection, lines: list[Line]) -> None:
    for line in lines:
        name, number = line.version if line.kind == "version" else (None, None)
        values = (line.digest, line.kind, line.subject, name, number)
        db.execute("INSERT OR IGNORE INTO lost (digest, kind, subject, name, number) VALUES (?, ?, ?, ?, ?)", values)


def _line(row: dict[str, Any]) -> Line | None:
    try:
        line = Line(str(row["kind"]), str(row["subject"]), str(row["digest"]))
        _ = line.version if line.kind == "version" else None
    except (KeyError, ValueError):
        return None
    return line


def _described(line: Line) -> str:
    """The message about a line whose blob is gone."""
    match line.kind:
        case "version":
            return f"{line.subject}: its manifest or its lineage is gone; its number stays taken"
        case "removal":
            return f"{line.subject} was removed: the record of it is gone"
        case "evaluation":
            return f"an evaluation of {line.subject}: its record is gone"
    return f"change {line.subject}, of an alias, tag, evaluation or the like: its record is gone"


def _gaps(db: sqlite3.Connection, known: set[tuple[str, int]]) -> list[str]:
    """Numbers below the highest of a name that nothing is left of."""
    numbers: dict[str, set[int]] = {}
    for name, number in known:
        numbers.setdefault(name, set()).add(number)
    lines = []
    for name, present in sorted(numbers.items()):
        named = {number for (number,) in db.execute("SELECT number FROM lost WHERE name = ?", (name,))}
        gone = (number for number in range(1, max(present)) if number not in present and number not in named)
        lines += [f"{name}@{number}: neither its manifest nor its row is left" for number in islice(gone, 20)]
    return lines


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
