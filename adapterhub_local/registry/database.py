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
from adapterhub_local.settings import make_folder

BUSY_TIMEOUT_MS = 60_000

# Append only: migration n brings a database from user_version n to n + 1.
MIGRATIONS = (
    """
    CREATE TABLE versions (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        number INTEGER NOT NULL CHECK (number >= 1),
        manifest_digest TEXT NOT NULL UNIQUE,
        content_digest TEXT NOT NULL,
        base_fingerprint TEXT,
        created_at TEXT NOT NULL,
        manifest TEXT NOT NULL,
        lineage TEXT NOT NULL,
        UNIQUE (name, number)
    ) STRICT;
    CREATE INDEX versions_by_content ON versions (content_digest);
    CREATE INDEX versions_by_base ON versions (base_fingerprint);
    CREATE TRIGGER versions_keep BEFORE UPDATE ON versions BEGIN SELECT RAISE(ABORT, 'versions are immutable'); END;
    CREATE TRIGGER versions_stay BEFORE DELETE ON versions BEGIN SELECT RAISE(ABORT, 'versions are immutable'); END;

    -- A removed version keeps its row, so that its number is never used again.
    CREATE TABLE removals (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        removed_at TEXT NOT NULL,
        PRIMARY KEY (name, number),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    CREATE TABLE aliases (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        number INTEGER NOT NULL,
        PRIMARY KEY (name, alias),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    CREATE TABLE alias_log (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        old_number INTEGER,
        new_number INTEGER,
        changed_at TEXT NOT NULL
    ) STRICT;
    CREATE TRIGGER alias_log_keep BEFORE UPDATE ON alias_log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    CREATE TRIGGER alias_log_stay BEFORE DELETE ON alias_log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    """,
    """
    CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        task TEXT NOT NULL,
        digest TEXT NOT NULL,
        evaluation TEXT NOT NULL,
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;
    CREATE INDEX evaluations_by_version ON evaluations (name, number);
    """,
    """
    CREATE TABLE tags (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        tag TEXT NOT NULL,
        PRIMARY KEY (name, number, tag),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;
    CREATE INDEX tags_by_tag ON tags (tag);

    -- What a person wrote later; the description a version was made with is in its lineage.
    CREATE TABLE descriptions (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        description TEXT NOT NULL,
        PRIMARY KEY (name, number),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    -- Content that a running process uses: it is not collected before the lease ends (seconds since 1970).
    CREATE TABLE leases (
        content_digest TEXT NOT NULL,
        holder TEXT NOT NULL,
        expires_at REAL NOT NULL,
        PRIMARY KEY (content_digest, holder)
    ) STRICT;

    ALTER TABLE alias_log ADD COLUMN action TEXT NOT NULL DEFAULT 'set';

    -- The newest score of each task and metric, from lineages and evaluations, for filters and sorting.
    CREATE TABLE scores (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        task TEXT NOT NULL,
        metric TEXT NOT NULL,
        value REAL NOT NULL,
        PRIMARY KEY (name, number, task, metric)
    ) STRICT;
    CREATE INDEX scores_by_metric ON scores (metric, value);
    CREATE TRIGGER scores_of_version AFTER INSERT ON versions BEGIN
        INSERT OR REPLACE INTO scores
        SELECT new.name, new.number, task.key, metric.key, metric.value
        FROM json_each(new.lineage, '$.metrics') task,
            json_each(CASE WHEN task.type = 'object' THEN task.value ELSE '{}' END, '$.adapter') metric
        WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text' AND typeof(task.key) = 'text';
    END;
    CREATE TRIGGER scores_of_evaluation AFTER INSERT ON evaluations BEGIN
        DELETE FROM scores WHERE name = new.name AND number = new.number AND task = new.task;
        INSERT OR REPLACE INTO scores
        SELECT new.name, new.number, new.task, metric.key, metric.value
        FROM json_each(new.evaluation, '$.adapter') metric
        WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text';
    END;

    CREATE VIRTUAL TABLE search USING fts5 (name, description, tags, recipe);
    CREATE TRIGGER search_version AFTER INSERT ON versions BEGIN
        INSERT INTO search (rowid, name, description, tags, recipe) VALUES (
            new.id, new.name, json_extract(new.lineage, '$.description'), '', json_extract(new.lineage, '$.recipe')
        );
    END;
    CREATE TRIGGER search_removed AFTER INSERT ON removals BEGIN
        DELETE FROM search WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;
    CREATE TRIGGER search_tagged AFTER INSERT ON tags BEGIN
        UPDATE search SET tags = (
            SELECT group_concat(tag, ' ') FROM tags WHERE name = new.name AND number = new.number
        ) WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;
    CREATE TRIGGER search_untagged AFTER DELETE ON tags BEGIN
        UPDATE search SET tags = (
            SELECT group_concat(tag, ' ') FROM tags WHERE name = old.name AND number = old.number
        ) WHERE rowid = (SELECT id FROM versions WHERE name = old.name AND number = old.number);
    END;
    CREATE TRIGGER search_described AFTER INSERT ON descriptions BEGIN
        UPDATE search SET description = new.description
        WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;

    INSERT INTO search (rowid, name, description, tags, recipe)
    SELECT id, name, json_extract(lineage, '$.description'), '', json_extract(lineage, '$.recipe')
    FROM versions LEFT JOIN removals r USING (name, number) WHERE r.name IS NULL;
    INSERT OR REPLACE INTO scores
    SELECT v.name, v.number, task.key, metric.key, metric.value
    FROM versions v, json_each(v.lineage, '$.metrics') task,
        json_each(CASE WHEN task.type = 'object' THEN task.value ELSE '{}' END, '$.adapter') metric
    WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text' AND typeof(task.key) = 'text';
    INSERT OR REPLACE INTO scores
    SELECT e.name, e.number, e.task, metric.key, metric.value
    FROM (SELECT * FROM evaluations ORDER BY id) e, json_each(e.evaluation, '$.adapter') metric
    WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text';
    """,
    """
    -- How requests for a plain name are split between its aliases; place: the order in which users are dealt out.
    CREATE TABLE splits (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        share INTEGER NOT NULL CHECK (share > 0),
        place INTEGER NOT NULL,
        PRIMARY KEY (name, alias)
    ) STRICT;
    """,
    """
    -- Aliases, tags and descriptions as they were said, one JSON record a time; each is a blob, too (journal.py).
    CREATE TABLE marks (id INTEGER PRIMARY KEY, record TEXT NOT NULL) STRICT;
    CREATE TRIGGER marks_keep BEFORE UPDATE ON marks BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
    CREATE TRIGGER marks_stay BEFORE DELETE ON marks BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
    """,
)


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
                _migrate(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path} cannot be opened: {error}. `qhub fsck --rebuild-db` makes it again") from None
        return connection

    def _connect(self) -> sqlite3.Connection:
        """A connection that needs to create no file where none can be created: a home may be mounted read-only."""
        options: dict[str, Any] = {"timeout": BUSY_TIMEOUT_MS / 1000, "isolation_level": None}
        effective = os.access in os.supports_effective_ids
        if not self.path.exists() or os.access(self.path.parent, os.W_OK, effective_ids=effective):
            return sqlite3.connect(self.path, **options)
        address = f"file:{quote(str(self.path))}?mode=ro"
        log = Path(f"{self.path}-wal")
        if not log.exists() or log.stat().st_size == 0:  # all there is is in the one file
            address += "&immutable=1"
        return sqlite3.connect(address, uri=True, **options)


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


def apply_migrations(connection: sqlite3.Connection, applied: int) -> None:
    """Bring the schema from `applied` to the newest, inside the caller's transaction."""
    for migration in MIGRATIONS[applied:]:
        for statement in _statements(migration):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one; `executescript` would commit between them."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
