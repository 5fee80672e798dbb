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
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_local.errors import InputError, InUse, QhubError

CHUNK = 1 << 20


@contextmanager
def telling_full(where: Path, what: str = "nothing was stored") -> Iterator[None]:
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


def digest_bytes(data: bytes | memoryview) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """`sha256:<hex>` of the file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


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
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(parent: Path, prefix: str = "") -> Iterator[Path]:
    """A fresh folder under `parent`, removed with all it holds when the block ends."""
    folder = parent / f"{prefix}{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
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
    target.parent.mkdir(parents=True, exist_ok=True)
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


def link(source: Path, target: Path) -> None:
    """Have the file under a second name; a copy where the filesystem has no links."""
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copyfile(source, target)
