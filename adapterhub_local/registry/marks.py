"""What belongs to versions and may change: the history of aliases, tags and descriptions. Versions do not change."""

import re
from collections.abc import Callable
from sqlite3 import Row
from typing import Any

from adapterhub_local.errors import BadReference, InputError, InUse, NotFound
from adapterhub_local.refs import check_alias
from adapterhub_local.registry.journal import marking, note
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import check_expected, now, point_alias
from adapterhub_local.registry.version import Version

MAX_TAG_LENGTH = 64
_TAG = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:/=-]*")


def alias_log(registry: Registry, name: str, alias: str | None = None) -> list[dict[str, Any]]:
    """Every move of the aliases of `name`, or of one of them, oldest first.

    Each has alias, action (set, rollback or removed), old_number, new_number (None for nothing), changed_at and actor
    (None for what an older qhub wrote).
    """
    query = "SELECT alias, action, old_number, new_number, changed_at, actor FROM alias_log WHERE name = ?"
    condition, values = (" AND alias = ?", (name, alias)) if alias is not None else ("", (name,))
    return [dict(row) for row in registry.database.rows(f"{query}{condition} ORDER BY id", values)]


def rollback(registry: Registry, name: str, alias: str, *, expect: int | None = None, to: int | None = None) -> int:
    """Point `name@alias` to where it pointed before, and return that number; again goes one more step back.

    With `expect`, only if it points to that version now, with `to`, only if that leads to this one. Versions removed
    since are passed over. Raises NotFound if there is nothing before, InUse if it is not as expected.
    """
    check_alias(alias)
    with marking(registry.database, registry.blobs) as db:
        check_expected(db, name, alias, expect)
        target = _before(lambda query, values: db.execute(query, values).fetchall(), name, alias)
        if target is None:
            raise NotFound(f"{name}@{alias} never pointed elsewhere: `qhub alias log {name} {alias}` shows its moves")
        if to is not None and target != to:
            raise InUse(f"before that {name}@{alias} pointed to {target}, not to {to}: nothing was changed")
        point_alias(db, name, alias, target, expect=expect, action="rollback")
    return target


def rollback_target(registry: Registry, name: str, alias: str) -> int | None:
    """Where a rollback of `name@alias` would go now, None if nowhere."""
    return _before(registry.database.rows, name, alias)


def _before(rows: Callable[[str, tuple[str, ...]], list[Row]], name: str, alias: str) -> int | None:
    """Where an alias pointed before; versions removed since are passed over."""
    removed = {row["number"] for row in rows("SELECT number FROM removals WHERE name = ?", (name,))}
    history: list[int] = []
    for row in rows("SELECT action, new_number FROM alias_log WHERE name = ? AND alias = ? ORDER BY id", (name, alias)):
        if row["action"] == "rollback":
            while history and history[-1] != row["new_number"]:
                history.pop()
        elif row["new_number"] is not None:
            history.append(row["new_number"])
    if history and rows("SELECT 1 FROM aliases WHERE name = ? AND alias = ?", (name, alias)):
        current = history.pop()
        while history and (history[-1] in removed or history[-1] == current):
            history.pop()
    return history[-1] if history else None


def remove_alias(registry: Registry, name: str, alias: str, *, expect: int | None = None) -> None:
    """Remove `name@alias`; its log stays. Raises NotFound, or InUse if it is not as expected or has traffic."""
    with marking(registry.database, registry.blobs) as db:
        if db.execute("SELECT 1 FROM splits WHERE name = ? AND alias = ?", (name, alias)).fetchone():
            raise InUse(f"{name}@{alias} answers a part of {name}'s traffic: `qhub alias split {name} ...` first")
        if not db.execute("SELECT 1 FROM aliases WHERE name = ? AND alias = ?", (name, alias)).fetchone():
            raise NotFound(f"there is no alias {name}@{alias}: `qhub alias list {name}` shows them")
        point_alias(db, name, alias, None, expect=expect, action="removed")


def check_tag(tag: str) -> str:
    """`tag`, if it may be one. Raises BadReference."""
    if len(tag) > MAX_TAG_LENGTH or not _TAG.fullmatch(tag):
        shown = tag.encode("unicode_escape").decode()[:80]
        raise BadReference(f"'{shown}' is not a tag: use letters, digits and . _ : / = -, up to {MAX_TAG_LENGTH}")
    return tag


def add_tags(registry: Registry, version: Version, tags: tuple[str, ...]) -> None:
    """Give a version these tags, all or none of them."""
    for tag in tags:
        check_tag(tag)
    with marking(registry.database, registry.blobs) as db:
        for tag in tags:
            values = (version.name, version.number, tag)
            if db.execute("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", values).rowcount:
                note(db, "tag", name=version.name, number=version.number, tag=tag, is_set=True, at=now())


def remove_tags(registry: Registry, version: Version, tags: tuple[str, ...]) -> None:
    """Take these tags off a version, all or none of them. Raises NotFound if it has not got one."""
    with marking(registry.database, registry.blobs) as db:
        for tag in tags:
            values = (version.name, version.number, tag)
            if not db.execute("DELETE FROM tags WHERE name = ? AND number = ? AND tag = ?", values).rowcount:
                raise NotFound(f"{version} has no tag '{tag}': nothing was changed")
            note(db, "tag", name=version.name, number=version.number, tag=tag, is_set=False, at=now())


def tags_of(registry: Registry, version: Version) -> list[str]:
    """The tags of a version, sorted."""
    query = "SELECT tag FROM tags WHERE name = ? AND number = ? ORDER BY tag"
    return [row["tag"] for row in registry.database.rows(query, (version.name, version.number))]


def describe(registry: Registry, version: Version, description: str, *, expect: str | None = None) -> None:
    """Describe a version, in place of the description before; with `expect`, only if that is the description now.

    The empty text stands for no description. Raises InputError for text that is not text, InUse if it is another.
    """
    if not description.strip() or not description.isprintable():
        raise InputError("a description is one line of text")
    with marking(registry.database, registry.blobs) as db:
        values = (version.name, version.number, description)
        known = db.execute("SELECT description FROM descriptions WHERE name = ? AND number = ?", values[:2]).fetchone()
        before = known["description"] if known else version.lineage.get("description")
        if expect is not None and str(before or "") != expect:
            raise InUse(f"{version} has another description now: nothing was changed")
        db.execute("DELETE FROM descriptions WHERE name = ? AND number = ?", values[:2])
        db.execute("INSERT INTO descriptions VALUES (?, ?, ?)", values)
        note(db, "description", name=version.name, number=version.number, description=description, at=now())


def description_of(registry: Registry, version: Version) -> str | None:
    """The last description of a version, else that of its recipe."""
    query = "SELECT description FROM descriptions WHERE name = ? AND number = ?"
    rows = registry.database.rows(query, (version.name, version.number))
    return rows[0]["description"] if rows else version.lineage.get("description")
