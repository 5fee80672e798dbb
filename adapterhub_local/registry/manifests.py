"""Manifests among the blobs: what versions a home holds, whatever its database says."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.digests import Digest, from_hex
from adapterhub_local.durable import digest_file
from adapterhub_local.registry.ledger import Ledger, is_complete
from adapterhub_local.registry.version import ARTIFACT_TYPES, NAME, VERSION
from adapterhub_local.settings import Home

MAX_MANIFEST_BYTES = 16 << 20
_BEGIN = b'{"annotations":{"'  # keys are sorted


@dataclass(frozen=True)
class Orphan:
    """A manifest that the database does not know: of a version that was published, or that a crash left behind."""

    reference: str
    digest: str
    blobs: frozenset[str]  # its own and those it names
    is_published: bool


def blob_paths(home: Home) -> Iterator[Path]:
    """Everything that lies in the folders of the blobs."""
    if not home.blobs.is_dir():
        return
    for folder in sorted(os.listdir(home.blobs)):
        if folder.startswith("."):  # one that another process is making: it has its own name in a moment
            continue
        with suppress(NotADirectoryError):
            yield from (home.blobs / folder / name for name in os.listdir(home.blobs / folder))


def holds_manifests(home: Home) -> bool:
    """Whether a blob is the manifest of a version."""
    return any(_read(path) is not None for path in blob_paths(home))


def orphans(home: Home, db: sqlite3.Connection, ledger: Ledger) -> list[Orphan]:
    """The manifests that the database does not know, but for those whose number was given to another version.

    Where the ledger names one, or there is no whole ledger that could, it was published.
    """
    # read before the blobs: whoever publishes at this moment is not taken for what was lost
    lines = ledger.read()[0]
    committed = {line.digest for line in (*lines, *ledger.beyond(lines)) if line.kind == "version"}
    complete = is_complete(db, ledger)
    found: dict[Digest, tuple[str, int, frozenset[str]]] = {}
    for path in blob_paths(home):
        digest = from_hex(path.name)
        if _is_known(db, digest) or (manifest := _read(path)) is None:
            continue
        try:
            if digest_file(path) == digest:
                found[digest] = (*_named(manifest), _owned(manifest) | {digest})
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            continue
    kept = []
    for digest, (name, number, blobs) in sorted(found.items(), key=lambda item: item[1][:2]):
        is_free = db.execute("SELECT 1 FROM versions WHERE name = ? AND number = ?", (name, number)).fetchone() is None
        is_published = digest in committed or (is_free and not complete)
        if (is_free or is_published) and not _is_file(db, digest, [other for _, _, other in found.values()]):
            kept.append(Orphan(f"{name}@{number}", digest, blobs, is_published))
    return kept


def _is_known(db: sqlite3.Connection, digest: str) -> bool:
    query = "SELECT 1 FROM versions WHERE manifest_digest = ? UNION ALL SELECT 1 FROM lost WHERE digest = ?"
    return db.execute(query, (digest, digest)).fetchone() is not None


def _is_file(db: sqlite3.Connection, digest: str, others: list[frozenset[str]]) -> bool:
    """Whether what looks like a manifest is a file of a version, whoever published it."""
    if sum(digest in blobs for blobs in others) > 1:
        return True
    return db.execute("SELECT 1 FROM versions WHERE instr(manifest, ?)", (digest,)).fetchone() is not None


def _named(manifest: dict[str, Any]) -> tuple[str, int]:
    notes = manifest["annotations"]
    return str(notes[NAME]), int(notes[VERSION])


def _owned(manifest: dict[str, Any]) -> frozenset[str]:
    parts = (manifest["config"], *manifest["layers"])
    return frozenset(str(part["digest"]) for part in parts)


def _read(path: Path) -> dict[str, Any] | None:
    """The manifest in a blob, None if it is something else."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        with open(path, "rb") as file:
            if file.read(len(_BEGIN)) != _BEGIN:
                return None
            value = json.loads(_BEGIN + file.read())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("artifactType") in ARTIFACT_TYPES else None
