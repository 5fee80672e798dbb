"""The registry: publish, resolve, list and alias immutable versions.

registry = Registry()                                   # at $QHUB_HOME
version = registry.publish("sentiment", files, lineage) # sentiment@1
registry.set_alias("sentiment", "prod", 1)
PeftModel.from_pretrained(model, registry.resolve("sentiment@prod").path)
"""

import difflib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import canonical_json, may_write, place_folder, share_parents, staging
from adapterhub_local.errors import BadReference, InputError, InUse, NotFound
from adapterhub_local.refs import MAX_NUMBER, Reference, check_alias, check_name
from adapterhub_local.registry.blobs import Blobs, is_sound
from adapterhub_local.registry.database import Database
from adapterhub_local.registry.gates import check_move
from adapterhub_local.registry.journal import log_move, marking, note
from adapterhub_local.registry.ledger import enter
from adapterhub_local.registry.quota import check_room
from adapterhub_local.registry.records import evaluation_record
from adapterhub_local.registry.version import File, Version
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at

NOTHING = 0  # where an alias points that is expected not to be there
LIVE = "FROM versions v LEFT JOIN removals r USING (name, number) WHERE r.name IS NULL"


class Registry:
    """The adapters of one home. Safe to use from several threads and processes.

    Everything raises Corrupt if the database was deleted or comes from an older backup; with `checked=False`, for
    repairs, what it still says is taken as it is.
    """

    def __init__(self, home: Home | str | Path | None = None, *, checked: bool = True) -> None:
        self.home = home if isinstance(home, Home) else home_at(home)
        self.blobs = Blobs(self.home)
        self.database = Database(self.home, checked=checked)

    def publish(
        self, name: str, files: Mapping[str, Path | bytes], lineage: Mapping[str, Any], *, alias: str | None = None
    ) -> Version:
        """Add the next version of `name`, all or nothing, and point `alias` to it if one is given.

        Raises Protected if the alias is protected against it, OverQuota if the home may not hold so much.

        Blobs are on disk before the one transaction that gives the number and makes the version
        visible; a crash before it leaves unreferenced files only. Numbers are gapless.
        """
        check_name(name)
        if alias is not None:
            check_alias(alias)
        while True:
            named = [*sorted(files.items()), ("lineage.json", canonical_json(lineage))]
            sizes = (len(data) if isinstance(data, bytes) else data.stat().st_size for _, data in named)
            check_room(self.home, sum(sizes))
            *stored, lineage_file = self.blobs.put_all(named)
            with marking(self.database, self.blobs) as db:
                # Bytes that were here already may have been collected meanwhile; not while the lock is held.
                if not all(self.blobs.path(file.digest).is_file() for file in (*stored, lineage_file)):
                    continue
                version = Version(name, next_number(db, name), now(), tuple(stored), lineage_file, lineage, self.folder)
                # Visible before the commit, flushed after it: two flushes less while others wait. Should the power
                # fail between the two, the row holds the manifest, and `fsck --repair` writes it again.
                manifest = self.blobs.put("manifest.json", version.manifest, durable=False)
                insert_version(db, version)
                enter(db, "version", version, version.manifest_digest)
                note_version(db, version, "published")
                if alias is not None:
                    point_alias(db, name, alias, version.number)
                break
        with suppress(OSError):
            self.blobs.sync(manifest)
        return version

    def resolve(self, reference: str | Reference) -> Version:
        """The version a reference names. Raises BadReference, or NotFound with the nearest names."""
        ref = Reference.parse(reference) if isinstance(reference, str) else reference
        if ref.version is not None:
            rows = self.rows("AND v.name = ? AND v.number = ?", (ref.name, ref.version))
        elif ref.alias is not None:
            pointed = "SELECT number FROM aliases WHERE name = ? AND alias = ?"
            rows = self.rows(f"AND v.name = ? AND v.number = ({pointed})", (ref.name, ref.name, ref.alias))
        elif ref.digest is not None:
            begins = "substr(v.manifest_digest, 1, ?) = ? OR substr(v.content_digest, 1, ?) = ?"
            given = (len(ref.digest), ref.digest)
            rows = self.rows(f"AND v.name = ? AND ({begins})", (ref.name, *given, *given))
            if len({row["content_digest"] for row in rows}) > 1:
                raise BadReference(f"'{ref}' matches several versions: write more digits of the digest")
        else:
            rows = self.rows(f"AND v.name = ? AND v.number = (SELECT max(v.number) {LIVE} AND v.name = ?)",
                              (ref.name, ref.name))  # fmt: skip
        if not rows:
            raise NotFound(self._no_such_version(ref))
        return self.version(rows[-1])

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, ordered by name and number."""
        rows = self.rows("AND v.name = ?", (name,)) if name is not None else self.rows("", ())
        return [self.version(row) for row in rows]

    def names(self) -> list[str]:
        """The names that have a version."""
        rows = self.database.rows(f"SELECT DISTINCT v.name {LIVE} ORDER BY v.name")
        return [row["name"] for row in rows]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number, of one name."""
        rows = self.database.rows("SELECT alias, number FROM aliases WHERE name = ? ORDER BY alias", (name,))
        return {row["alias"]: row["number"] for row in rows}

    def set_alias(self, name: str, alias: str, number: int, *, expect: int | None = None) -> None:
        """Point `name@alias` to version `number`; with `expect`, only if it points to that version, or NOTHING, now.

        Raises NotFound if there is no such version, InUse if the alias does not point to the version that was expected,
        and Protected if it is a protected alias whose requirements the version does not meet.
        """
        check_alias(alias)
        self.resolve(Reference(name, version=number))
        with marking(self.database, self.blobs) as db:
            point_alias(db, name, alias, number, expect=expect)

    def add_evaluation(self, version: Version, task: str, evaluation: Mapping[str, Any]) -> None:
        """Keep a later evaluation of a version beside it; the version itself does not change.

        `evaluation` has the form of a task in the lineage's `metrics`. It is stored as a blob too, which
        names its version, so that the database can be made again from the blobs.
        """
        blob = self.blobs.put("evaluation.json", evaluation_record(version.manifest_digest, task, evaluation))
        with marking(self.database, self.blobs) as db:
            insert_evaluation(db, version, task, blob.digest, evaluation)
            enter(db, "evaluation", version, blob.digest)
            number, digest = version.number, blob.digest
            note(db, "evaluation", name=version.name, number=number, task=task, digest=digest, at=now())

    def metrics(self, version: Version) -> dict[str, Any]:
        """Task -> scores: those of the version's lineage, and the newest of its later evaluations."""
        metrics = dict(version.lineage.get("metrics", {}))
        query = "SELECT task, evaluation FROM evaluations WHERE name = ? AND number = ? ORDER BY id"
        rows = self.database.rows(query, (version.name, version.number))
        return metrics | {row["task"]: json.loads(row["evaluation"]) for row in rows}

    def versions_on_base(self, fingerprint: str) -> list[Version]:
        """The versions that were made for the base with this fingerprint."""
        return [self.version(row) for row in self.rows("AND v.base_fingerprint = ?", (fingerprint,))]

    def folder(self, version: Version) -> Path:
        """A folder with the version's files, their bytes checked. Raises Corrupt if a blob is damaged or missing.

        The files are links to the read-only blobs where the filesystem allows it.
        """
        blobs = {file.path: self.blobs.check(file) for file in version.files}
        name = hex_of(version.content_digest)
        target = self.home.folders / name
        if _holds(target, version, blobs):
            return target
        if may_write(self.home.root) and may_write(self.home.folders) and may_write(self.home.tmp):
            _lay_out(target, self.home.tmp, version, blobs, _link_or_copy)
            return target
        target = self.home.views / name
        if not _holds(target, version, blobs):
            # links to the blobs, which need no room; the home is on another filesystem as a rule
            tmp = self.home.views.parent / "tmp"
            _lay_out(target, tmp, version, blobs, lambda blob, link: link.symlink_to(blob))
        return target

    def rows(self, condition: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        """Rows of the versions `v` that were not removed and fit an SQL condition, by name and number."""
        return self.database.rows(f"SELECT v.* {LIVE} {condition} ORDER BY v.name, v.number", values)

    def version(self, row: sqlite3.Row) -> Version:
        """The version of such a row."""
        return Version.from_manifest(row["manifest"].encode(), row["lineage"].encode(), self.folder)

    def _no_such_version(self, ref: Reference) -> str:
        rows = self.database.rows(f"SELECT v.number {LIVE} AND v.name = ? ORDER BY v.number", (ref.name,))
        if not rows:
            near = difflib.get_close_matches(ref.name, self.names(), n=3)
            hint = f": did you mean {' or '.join(near)}?" if near else ": `qhub list` shows what there is"
            return f"there is no adapter '{ref.name}'{hint}"
        numbers = [row["number"] for row in rows]
        aliases = self.aliases(ref.name)
        shown = ", ".join(str(number) for number in numbers[-5:])
        known = f"versions {'... ' if len(numbers) > 5 else ''}{shown}"
        return f"there is no '{ref}': '{ref.name}' has {known}" + (
            f" and aliases {', '.join(aliases)}" if aliases else ""
        )


def next_number(db: sqlite3.Connection, name: str) -> int:
    """The number after the highest that a version of `name` ever had. Raises InputError if there is none left."""
    query = (
        "SELECT max(coalesce((SELECT max(number) FROM versions WHERE name = ?), 0),"
        " coalesce((SELECT max(number) FROM lost WHERE name = ?), 0))"
    )
    (newest,) = db.execute(query, (name, name)).fetchone()
    if newest >= MAX_NUMBER:
        raise InputError(f"'{name}@{newest}' has the highest number there can be: publish under another name")
    return int(newest) + 1


def is_number_taken(db: sqlite3.Connection, name: str, number: int) -> bool:
    """Whether a version of `name` ever had this number."""
    tables = (
        "SELECT 1 FROM versions WHERE name = ? AND number = ?",
        "SELECT 1 FROM lost WHERE name = ? AND number = ?",
    )
    return any(db.execute(query, (name, number)).fetchone() is not None for query in tables)


def insert_version(db: sqlite3.Connection, version: Version) -> None:
    """The row of a version, inside a transaction."""
    db.execute(
        "INSERT INTO versions (name, number, manifest_digest, content_digest, base_fingerprint, created_at,"
        " manifest, lineage) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(version.name, version.number, version.manifest_digest, version.content_digest),
            *(version.base_fingerprint, version.created_at, version.manifest.decode()),
            canonical_json(version.lineage).decode(),
        ),
    )


def note_version(db: sqlite3.Connection, version: Version, action: str) -> None:
    """The record that a version came: published here, or received from elsewhere."""
    fields = {"name": version.name, "number": version.number, "manifest": version.manifest_digest}
    kind = version.lineage.get("kind")
    note(db, "version", action=action, kind=kind if isinstance(kind, str) else None, at=now(), **fields)


def insert_evaluation(
    db: sqlite3.Connection, version: Version, task: str, digest: str, evaluation: Mapping[str, Any]
) -> None:
    """The row of an evaluation whose blob is `digest`, inside a transaction."""
    db.execute(
        "INSERT INTO evaluations (name, number, task, digest, evaluation) VALUES (?, ?, ?, ?, ?)",
        (version.name, version.number, task, digest, canonical_json(evaluation).decode()),
    )


def point_alias(
    db: sqlite3.Connection, name: str, alias: str, number: int | None, *, expect: int | None = None, action: str = "set"
) -> None:
    """Move an alias inside a transaction of `marking`, or remove it if `number` is None, and log it.

    Every move of an alias is made here, so that a protected one (gates.py) has no other door.
    """
    row = db.execute("SELECT number FROM aliases WHERE name = ? AND alias = ?", (name, alias)).fetchone()
    old = row["number"] if row else None
    if expect is not None and (old or NOTHING) != expect:
        now_at, wanted = (number or "nothing" for number in (old, expect))
        raise InUse(f"{name}@{alias} points to {now_at}, not to {wanted}: nothing was changed")
    if number != old:
        check_move(db, name, alias, number)
    if number is None:
        for table in ("aliases", "splits"):
            db.execute(f"DELETE FROM {table} WHERE name = ? AND alias = ?", (name, alias))  # noqa: S608
    else:
        db.execute("INSERT OR REPLACE INTO aliases (name, alias, number) VALUES (?, ?, ?)", (name, alias, number))
    log_move(db, name=name, alias=alias, old=old, new=number, at=now(), action=action)


def _holds(folder: Path, version: Version, blobs: Mapping[str, Path]) -> bool:
    """Whether a folder has the files of a version: links to their blobs, or the same bytes."""
    return folder.is_dir() and all(_is_same(folder / file.path, blobs[file.path], file) for file in version.files)


def _lay_out(
    target: Path, tmp: Path, version: Version, blobs: Mapping[str, Path], place: Callable[[Path, Path], None]
) -> None:
    """Make the folder of a version by one rename; one that was changed by hand, or repaired since, is replaced."""
    if target.is_dir():
        with staging(tmp) as discarded:
            target.rename(discarded / "folder")
    with staging(tmp) as folder:
        staged = folder / "files"
        share_parents(staged)
        for path, blob in blobs.items():
            place(blob.absolute(), staged / path)
        with suppress(InUse):  # another process made the same folder meanwhile
            place_folder(staged, target)


def _is_same(path: Path, blob: Path, file: File) -> bool:
    return path.is_file() and (path.samefile(blob) or is_sound(path, file.digest, file.size))


def _link_or_copy(blob: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(blob)
    except OSError:  # a filesystem without hard links
        shutil.copyfile(blob, target)


def now() -> str:
    """The time as ISO 8601 in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@contextmanager
def unchecked(home: Home) -> Iterator[Registry]:
    """The registry of a home as it is, for those who look at the damage; its connection is closed with the block."""
    registry = Registry(home, checked=False)
    with closing(registry.database):
        yield registry
