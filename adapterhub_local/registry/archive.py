"""Versions with what they were made of as one tar in the OCI image layout, out and in.

The layout (`oci-layout`, `index.json`, `blobs/sha256/<hex>`) is that of the OCI image specification, so other
tools can read it. What comes in may be hostile: only those names, only plain files, every byte hashed.
"""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from adapterhub_local.durable import canonical_json, check_absent, digest_file, place_file, staging, telling_full
from adapterhub_local.errors import BadFile, Corrupt, NotFound
from adapterhub_local.registry.receive import (
    MAX_JSON_BYTES,
    Received,
    check_digest,
    check_files,
    lineage_digest,
    parse_manifest,
    register,
    with_parents,
)
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import ARTIFACT_TYPE, MANIFEST_TYPE, File, Version

LAYOUT = canonical_json({"imageLayoutVersion": "1.0.0"})
REF_NAME = "org.opencontainers.image.ref.name"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


def write_archive(registry: Registry, version: Version, target: Path) -> list[Version]:
    """Write `version`, and the versions here that it was merged from, to the tar `target`; the bytes are checked.

    Equal versions give equal bytes. Raises InUse if `target` exists, Corrupt if a blob is not sound.
    """
    check_absent(target)
    versions = with_parents(registry, version)
    blobs: dict[str, Path | bytes] = {}
    descriptors = []
    for one in versions:
        manifest = File.of("manifest.json", one.manifest)
        # manifest and lineage as the row has them, should their blobs be damaged
        blobs |= {manifest.digest: one.manifest, one.lineage_file.digest: canonical_json(one.lineage)}
        blobs |= {file.digest: registry.blobs.check(file) for file in one.files}
        descriptors.append(
            {"mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE, "digest": manifest.digest,
             "size": manifest.size, "annotations": {REF_NAME: str(one)}}
        )  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": descriptors}
    parent = target.absolute().parent
    with telling_full(parent, "nothing was written"), staging(parent, prefix=".qhub-") as stage:
        with tarfile.open(stage / "archive", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in (("oci-layout", LAYOUT), ("index.json", canonical_json(index))):
                tar.addfile(_entry(name, len(data)), io.BytesIO(data))
            for digest, content in sorted(blobs.items()):
                name = f"blobs/sha256/{digest.removeprefix('sha256:')}"
                if isinstance(content, bytes):
                    tar.addfile(_entry(name, len(content)), io.BytesIO(content))
                    continue
                with open(content, "rb") as blob:
                    tar.addfile(_entry(name, content.stat().st_size), blob)
        place_file(stage / "archive", target)
    return versions


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o444, 0
    return entry


def read_archive(registry: Registry, source: Path) -> list[Received]:
    """Register the versions of an archive, parents first.

    A version keeps its number and digests if its number was never used here; else it gets the next number, and
    its lineage says where it came from. Raises NotFound, BadFile for what is no such archive, Corrupt where bytes
    are not what a digest says; then nothing is registered.
    """
    if not source.is_file():
        what = "is a folder, not a tar of `qhub export --oci`" if source.is_dir() else "is no file that can be read"
        raise NotFound(f"{source} {what}" if source.exists() else f"there is no file {source}")
    with telling_full(registry.home.root, "nothing was imported"), staging(registry.home.tmp) as folder:
        index = _unpack(source, folder)
        parsed = [_parse(folder, descriptor, source) for descriptor in index]
        return [register(registry, version, folder) for version in parsed]


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
        lineage = _json_bytes(folder, lineage_digest(raw, source))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BadFile(f"{source} holds a manifest that is none of an adapter version: {error}") from None
    version = parse_manifest(raw, lineage, source)
    check_files(version, folder, source)
    return version


def _json_bytes(folder: Path, digest: Any) -> bytes:
    path = folder / check_digest(digest).removeprefix("sha256:")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError("it is too large")
    return path.read_bytes()
