"""What a remote says of its adapters beside what is here, and what each record of its log says, for those who look."""

import difflib
from typing import Any

from adapterhub_local.errors import NotFound
from adapterhub_local.keys import key_of
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.remote_kinds import Record
from adapterhub_local.registry.remote_layout import all_numbers
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_marks import local_version
from adapterhub_local.registry.remote_moves import aliases_at, split_at
from adapterhub_local.registry.split import split_of


def status(registry: Registry, log: Log, name: str | None = None) -> dict[str, Any]:
    """Newest versions, aliases and splits of the remote, or of one name there, each with what is here.

    `there` and `here` are numbers of versions as each side has them, or shares; `state` is same, not here, other (what
    is here is not what the remote says) or here only. Raises NotFound.
    """
    numbers = all_numbers(log.store)
    if name is not None and name not in numbers:
        where = log.store.remote.name
        raise NotFound(f"{where} has no '{name}': `qhub remote show {where}` lists what it has")
    entries = []
    for one in [name] if name is not None else numbers:
        newest = numbers[one][-1]
        record = log.get("version", one, newest)
        found = local_version(registry, log, one, newest)
        here = found.number if found is not None else None
        entries.append(_entry(one, newest, here, "same" if found else "not here", record))
        aliases = registry.aliases(one)
        for record in aliases_at(log, one):
            alias, number = record.fields["alias"], record.fields["number"]
            version, at = local_version(registry, log, one, number), aliases.pop(alias, None)
            state = "not here" if version is None else "same" if at == version.number else "other"
            entries.append(_entry(f"{one}@{alias}", number, at, state, record))
        entries += [_entry(f"{one}@{alias}", None, number, "here only", None) for alias, number in aliases.items()]
        there, own = split_at(log, one), split_of(registry, one)
        if there or own:
            state = "same" if list(there) == list(own) else "other" if there else "here only"
            entries.append(_entry(f"{one} (split)", _shares(there), _shares(own), state, log.get("split", one)))
    revoked = {record.fields["id"] for record in log.all("revocation")}
    keys = [key for key in (key_of(record.fields["key"]) for record in log.all("key")) if key.id not in revoked]
    valid = sum(key.is_valid() for key in keys)
    unread = {str(number): reason for number, reason in log.unread.items()}
    place = {"remote": log.store.remote.name, "url": log.store.url, "records": log.last}
    return {**place, "keys": valid, "unread": unread, "entries": entries}


def records(log: Log, name: str | None = None) -> list[Record]:
    """Every record of the log, or those about one name, oldest first. Raises NotFound if none is about it."""
    every = list(log.every())
    found = [one for one in every if name is None or one.fields.get("name") == name]
    if name is not None and not found:
        where = log.store.remote.name
        near = difflib.get_close_matches(name, {str(one.fields.get("name", "")) for one in every}, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"`qhub remote show {where}` lists what it has"
        raise NotFound(f"the log of {where} has no '{name}': {hint}")
    return found


def described(record: Record) -> tuple[str, str]:
    """What a record is about, and what it says, in words."""
    fields = record.fields
    match record.kind:
        case "version":
            return f"{fields['name']}@{fields['number']}", "was sent"
        case "alias":
            old, new = (fields[which] or "nothing" for which in ("old", "number"))
            return f"{fields['name']}@{fields['alias']}", f"{old} -> {new}"
        case "split":
            return fields["name"], _shares(fields["shares"]) or "not split"
        case "tag":
            return f"{fields['name']}@{fields['number']}", f"{fields['tag']}{'' if fields['is_set'] else ' taken away'}"
        case "evaluation":
            return f"{fields['name']}@{fields['number']}", fields["task"]
        case "key":
            return fields["id"], "published"
    return fields["id"], "revoked"


def _entry(reference: str, there: Any, here: Any, state: str, record: Record | None) -> dict[str, Any]:
    by, at = (record.by, record.at) if record is not None else (None, None)
    return {"reference": reference, "there": there, "here": here, "state": state, "by": by, "at": at}


def _shares(split: Any) -> str:
    return ",".join(f"{alias}={share}" for alias, share in split)
