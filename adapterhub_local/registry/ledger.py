"""What was ever committed, in a file beside the database: one line a version, removal, evaluation and mark.

    version sentiment@3 sha256:<manifest>
    removal sentiment@1 sha256:<record>
    evaluation sentiment@3 sha256:<record>
    mark 12 sha256:<record>

A line is appended after its commit and never changed. So a database that was deleted or comes back from an older
backup is found to know less than its home, and a blob that a crash left behind is known from one that was published.
The database keeps how far it has read (`ledger_state`) and which of its own lines it has not met there yet
(`ledger_pending`), so a crash between a commit and its line loses nothing: `meet` has what is missing appended.
Versions and the last changes get a receipt, too (receipts.py): it shows that both files came back from a backup.
"""

import os
import re
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from adapterhub_local.durable import create_shared, digest_bytes, share_file
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.receipts import Receipts
from adapterhub_local.registry.records import removal_record
from adapterhub_local.settings import Home

_LINE = re.compile(r"(version|removal|evaluation|mark) (\S{1,150}) (sha256:[0-9a-f]{64})")
SLACK = 16  # so many lines may still be on their way to the file from other processes


class Line(NamedTuple):
    """Something that was committed: of `subject` (`name@3`, or the number of a mark), with its blob's `digest`."""

    kind: str
    subject: str
    digest: str

    def __str__(self) -> str:
        return " ".join(self)

    @property
    def version(self) -> tuple[str, int]:
        """Name and number of the version it speaks of."""
        name, _, number = self.subject.rpartition("@")
        return name, int(number)


class Ledger:
    """The file of one home."""

    def __init__(self, home: Home) -> None:
        self.path = home.ledger
        self.receipts = Receipts(home)

    def size(self) -> int | None:
        """Bytes of the file, None if there is none. Raises Corrupt for what is not a file."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise Corrupt(f"{self.path} is not a file: move it away, and `qhub fsck --repair` writes it again")
        return status.st_size

    def read(self, start: int = 0) -> tuple[list[Line], int]:
        """The lines from byte `start` on, and where the last whole one ends. What is not a line is passed over."""
        if self.size() is None:
            return [], 0
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        matches = (_LINE.fullmatch(text) for text in whole.decode(errors="replace").split("\n"))
        lines = [Line(*match.groups()) for match in matches if match and _is_possible(match)]
        return lines, start + len(whole)

    def beyond(self, lines: Iterable[Line]) -> list[Line]:
        """Lines of versions, and of the last change, that have a receipt and are not among these: of a ledger that is
        older than its home."""
        lines = list(lines)
        there = {line.subject for line in lines if line.kind == "version"}
        subjects = [subject for subject in self.receipts.subjects() if subject not in there]
        held = [Line("version", subject, digest) for subject in subjects for digest in self.receipts.of(subject)]
        return held + self.later_change(max((int(line.subject) for line in lines if line.kind == "mark"), default=0))

    def later_change(self, number: int) -> list[Line]:
        """A line of the last change that has a receipt if it came after this one."""
        last, digests = self.receipts.last_change()
        return [Line("mark", str(last), digest) for digest in digests if last > number]

    def append(self, lines: Sequence[str]) -> None:
        """Append lines by one write; a line that a power failure cut is ended first."""
        text = "".join(f"{line}\n" for line in lines)
        create_shared(self.path)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                share_file(self.path)
            elif os.pread(descriptor, 1, size - 1) != b"\n":
                text = f"\n{text}"
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        parts = [line.split(" ") for line in lines]
        self.receipts.add((subject, digest) for kind, subject, digest in parts if kind == "version")
        self.receipts.add_changes((int(subject), digest) for kind, subject, digest in parts if kind == "mark")


def _is_possible(match: re.Match[str]) -> bool:
    number = match[2] if match[1] == "mark" else match[2].rpartition("@")[2]
    return number.isascii() and number.isdigit() and len(number) < 12


def enter(db: sqlite3.Connection, kind: str, subject: object, digest: str) -> None:
    """Have a line appended once the transaction is committed."""
    db.execute("INSERT INTO ledger_pending (line) VALUES (?)", (str(Line(kind, str(subject), digest)),))


def last_entered(db: sqlite3.Connection) -> int:
    """The number of the last line that was entered."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'ledger_pending'").fetchone()
    return 0 if row is None else int(row[0])


def entered(db: sqlite3.Connection, after: int) -> list[str]:
    """The lines that were entered after line `after`."""
    rows = db.execute("SELECT line FROM ledger_pending WHERE id > ? ORDER BY id", (after,))
    return [line for (line,) in rows.fetchall()]


def unread(db: sqlite3.Connection, ledger: Ledger) -> list[Line]:
    """What the file has beyond what the database has read and does not know: the database is older than its home."""
    size, known = ledger.size(), _size_read(db) or 0
    lines = ledger.read(known)[0] if size is not None and size > known else []
    (versions,) = db.execute("SELECT (SELECT count(*) FROM versions) + (SELECT count(*) FROM lost)").fetchone()
    if ledger.receipts.count() > versions:
        lines += ledger.beyond(lines)
    (changes,) = db.execute("SELECT coalesce(max(id), 0) FROM marks").fetchone()
    return unknown(db, [*lines, *ledger.later_change(changes)])


def given_twice(db: sqlite3.Connection, ledger: Ledger, entering: Iterable[str]) -> list[Line]:
    """What was committed under the numbers of these lines, which the database does not know."""
    matches = [match for text in entering if (match := _LINE.fullmatch(text)) and match[1] == "version"]
    held = [Line("version", match[2], digest) for match in matches for digest in ledger.receipts.of(match[2])]
    return unknown(db, held)


def meet(db: sqlite3.Connection, ledger: Ledger) -> list[Line]:
    """Read on in the file, inside a transaction, and have it completed. Returns what the database does not know."""
    size, known = ledger.size(), _size_read(db)
    if size is None or known is None or size < known:
        return reconcile(db, ledger)
    if size > known:
        lines, end = ledger.read(known)
        if found := unknown(db, lines):
            return found
        db.executemany("DELETE FROM ledger_pending WHERE line = ?", [(str(line),) for line in lines])
        db.execute("UPDATE ledger_state SET size = ?", (end,))
    late = db.execute("SELECT line FROM ledger_pending WHERE id <= ?", (last_entered(db) - SLACK,))
    if stale := [line for (line,) in late.fetchall()]:
        ledger.append(stale)  # whoever committed these died before they could append them
    return []


def reconcile(db: sqlite3.Connection, ledger: Ledger) -> list[Line]:
    """Hold the whole file against the whole database, inside a transaction, and enter what the file lacks."""
    lines, end = ledger.read()
    if found := unknown(db, lines):
        return found
    there = set(lines)
    db.execute("DELETE FROM ledger_pending")
    missing = [(str(line),) for line in committed(db) if line not in there]
    db.executemany("INSERT INTO ledger_pending (line) VALUES (?)", missing)
    db.execute("INSERT OR REPLACE INTO ledger_state (id, size) VALUES (1, ?)", (end,))
    return []


def is_complete(db: sqlite3.Connection, ledger: Ledger) -> bool:
    """Whether what the file does not name was never committed; not so in a home of an older qhub, or if it was cut, or
    if it came back from a backup."""
    size = ledger.size()
    if size is None or size < (_size_read(db) or 0):
        return False
    return not unknown(db, ledger.beyond(ledger.read()[0]))


def unknown(db: sqlite3.Connection, lines: Iterable[Line]) -> list[Line]:
    """Those of the lines that the database knows nothing of."""
    return [line for line in dict.fromkeys(lines) if not _is_known(db, line)]


def committed(db: sqlite3.Connection) -> Iterator[Line]:
    """A line for everything the database holds, in the order in which it was committed, kind by kind."""
    for name, number, digest in db.execute("SELECT name, number, manifest_digest FROM versions ORDER BY id"):
        yield Line("version", f"{name}@{number}", digest)
    query = "SELECT name, number, manifest_digest, removed_at FROM removals JOIN versions USING (name, number)"
    for name, number, digest, removed_at in db.execute(f"{query} ORDER BY removed_at"):
        yield Line("removal", f"{name}@{number}", digest_bytes(removal_record(digest, removed_at)))
    for name, number, digest in db.execute("SELECT name, number, digest FROM evaluations ORDER BY id"):
        yield Line("evaluation", f"{name}@{number}", digest)
    for number, record in db.execute("SELECT id, record FROM marks ORDER BY id"):
        yield Line("mark", str(number), digest_bytes(record.encode()))


def _size_read(db: sqlite3.Connection) -> int | None:
    """How much of the file the database has read, None if it never looked."""
    row = db.execute("SELECT size FROM ledger_state").fetchone()
    return None if row is None else int(row[0])


def _is_known(db: sqlite3.Connection, line: Line) -> bool:
    match line.kind:
        case "version":
            row = db.execute("SELECT 1 FROM versions WHERE manifest_digest = ?", (line.digest,)).fetchone()
        case "removal":
            row = db.execute("SELECT 1 FROM removals WHERE name = ? AND number = ?", line.version).fetchone()
        case "evaluation":
            query = "SELECT 1 FROM evaluations WHERE name = ? AND number = ? AND digest = ?"
            row = db.execute(query, (*line.version, line.digest)).fetchone()
        case _:
            # as bytes: a damaged record need not be UTF-8
            query = "SELECT CAST(record AS BLOB) FROM marks WHERE id = ?"
            row = db.execute(query, (int(line.subject),)).fetchone()
            if row is not None and digest_bytes(row[0] or b"") != line.digest:
                row = None
    return row is not None or db.execute("SELECT 1 FROM lost WHERE digest = ?", (line.digest,)).fetchone() is not None
