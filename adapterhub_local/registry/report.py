"""What a check of the registry finds, and what the state of the database is."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from adapterhub_local.digests import short
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.database import DAMAGED, Database
from adapterhub_local.registry.found import Rebuilt
from adapterhub_local.registry.ledger import unknown
from adapterhub_local.registry.manifests import Orphan, orphans
from adapterhub_local.settings import Home


@dataclass(frozen=True)
class Problem:
    """One thing that is not what it should be; `repaired` says what was done about it, if anything."""

    kind: str  # damaged, missing, foreign, header, row, alias, database or unknown
    subject: str  # the blob's digest, the reference, or the file
    message: str
    repaired: str | None = None


@dataclass
class Report:
    """What was looked at and what was wrong. Unreferenced blobs are not a problem: `qhub gc` gives their space back."""

    num_blobs: int = 0
    num_versions: int = 0
    num_unreferenced: int = 0
    problems: list[Problem] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)  # versions that blobs hold, and neither database nor ledger
    rebuilt: Rebuilt | None = None  # what a repair made the database anew of

    @property
    def is_clean(self) -> bool:
        return not self.problems

    @property
    def is_repaired(self) -> bool:
        return all(problem.repaired for problem in self.problems)


def state_problems(home: Home) -> Iterator[Problem]:
    """What is wrong with the database as a whole: damaged, gone, or older than what was published."""
    with closing(Database(home, checked=False)) as plain, closing(Database(home)) as checked:
        yield from _state_problems(plain, checked)


def _state_problems(plain: Database, checked: Database) -> Iterator[Problem]:
    path = str(plain.path)
    message = plain.problem()
    if message is None and plain.connection() is None:
        message = checked.problem()
    if message is not None:
        yield Problem("database", path, message.removeprefix(f"{path} "))
        return
    connection = plain.connection()
    if connection is None:
        return
    published_lines = plain.ledger.read()[0]
    lines = unknown(connection, [*published_lines, *plain.ledger.beyond(published_lines)])
    published = {one.reference: one for one in found_orphans(plain) if one.is_published}
    for line in lines:
        what = {"version": "it was published", "mark": "it was recorded"}.get(
            line.kind, f"its {line.kind} was recorded"
        )
        subject = f"change {line.subject}" if line.kind == "mark" else line.subject
        yield Problem("unknown", subject, f"{what} ({short(line.digest)}), and the database does not know it")
    named = {line.digest for line in lines}
    for reference, one in published.items():
        if one.digest not in named:
            yield Problem("unknown", reference, f"the blobs hold it ({short(one.digest)}), the database does not")


def found_orphans(database: Database) -> list[Orphan]:
    """The manifests of a home that its database does not know; none if it cannot be read."""
    try:
        connection = database.connection()
        return [] if connection is None else orphans(database.home, connection, database.ledger)
    except (Corrupt, *DAMAGED):
        return []
