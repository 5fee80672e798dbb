"""What blobs, the ledger and an old database say, before a new database is made of it."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from adapterhub_local.registry.ledger import Line
from adapterhub_local.registry.version import Version

# In the order in which rows may refer to each other. All but the first and the last are made from records where
# there are some.
KEPT = ("removals", "aliases", "alias_log", "tags", "descriptions", "marks", "splits", "lost")


class Record(NamedTuple):
    """A record about versions (journal.py), and the digest of its blob."""

    digest: str
    value: dict[str, Any]


@dataclass
class Rebuilt:
    """What the new database holds.

    `moved` has one line for every version that had to be given another number, `lost` one for everything that could
    not be made again.
    """

    num_versions: int = 0
    num_evaluations: int = 0
    moved: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What there is to make a database of."""

    ledger: list[Line] = field(default_factory=list)
    is_complete: bool = False  # what the ledger does not name was never committed
    received: set[str] = field(default_factory=set)  # `name@3` of which a receipt says what was committed, no ledger
    is_whole: bool = False  # all tables of the old database could be read
    manifests: dict[str, Version] = field(default_factory=dict)  # by the digest of the manifest
    rows: dict[tuple[str, int], Version] = field(default_factory=dict)  # of the old database
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by digest, the older first
    removals: dict[str, tuple[str, str]] = field(default_factory=dict)  # record -> manifest and when
    records: list[Record] = field(default_factory=list)  # of blobs
    recorded: list[Record] = field(default_factory=list)  # of the old database
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @cached_property
    def committed(self) -> set[str]:
        """The digests that the ledger names."""
        return {line.digest for line in self.ledger}

    def is_committed(self, digest: str) -> bool:
        """Whether the ledger names it, or cannot know."""
        return not self.is_complete or digest in self.committed
