"""Versions to a remote, each after what it was merged from. What lies where there: `remote_layout.py`.

A version is at a remote when its slot is, which is created last: two pushers cannot take one number, the
second gets the next.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import BadReference, Corrupt
from adapterhub_local.refs import Reference
from adapterhub_local.registry.moved import Moved, Progress, quiet
from adapterhub_local.registry.receive import origin_of, renumbered_lineage, with_parents
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_layout import (
    Slot,
    blob_path,
    check_format,
    find_slot,
    numbers_of,
    prepare,
    slot_path,
)
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import announce
from adapterhub_local.registry.store import Store
from adapterhub_local.registry.version import File, Version


def push(
    registry: Registry, store: Store, versions: Sequence[Version], *, dry_run: bool = False, recheck: bool = False,
    progress: Progress = quiet,
) -> list[Moved]:  # fmt: skip
    """Send versions and what they were merged from; what is there is not sent again.

    Every object that was sent is read back and hashed; with `recheck` also those that were there, and what is
    damaged is sent again. A version whose number is another's at the remote gets the next one there. Its tags
    and later evaluations go into the remote's log. Raises
    Corrupt, RemoteError, NotFound, and InputError for a store in which pushers could overwrite one another.
    """
    store.check_writable()
    if dry_run:
        check_format(store)
    else:
        prepare(store)
    chosen = {one.manifest_digest: one for version in versions for one in with_parents(registry, version)}
    total = sum(file.size for one in chosen.values() for file in one.files)
    moved, done, log = [], 0, Log(store)
    for version in chosen.values():
        progress(done, total)
        one, slot = _push(registry, store, version, dry_run, recheck)
        if not dry_run:
            log.catch_up()
            announce(log, registry, version, slot)
        moved.append(one)
        done += sum(file.size for file in version.files)
    return moved


def _push(registry: Registry, store: Store, version: Version, dry_run: bool, recheck: bool) -> tuple[Moved, Slot]:
    sent: list[File] = []
    while True:
        there = _slot_of(store, version)
        numbers = [] if there else numbers_of(store, version.name)
        number = there.number if there else numbers[-1] + 1 if version.number in numbers else version.number
        there_as = _renumbered(version, number)
        if there is None or (recheck and there.manifest == there_as.manifest_digest):
            sent += [file for file, data in _blobs(registry, there_as) if _send(store, file, data, dry_run, recheck)]
        slot = Slot(number, there_as.manifest_digest, version.manifest_digest if number != version.number else None)
        if there or dry_run or store.create(slot_path(version.name, number), slot.to_bytes()):
            slot = there or slot
            size = sum(file.size for file in sent)
            target = f"{version.name}@{number}"
            return Moved(str(version), target, there is None, len(sent), size, slot.manifest), slot


def _slot_of(store: Store, version: Version) -> Slot | None:
    """Where the remote has this version, under whichever number."""
    digests = {version.manifest_digest}
    if origin := origin_of(version):  # it came here under another number, perhaps from there
        digests.add(origin)
        try:
            was = Reference.parse(str(version.lineage["imported_from"].get("reference"))).version
        except BadReference:
            was = None
        if was is not None and (slot := find_slot(store, version.name, was, digests)):
            return slot
    return find_slot(store, version.name, version.number, digests)


def _renumbered(version: Version, number: int) -> Version:
    if number == version.number:
        return version
    lineage = renumbered_lineage(version)
    file = File.of("lineage.json", canonical_json(lineage))
    return Version(version.name, number, version.created_at, version.files, file, lineage)


def _blobs(registry: Registry, version: Version) -> Iterator[tuple[File, Path | bytes]]:
    for file in version.files:
        yield file, registry.blobs.check(file)
    yield version.lineage_file, canonical_json(version.lineage)
    yield File.of("manifest.json", version.manifest), version.manifest


def _send(store: Store, file: File, data: Path | bytes, dry_run: bool, recheck: bool) -> bool:
    """Send a blob unless it is there; whether it was, or would be, sent."""
    path = blob_path(file.digest)
    if store.size(path) == file.size and not (recheck and store.digest(path) != file.digest):
        return False
    if not dry_run:
        store.put(path, data)
        if store.size(path) != file.size or store.digest(path) != file.digest:
            raise Corrupt(f"{store.url}/{path} differs from what was sent: the version was not registered there")
    return True
