"""Versions to and from a repository of a registry, with the versions they were made of.

A version's manifest is an OCI image manifest as it is, so its digest there is its digest here. Those it was made of lie
in the same repository, each under a tag of its digest, so that no registry takes them for garbage.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import canonical_json, link, on_full_disk, staging
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.oci.address import Address
from adapterhub_local.oci.client import Repository
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.blobs import is_sound
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
from adapterhub_local.registry.version import File

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Pushed:
    """A version that is at `address` now; `moved_from` is the digest that its tag had, if it had another."""

    version: Version
    address: Address
    num_versions: int
    num_bytes: int
    moved_from: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": str(self.version),
            "address": str(self.address),
            "digest": self.version.manifest_digest,
            "content_digest": self.version.content_digest,
            "versions": self.num_versions,
            "bytes_sent": self.num_bytes,
            "moved_from": self.moved_from,
        }


def push(registry: Registry, version: Version, address: Address, progress: Progress = _quiet) -> Pushed:
    """Send a version and what it was made of, and point the tag to it (`v<number>` if the address has none).

    What is there is not sent again; the tag is set last. Raises InputError for an address by digest, RemoteError,
    Corrupt if a blob here is not sound.
    """
    if address.digest is not None:
        raise InputError(
            f"{address} names a digest: push to a tag, such as oci://{address.host}/{address.repository}:v1"
        )
    tag = address.tag or f"v{version.number}"
    versions = with_parents(registry, version)
    total = sum(file.size for one in versions for file in one.files)
    sent = done = 0
    with Repository(address) as repository:
        before = repository.digest_of(tag)
        for one in versions:
            for file in one.files:
                sent += file.size * repository.put_blob(file, registry.blobs.check(file))
                progress(done := done + file.size, total)
            lineage = canonical_json(one.lineage)
            sent += len(lineage) * repository.put_blob(one.lineage_file, lineage)
            repository.put_manifest(tag if one is versions[-1] else _tag_of(one), one.manifest)
    moved = before if before not in (None, version.manifest_digest) else None
    there = Address(address.host, address.repository, tag)
    return Pushed(version, there, len(versions), sent, moved)


def pull(registry: Registry, address: Address, progress: Progress = _quiet) -> list[Received]:
    """Register the version at `address` after those it was made of; the last one is what was asked for.

    Raises InputError without tag and digest, NotFound, RemoteError, and Corrupt or BadFile for what is not what its
    digests say, or not a version: nothing is registered then.
    """
    if address.tag is None and address.digest is None:
        raise InputError(f"say which version: {address}:v1, or another tag, or @sha256:...")
    home = registry.home
    with on_full_disk(home.root, "nothing was registered"), staging(home.tmp) as folder, Repository(address) as there:
        incoming: dict[str, Version] = {}
        lineages: dict[str, bytes] = {}
        _look(there, address.digest or str(address.tag), incoming, lineages)
        files = {file.digest: file for version in incoming.values() for file in version.files}
        total, done = sum(file.size for file in files.values()), 0
        for digest, file in files.items():
            target, here = folder / hex_of(digest), registry.blobs.path(digest)
            if is_sound(here, digest, file.size):
                link(here, target)
            else:
                there.fetch(file, target)
            progress(done := done + file.size, total)
        for digest, data in lineages.items():
            (folder / hex_of(digest)).write_bytes(data)
        for version in incoming.values():
            check_files(version, folder, address)
        return [register(registry, version, folder) for version in incoming.values()]


def _look(repository: Repository, reference: str, incoming: dict[str, Version], lineages: dict[str, bytes]) -> None:
    """Add the version of a manifest after its parents, as far as the repository has them."""
    address = repository.address
    raw = repository.manifest(reference)
    digest = lineage_digest(raw, address)
    lineage = _lineage(repository, raw, digest)
    version = parse_manifest(raw, lineage, address)
    if len(lineages) >= MAX_VERSIONS:
        raise Corrupt(f"{address} was made from more than {MAX_VERSIONS} versions: nothing was registered")
    lineages[digest] = lineage
    for parent in version.lineage.get("parents") or ():
        wanted = parent.get("manifest_digest")
        if isinstance(wanted, str) and wanted.startswith("sha256:") and wanted not in incoming:
            try:
                _look(repository, wanted, incoming, lineages)
            except NotFound:
                continue  # one that nobody has stays named in the lineage only
    incoming.setdefault(version.manifest_digest, version)


def _lineage(repository: Repository, raw: bytes, digest: str) -> bytes:
    size = json.loads(raw)["config"].get("size")
    if not isinstance(size, int) or not 0 <= size <= MAX_JSON_BYTES:
        raise Corrupt(f"{repository.address} names a lineage of {size!r} bytes: nothing was registered")
    return repository.read(File("lineage.json", digest, size))


def _tag_of(version: Version) -> str:
    return f"made-of-{hex_of(version.manifest_digest)[:32]}"
