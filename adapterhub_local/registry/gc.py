"""Remove versions, and give back the space of what nothing needs: mark and sweep, into `quarantine/` first.

A removed version keeps its row, manifest and lineage, so its number stays taken and its children stay
explained. Leases of running processes keep content that they may load again.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.digests import PATTERN, from_hex
from adapterhub_local.durable import sync_folder
from adapterhub_local.errors import Corrupt, InUse
from adapterhub_local.registry.ancestry import children
from adapterhub_local.registry.fsck import read_rows
from adapterhub_local.registry.journal import marking, note
from adapterhub_local.registry.ledger import enter
from adapterhub_local.registry.records import removal_record
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.report import Report, found_orphans, state_problems
from adapterhub_local.registry.rows import now, point_alias
from adapterhub_local.registry.version import Version, version_of_row
from adapterhub_local.settings import make_folder

GRACE_SECONDS = 3600.0  # what is younger may belong to a version that is being published
TMP_SECONDS = 24 * 3600.0  # a run may stage for hours
PURGE_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Collected:
    """Files and bytes that were, or would be, set aside, deleted for good, and cleared from `tmp/`."""

    num_blobs: int
    blob_bytes: int
    num_purged: int
    purged_bytes: int
    num_temporary: int
    applied: bool


def remove(registry: Registry, version: Version, *, force: bool = False) -> None:
    """Remove a version. Raises InUse if an alias points to it or a merge has it as parent, unless `force`.

    Its aliases go with it, logged. Its bytes stay until `collect`.
    """
    with marking(registry.database, registry.blobs) as db:
        values = (version.name, version.number)
        query = "SELECT alias FROM aliases WHERE name = ? AND number = ? ORDER BY alias"
        aliases = [row["alias"] for row in db.execute(query, values)]
        if aliases and not force:
            raise InUse(f"{version} is {', '.join(f'{version.name}@{alias}' for alias in aliases)}: "
                        "move the alias first, or --force removes both")  # fmt: skip
        made = children(registry, version)
        if made and not force:
            shown = ", ".join(made[:3]) + (", ..." if len(made) > 3 else "")
            raise InUse(f"{version} is a parent of {shown}: --force removes it anyway")
        removed_at = now()
        record = registry.blobs.put("removal.json", removal_record(version.manifest_digest, removed_at))
        for alias in aliases:
            point_alias(db, version.name, alias, None, action="removed")
        if db.execute("INSERT OR IGNORE INTO removals VALUES (?, ?, ?)", (*values, removed_at)).rowcount:
            enter(db, "removal", version, record.digest)
            digest = version.manifest_digest
            note(db, "removal", name=version.name, number=version.number, manifest=digest, at=removed_at)


def lease(registry: Registry, version: Version, holder: str, seconds: float) -> None:
    """Keep the content of a version for this many seconds from now, for `holder` (process and host); may be renewed."""
    renew(registry, {version.content_digest}, holder, seconds)


def renew(registry: Registry, digests: Set[str], holder: str, seconds: float) -> None:
    """Keep these contents for this many seconds from now; leases that ended are forgotten."""
    clock = time.time()
    with registry.database.writing() as db:
        db.execute("DELETE FROM leases WHERE expires_at < ?", (clock,))
        rows = [(digest, holder, clock + seconds) for digest in sorted(digests)]
        db.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", rows)


def release(registry: Registry, holder: str) -> None:
    """End all leases of `holder`."""
    with registry.database.writing() as db:
        db.execute("DELETE FROM leases WHERE holder = ?", (holder,))


def collect(
    registry: Registry, *, apply: bool = False, grace: float = GRACE_SECONDS, purge: float = PURGE_SECONDS
) -> Collected:
    """Set aside the blobs that nothing needs and that are older than `grace` seconds; count them only without `apply`.

    What has been in quarantine for `purge` seconds is deleted for good, and so are leftovers in `tmp/`.
    Raises Corrupt if the database cannot be read or does not know all that was published: nobody knows then what is
    needed.
    """
    if problems := list(state_problems(registry.home)):
        shown = "; ".join(f"{problem.subject}: {problem.message}" for problem in problems[:2])
        more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise Corrupt(f"{shown}{more}: run `qhub fsck --repair` first. Nothing was collected")
    if registry.database.connection() is None:
        return Collected(0, 0, 0, 0, 0, apply)
    clock = time.time()
    sweep: list[Path] = []
    size = 0
    with registry.database.writing():  # nobody can publish a reference to what is being moved
        needed, contents = _marked(registry, clock)
        for path in registry.blobs.paths():
            status = path.lstat()
            if from_hex(path.name) not in needed and status.st_mtime < clock - grace:
                sweep.append(path)
                size += status.st_size
        if apply and sweep:
            make_folder(registry.home.quarantine)
            for path in sweep:
                path.rename(registry.home.quarantine / f"{path.name}.unused")
    if apply:
        for folder in sorted({path.parent for path in sweep} | ({registry.home.quarantine} if sweep else set())):
            sync_folder(folder)
        for folder in registry.home.folders.glob("*"):  # links that would keep the bytes of removed versions
            if from_hex(folder.name) not in contents:
                shutil.rmtree(folder, ignore_errors=True)
    old = dict(_aged(registry.home.quarantine, clock - purge))
    left = [path for path in _entries(registry.home.tmp) if _newest(path) < clock - TMP_SECONDS]
    if apply:
        for path in (*old, *left):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return Collected(len(sweep), size, len(old), sum(old.values()), len(left), apply)


def _marked(registry: Registry, clock: float) -> tuple[set[str], set[str]]:
    """The digests of blobs, and of contents, that are needed."""
    versions, copies = read_rows(registry, Report())
    needed = set(copies)
    for orphan in found_orphans(registry.database):  # of a number that is free, and may be somebody's at this moment
        needed |= orphan.blobs
    leased = {row[0] for row in registry.database.rows(
        "SELECT content_digest FROM leases WHERE expires_at > ?", (clock,))}  # fmt: skip
    contents = set(leased)
    for version in versions:
        needed |= {file.digest for file in version.files}
        contents.add(version.content_digest)
    for row in registry.database.rows("SELECT * FROM versions"):
        try:
            version = version_of_row(row)
        except Corrupt:  # whatever a damaged row may need is kept
            needed |= set(PATTERN.findall(" ".join(map(str, tuple(row)))))
            contents.add(row["content_digest"])
            continue
        if version.content_digest in leased:
            needed |= {file.digest for file in version.files}
    return needed, contents


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _newest(path: Path) -> float:
    """The latest time at which a file or anything in a folder was changed; the future for what is gone already."""
    try:
        times = [path.lstat().st_mtime]
    except FileNotFoundError:
        return float("inf")
    for parent, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                times.append(os.lstat(os.path.join(parent, name)).st_mtime)
    return max(times)


def _aged(folder: Path, before: float) -> Iterator[tuple[Path, int]]:
    """What was put into a folder before a time, and its size."""
    for path in _entries(folder):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if status.st_ctime < before:
                yield path, status.st_size
