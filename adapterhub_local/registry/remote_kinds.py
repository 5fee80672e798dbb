"""What a remote's log may hold about versions and keys: the kinds of records, and what makes each believable.

Of two records about one subject the later counts. Whoever may write to a remote is believed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_local.actor import check_actor
from adapterhub_local.digests import parse_digest
from adapterhub_local.errors import QhubError
from adapterhub_local.keys import key_of
from adapterhub_local.refs import MAX_NUMBER, check_alias, check_name
from adapterhub_local.registry.marks import check_tag
from adapterhub_local.registry.split import MAX_SHARE

MAX_TEXT = 200  # characters of an actor, a task
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_KEY = re.compile(r"[0-9a-f]{8}")
Subject = tuple[Any, ...]
Check = Callable[[Any], object]  # raises ValueError, TypeError, KeyError or QhubError for what it does not take


@dataclass(frozen=True)
class Record:
    """A record of a remote's log: the `number`-th there, by an actor (user@host) at a time."""

    number: int
    kind: str
    by: str
    at: str
    fields: Mapping[str, Any]

    @property
    def subject(self) -> Subject:
        """What it is about: of two records about the same, the later counts."""
        return (self.kind, *(self.fields[name] for name in KINDS[self.kind].subject))

    def to_json(self) -> dict[str, Any]:
        """All of it, flat."""
        return {"record": self.number, "kind": self.kind, "by": self.by, "at": self.at, **self.fields}


@dataclass(frozen=True)
class Kind:
    """The fields of a kind of record with their checks, and which of them say what it is about."""

    subject: tuple[str, ...]
    fields: Mapping[str, Check]


def _number(value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r} is not the number of a version")


def _text(value: Any) -> None:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_TEXT:
        raise ValueError(f"{value!r} is not a line of text")


def _time(value: Any) -> None:
    if not _TIME.fullmatch(value):
        raise ValueError(f"{value!r} is not a time")


def _flag(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")


def _key(value: Any) -> None:
    if not _KEY.fullmatch(value):
        raise ValueError(f"{value!r} is not the id of a key")


def _shares(value: Any) -> None:
    aliases = [check_alias(alias) for alias, _ in value]
    if len(set(aliases)) < len(aliases) or any(
        type(share) is not int or not 0 < share <= MAX_SHARE for _, share in value
    ):
        raise ValueError(f"{value!r} is not a split")


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_VERSION: dict[str, Check] = {"name": check_name, "number": _number, "manifest": parse_digest}
KINDS = {
    # that a version is there, and the manifest it had under its first number
    "version": Kind(("name", "number"), {**_VERSION, "origin": _or_none(parse_digest)}),
    # where an alias points, and pointed before; to no number if it was removed
    "alias": Kind(
        ("name", "alias"),
        {"name": check_name, "alias": check_alias, "number": _or_none(_number), "old": _or_none(_number)},
    ),
    # how the traffic of a name is split, none for not at all
    "split": Kind(("name",), {"name": check_name, "shares": _shares}),
    "tag": Kind(("name", "number", "tag"), {"name": check_name, "number": _number, "tag": check_tag, "is_set": _flag}),
    # a later evaluation of a version, whose blob has this digest
    "evaluation": Kind(
        ("name", "digest"), {"name": check_name, "number": _number, "task": _text, "digest": parse_digest}
    ),
    # a key of the server, as `keys.json` has it, with the hash of its secret
    "key": Kind(("id",), {"id": _key, "key": key_of}),
    # a key is refused from now on, forever
    "revocation": Kind(("id",), {"id": _key}),
}  # fmt: skip


def parse(number: int, value: Any) -> Record:
    """The record in an object's JSON. Raises ValueError with the reason if it cannot be believed."""
    try:
        kind = KINDS.get(value["kind"])
        if kind is None:
            raise ValueError("its kind is not known here: a newer qhub wrote it")
        fields = {name: item for name, item in value.items() if name not in ("kind", "by", "at", "id_of_record")}
        if fields.keys() != kind.fields.keys():
            raise ValueError(f"it has {', '.join(sorted(fields))}, not {', '.join(sorted(kind.fields))}")
        for name, check in {**kind.fields, "by": check_actor, "at": _time}.items():
            check(value[name])
        if value["kind"] == "key" and value["key"]["id"] != value["id"]:
            raise ValueError("it is about another key than it says")
        return Record(number, value["kind"], value["by"], value["at"], fields)
    except (KeyError, TypeError, AttributeError, QhubError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
