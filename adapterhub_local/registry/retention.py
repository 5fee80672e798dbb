"""Which versions a home need not keep: all but the newest of each name, and but what something else needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.errors import InputError, InUse, NotFound
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.marks import rollback_target
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version


@dataclass
class Retention:
    """What is, or would be, removed, and why the others stay; `num_bytes` of files that only the former need."""

    drop: list[Version]
    keep: dict[str, str]
    num_bytes: int
    refused: list[str] = field(default_factory=list)  # needed since

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "removed": [str(version) for version in self.drop],
            "kept": self.keep,
            "bytes": self.num_bytes,
            "refused": self.refused,
        }


def choose(registry: Registry, keep: int, *, aliased_apart: bool = False, clock: float) -> Retention:
    """What to keep: the `keep` newest of each name, and what an alias, a rollback, a lease or a kept child needs.

    With `aliased_apart` versions with an alias are not counted among the newest. `clock` is seconds since 1970.
    """
    if keep < 1:
        raise InputError(f"keep is {keep}: keep at least the newest version of a name")
    versions = registry.versions()
    reasons: dict[str, str] = {}
    leased = {row["content_digest"] for row in registry.database.rows(
        "SELECT content_digest FROM leases WHERE expires_at > ?", (clock,))}  # fmt: skip
    for name in registry.names():
        own = [version for version in versions if version.name == name]
        aliases = registry.aliases(name)
        pointed = set(aliases.values())
        counted = [version for version in own if not (aliased_apart and version.number in pointed)]
        for version in counted[-keep:]:
            reasons[str(version)] = f"one of the {keep} newest" if keep > 1 else "the newest"
        before = {alias: rollback_target(registry, name, alias) for alias in aliases}
        for version in own:
            names = [alias for alias, number in aliases.items() if number == version.number]
            back = [alias for alias, number in before.items() if number == version.number]
            if names:
                reasons[str(version)] = f"{name}@{', '.join(names)} points to it"
            elif version.content_digest in leased:
                reasons.setdefault(str(version), "a running server uses it")
            elif back:
                reasons.setdefault(str(version), f"a rollback of {name}@{', '.join(back)} goes to it")
    _keep_parents(versions, reasons)
    drop = [version for version in versions if str(version) not in reasons]
    needed = {file.digest for version in versions if str(version) in reasons for file in version.files}
    freed = {file.digest: file.size for version in drop for file in version.files if file.digest not in needed}
    return Retention(drop, reasons, sum(freed.values()))


def retire(registry: Registry, chosen: Retention, progress: Callable[[int, int], None] = lambda *_: None) -> Retention:
    """Remove what was chosen, children before parents; what is needed by now stays, and stands in `refused`."""
    left = [*reversed(chosen.drop)]
    done: list[Version] = []
    is_moving = True
    while left and is_moving:
        waiting: list[Version] = []
        chosen.refused = []
        for version in left:
            try:
                remove(registry, version)
                done.append(version)
                progress(len(done), len(chosen.drop))
            except NotFound:
                pass
            except InUse as error:
                waiting.append(version)
                chosen.refused.append(str(error))
        is_moving = len(waiting) < len(left)
        left = waiting
    return Retention(
        sorted(done, key=lambda one: (one.name, one.number)), chosen.keep, chosen.num_bytes, chosen.refused
    )


def _keep_parents(versions: list[Version], reasons: dict[str, str]) -> None:
    """Keep what kept versions were made of, and so on up."""
    by_name: dict[str, Version] = {}
    for version in versions:
        origin = (version.lineage.get("imported_from") or {}).get("manifest_digest")
        by_name |= {str(version): version, version.manifest_digest: version} | ({origin: version} if origin else {})
    pending = [version for version in versions if str(version) in reasons]
    while pending:
        child = pending.pop()
        for entry in _parents(child):
            parent = by_name.get(str(entry.get("manifest_digest"))) or by_name.get(str(entry.get("reference")))
            if parent is not None and str(parent) not in reasons:
                reasons[str(parent)] = f"{child} was made of it"
                pending.append(parent)


def _parents(version: Version) -> list[dict[str, Any]]:
    return [entry for entry in version.lineage.get("parents") or () if isinstance(entry, dict)]
