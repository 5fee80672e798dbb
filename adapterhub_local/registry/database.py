"""The SQLite index: which versions and aliases exist. Versions can be rebuilt from their manifests.

Write-ahead logging, one writer at a time by `BEGIN IMMEDIATE`, a busy timeout instead of errors,
STRICT tables, and triggers that make versions and logs append-only.
"""

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adapterhub_local.errors import Corrupt, InputError, QhubError
from adapterhub_local.registry.migrations import MIGRATIONS, apply_migrations
from adapterhub_local.settings import make_folder

BUSY_TIMEOUT_MS = 60_000


class Database:
    """Connections to one `registry.db`, one a thread; created by the first write, never by a read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query, none if nothing was ever written. Raises Corrupt if the file is damaged."""
        if not self.path.exists():
            return []
        try:
            return self._connection().execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path} cannot be read: {error}. `qhub fsck --rebuild-db` makes it again") from None

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start: all of it happens or none."""
        make_folder(self.path.parent)
        connection = self._connection()
        try:
            _begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:  # read-only, full, or locked for longer than the timeout
            raise QhubError(f"{self.path} cannot be written: {error}") from None
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path} is damaged: {error}. `qhub fsck --rebuild-db` makes it again") from None

    def is_sound(self) -> bool:
        """Whether SQLite can read the whole file. A database that was never written is sound."""
        try:
            return not self.path.exists() or [tuple(row) for row in self.rows("PRAGMA integrity_check")] == [("ok",)]
        except Corrupt:
            return False

    def close(self) -> None:
        """Close this thread's connection; the next use opens another."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._open()
        return connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = self._connect()
            connection.row_factory = sqlite3.Row
            (applied,) = connection.execute("PRAGMA user_version").fetchone()
            if applied > len(MIGRATIONS):
                raise InputError(f"{self.path} was written by a newer version of qhub: install that version or newer")
            if applied < len(MIGRATIONS):
                if connection.execute("PRAGMA query_only").fetchone()[0]:
                    raise InputError(
                        f"{self.path} was written by an older version of qhub and cannot be written here: run any "
                        "command once where the home can be written, which brings it up to date"
                    )
                _migrate(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path} cannot be opened: {error}. `qhub fsck --rebuild-db` makes it again") from None
        return connection

    def _connect(self) -> sqlite3.Connection:
        """A connection that needs to create no file where none can be created: a home may be mounted read-only."""
        effective = os.access in os.supports_effective_ids
        if not self.path.exists() or os.access(self.path.parent, os.W_OK, effective_ids=effective):
            return sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
        address = f"file:{quote(str(self.path))}?mode=ro"
        log = Path(f"{self.path}-wal")
        if not log.exists() or log.stat().st_size == 0:  # all there is is in the one file
            address += "&immutable=1"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
        connection.execute("PRAGMA query_only = ON")
        return connection


def _begin(connection: sqlite3.Connection) -> None:
    """Take the write lock, asking every few milliseconds until the busy timeout.

    SQLite's own wait sleeps up to 100 ms at a time, during which the lock lies idle: with 8 writers most of
    the time. Raises sqlite3.OperationalError after the timeout.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    wait = 0.001
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311 - nothing secret
            wait = min(wait * 1.1, 0.01)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply what is missing, under an exclusive lock so that two processes cannot do it at once."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN EXCLUSIVE")
    (applied,) = connection.execute("PRAGMA user_version").fetchone()
    apply_migrations(connection, applied)
    connection.execute("COMMIT")
