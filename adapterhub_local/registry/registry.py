"""The registry: publish, resolve, list and alias immutable versions.

registry = Registry()                                   # at $QHUB_HOME
version = registry.publish("sentiment", files, lineage) # sentiment@1
registry.set_alias("sentiment", "prod", 1)
PeftModel.from_pretrained(model, registry.resolve("sentiment@prod").path)
"""

import difflib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.refs import MAX_NUMBER, Reference, check_alias, check_name
from adapterhub_local.registry.blobs import Blobs
from adapterhub_local.registry.database import Database
from adapterhub_local.registry.folders import lay_out
from adapterhub_local.registry.journal import marking, note
from adapterhub_local.registry.ledger import enter
from adapterhub_local.registry.quota import check_room
from adapterhub_local.registry.records import evaluation_record
from adapterhub_local.registry.rows import (
    insert_evaluation,
    insert_version,
    next_number,
    note_version,
    now,
    point_alias,
)
from adapterhub_local.registry.version import Version
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at

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
            number = min(ref.version, MAX_NUMBER + 1)  # SQLite holds no number of any size
            rows = self.rows("AND v.name = ? AND v.number = ?", (ref.name, number))
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
        return lay_out(self.home, self.blobs, version)

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


@contextmanager
def unchecked(home: Home) -> Iterator[Registry]:
    """The registry of a home as it is, for those who look at the damage; its connection is closed with the block."""
    registry = Registry(home, checked=False)
    with closing(registry.database):
        yield registry
