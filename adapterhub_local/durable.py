"""Writing so that nothing is lost or half-written: canonical JSON, digests, stage-and-rename.

Every write goes to a new name in a staging folder of the same filesystem, is flushed to disk, and
becomes visible by one rename. A crash leaves files under `tmp/`, never a half-written result.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_local.digests import Digest, from_hex
from adapterhub_local.errors import InputError, InUse, QhubError

CHUNK = 1 << 20
ATTEMPTS = 100  # at a folder that other processes remove or replace


@contextmanager
def on_full_disk(where: Path, what: str = "nothing was stored") -> Iterator[None]:
    """Raises QhubError that says so if the disk at `where` is full, the quota used up or a file too large."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise QhubError(f"there is no space left at {where}: {what}, free some and try again") from None


def canonical_json(value: Any) -> bytes:
    """`value` as JSON with sorted keys and no spaces, UTF-8: equal values give equal bytes.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # a file name that is not UTF-8 has lone surrogates: escaped, as JSON allows
    return text.encode(errors="backslashreplace")


def digest_bytes(data: bytes | memoryview) -> Digest:
    """`sha256:<hex>` of `data`."""
    return from_hex(hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> Digest:
    """`sha256:<hex>` of the file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return from_hex(hashlib.file_digest(file, "sha256").hexdigest())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new files, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the file's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time, in the file `path`; others wait. The file stays."""
    share_parents(path.parent)
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def share_parents(folder: Path) -> None:
    """Create a folder and those it is in; what is made in a folder that a group shares is the group's, too.

    From the first moment: another member of the group may enter it as soon as it can be seen.
    """
    for _ in range(ATTEMPTS):
        if folder.is_dir():
            return
        share_parents(folder.parent)
        # another process may remove the parent just then, or put its own, as empty, in its place
        with suppress(FileNotFoundError):
            _make_shared(folder)
            return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _make_shared(folder: Path) -> None:
    if not is_shared(folder.parent):
        try:
            folder.mkdir()  # without exist_ok, which raises if another process removes the folder just then
        except FileExistsError:
            if _is_something_else(folder):
                raise
        return
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    made.mkdir()
    try:
        made.chmod(stat.S_IMODE(made.stat().st_mode) | stat.S_ISGID | stat.S_IRWXG)
        made.rename(folder)  # in the place of an empty one, too, which another member has just made
    except OSError as error:
        made.rmdir()
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _is_something_else(path: Path) -> bool:
    """Whether what has this name, if anything still has, is not a folder."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode) and not path.is_dir()
    except FileNotFoundError:
        return False


def share_file(path: Path) -> None:
    """Give a file that is written in place the rights of its folder, where a group shares that: all of it may write."""
    wanted = stat.S_IMODE(path.parent.stat().st_mode) & 0o666
    status = path.stat()
    if is_shared(path.parent) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != wanted:
        path.chmod(wanted)


def create_shared(path: Path) -> None:
    """Create an empty file that is written in place, unless it is there, with its rights from the first moment.

    Another member of a group may open it as soon as it can be seen: rights that come later would be too late.
    """
    if path.exists():
        return
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    made.touch(exist_ok=False)
    try:
        share_file(made)
        os.link(made, path)
    except FileExistsError:
        return
    except OSError:  # a filesystem without hard links
        path.touch()
        share_file(path)
    finally:
        made.unlink(missing_ok=True)


def is_shared(folder: Path) -> bool:
    """Whether a group shares a folder: its setgid bit is set, and the group may write."""
    shared = stat.S_ISGID | stat.S_IWGRP
    return folder.stat().st_mode & shared == shared


def may_write(path: Path) -> bool:
    """Whether this user may write a file or folder; what is not there yet counts as what it would be made in."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def staging(parent: Path, prefix: str = "") -> Iterator[Path]:
    """A fresh folder under `parent`, removed with all it holds when the block ends."""
    folder = parent / f"{prefix}{uuid.uuid4().hex}"
    share_parents(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place_folder(staged: Path, target: Path) -> None:
    """Make the finished folder `staged` visible as `target` by one rename. Raises InUse if `target` exists."""
    for path in staged.rglob("*"):
        if path.is_file():
            sync_file(path)
    sync_folder(staged)
    share_parents(target.parent)
    try:
        # rename replaces an empty folder; anything else that is there makes it fail
        staged.rename(target)
    except OSError as error:
        if target.exists():
            raise InUse(f"{target} exists already: remove it or choose another name") from None
        raise error
    sync_folder(target.parent)


def place_file(staged: Path, target: Path) -> None:
    """Make the finished file `staged` visible as `target`. Raises InUse if `target` exists."""
    sync_file(staged)
    try:
        os.link(staged, target)  # unlike rename, fails if another process was first
        staged.unlink()
    except FileExistsError:
        raise InUse(f"{target} exists already: remove it or choose another name with -o") from None
    except OSError:  # a filesystem without hard links
        staged.rename(check_absent(target))
    sync_folder(target.parent)


def check_absent(target: Path) -> Path:
    """`target` as a path that can be created. InUse if it exists, InputError if its folder does not or is closed."""
    if target.exists():
        raise InUse(f"{target} exists already: remove it or choose another name with -o")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target.absolute().parent} does not exist: create the folder first")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputError(f"{target.absolute().parent} cannot be written to: choose another folder with -o")
    return target


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new file beside `path`, which takes its place when the block ends: a reader sees the old one or the new one.

    If the block raises, `path` stays as it was. One process at a time may do so.
    """
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)  # of a process that was killed
    os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield staged
        sync_file(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Have the file under a second name; a copy where the filesystem has no links."""
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copyfile(source, target)
