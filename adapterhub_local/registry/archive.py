"""Versions with what they were made of as one tar in the OCI image layout, out and in.

The layout (`oci-layout`, `index.json`, `blobs/sha256/<hex>`) is that of the OCI image specification, so other
tools can read it. What comes in may be hostile: only those names, only plain files, every byte hashed.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.durable import canonical_json, check_absent, digest_file, place_file, staging
from adapterhub_local.errors import BadFile, BadReference, Corrupt, NotFound
from adapterhub_local.lora.header import read_header
from adapterhub_local.refs import check_name
from adapterhub_local.registry.registry import Registry, insert_version
from adapterhub_local.registry.version import ARTIFACT_TYPE, MANIFEST_TYPE, Version

LAYOUT = canonical_json({"imageLayoutVersion": "1.0.0"})
REF_NAME = "org.opencontainers.image.ref.name"
MAX_JSON_BYTES = 16 << 20
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@dataclass(frozen=True)
class Imported:
    """A version of the archive and what it is here; `is_new` is False if the registry had it already."""

    reference: str
    version: Version
    is_new: bool


def write_archive(registry: Registry, version: Version, target: Path) -> list[Version]:
    """Write `version`, and the versions here that it was merged from, to the tar `target`; the bytes are checked.

    Equal versions give equal bytes. Raises InUse if `target` exists, Corrupt if a blob is not sound.
    """
    check_absent(target)
    versions = _with_parents(registry, version)
    blobs: dict[str, Path] = {}
    descriptors = []
    for one in versions:
        manifest = registry.blobs.put("manifest.json", one.manifest)  # as the row has it, should the blob be damaged
        for file in (manifest, one.lineage_file, *one.files):
            blobs[file.digest] = registry.blobs.check(file)
        descriptors.append(
            {"mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE, "digest": manifest.digest,
             "size": manifest.size, "annotations": {REF_NAME: str(one)}}
        )  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": descriptors}
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        with tarfile.open(stage / "archive", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in (("oci-layout", LAYOUT), ("index.json", canonical_json(index))):
                tar.addfile(_entry(name, len(data)), io.BytesIO(data))
            for digest, path in sorted(blobs.items()):
                with open(path, "rb") as blob:
                    name = f"blobs/sha256/{digest.removeprefix('sha256:')}"
                    tar.addfile(_entry(name, path.stat().st_size), blob)
        place_file(stage / "archive", target)
    return versions


def _with_parents(registry: Registry, version: Version) -> list[Version]:
    """The version and all it was merged from that is here, parents first."""
    found: dict[str, Version] = {}

    def visit(one: Version, path: frozenset[str]) -> None:
        if one.manifest_digest in found or one.manifest_digest in path:
            return
        for entry in one.lineage.get("parents") or ():
            rows = registry.rows("AND v.manifest_digest = ?", (entry.get("manifest_digest"),))
            for row in rows:
                visit(registry.version(row), path | {one.manifest_digest})
        found[one.manifest_digest] = one

    visit(version, frozenset())
    return list(found.values())


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o444, 0
    return entry


def read_archive(registry: Registry, source: Path) -> list[Imported]:
    """Register the versions of an archive, parents first.

    A version keeps its number and digests if its number is the next one here; else it gets the next number, and
    its lineage says where it came from. Raises NotFound, BadFile for what is no such archive, Corrupt where bytes
    are not what a digest says; then nothing is registered.
    """
    if not source.is_file():
        raise NotFound(f"there is no file {source}")
    with staging(registry.home.tmp) as folder:
        index = _unpack(source, folder)
        parsed = [_parse(folder, descriptor, source) for descriptor in index]
        return [_register(registry, version, folder) for version in parsed]


def _unpack(source: Path, folder: Path) -> list[Any]:
    """Write the blobs of the tar into `folder`, named by their digests, and return the index's manifests."""
    index = None
    seen: set[str] = set()
    try:
        with tarfile.open(source, "r:") as tar:
            for entry in tar:
                if entry.isdir() and entry.name.rstrip("/") in ("blobs", "blobs/sha256"):
                    continue
                match = _BLOB.fullmatch(entry.name)
                # a sparse entry can claim more bytes than there are
                is_plain = entry.isreg() and not entry.issparse() and entry.name not in seen
                if not is_plain or not (match or entry.name in ("oci-layout", "index.json")):
                    raise BadFile(f"{source} holds {entry.name!r}, which no archive of versions has: nothing was read")
                seen.add(entry.name)
                data = tar.extractfile(entry)
                assert data is not None, "a plain file"
                if match:
                    _write(data, folder / match[1])
                    if digest_file(folder / match[1]) != f"sha256:{match[1]}":
                        raise Corrupt(f"{source} is damaged: {entry.name} has other bytes. Nothing was registered")
                elif entry.size > MAX_JSON_BYTES:
                    raise BadFile(f"{source} has an {entry.name} of {entry.size:,} bytes: no archive needs that")
                elif entry.name == "index.json":
                    index = json.loads(data.read())
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise BadFile(f"{source} is not a tar in the OCI layout: {error}") from None
    manifests = index.get("manifests") if isinstance(index, dict) else None
    if "oci-layout" not in seen or not isinstance(manifests, list) or not manifests:
        raise BadFile(f"{source} is not a tar in the OCI layout: it has no oci-layout or no index.json with manifests")
    return manifests


def _write(data: Any, path: Path) -> None:
    with open(path, "xb") as out:
        while chunk := data.read(1 << 20):
            out.write(chunk)


def _parse(folder: Path, descriptor: Any, source: Path) -> Version:
    """The version of one manifest, if it and all its files are sound."""
    try:
        raw = _json_bytes(folder, descriptor["digest"])
        lineage = _json_bytes(folder, json.loads(raw)["config"]["digest"])
        version = Version.from_manifest(raw, lineage)
        check_name(version.name)
        if not 1 <= version.number < 2**31 or not _TIME.fullmatch(version.created_at) or version.manifest != raw:
            raise ValueError("it was not made by qhub")
        _check_lineage(version.lineage)
    except BadReference as error:
        raise BadFile(f"{source} holds a version that cannot be here: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, Corrupt, RecursionError, OSError) as error:
        raise BadFile(f"{source} holds a manifest that is none of an adapter version: {error}") from None
    for file in (version.lineage_file, *version.files):
        path = folder / file.digest.removeprefix("sha256:")
        if not path.is_file() or path.stat().st_size != file.size:
            raise Corrupt(f"{source} does not hold {file.path} of {version}: nothing was registered")
        if file.path.endswith(".safetensors"):
            read_header(path)
    return version


def _json_bytes(folder: Path, digest: str) -> bytes:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ValueError(f"{digest!r} is no digest")
    path = folder / digest.removeprefix("sha256:")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError("it is too large")
    return path.read_bytes()


def _check_lineage(lineage: Any) -> None:
    """Raise ValueError unless the parts that are read have the form in which they are read."""
    tables = all(isinstance(lineage.get(key) or {}, dict) for key in ("base", "adapter", "metrics", "merge", "recipe"))
    lists = [lineage.get(key) or [] for key in ("parents", "data")]
    if not tables or not all(isinstance(item, dict) for entries in lists for item in entries):
        raise ValueError("its lineage has another form")
    if not isinstance((lineage.get("base") or {}).get("fingerprint"), str | None):
        raise ValueError("the fingerprint of its base is no text")


def _register(registry: Registry, version: Version, folder: Path) -> Imported:
    known = registry.rows(
        "AND (v.manifest_digest = ? OR json_extract(v.lineage, '$.imported_from.manifest_digest') = ?)",
        (version.manifest_digest, version.manifest_digest),
    )
    if known:
        return Imported(str(version), registry.version(known[0]), False)
    files: Mapping[str, Path | bytes] = {
        file.path: folder / file.digest.removeprefix("sha256:") for file in version.files
    }
    registry.blobs.put_all(files)
    registry.blobs.put("lineage.json", canonical_json(version.lineage))
    registry.blobs.put("manifest.json", version.manifest)
    needed = (version.lineage_file, *version.files)
    with registry.database.writing() as db:
        newest = db.execute("SELECT max(number) FROM versions WHERE name = ?", (version.name,)).fetchone()[0] or 0
        if version.number == newest + 1 and all(registry.blobs.path(file.digest).is_file() for file in needed):
            insert_version(db, version)
            row = db.execute("SELECT * FROM versions WHERE manifest_digest = ?", (version.manifest_digest,)).fetchone()
            return Imported(str(version), registry.version(row), True)
    origin = {"reference": str(version), "manifest_digest": version.manifest_digest}
    return Imported(
        str(version), registry.publish(version.name, files, {**version.lineage, "imported_from": origin}), True
    )
