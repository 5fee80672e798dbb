"""Files: where the lines of the request log go. They are the user's own alone, and together bounded."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from adapterhub_local.data.answer_log import log_files, new_name
from adapterhub_local.durable import alone
from adapterhub_local.errors import InputError
from serve.errors import TooLarge

PARTS = 8  # files that the whole log is divided into: as much of it goes at once when it is full


class LogFiles:
    """The files of one log, of which this process has one open, and locked so that no other removes it.

    `size`: bytes of all of them together, those of other processes with the same folder included. Not safe to use from
    several threads. Raises InputError if the folder cannot be written to.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.most = size // PARTS  # bytes of one file
        self._descriptor: int | None = None
        self._length = 0
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the request log {folder} cannot be created: {error.strerror}: name another folder"
            ) from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"the request log {folder} cannot be written to: name another folder")

    def append(self, row: bytes) -> None:
        """Write a line, all of it or nothing. Raises OSError if it cannot be written, TooLarge if it never could."""
        if len(row) > self.most:
            raise TooLarge(
                f"a record of {len(row):,} bytes is more than a file of the request log holds, which is an eighth of "
                "--request-log-size"
            )
        if self._descriptor is None or self._length + len(row) > self.most or not os.fstat(self._descriptor).st_nlink:
            self._begin()
        assert self._descriptor is not None
        written = 0
        try:
            while written < len(row):
                written += os.write(self._descriptor, row[written:])
        except OSError:
            self._cut_back()
            raise
        self._length += written

    def close(self) -> None:
        """Write to the open file no longer."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _begin(self) -> None:
        """Open a new file, once there is room for all that may come into it."""
        self.close()
        self.folder.mkdir(0o700, parents=True, exist_ok=True)  # its owner may have removed the log meanwhile
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with alone(self.folder / ".lock"):  # two that look at once would take each other's look for writing
            self._make_room()
            self._descriptor = os.open(self.folder / new_name(), flags, 0o600)
            self._length = 0
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def _make_room(self) -> None:
        """Remove the oldest files that nobody writes to. Raises OSError if those that are written to are too many."""
        held = {path: _try_lock(path) for path in log_files(self.folder)}
        try:
            # one that another process writes to may grow to its bound
            sizes = {
                path: self.most if descriptor is None else os.fstat(descriptor).st_size
                for path, descriptor in held.items()
            }
            total = sum(sizes.values())
            for path, descriptor in held.items():
                if total + self.most <= self.size:
                    return
                if descriptor is not None:
                    path.unlink(missing_ok=True)
                    total -= sizes[path]
            if total + self.most > self.size:
                raise OSError(errno.EDQUOT, "too many servers write to this log for its size (--request-log-size)")
        finally:
            for descriptor in held.values():
                if descriptor is not None:
                    os.close(descriptor)

    def _cut_back(self) -> None:
        """Take back what a line that failed has left; a file of which that fails is written to no more."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._length)
        except OSError:
            self.close()


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file; None if somebody else does, or it is gone or not a file of ours."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None
