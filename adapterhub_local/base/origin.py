"""Whether an adapter belongs to a base, by what it says of where it is from: one rule for every door.

The answers are `exact` (its fingerprint is the base's), `named` (the base's own id on the Hub, in any case of letters,
or that of a known mirror), `shapes` (it says nothing that decides, so only shapes can), and `other`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from adapterhub_local.lora.config import is_hub_id

if TYPE_CHECKING:
    from adapterhub_local.base.bases import BaseInfo
    from adapterhub_local.lora.adapter import AdapterFile
    from adapterhub_local.registry import Version

Level = Literal["exact", "named", "shapes", "other"]
# who publishes other people's models again, quantised or not, under the name they have
MIRRORS = frozenset(["unsloth", "mlx-community", "lmstudio-community"])
_QUANTISED = re.compile(r"(-unsloth)?-(bnb-4bit|bnb-8bit|4bit|8bit|6bit|bf16|fp16)$", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """How something names its base: by fingerprint, its name (a Hub id or a path of some machine), its revision."""

    fingerprint: str | None = None
    name: str | None = None
    revision: str | None = None

    @property
    def hub_id(self) -> str | None:
        """The name, if it is an id on the Hub; a path of some machine decides nothing."""
        return self.name if is_hub_id(self.name) else None

    @property
    def is_known(self) -> bool:
        return bool(self.fingerprint or self.hub_id)

    @classmethod
    def of_adapter(cls, adapter: "AdapterFile") -> "Origin":
        """What the files of an adapter say."""
        return cls(adapter.base_fingerprint, adapter.config.base_model)

    @classmethod
    def of_lineage(cls, entry: Mapping[str, Any] | None) -> "Origin":
        """What the `base` of a lineage says."""
        entry = entry or {}
        return cls(entry.get("fingerprint"), entry.get("hub_id"), entry.get("revision"))

    @classmethod
    def of_base(cls, base: "BaseInfo") -> "Origin":
        return cls(base.fingerprint, base.hub_id, base.revision)

    @classmethod
    def of_version(cls, version: "Version") -> "Origin":
        """What the lineage of a version says."""
        return cls.of_lineage(version.lineage.get("base"))

    def __str__(self) -> str:
        return self.hub_id or (f"another base ({self.fingerprint[:19]})" if self.fingerprint else "an unknown model")


@dataclass(frozen=True)
class Answer:
    """How far something belongs to a base, and why, for people: `made for X, not for base 'tiny' (someone/tiny)`."""

    level: Level
    reason: str

    def __bool__(self) -> bool:
        return self.level != "other"


def belongs(origin: Origin, base: "BaseInfo | Origin", name: str | None = None) -> Answer:
    """Whether what has this origin belongs to `base`, which people call `name`; two fingerprints decide."""
    own = base if isinstance(base, Origin) else Origin.of_base(base)
    called = f"base '{name or getattr(base, 'name', '')}'" if name or not isinstance(base, Origin) else "the other"
    if origin.fingerprint and own.fingerprint:
        if origin.fingerprint == own.fingerprint:
            return Answer("exact", "exact base, by fingerprint")
        theirs = f"another base ({origin.fingerprint[:19]}" + (f", {origin.hub_id})" if origin.hub_id else ")")
        return Answer("other", f"made for {theirs}, not for {called} ({own.fingerprint[:19]})")
    if origin.name and own.name and "/" not in own.name and origin.name.casefold() == own.name.casefold():
        return Answer("named", f"its base is {own.name} by name")  # an old id of one word
    if origin.hub_id and own.hub_id:
        how = same_model(origin.hub_id, own.hub_id)
        if how is None:
            return Answer("other", f"made for {origin.hub_id}, not for {called} ({own.hub_id})")
        if origin.revision and own.revision and origin.revision != own.revision:
            return Answer("shapes", f"{how}, of another revision ({origin.revision[:12]})")
        return Answer("named", how)
    if origin.name:
        return Answer("shapes", f"same shapes, it names {origin.name[:60]!r} as its base")
    return Answer("shapes", "same shapes, it names no base")


def same_model(one: str, other: str) -> str | None:
    """Why two ids on the Hub are of one model, None if they are not."""
    if one == other:
        return f"its base is {other} by name"
    if one.casefold() == other.casefold():
        return f"its base is {other} by name, in another case"
    (org, name), (its_org, its_name) = (text.casefold().split("/") for text in (one, other))
    if {org, its_org} & MIRRORS and _QUANTISED.sub("", name) == _QUANTISED.sub("", its_name):
        return f"its base {one} is a mirror of {other}"
    return None


Base = TypeVar("Base", bound="BaseInfo")


def best(origin: Origin, bases: Iterable[Base]) -> Base | None:
    """The base that it belongs to, exactly or by name (with the revision it names, if one has that), or None."""
    answers = [(belongs(origin, base).level, base) for base in bases]
    for level in ("exact", "named"):
        fitting = [base for found, base in answers if found == level]
        same = [base for base in fitting if origin.revision and base.revision == origin.revision]
        if same or fitting:
            return (same or fitting)[0]
    return None
