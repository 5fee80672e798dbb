"""The SQLite index: which versions and aliases exist. Versions can be rebuilt from their manifests.

Write-ahead logging, one writer at a time by `BEGIN IMMEDIATE`, a busy timeout instead of errors,
STRICT tables, and triggers that make versions and logs append-only.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_local.durable import may_write
from adapterhub_local.errors import Corrupt, InputError, QhubError
from adapterhub_local.registry.connection import Held, alone_in, begin, connect, migrate, seen_file
from adapterhub_local.registry.ledger import Ledger, Line, entered, given_twice, last_entered, meet, unread
from adapterhub_local.registry.manifests import holds_manifests, orphans
from adapterhub_local.registry.migrations import MIGRATIONS, schema_problem
from adapterhub_local.settings import Home, make_folder

# sqlite3 decodes its own messages, which quote what a damaged schema says
DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)
# what the disk, the rights and the limits of a process say, not what is in the file
_OUTSIDE = {
    sqlite3.SQLITE_IOERR: "the disk or a limit of this process refuses it",
    sqlite3.SQLITE_FULL: "free some space and try again",
    sqlite3.SQLITE_CANTOPEN: "check its permissions, and how many files this process may open",
    sqlite3.SQLITE_READONLY: "check its permissions and those of its folder",
    sqlite3.SQLITE_PERM: "check its permissions",
    sqlite3.SQLITE_AUTH: "check its permissions",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
    sqlite3.SQLITE_BUSY: "another process has held it for a minute",
    sqlite3.SQLITE_LOCKED: "another process holds it",
    sqlite3.SQLITE_PROTOCOL: "another process holds it",
}
_REBUILD = "`qhub fsck --rebuild-db` makes it again"
_WORDS = {"removal": "the removal", "evaluation": "an evaluation"}


class Database:
    """Connections to the `registry.db` of a home, one a thread; created by the first write, never by a read.

    What is read is trusted only if the file knows everything that was committed in its home (ledger.py): one that
    was deleted, emptied or brought back from an older backup raises Corrupt. With `checked=False` it does not:
    for those who look at the damage and repair it.

    Nothing but SQLite opens the file: POSIX locks are a process's, not a descriptor's, so closing any other
    descriptor of the file gives up those of all its connections. The next process to leave would then believe that
    it is the last, and remove the log under them (https://sqlite.org/howtocorrupt.html, section 2.2).
    """

    def __init__(self, home: Home, *, checked: bool = True) -> None:
        self.home = home
        self.path = home.database
        self._log = Path(f"{self.path}-wal")
        self.ledger = Ledger(home)
        self.checked = checked
        self._local = threading.local()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query, none if nothing was ever written. Raises Corrupt if the file is damaged or too old."""
        connection = self.connection()
        if connection is None:
            return []
        try:
            return connection.execute(query, values).fetchall()
        except DAMAGED as error:
            raise self._refusal(error, "read") from None

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start: all of it happens or none."""
        make_folder(self.path.parent)
        connection = self.connection(create=True)
        assert connection is not None, "it was created"
        try:
            begin(connection)
            try:
                before = last_entered(connection)
                if self.checked:
                    self._meet(connection)
                yield connection
                lines = entered(connection, before)
                if self.checked and (missing := given_twice(connection, self.ledger, lines)):
                    raise Corrupt(self._behind(missing))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.IntegrityError:
            raise
        except DAMAGED as error:
            raise self._refusal(error, "written") from None
        if lines:
            with suppress(OSError):  # they are committed: the next who writes appends them
                self.ledger.append(lines)

    def problem(self) -> str | None:
        """Why what is in the file cannot be trusted, None if it can. A database that was never written is sound.

        Raises what is not a fault of the file, such as a disk that cannot be read.
        """
        try:
            found = [tuple(row) for row in self.rows("PRAGMA integrity_check")]
            if found and found != [("ok",)]:
                return f"{self.path} is damaged: {str(found[0][0])[:200]}. {_REBUILD}"
            connection = self.connection()
            if connection is not None and (wrong := self._header_problem(connection) or schema_problem(connection)):
                return f"{self.path} is damaged: {wrong}. {_REBUILD}"
        except Corrupt as error:
            return str(error)
        except DAMAGED as error:
            refusal = self._refusal(error, "read")
            if isinstance(refusal, Corrupt):
                return str(refusal)
            raise refusal from None
        return None

    def _header_problem(self, connection: sqlite3.Connection) -> str | None:
        """SQLite opens a file whose format it does not know for reading, if it can, and never says why."""
        if not may_write(self.path) or connection.execute("PRAGMA query_only").fetchone()[0]:
            return None  # nobody here would write it
        begin(connection)
        try:
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:
                raise
            return "its header names a file format that is unknown"
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        return None

    def is_sound(self) -> bool:
        """Whether there is no `problem`."""
        return self.problem() is None

    def close(self) -> None:
        """Close this thread's connection; the next use opens another."""
        self._local.held = None

    def connection(self, *, create: bool = False) -> sqlite3.Connection | None:
        """This thread's connection, None if there is no database yet."""
        seen = seen_file(self.path)
        held: Held | None = getattr(self._local, "held", None)
        if held is not None and held.seen != (seen, self._state() if held.is_fixed else None):
            self.close()  # another file has its name since: one that was restored, or made again
            held = None
        if not seen:
            self._check_absence()
            if not create and not (seen := seen_file(self.path)):
                return None
        if held is None:
            before = self._state()
            with alone_in(self.path.parent):
                held = self._local.held = self._open()
            held.seen = (seen_file(self.path), before if held.is_fixed else None)
            held.log = seen_file(self._log, empty=True)
        elif not held.is_fixed and held.log != seen_file(self._log, empty=True):
            raise QhubError(
                f"{self._log} was removed while this process had it open: somebody deleted it, or code in this process "
                f"has read {self.path.name} as a file, which gives up SQLite's locks. Nothing was written; start it "
                "again, and back a home up from another process"
            )
        return held.connection

    def _meet(self, connection: sqlite3.Connection) -> None:
        """Raise Corrupt, inside a transaction, unless the database knows all that was ever committed here."""
        if self.ledger.size() is None:  # a home of an older qhub, or a new one
            published = [one for one in orphans(self.home, connection, self.ledger) if one.is_published]
            if published:
                raise Corrupt(self._behind([Line("version", one.reference, one.digest) for one in published]))
            self.ledger.append(())
        if missing := meet(connection, self.ledger):
            raise Corrupt(self._behind(missing))

    def _state(self) -> tuple[int, ...]:
        """What changes when others write: SQLite does not look where it was promised that nobody writes."""
        found = []
        for path in (self.path, self._log):
            with suppress(FileNotFoundError):
                status = path.stat()
                found += [status.st_size, status.st_mtime_ns]
        return tuple(found)

    def _check_absence(self) -> None:
        """Raise Corrupt if there is no database although something was published here."""
        if not self.checked or not self.path.parent.is_dir():
            return
        lines = self.ledger.read()[0]
        held = len({line.version for line in lines if line.kind == "version"}) or holds_manifests(self.home)
        if not held or seen_file(self.path):  # made by another process meanwhile
            return
        state = "is empty" if self.path.exists() else "is missing"
        what = f"{held} version{'' if held == 1 else 's'} that were published" if held is not True else "manifests"
        raise Corrupt(f"{self.path} {state}, but the home holds {what}. {_REBUILD}")

    def _behind(self, missing: Sequence[Line]) -> str:
        subjects = list(dict.fromkeys(
            line.subject if line.kind == "version" else f"{_WORDS[line.kind]} of {line.subject}"
            if line.kind != "mark" else "changes of aliases, tags, evaluations or removals" for line in missing
        ))  # fmt: skip
        more = f" and {len(subjects) - 3} more" if len(subjects) > 3 else ""
        return (f"{self.path} is older than its home: it does not know {', '.join(subjects[:3])}{more}. Was it brought "
                "back from a backup? `qhub fsck --repair` restores what it lacks")  # fmt: skip

    def _refusal(self, error: BaseException, done: str) -> QhubError:
        """What to say of an error of SQLite."""
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        reason = " ".join(str(error).split())[:200] if not isinstance(error, UnicodeDecodeError) else "not UTF-8"
        if code in _OUTSIDE:
            return QhubError(f"{self.path} cannot be {done}: {reason}: {_OUTSIDE[code]}")
        return Corrupt(f"{self.path} is damaged: {reason}. {_REBUILD}")

    def _open(self) -> Held:
        try:
            held = connect(self.path, self._log)
        except DAMAGED as error:
            raise self._refusal(error, "opened") from None
        try:
            connection = held.connection
            connection.row_factory = sqlite3.Row
            (applied,) = connection.execute("PRAGMA user_version").fetchone()  # makes SQLite's files beside it
            if applied > len(MIGRATIONS):
                if not self.checked and not schema_problem(connection):
                    raise Corrupt(f"{self.path} is damaged: it does not have the schema that it names. {_REBUILD}")
                raise InputError(f"{self.path} was written by a newer version of qhub: install that version or newer")
            if applied < len(MIGRATIONS):
                if connection.execute("PRAGMA query_only").fetchone()[0]:
                    raise InputError(
                        f"{self.path} was written by an older version of qhub and cannot be written here: run any "
                        "command once where the home can be written, which brings it up to date"
                    )
                migrate(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            if self.checked and (missing := unread(connection, self.ledger)):
                raise Corrupt(self._behind(missing))
        except DAMAGED as error:
            held.connection.close()
            raise self._refusal(error, "opened") from None
        except BaseException:
            held.connection.close()
            raise
        return held
