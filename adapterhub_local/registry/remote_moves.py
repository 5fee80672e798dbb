"""Changes at a remote: its aliases and splits are moved, versions announced with tags and evaluations, keys
published and revoked. Nothing of it changes this home; `remote_marks.py` brings it to others.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import InUse, NotFound
from adapterhub_local.keys import Key
from adapterhub_local.refs import check_alias
from adapterhub_local.registry.marks import tags_of
from adapterhub_local.registry.records import evaluation_record
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_kinds import KINDS, Record
from adapterhub_local.registry.remote_layout import Slot, blob_path, read_slot
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.rows import NOTHING
from adapterhub_local.registry.split import Split
from adapterhub_local.registry.version import Version


@dataclass(frozen=True)
class Logged:
    """What a record changed at the remote; `is_new` is False if it was so already, and `before` is what it replaced."""

    subject: str
    now: Any
    before: Any
    is_new: bool


def move_alias(log: Log, name: str, alias: str, number: int | None, *, expect: int | None = None) -> Logged:
    """Point `name@alias` to version `number` of the remote, or remove it; with `expect`, only if it points there now.

    Raises NotFound if the remote has no such version, InUse if the alias is elsewhere than expected, or has traffic.
    """
    check_alias(alias)
    old: int | None = None

    def make() -> dict[str, Any] | None:
        nonlocal old
        old = number_of(log, name, alias)
        if expect is not None and (old or NOTHING) != expect:
            now_at, wanted = (value or "nothing" for value in (old, expect))
            raise InUse(f"{name}@{alias} points to {now_at} at {_where(log)}, not to {wanted}: nothing was changed")
        if number is None and old is None:
            raise NotFound(f"{_where(log)} has no alias {name}@{alias}: `qhub sync status` shows what it has")
        if number is None and alias in dict(split_at(log, name)):
            raise InUse(f"{name}@{alias} answers a part of {name}'s traffic there: push another --split first")
        if number is not None and read_slot(log.store, name, number) is None:
            raise NotFound(f"{_where(log)} has no '{name}@{number}': push it first")
        return {"name": name, "alias": alias, "number": number, "old": old} if number != old else None

    record = log.append("alias", make)
    return Logged(f"{name}@{alias}", number, old, record is not None)


def set_split(log: Log, name: str, split: Split) -> Logged:
    """Split the traffic of plain `name` between aliases of the remote; none ends that. Raises NotFound."""
    before: list[list[Any]] = []

    def make() -> dict[str, Any] | None:
        nonlocal before
        before = [list(term) for term in split_at(log, name)]
        for alias, _ in split:
            if number_of(log, name, alias) is None:
                raise NotFound(f"{_where(log)} has no alias {name}@{alias}: push it with --alias {alias} first")
        shares = [list(term) for term in split]
        return {"name": name, "shares": shares} if shares != before else None

    record = log.append("split", make)
    return Logged(name, dict(split), dict(before), record is not None)  # type: ignore[arg-type]


def announce(log: Log, registry: Registry, version: Version, slot: Slot) -> None:
    """Say that a version is in its slot, and what is known of it here: tags, and evaluations that came later.

    A tag that was taken away there stays away; `set_tag` gives it again.
    """
    name, number = version.name, slot.number
    if log.get("version", name, number) is None:
        fields = {"name": name, "number": number, "manifest": slot.manifest, "origin": slot.origin}
        _say_once(log, "version", fields)
    for tag in tags_of(registry, version):
        if log.get("tag", name, number, tag) is None:
            set_tag(log, name, number, tag)
    query = "SELECT task, evaluation FROM evaluations WHERE name = ? AND number = ? ORDER BY id"
    for row in registry.database.rows(query, (version.name, version.number)):
        blob = evaluation_record(slot.manifest, row["task"], json.loads(row["evaluation"]))
        if log.get("evaluation", name, digest := digest_bytes(blob)) is None:
            log.store.put(blob_path(digest), blob)
            _say_once(log, "evaluation", {"name": name, "number": number, "task": row["task"], "digest": digest})


def _say_once(log: Log, kind: str, fields: dict[str, Any]) -> None:
    """Add a record unless there is one about its subject already."""
    subject = [fields[field] for field in KINDS[kind].subject]
    log.append(kind, lambda: None if log.get(kind, *subject) else fields)


def set_tag(log: Log, name: str, number: int, tag: str, *, is_set: bool = True) -> None:
    """Give a version of the remote a tag, or take it away."""

    def make() -> dict[str, Any] | None:
        before = log.get("tag", name, number, tag)
        if (before is not None and before.fields["is_set"]) == is_set:
            return None
        return {"name": name, "number": number, "tag": tag, "is_set": is_set}

    log.append("tag", make)


def publish_key(log: Log, key: Key) -> Logged:
    """Let servers that follow the remote know a key by the hash of its secret. Raises InUse for one revoked there."""

    def make() -> dict[str, Any] | None:
        if log.get("revocation", key.id) is not None:
            raise InUse(f"key {key.id} was revoked at {_where(log)}, which cannot be taken back: make another")
        before = log.get("key", key.id)
        return {"id": key.id, "key": _entry(key)} if before is None or before.fields["key"] != _entry(key) else None

    return Logged(key.id, "published", None, log.append("key", make) is not None)


def revoke_key(log: Log, identity: str) -> Logged:
    """Refuse a key wherever the remote is followed, forever. Raises NotFound."""

    def make() -> dict[str, Any] | None:
        if log.get("key", identity) is None:
            raise NotFound(
                f"{_where(log)} has no key '{identity}': `qhub sync log {log.store.remote.name}` shows those it got"
            )
        return {"id": identity} if log.get("revocation", identity) is None else None

    return Logged(identity, "revoked", None, log.append("revocation", make) is not None)


def number_of(log: Log, name: str, alias: str) -> int | None:
    """Where an alias points at the remote, None for nowhere."""
    record = log.get("alias", name, alias)
    number: int | None = record.fields["number"] if record is not None else None
    return number


def aliases_at(log: Log, name: str | None = None) -> list[Record]:
    """The aliases of the remote, or of one name there, that point somewhere."""
    return [record for record in log.all("alias", name) if record.fields["number"] is not None]


def split_at(log: Log, name: str) -> Split:
    """How the traffic of a name is split at the remote, none if it is not."""
    record = log.get("split", name)
    return [(alias, share) for alias, share in record.fields["shares"]] if record is not None else []


def _entry(key: Key) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(canonical_json(asdict(key)))
    return entry


def _where(log: Log) -> str:
    return f"remote '{log.store.remote.name}'"
