"""Versions to and from a remote, each after what it was merged from. What lies where there: `slots.py`.

A version is at a remote when its slot is, which is created last: two pushers cannot take one number, the
second gets the next. What comes back may be hostile, and is checked before any of it is registered.
"""

import difflib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of, short
from adapterhub_local.durable import canonical_json, digest_bytes, link, on_full_disk, staging
from adapterhub_local.errors import BadReference, Corrupt, NotFound, QhubError
from adapterhub_local.refs import Reference
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.fetch import Download
from adapterhub_local.registry.receive import (
    MAX_JSON_BYTES,
    MAX_VERSIONS,
    check_files,
    find_same,
    lineage_digest,
    origin_of,
    parse_manifest,
    register,
    renumbered_lineage,
    with_parents,
)
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_layout import (
    Slot,
    all_numbers,
    blob_path,
    check_format,
    find_slot,
    numbers_of,
    prepare,
    read_slot,
    slot_path,
)
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import announce, number_of
from adapterhub_local.registry.store import Store
from adapterhub_local.registry.version import File, Version

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Moved:
    """A version that was, or would be, pushed or pulled: what it is called where it was and where it went.

    `is_new` is False if it was there already; `num_objects` and `num_bytes` count what was sent.
    """

    source: str
    target: str
    is_new: bool
    num_objects: int
    num_bytes: int
    manifest_digest: str


def _quiet(done: int, total: int) -> None:
    pass


def push(
    registry: Registry, store: Store, versions: Sequence[Version], *, dry_run: bool = False, recheck: bool = False,
    progress: Progress = _quiet,
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


def pull(
    registry: Registry, store: Store, reference: Reference, *, every: bool = False, dry_run: bool = False,
    progress: Progress = _quiet, accept: Callable[[Version], None] | None = None,
) -> list[Moved]:  # fmt: skip
    """Register a version of the remote, or `every` version of its name, and what they were merged from.

    A version keeps its number if that was never used here. What came before an interruption is not fetched
    again. `accept` may raise for a version that was asked for and is not wanted, before its files are fetched. Raises
    NotFound, RemoteError; Corrupt or BadFile for what is not what its digest or manifest says: nothing is registered
    then.
    """
    check_format(store)
    home = registry.home
    numbers = _wanted(store, reference, every)
    with on_full_disk(home.root, "nothing was registered"), staging(home.tmp) as folder:
        incoming: dict[str, Version] = {}
        for number in numbers:
            _look(registry, store, reference.name, number, folder, incoming)
            if accept is not None and incoming:
                accept(list(incoming.values())[-1])
        here = {one.manifest_digest: find_same(registry, one) for one in incoming.values()}
        files = {file.digest: file for one in incoming.values() for file in one.files}
        missing = {  # what is here is hashed, so pulling again repairs
            digest: file for digest, file in files.items()
            if not is_sound(registry.blobs.path(digest), digest, file.size)
        }  # fmt: skip
        _check_sizes(store, home.root, list(missing.values()))
        if not dry_run:
            with Download(store, list(missing.values()), folder, home.tmp / "sync", progress):
                for digest in files.keys() - missing.keys():
                    link(registry.blobs.path(digest), folder / hex_of(digest))
                for digest, version in incoming.items():
                    if here[digest] is None:
                        check_files(version, folder, store.url)
        moved = []
        for digest, version in incoming.items():
            fetched = [missing.pop(file.digest) for file in version.files if file.digest in missing]
            if (same := here[digest]) is None and not dry_run:
                same = register(registry, version, folder).version
            elif not dry_run:
                registry.blobs.take((file, folder / hex_of(file.digest)) for file in fetched)
            size = sum(file.size for file in fetched)
            moved.append(Moved(str(version), str(same or version), here[digest] is None, len(fetched), size, digest))
    return moved


def _wanted(store: Store, reference: Reference, every: bool) -> list[int]:
    """The numbers that `reference` names at the remote. Raises NotFound."""
    if reference.alias is not None:
        log = Log(store)
        log.catch_up()
        number = number_of(log, reference.name, reference.alias)
        if number is None:
            raise NotFound(
                f"{store.remote.name} has no alias '{reference}': `qhub sync push {store.remote.name} {reference.name} "
                f"--alias {reference.alias}` makes it, `qhub sync status {store.remote.name}` shows what it has"
            )
        reference = Reference(reference.name, version=number)
    numbers = numbers_of(store, reference.name)
    if reference.version in numbers:
        return [reference.version]
    if numbers and reference.digest is not None:
        slots = (read_slot(store, reference.name, number) for number in numbers)
        found = [slot.number for slot in slots if slot and slot.manifest.startswith(reference.digest)]
    else:
        found = [] if reference.version is not None else numbers if every else numbers[-1:]
    if not found:
        raise NotFound(f"{store.remote.name} has no '{reference}': {_hint(store, reference.name, numbers)}")
    return found


def _hint(store: Store, name: str, numbers: list[int]) -> str:
    if numbers:
        shown = ", ".join(map(str, numbers[-5:]))
        return f"'{name}' has versions {'... ' if len(numbers) > 5 else ''}{shown}"
    near = difflib.get_close_matches(name, all_numbers(store), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"`qhub remote show {store.remote.name}` lists what it has"


def _look(
    registry: Registry, store: Store, name: str, number: int, folder: Path, incoming: dict[str, Version],
    path: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """Add the version in a slot to `incoming`, after its parents; manifests and lineages are written to `folder`."""
    slot = read_slot(store, name, number)
    if slot is None or slot.manifest in incoming or slot.manifest in path:
        return
    if len(incoming) + len(path) >= MAX_VERSIONS:
        raise Corrupt(f"{store.url} says that '{name}@{number}' was made from more than {MAX_VERSIONS} versions")
    where = f"{store.url} ({name}@{number})"
    raw = _json(store, slot.manifest, where)
    lineage = _json(store, lineage_digest(raw, where), where)
    version = parse_manifest(raw, lineage, where)
    if (version.name, version.number) != (name, number):
        raise Corrupt(f"{store.url} has '{version}' where '{name}@{number}' should be: nothing was registered")
    (folder / hex_of(version.lineage_file.digest)).write_bytes(lineage)
    for entry in version.lineage.get("parents") or ():
        _look_parent(registry, store, entry, folder, incoming, path | {slot.manifest})
    incoming[slot.manifest] = version


def _look_parent(
    registry: Registry, store: Store, entry: dict[str, Any], folder: Path, incoming: dict[str, Version],
    path: frozenset[str],
) -> None:  # fmt: skip
    """Add a parent if the remote has it; one that nobody has stays named in the lineage only."""
    digest = entry.get("manifest_digest")
    try:
        reference = Reference.parse(str(entry.get("reference")))
    except BadReference:  # a file that was merged
        return
    if reference.version is None or not isinstance(digest, str):
        return
    if registry.rows("AND v.manifest_digest = ?", (digest,)):
        return
    if slot := find_slot(store, reference.name, reference.version, {digest}):
        _look(registry, store, reference.name, slot.number, folder, incoming, path)


def _json(store: Store, digest: str, where: str) -> bytes:
    try:
        data = store.read(blob_path(digest), MAX_JSON_BYTES)
    except FileNotFoundError:
        raise Corrupt(f"{where} lacks its manifest or lineage ({short(digest)}): push it again") from None
    if digest_bytes(data) != digest:
        raise Corrupt(f"{where} is damaged: {blob_path(digest)} has other bytes. Nothing was registered")
    return data


def _check_sizes(store: Store, root: Path, files: list[File]) -> None:
    """Before anything is fetched: the objects are as large as the manifests say, and there is room for them."""
    for file in files:
        size = store.size(blob_path(file.digest))
        if size != file.size:
            problem = "is not there" if size is None else f"has {size:,} bytes"
            raise Corrupt(
                f"{store.url}/{blob_path(file.digest)} {problem}, {file.path} has {file.size:,}: push it again"
            )
    total = sum(file.size for file in files)
    free = shutil.disk_usage(root).free
    if total > free:
        raise QhubError(f"there is no space for {total:,} bytes at {root}, {free:,} are free: nothing was fetched")
