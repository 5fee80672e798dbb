"""Versions that come from elsewhere, an archive or a remote: checked to the last byte, then registered.

What arrives may be hostile. Nothing is registered before manifest, lineage and files are what their digests
say, and what a version of this registry can be.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of, parse_digest
from adapterhub_local.durable import canonical_json, link, staging
from adapterhub_local.errors import BadFile, BadReference, Corrupt
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.lora.contents import read_layout
from adapterhub_local.lora.header import read_header
from adapterhub_local.refs import MAX_NUMBER, check_name
from adapterhub_local.registry.journal import marking
from adapterhub_local.registry.kinds import ROUTER_FILES, is_router
from adapterhub_local.registry.ledger import enter
from adapterhub_local.registry.lineage_form import check_lineage
from adapterhub_local.registry.quota import check_room
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import insert_version, is_number_taken, note_version
from adapterhub_local.registry.version import File, Version

MAX_JSON_BYTES = 16 << 20
MAX_VERSIONS = 1000  # at once, parents included
MAX_KEPT_NUMBER = MAX_NUMBER // 2
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@dataclass(frozen=True)
class Received:
    """A version as it was called elsewhere, and what it is here; `is_new` is False if it was here already."""

    reference: str
    version: Version
    is_new: bool


def with_parents(registry: Registry, version: Version) -> list[Version]:
    """The version and all it was merged from that is here, parents first."""
    found: dict[str, Version] = {}
    parents: dict[str, list[Version]] = {}
    pending = [version]
    while pending:
        one = pending[-1]
        if one.manifest_digest not in parents:
            digests = [entry.get("manifest_digest") for entry in one.lineage.get("parents") or ()]
            rows = [row for digest in digests for row in registry.rows("AND v.manifest_digest = ?", (digest,))]
            parents[one.manifest_digest] = [registry.version(row) for row in rows]
            pending += [one for one in reversed(parents[one.manifest_digest]) if one.manifest_digest not in parents]
        else:
            found.setdefault(one.manifest_digest, one)
            pending.pop()
    return list(found.values())


def parse_manifest(raw: bytes, lineage: bytes, source: object) -> Version:
    """The version that these two blobs describe. Raises BadFile naming `source` if it cannot be one of ours."""
    try:
        version = Version.from_manifest(raw, lineage)
        check_name(version.name)
        if not 1 <= version.number <= MAX_NUMBER or not _TIME.fullmatch(version.created_at) or version.manifest != raw:
            raise ValueError("it was not made by qhub")
        if File.of("lineage.json", lineage) != version.lineage_file or canonical_json(version.lineage) != lineage:
            raise ValueError("its lineage is not what its digest says")
        if len({file.path for file in version.files}) != len(version.files):
            raise ValueError("a file occurs twice")
        check_lineage(version.lineage)
    except BadReference as error:
        raise BadFile(f"{source} holds a version that cannot be here: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, Corrupt, RecursionError) as error:
        raise BadFile(f"{source} holds a manifest that is not one of an adapter version: {error}") from None
    return version


def lineage_digest(raw: bytes, source: object) -> str:
    """The digest of the lineage that the manifest `raw` names. Raises BadFile."""
    try:
        return parse_digest(json.loads(raw)["config"]["digest"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadFile(f"{source} holds a manifest that is not one of an adapter version: {error}") from None


def check_files(version: Version, folder: Path, source: object) -> None:
    """Raise Corrupt or BadFile unless `folder` has all blobs of the version, named by their digests, and sound.

    The digests of those blobs were checked when they arrived. The weights must be factors of the modules the
    config names, and finite.
    """
    names = tuple(sorted(file.path for file in version.files))
    if is_router(version.lineage) and names != ROUTER_FILES:
        raise BadFile(f"{source} holds a router without the files of one: {version}. Nothing was registered")
    for file in (version.lineage_file, *version.files):
        path = folder / hex_of(file.digest)
        if not path.is_file() or path.stat().st_size != file.size:
            raise Corrupt(f"{source} does not hold {file.path} of {version}: nothing was registered")
    with staging(folder) as named:
        for file in version.files:
            link(folder / hex_of(file.digest), named / file.path)
        try:
            for file in version.files:
                if file.path.endswith(".safetensors"):
                    _check_weights(named / file.path)
        except BadFile as error:  # the folder is gone when this is read
            raise BadFile(str(error).replace(str(named), f"{source}, {version}:").replace(":/", ": ")) from None


def _check_weights(path: Path) -> None:
    read_header(path)
    if path.name == WEIGHTS:
        read_layout(path.parent, dora=True, tokens=True)
    from adapterhub_local.lora.finite import check_finite  # loads numpy

    check_finite(path)


def find_same(registry: Registry, version: Version) -> Version | None:
    """The version here that is this very one: by its manifest, or imported under another number from or to here."""
    origin = origin_of(version)
    rows = registry.rows(
        "AND v.name = ? AND (v.manifest_digest IN (?, ?)"
        " OR json_extract(v.lineage, '$.imported_from.manifest_digest') IN (?, ?))",
        (version.name, *(version.manifest_digest, origin) * 2),
    )
    same = (registry.version(row) for row in rows)
    return next((one for one in same if one.content_digest == version.content_digest), None)


def origin_of(version: Version) -> str | None:
    """The digest of the manifest it had under its first number, if it got another."""
    return (version.lineage.get("imported_from") or {}).get("manifest_digest")


def renumbered_lineage(version: Version) -> dict[str, Any]:
    """The lineage of `version` under another number: it says which one it was."""
    origin = {"reference": str(version), "manifest_digest": version.manifest_digest}
    return {**version.lineage, "imported_from": origin}


def register(registry: Registry, version: Version, folder: Path) -> Received:
    """Register a checked version whose blobs lie in `folder`, named by their digests; they are moved from there.

    It keeps its number if that was never used here; else it gets the next one, and its lineage says what it was.
    """
    if (same := find_same(registry, version)) is not None:
        return Received(str(version), same, False)
    files = [(file, folder / hex_of(file.digest)) for file in (version.lineage_file, *version.files)]
    check_room(registry.home, 0)  # what arrives lies in the home already
    registry.blobs.take(files)
    row = None
    with marking(registry.database, registry.blobs) as db:
        # a number so high would leave none, or few, for what comes after it
        taken = version.number > MAX_KEPT_NUMBER or is_number_taken(db, version.name, version.number)
        if not taken and all(registry.blobs.path(file.digest).is_file() for file, _ in files):
            manifest = registry.blobs.put("manifest.json", version.manifest, durable=False)
            insert_version(db, version)
            enter(db, "version", version, version.manifest_digest)
            note_version(db, version, "received")
            row = db.execute("SELECT * FROM versions WHERE manifest_digest = ?", (version.manifest_digest,)).fetchone()
    if row is not None:
        with contextlib.suppress(OSError):  # the row holds it, and `fsck --repair` writes it again
            registry.blobs.sync(manifest)
        return Received(str(version), registry.version(row), True)
    blobs = {file.path: registry.blobs.path(file.digest) for file in version.files}
    return Received(str(version), registry.publish(version.name, blobs, renumbered_lineage(version)), True)
