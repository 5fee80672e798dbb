"""What a remote says, brought to this home: aliases, splits, tags and evaluations of one name, and keys.

What the remote has a record of is as the remote says, here too; what it has never heard of stays as it is. Every
change is returned, and an alias keeps its log, so that what was here before is one `qhub alias rollback` away.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterhub_local.digests import short
from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import Corrupt
from adapterhub_local.keys import Keys, key_of
from adapterhub_local.registry.journal import marking, note, replace_split
from adapterhub_local.registry.lineage_form import check_metrics
from adapterhub_local.registry.marks import tags_of
from adapterhub_local.registry.receive import MAX_JSON_BYTES
from adapterhub_local.registry.records import evaluation_record
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_kinds import Record
from adapterhub_local.registry.remote_layout import blob_path, read_slot
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.rows import now, point_alias
from adapterhub_local.registry.split import split_of
from adapterhub_local.registry.version import Version

PULLED = "pulled"  # the action of an alias that a remote moved


@dataclass(frozen=True)
class Taken:
    """What a record of a remote changed here, or, with a reason, why it did not; by whom it was made, and when.

    `before` and `now` are numbers of this home for an alias, shares for a split, and texts for the rest.
    """

    kind: str
    subject: str
    before: Any
    now: Any
    by: str
    at: str
    reason: str | None = None


def take_marks(registry: Registry, log: Log, name: str) -> list[Taken]:
    """Make aliases, split, tags and evaluations of `name` what the remote says, as far as its versions are here.

    An alias of a version that is not here stays where it is, and is returned with the reason.
    """
    moves = list(_moves(registry, log, name))
    taken = [move for move in moves if move.reason is not None or move.before != move.now]
    changed = [move for move in taken if move.reason is None]
    split = _split(registry, log, name, {move.subject.partition("@")[2]: move.now for move in changed})
    with_split = [split] if split is not None and split.reason is None else []
    if changed or with_split:
        with marking(registry.database, registry.blobs) as db:
            for move in changed:
                if move.now is not None:
                    point_alias(db, name, move.subject.partition("@")[2], move.now, action=PULLED)
            for one in with_split:
                replace_split(db, name, one.now.items())
                note(db, "split", name=name, shares=[[alias, share] for alias, share in one.now.items()], at=now())
            for move in changed:
                if move.now is None:
                    point_alias(db, name, move.subject.partition("@")[2], None, action=PULLED)
    tags = list(_take_tags(registry, log, name))
    return taken + ([split] if split is not None else []) + tags + list(_take_evaluations(registry, log, name))


def take_keys(keys: Keys, log: Log) -> list[Taken]:
    """Let keys that were published at the remote in here, and refuse those that were revoked there."""
    published = {record.fields["id"]: record for record in log.all("key")}
    revoked = {record.fields["id"]: record for record in log.all("revocation")}
    before = {key.id: key for key in keys.all()}
    changed, others = keys.take(
        [key_of(record.fields["key"]) for record in published.values()],
        {identity: record.at for identity, record in revoked.items()},
    )
    after = {key.id: key for key in keys.all()}

    def state(identity: str, known: dict[str, Any]) -> str | None:
        return None if identity not in known else "revoked" if known[identity].revoked_at else "valid"

    taken = []
    for identity in changed:
        record = revoked.get(identity) or published[identity]
        taken.append(Taken("key", identity, state(identity, before), state(identity, after), record.by, record.at))
    for identity in others:
        record, reason = published[identity], "another key has this id here: revoke one of the two"
        taken.append(Taken("key", identity, state(identity, before), None, record.by, record.at, reason))
    return taken


def local_version(registry: Registry, log: Log, name: str, number: int) -> Version | None:
    """What the remote calls `name@number`, as it is called here; None if it is not here."""
    record = log.get("version", name, number)
    if record is not None:
        digests = (record.fields["manifest"], record.fields["origin"] or record.fields["manifest"])
    else:  # pushed by a qhub that had no log
        slot = read_slot(log.store, name, number)
        if slot is None:
            return None
        digests = (slot.manifest, slot.origin or slot.manifest)
    condition = (
        "AND v.name = ? AND (v.manifest_digest IN (?, ?)"
        " OR json_extract(v.lineage, '$.imported_from.manifest_digest') IN (?, ?))"
    )
    rows = registry.rows(condition, (name, *digests, *digests))
    return registry.version(rows[0]) if rows else None


def _moves(registry: Registry, log: Log, name: str) -> Iterator[Taken]:
    here = registry.aliases(name)
    for record in log.all("alias", name):
        alias, number = record.fields["alias"], record.fields["number"]
        version = local_version(registry, log, name, number) if number is not None else None
        change = ("alias", f"{name}@{alias}", here.get(alias))
        if number is not None and version is None:
            reason = f"{name}@{number} is not here"
            yield Taken(*change, None, record.by, record.at, reason)
        else:
            yield Taken(*change, version.number if version is not None else None, record.by, record.at)


def _split(registry: Registry, log: Log, name: str, moved: dict[str, int | None]) -> Taken | None:
    record = log.get("split", name)
    if record is None:
        return None
    before, wanted = dict(split_of(registry, name)), dict(record.fields["shares"])
    if list(before.items()) == list(wanted.items()):
        return None
    known = {alias: number for alias, number in (registry.aliases(name) | moved).items() if number is not None}
    missing = [alias for alias in wanted if alias not in known]
    reason = f"{name}@{missing[0]} is not here" if missing else None
    return Taken("split", name, before, wanted, record.by, record.at, reason)


def _take_tags(registry: Registry, log: Log, name: str) -> Iterator[Taken]:
    for record in log.all("tag", name):
        number, tag, is_set = (record.fields[field] for field in ("number", "tag", "is_set"))
        version = local_version(registry, log, name, number)
        if version is None or (tag in tags_of(registry, version)) == is_set:
            continue
        with marking(registry.database, registry.blobs) as db:
            values = (name, version.number, tag)
            if is_set:
                db.execute("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", values)
            else:
                db.execute("DELETE FROM tags WHERE name = ? AND number = ? AND tag = ?", values)
            note(db, "tag", name=name, number=version.number, tag=tag, is_set=is_set, at=now())
        there, not_there = (tag, None) if is_set else (None, tag)
        yield Taken("tag", str(version), not_there, there, record.by, record.at)


def _take_evaluations(registry: Registry, log: Log, name: str) -> Iterator[Taken]:
    for record in log.all("evaluation", name):
        version = local_version(registry, log, name, record.fields["number"])
        if version is None:
            continue
        task, digest = record.fields["task"], record.fields["digest"]
        query = "SELECT evaluation FROM evaluations WHERE name = ? AND number = ? AND task = ?"
        rows = registry.database.rows(query, (name, version.number, task))
        publication = log.get("version", name, record.fields["number"])
        manifest = publication.fields["manifest"] if publication is not None else version.manifest_digest
        known = {digest_bytes(evaluation_record(manifest, task, json.loads(row["evaluation"]))) for row in rows}
        if digest not in known:
            registry.add_evaluation(version, task, _evaluation(log, record))
            yield Taken("evaluation", str(version), None, task, record.by, record.at)


def _evaluation(log: Log, record: Record) -> dict[str, Any]:
    """The evaluation that a record names. Raises Corrupt if it is not what its digest says."""
    digest = record.fields["digest"]
    path = blob_path(digest)
    try:
        data = log.store.read(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise Corrupt(f"{log.store.url}/{path} is gone, an evaluation of {record.fields['name']}") from None
    if digest_bytes(data) != digest:
        raise Corrupt(f"{log.store.url}/{path} is damaged: it has other bytes than {short(digest)}")
    try:
        value = json.loads(data)
        evaluation: dict[str, Any] = value["evaluation"]
        task = value["task"]
        check_metrics({task: evaluation})
        if task != record.fields["task"]:
            raise ValueError(task)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Corrupt(f"{log.store.url}/{path} is not the evaluation that record @{record.number} names") from None
    return evaluation
