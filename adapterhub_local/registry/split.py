"""Traffic of one name split between its aliases by share, such as 10 of 100 to a canary; users stay on their side."""

import hashlib
import re
import secrets
import sqlite3
from collections.abc import Iterable, Sequence

from adapterhub_local.errors import InputError, InUse, NotFound
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.registry.journal import marking, note, replace_split
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import now

MAX_SHARE = 1_000_000
_SPLIT = "SELECT alias, share FROM splits WHERE name = ? ORDER BY place"
_TERM = re.compile(r"([^=,]+)=([0-9]{1,7})")
Split = Sequence[tuple[str, int]]  # alias and share, in the order in which users are dealt out


def parse_split(text: str) -> Split:
    """`canary=10,prod=90` as aliases and shares. Raises InputError."""
    terms = [_TERM.fullmatch(term.strip()) for term in text.split(",")]
    shares = [(term[1], int(term[2])) for term in terms if term is not None]
    if len(shares) < len(terms) or any(not 0 < share <= MAX_SHARE for _, share in shares):
        raise InputError(f"'{text}' is not a split: write aliases with their shares, such as canary=10,prod=90")
    if len({alias for alias, _ in shares}) < len(shares):
        raise InputError(f"'{text}' names an alias twice")
    return [(check_alias(alias), share) for alias, share in shares]


def set_split(registry: Registry, name: str, split: Split, *, expect: Split | None = None) -> None:
    """Answer requests for plain `name` by these aliases from now on; none ends that.

    expect: change it only if it is split so now. Raises NotFound, InputError for an alias that occurs twice, InUse if
    it is split otherwise.
    """
    check_name(name)
    known = registry.aliases(name)
    for alias, _ in split:
        if alias not in known:
            raise NotFound(f"there is no alias {name}@{alias}: `qhub alias set {name} {alias} VERSION` makes it")
    if len({alias for alias, _ in split}) < len(split):
        raise InputError("a split names an alias twice: give each alias one share")
    with marking(registry.database, registry.blobs) as db:
        if expect is not None and (now_split := _read(db.execute(_SPLIT, (name,)))) != [tuple(side) for side in expect]:
            shown = ",".join(f"{alias}={share}" for alias, share in now_split) or "not at all"
            raise InUse(f"{name} is split {shown} now: look at it again, then change it")
        replace_split(db, name, split)
        note(db, "split", name=name, shares=[[alias, share] for alias, share in split], at=now())


def split_of(registry: Registry, name: str) -> Split:
    """How the traffic of `name` is split, none if it is not."""
    return _read(registry.database.rows(_SPLIT, (name,)))


def splits_in(registry: Registry) -> dict[str, Split]:
    """Every name whose traffic is split, and how."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, alias, share in registry.database.rows("SELECT name, alias, share FROM splits ORDER BY name, place"):
        found.setdefault(name, []).append((alias, share))
    return dict(found)


def _read(rows: Iterable[sqlite3.Row]) -> list[tuple[str, int]]:
    return [(str(alias), int(share)) for alias, share in rows]


def side_of(split: Split, name: str, user: str | None) -> str:
    """The alias that answers `user`, always the same while the shares are; chosen at random for nobody.

    Users lie on a line in an order that the name alone decides, and sides are dealt out from its start: when
    the first share grows, those who were on its side stay there.
    """
    total = sum(share for _, share in split)
    if user is None:
        place = secrets.randbelow(total)
    else:
        digest = hashlib.sha256(f"{name}\0{user}".encode(errors="backslashreplace")).digest()
        place = int.from_bytes(digest[:8]) * total >> 64
    for alias, share in split:
        place -= share
        if place < 0:
            return alias
    raise AssertionError("shares add up to their sum")
