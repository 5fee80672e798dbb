"""Versions of a remote, each after what it was merged from. What lies where there: `remote_layout.py`.

What comes may be hostile, and is checked before any of it is registered.
"""

import difflib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of, short
from adapterhub_local.durable import digest_bytes, link, on_full_disk, staging
from adapterhub_local.errors import BadReference, Corrupt, NotFound, QhubError
from adapterhub_local.refs import Reference
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.fetch import Download
from adapterhub_local.registry.moved import Moved, Progress, quiet
from adapterhub_local.registry.receive import (
    MAX_JSON_BYTES,
    MAX_VERSIONS,
    check_files,
    find_same,
    lineage_digest,
    parse_manifest,
    register,
)
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_layout import (
    all_numbers,
    blob_path,
    check_format,
    find_slot,
    numbers_of,
    read_slot,
)
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import number_of
from adapterhub_local.registry.store import Store
from adapterhub_local.registry.version import File, Version


def pull(
    registry: Registry, store: Store, reference: Reference, *, every: bool = False, dry_run: bool = False,
    progress: Progress = quiet, accept: Callable[[Version], None] | None = None,
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
