"""Versions with what they were made of in the OCI image layout: out as one tar, in as a tar, a .tgz or a folder.

The layout (`oci-layout`, `index.json`, `blobs/sha256/<hex>`) is that of the OCI image specification, so other
tools can read it. What comes in may be hostile: only those names, only plain files, every byte hashed.
"""

import gzip
import io
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub_local.digests import Digest, from_hex, hex_of, parse_digest
from adapterhub_local.durable import canonical_json, check_absent, digest_file, on_full_disk, place_file, staging
from adapterhub_local.errors import BadFile, Corrupt, NotFound
from adapterhub_local.registry.receive import (
    MAX_JSON_BYTES,
    MAX_VERSIONS,
    Received,
    check_files,
    lineage_digest,
    parse_manifest,
    register,
    with_parents,
)
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import MANIFEST_TYPE, File, Version

LAYOUT = canonical_json({"imageLayoutVersion": "1.0.0"})
MAX_FILES = 20_000
MAX_UNPACKED = 100_000_000  # bytes that a small archive may unpack to,
MAX_RATIO = 20  # and this many times its own size
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
            {"mediaType": MANIFEST_TYPE, "artifactType": one.artifact_type, "digest": manifest.digest,
             "size": manifest.size, "annotations": {REF_NAME: str(one)}}
        )  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": descriptors}
    parent = target.absolute().parent
    with on_full_disk(parent, "nothing was written"), staging(parent, prefix=".qhub-") as stage:
        with tarfile.open(stage / "archive", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in (("oci-layout", LAYOUT), ("index.json", canonical_json(index))):
                tar.addfile(_entry(name, len(data)), io.BytesIO(data))
            for digest, content in sorted(blobs.items()):
                name = f"blobs/sha256/{hex_of(digest)}"
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
    """Register the versions of an archive, parents first: a tar of `qhub export --oci`, packed again or not, a .tgz, or
    a folder with the same layout.

    A version keeps its number and digests if its number was never used here; else it gets the next number, and
    its lineage says where it came from. Raises NotFound, BadFile for what is not such an archive, Corrupt where bytes
    are not what a digest says; then nothing is registered.
    """
    if not source.is_file() and not source.is_dir():
        raise NotFound(f"{source} is not a file that can be read" if source.exists() else f"there is no file {source}")
    if source.is_dir() and not (source / "oci-layout").exists():
        raise NotFound(f"{source} is a folder, not a tar of `qhub export --oci`, and has no oci-layout")
    with on_full_disk(registry.home.root, "nothing was imported"), staging(registry.home.tmp) as folder:
        digests = _unpack(source, folder)
        checked: set[tuple[File, ...]] = set()
        parsed = [_parse(folder, digest, source, checked) for digest in digests]
        return [register(registry, version, folder) for version in parsed]


def _unpack(source: Path, folder: Path) -> list[Digest]:
    """Write the blobs of an archive into `folder`, named by their digests, and return the manifests of its index."""
    index = None
    seen: set[str] = set()
    room = MAX_UNPACKED + MAX_RATIO * source.stat().st_size
    try:
        for name, size, data in _folder_files(source) if source.is_dir() else _tar_files(source):
            match = _BLOB.fullmatch(name)
            if name in seen:
                raise BadFile(f"{source} holds {name!r} twice: nothing was read")
            if not (match or name in ("oci-layout", "index.json")):
                raise BadFile(f"{source} holds {name!r}, which no archive of versions has: nothing was read")
            seen.add(name)
            if len(seen) > MAX_FILES:
                raise BadFile(f"{source} holds more than {MAX_FILES:,} files: export fewer versions at once")
            if match:
                room -= size
                if room < 0 and not source.is_dir():
                    raise BadFile(f"{source} unpacks to more than {MAX_RATIO} times its size: nothing was read")
                _write(data, folder / match[1])
                if digest_file(folder / match[1]) != from_hex(match[1]):
                    raise Corrupt(f"{source} is damaged: {name} has other bytes. Nothing was registered")
            elif size > MAX_JSON_BYTES:
                raise BadFile(f"{source} has an {name} of {size:,} bytes: no archive needs that")
            elif name == "index.json":
                index = json.loads(data.read())
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
        raise BadFile(f"{source} is not a tar in the OCI layout: {error}") from None
    manifests = index.get("manifests") if isinstance(index, dict) else None
    if "oci-layout" not in seen or not isinstance(manifests, list) or not manifests:
        raise BadFile(f"{source} is not a tar in the OCI layout: it has no oci-layout or no index.json with manifests")
    try:
        digests = list(dict.fromkeys(parse_digest(entry["digest"]) for entry in manifests))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{source} has an index.json that does not name its manifests: {error}") from None
    if len(digests) > MAX_VERSIONS:
        raise BadFile(f"{source} names more than {MAX_VERSIONS:,} versions: export fewer at once")
    return digests


def _tar_files(source: Path) -> Iterator[tuple[str, int, Any]]:
    """Name, size and open file of everything in a tar but its folders. Raises BadFile for links and devices."""
    with open(source, "rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
    with tarfile.open(source, "r|gz" if is_zipped else "r:") as tar:
        for entry in tar:
            name = entry.name.removeprefix("./")
            if entry.isdir() and name.rstrip("/") in ("", ".", "blobs", "blobs/sha256"):
                continue
            # a sparse entry can claim more bytes than there are
            if not entry.isreg() or entry.issparse():
                raise BadFile(f"{source} holds {entry.name!r}, which is not a plain file: nothing was read")
            data = tar.extractfile(entry)
            assert data is not None, "a plain file"
            yield name, entry.size, data


def _folder_files(source: Path) -> Iterator[tuple[str, int, Any]]:
    """Name, size and open file of everything in a folder and below it."""
    for parent, folders, names in os.walk(source):
        for name in (*names, *(folder for folder in folders if os.path.islink(os.path.join(parent, folder)))):
            path = Path(parent, name)
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise BadFile(
                    f"{source} holds '{path.relative_to(source)}', which is not a plain file: nothing was read"
                )
            with open(path, "rb") as file:
                yield path.relative_to(source).as_posix(), status.st_size, file


def _write(data: Any, path: Path) -> None:
    with open(path, "xb") as out:
        while chunk := data.read(1 << 20):
            out.write(chunk)


def _parse(folder: Path, digest: str, source: Path, checked: set[tuple[File, ...]]) -> Version:
    """The version of one manifest, if it and all its files are sound; equal content is checked once."""
    try:
        raw = _json_bytes(folder, digest)
        lineage = _json_bytes(folder, lineage_digest(raw, source))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BadFile(f"{source} holds a manifest that is not one of an adapter version: {error}") from None
    version = parse_manifest(raw, lineage, source)
    if version.files not in checked:
        check_files(version, folder, source)
        checked.add(version.files)
    return version


def _json_bytes(folder: Path, digest: Any) -> bytes:
    path = folder / hex_of(parse_digest(digest))
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError("it is too large")
    return path.read_bytes()
