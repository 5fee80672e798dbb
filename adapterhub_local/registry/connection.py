"""A connection to a SQLite file in a home: how it is opened where others share the home, and takes the write lock."""

import fcntl
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from adapterhub_local.durable import create_shared, is_shared, may_write, share_file
from adapterhub_local.registry.migrations import apply_migrations
from adapterhub_local.registry.mounts import check_local

BUSY_TIMEOUT_MS = 60_000


class Held:
    """A thread's connection, closed as soon as nobody has it: sqlite3's own are part of a reference cycle each, and
    would stay open until the garbage collector comes by."""

    def __init__(self, connection: sqlite3.Connection, *, is_fixed: bool) -> None:
        self.connection = connection
        self.is_fixed = is_fixed  # it was promised that nobody writes
        self.seen: tuple[object, ...] = ()  # the file it was opened on
        self.log: tuple[int, ...] = ()  # and its log

    def __del__(self) -> None:
        with suppress(sqlite3.Error):
            self.connection.close()


def connect(path: Path, log: Path) -> Held:
    """A connection to the database at `path`, whose `log` is beside it.

    It creates no file where we may not write the database: it would be ours, and in the way. A home may be mounted
    read-only, or be another member's of a group.
    """
    timeout = BUSY_TIMEOUT_MS / 1000
    if may_write(path.parent):
        check_local(path.parent)  # what cannot be written is read, wherever it is
        create_shared(path)
        share_file(path)
        if may_write(path):
            return Held(_connected(str(path), timeout), is_fixed=False)
    address = f"file:{quote(str(path))}?mode=ro"
    is_fixed = not seen_file(log)  # all there is is in the one file
    address += "&immutable=1" if is_fixed else "&readonly_shm=1"
    held = Held(_connected(address, timeout), is_fixed=is_fixed)
    held.connection.execute("PRAGMA query_only = ON")
    return held


def _connected(address: str, timeout: float) -> sqlite3.Connection:
    # may be closed by another thread: whoever lets go of it last
    is_uri = address.startswith("file:")
    return sqlite3.connect(address, timeout=timeout, isolation_level=None, uri=is_uri, check_same_thread=False)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Of all members of a group that shares a folder, only this one opens its database now.

    SQLite gives the files beside a database its rights, but only after they can be seen: who opens the database in
    that moment could not write it.
    """
    if not is_shared(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def seen_file(path: Path, *, empty: bool = False) -> tuple[int, ...]:
    """Which file has this name, () if there is none or, unless `empty` counts, nothing was ever written to it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    return (status.st_dev, status.st_ino) if status.st_size or empty else ()


def begin(connection: sqlite3.Connection) -> None:
    """Take the write lock, asking every few milliseconds until the busy timeout.

    SQLite's own wait sleeps up to 100 ms at a time, during which the lock lies idle: with 8 writers most of
    the time. Raises sqlite3.OperationalError after the timeout.
    """
    _patiently(connection, "BEGIN IMMEDIATE")


def migrate(connection: sqlite3.Connection) -> None:
    """Apply what is missing, under an exclusive lock so that two processes cannot do it at once."""
    # SQLite does not always wait for those who read while the journal's mode is changed: several processes may do so
    _patiently(connection, "PRAGMA journal_mode = WAL")
    _patiently(connection, "BEGIN EXCLUSIVE")
    (applied,) = connection.execute("PRAGMA user_version").fetchone()
    apply_migrations(connection, applied)
    connection.execute("COMMIT")


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Carry out a statement that needs a lock, asking for it again and again until the busy timeout."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    wait = 0.001
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311 - nothing secret
            wait = min(wait * 1.1, 0.01)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
