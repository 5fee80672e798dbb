"""Is the registry whole? Every blob hashed again, every header read, every row held against its manifest.

Nothing is trusted but the bytes. What is damaged can be set aside into `quarantine/`, where it stops
nothing else; what the database also holds (manifests, lineages, evaluations) is written again from it.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterhub_local.digests import from_hex
from adapterhub_local.durable import alone, digest_bytes
from adapterhub_local.errors import BadFile, Corrupt, QhubError
from adapterhub_local.lora.header import read_header
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.rebuild import rebuild_alone
from adapterhub_local.registry.records import evaluation_record, removal_record
from adapterhub_local.registry.registry import Registry, unchecked
from adapterhub_local.registry.report import Problem, Report, found_orphans, state_problems
from adapterhub_local.registry.version import File, Version, version_of_row

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass
class Checked:
    """One pass over the blobs: the state of each digest, hashed at most once."""

    registry: Registry
    known: dict[str, str] = field(default_factory=dict)  # digest -> sound, damaged or missing

    def state(self, digest: str) -> str:
        if digest not in self.known:
            path = self.registry.blobs.path(digest)
            if not path.is_file():
                self.known[digest] = "missing"
            else:
                try:
                    self.known[digest] = "sound" if is_sound(path, digest, path.stat().st_size) else "damaged"
                except OSError:  # bytes the disk itself cannot give back
                    self.known[digest] = "damaged"
        return self.known[digest]


def verify(registry: Registry, version: Version) -> list[Problem]:
    """What is wrong with one version: its files, lineage and manifest, byte for byte, and its headers."""
    store = Checked(registry)
    return list(_version_problems(version, store))


def fsck(
    registry: Registry, *, repair: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Check everything. With `repair`, set aside what is damaged and write again what the database holds.

    May run while others publish: rows are read before blobs, and blobs are on disk before their rows.
    """
    with unchecked(registry.home) as plain:
        if not repair or not registry.home.root.is_dir():
            return _fsck(plain, False, progress)
        with alone(registry.home.repair_lock):
            return _fsck(plain, True, progress)


def _fsck(registry: Registry, repair: bool, progress: Callable[[int, int], None]) -> Report:
    report = Report(problems=list(state_problems(registry.home)))
    if repair and report.problems:
        report.rebuilt = rebuild_alone(registry)
        done = "the database was made again from the manifests and records"
        report.problems = [replace(problem, repaired=done) for problem in report.problems]
    store = Checked(registry)
    versions, copies = read_rows(registry, report)
    blobs = registry.blobs.paths()
    needed = {digest for version in versions for digest in _digests(version)} | set(copies)
    for orphan in found_orphans(registry.database):
        needed |= orphan.blobs
        if not orphan.is_published:
            report.unfinished.append(orphan.reference)
    users: dict[str, list[str]] = {}
    for version in versions:
        for digest in _digests(version):
            users.setdefault(digest, []).append(str(version))
    for index, path in enumerate(blobs):
        report.problems += _blob_problems(registry, path, store, users)
        progress(index + 1, len(blobs))
    report.num_blobs, report.num_versions = len(blobs), len(versions)
    report.num_unreferenced = sum(from_hex(path.name) not in needed for path in blobs)
    headers: set[str] = set()
    missing: set[str] = set()
    for version in versions:
        for problem in _version_problems(version, store, headers):
            # a damaged blob was reported above, once, with all the versions that need it
            if problem.kind == "header" or (problem.kind == "missing" and problem.subject not in missing):
                report.problems.append(problem)
                missing.add(problem.subject)
    for digest in copies:
        if store.state(digest) == "missing" and digest not in missing:
            report.problems.append(Problem("missing", digest, "a record the database knows is missing"))
    if repair:
        report.problems = [problem if problem.repaired else _repair(registry, problem, copies)
                           for problem in report.problems]  # fmt: skip
    return report


def read_rows(registry: Registry, report: Report) -> tuple[list[Version], dict[str, bytes]]:
    """The live versions whose rows are what their digests say, and what the database holds: digest -> bytes."""
    versions: list[Version] = []
    copies: dict[str, bytes] = {}
    try:
        removals = registry.database.rows("SELECT name, number, removed_at FROM removals")
        removed = {(row["name"], row["number"]): row["removed_at"] for row in removals}
        for row in registry.database.rows("SELECT * FROM versions ORDER BY name, number"):
            reference = f"{row['name']}@{row['number']}"
            try:
                version = version_of_row(row)
            except Corrupt as error:
                report.problems.append(Problem("row", reference, f"{error}: `qhub fsck --rebuild-db` makes it again"))
                continue
            copies[version.manifest_digest] = row["manifest"].encode()
            copies[version.lineage_file.digest] = row["lineage"].encode()
            removed_at = removed.get((row["name"], row["number"]))
            if removed_at is None:
                versions.append(version)
            else:
                record = removal_record(version.manifest_digest, removed_at)
                copies[digest_bytes(record)] = record
        copies |= _evaluations(registry, report)
        records = [row["record"].encode() for row in registry.database.rows("SELECT record FROM marks")]
        copies |= {digest_bytes(record): record for record in records}
        report.problems += _alias_problems(registry)
    except QhubError as error:
        if not any(problem.kind == "database" for problem in report.problems):
            report.problems.append(Problem("database", str(registry.home.database), str(error)))
    return versions, copies


def _evaluations(registry: Registry, report: Report) -> dict[str, bytes]:
    """Digest -> bytes of the record of every evaluation in the database."""
    records = {}
    query = "SELECT e.*, v.manifest_digest FROM evaluations e JOIN versions v USING (name, number)"
    for row in registry.database.rows(query):
        try:
            record = evaluation_record(row["manifest_digest"], row["task"], json.loads(row["evaluation"]))
        except ValueError:
            record = b""
        if File.of("evaluation.json", record).digest == row["digest"]:
            records[row["digest"]] = record
        else:
            where = f"{row['name']}@{row['number']}"
            message = f"its evaluation on {row['task']} is damaged in the database: `qhub fsck --rebuild-db` helps"
            report.problems.append(Problem("row", where, message))
    return records


def _alias_problems(registry: Registry) -> Iterator[Problem]:
    """Aliases that point to nothing, or elsewhere than the log of their moves says."""
    log = "SELECT name, alias, new_number, max(id) FROM alias_log GROUP BY name, alias"
    logged = {(row["name"], row["alias"]): row["new_number"] for row in registry.database.rows(log)}
    pointed = registry.database.rows("SELECT name, alias, number FROM aliases")
    actual = {(row["name"], row["alias"]): row["number"] for row in pointed}
    for name, alias in sorted({*logged, *actual}):
        recorded, points = logged.get((name, alias)), actual.get((name, alias))
        if recorded != points:
            message = f"points to {points or 'nothing'}, its log says {recorded or 'nothing'}: set it again"
            yield Problem("alias", f"{name}@{alias}", message)


def _digests(version: Version) -> tuple[str, ...]:
    return (version.manifest_digest, version.lineage_file.digest, *(file.digest for file in version.files))


def _blob_problems(registry: Registry, path: Path, store: Checked, users: dict[str, list[str]]) -> Iterator[Problem]:
    digest = from_hex(path.name)
    if not _HEX.fullmatch(path.name) or registry.blobs.path(digest) != path or not path.is_file():
        yield Problem("foreign", str(path), "is not a blob: nothing of this registry made it")
    elif store.state(digest) == "damaged":
        needing = ", ".join(users.get(digest, [])[:3]) or "no version"
        yield Problem("damaged", digest, f"its bytes have another digest; {needing} needs it: pull or publish it again")


def _version_problems(version: Version, store: Checked, headers: set[str] | None = None) -> Iterator[Problem]:
    """Missing and damaged blobs of a version, and headers that are not sound; `headers` are those seen before."""
    seen = headers if headers is not None else set()
    names = {version.manifest_digest: "manifest", version.lineage_file.digest: "lineage"}
    names |= {file.digest: file.path for file in version.files}
    for digest, name in names.items():
        state = store.state(digest)
        if state != "sound":
            yield Problem(state, digest, f"{name} of {version} is {state}: pull or publish it again")
    for file in version.files:
        if file.path.endswith(".safetensors") and file.digest not in seen and store.state(file.digest) == "sound":
            seen.add(file.digest)
            try:
                read_header(store.registry.blobs.path(file.digest))
            except BadFile as error:
                yield Problem("header", str(version), f"{file.path} was published so: {error}")


def _repair(registry: Registry, problem: Problem, copies: dict[str, bytes]) -> Problem:
    done = []
    if problem.kind in ("damaged", "foreign"):
        path = registry.blobs.path(problem.subject) if problem.kind == "damaged" else Path(problem.subject)
        if problem.kind == "foreign" or not is_sound(path, problem.subject, path.stat().st_size):
            done.append(f"set aside as {registry.blobs.set_aside(path)}")
    if problem.kind in ("damaged", "missing") and problem.subject in copies:
        registry.blobs.put("copy", copies[problem.subject])
        done.append("written again from the database")
    return replace(problem, repaired=", ".join(done) or None)
