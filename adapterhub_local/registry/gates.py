"""What a protected alias asks of the version it is moved to: scores, and approvals from others than the mover.

Protections and approvals are records of the journal and nothing else: the newest of an alias counts. Everything here
runs inside the transaction that moves the alias, so nobody can move it between the look and the move.
"""

import difflib
import json
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adapterhub_local.actor import current_actor
from adapterhub_local.bounds import Bound, split_bound
from adapterhub_local.errors import InputError, Protected

MAX_APPROVALS = 20
RECORDS = (  # of one kind, about one name, oldest first
    "SELECT record FROM marks WHERE json_extract(record, '$.mark') = ? AND json_extract(record, '$.name') = ?"
    " ORDER BY id"
)
Rows = Callable[[str, tuple[Any, ...]], list[sqlite3.Row]]


@dataclass(frozen=True)
class Requirement:
    """A bound on a score: `sentiment.exact_match>=0.8`, or `exact_match>=0.8` on every task that has the metric."""

    score: str
    bound: Bound

    def __str__(self) -> str:
        return f"{self.score}{self.bound}"

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """The requirement that `text` spells. Raises InputError."""
        found = split_bound(text)
        if found is None:
            shown = text.encode("unicode_escape").decode()[:80]
            raise InputError(
                f"'{shown}' is not a requirement: write a score and a bound, such as 'sentiment.exact_match>=0.8'"
            )
        return cls(*found)

    def values(self, scores: dict[tuple[str, str], float]) -> list[float]:
        """Those of the scores, (task, metric) -> value, that it speaks of."""
        return [
            value for (task, metric), value in scores.items() if self.score in (f"{task}.{metric}", metric)
        ]  # fmt: skip


@dataclass(frozen=True)
class Protection:
    """What `name@alias` asks before it moves: all of `require`, and this many approvals."""

    name: str
    alias: str
    require: tuple[Requirement, ...]
    approvals: int
    actor: str | None
    at: str

    def to_json(self) -> dict[str, Any]:
        """As lists and pages show it."""
        return {
            "alias": self.alias,
            "require": [str(one) for one in self.require],
            "approvals": self.approvals,
            "actor": self.actor,
            "at": self.at,
        }


@dataclass(frozen=True)
class Approval:
    """That `actor` holds a version, by the digest of its manifest, fit for an alias."""

    alias: str
    manifest: str
    actor: str
    at: str


def protections(records: Iterable[sqlite3.Row]) -> dict[str, Protection]:
    """Alias -> what protects it, by the rows of RECORDS of one name."""
    found: dict[str, Protection] = {}
    for record in (json.loads(text) for (text,) in records):
        alias = str(record["alias"])
        if record["approvals"] is None:
            found.pop(alias, None)
            continue
        require = tuple(Requirement.parse(text) for text in record["require"])
        found[alias] = Protection(
            record["name"], alias, require, record["approvals"], record.get("actor"), record["at"]
        )
    return found


def approvals(records: Iterable[sqlite3.Row]) -> list[Approval]:
    """The approvals that count, by the rows of RECORDS of one name.

    Of each actor the last word on a version and an alias.
    """
    given: dict[tuple[str, str, str], Approval] = {}
    for record in (json.loads(text) for (text,) in records):
        key = (record["alias"], record["manifest"], str(record.get("actor")))
        if record["is_given"]:
            given.setdefault(key, Approval(*key, record["at"]))
        else:
            given.pop(key, None)
    return list(given.values())


def check_move(db: sqlite3.Connection, name: str, alias: str, number: int | None) -> None:
    """Raise Protected, with what is not met and the way out, if `name@alias` may not point to version `number` now.

    None is for removing the alias.
    """
    protection = protections(recorded(db, "protection", name)).get(alias)
    if protection is None:
        return
    lift = f"`qhub alias unprotect {name} {alias}`"
    if number is None:
        raise Protected(f"{name}@{alias} is protected and cannot be removed: {lift} first. Nothing was changed")
    problems = lacking(lambda query, values: db.execute(query, values).fetchall(), protection, number)
    if problems:
        reasons = "; ".join(problems)
        raise Protected(f"{name}@{alias} is protected: {reasons}. Nothing was changed; {lift} lifts the protection")


def lacking(rows: Rows, protection: Protection, number: int) -> list[str]:
    """All that a version lacks before the current actor may move the alias to it; `rows` runs a query."""
    name = protection.name
    query = "SELECT task, metric, value FROM scores WHERE name = ? AND number = ?"
    scores = {(row["task"], row["metric"]): row["value"] for row in rows(query, (name, number))}
    found = [_unmet(requirement, scores, f"{name}@{number}") for requirement in protection.require]
    return [*filter(None, found), *_unapproved(rows, protection, number)]


def _unmet(requirement: Requirement, scores: dict[tuple[str, str], float], reference: str) -> str | None:
    """Why the scores do not meet a requirement, None if they do."""
    values = requirement.values(scores)
    if not values:
        known = sorted({f"{task}.{metric}" for task, metric in scores})
        near = difflib.get_close_matches(requirement.score, known, n=1)
        hint = f" (it has {near[0]})" if near else ""
        return (
            f"{reference} must have '{requirement}' and has no score {requirement.score}{hint}: `qhub eval "
            f"{reference} ...` measures it"
        )
    if failing := [value for value in values if not requirement.bound.holds(value)]:
        return f"{reference} must have '{requirement}' and has {failing[0]:g}"
    return None


def _unapproved(rows: Rows, protection: Protection, number: int) -> list[str]:
    """Why the approvals of a version are not enough, nothing if they are."""
    if not protection.approvals:
        return []
    name, alias = protection.name, protection.alias
    found = rows("SELECT manifest_digest FROM versions WHERE name = ? AND number = ?", (name, number))
    manifest, mover = found[0]["manifest_digest"] if found else None, current_actor()
    given = {
        one.actor
        for one in approvals(rows(RECORDS, ("approval", name)))
        if one.alias == alias and one.manifest == manifest
    }
    if len(given - {mover}) >= protection.approvals:
        return []
    plural = "" if protection.approvals == 1 else "s"
    own = f"; that of {mover}, who moves it, does not count" if mover in given else ""
    reason = (
        f"{name}@{number} must have {protection.approvals} approval{plural} from others than {mover} and has "
        f"{len(given - {mover})}{own}: somebody else runs `qhub approve {name}@{number} --for {alias}`"
    )
    return [reason]


def recorded(db: sqlite3.Connection, kind: str, name: str) -> list[sqlite3.Row]:
    """The rows of RECORDS."""
    return db.execute(RECORDS, (kind, name)).fetchall()
