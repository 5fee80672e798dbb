"""Protect aliases and approve versions for them; what is asked of a version is in gates.py."""

from collections.abc import Sequence
from typing import Any

from adapterhub_local.errors import InputError, NotFound, Protected
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.registry import gates
from adapterhub_local.registry.catalog import metrics_of
from adapterhub_local.registry.gates import MAX_APPROVALS, Approval, Protection, Requirement
from adapterhub_local.registry.journal import marking, note
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import now
from adapterhub_local.registry.version import Version


def protect(registry: Registry, name: str, alias: str, require: Sequence[str] = (), approvals: int = 0) -> Protection:
    """Let `name@alias` move only to versions that meet all of `require` and have this many approvals from others.

    This replaces any earlier protection. Where it points now it stays. Raises InputError, and NotFound for a name
    that has no version.
    """
    check_alias(alias)
    if not 0 <= approvals <= MAX_APPROVALS:
        raise InputError(f"approvals is {approvals}: ask for 0 to {MAX_APPROVALS}")
    wanted = tuple(Requirement.parse(text) for text in require)
    if not wanted and not approvals:
        raise InputError("say what is asked of a version: --require 'TASK.METRIC>=BOUND', --approvals N, or both")
    registry.resolve(check_name(name))
    at = now()
    with marking(registry.database, registry.blobs) as db:
        texts = [str(one) for one in wanted]
        note(db, "protection", name=name, alias=alias, require=texts, approvals=approvals, at=at)
        return gates.protections(gates.recorded(db, "protection", name))[alias]


def unprotect(registry: Registry, name: str, alias: str) -> None:
    """Let `name@alias` move anywhere again. Raises NotFound if it is not protected."""
    with marking(registry.database, registry.blobs) as db:
        if alias not in gates.protections(gates.recorded(db, "protection", name)):
            raise NotFound(f"{name}@{alias} is not protected: `qhub alias list {name}` shows what is")
        note(db, "protection", name=name, alias=alias, require=[], approvals=None, at=now())


def approve(registry: Registry, version: Version, alias: str, *, is_given: bool = True) -> list[Approval]:
    """Hold a version fit for an alias, as the current actor, or take that back; the approvals it has then.

    Raises NotFound if there is nothing to take back.
    """
    check_alias(alias)
    fields = {"name": version.name, "number": version.number, "manifest": version.manifest_digest, "alias": alias}
    with marking(registry.database, registry.blobs) as db:
        before = len(gates.approvals(gates.recorded(db, "approval", version.name)))
        note(db, "approval", is_given=is_given, at=now(), **fields)
        given = gates.approvals(gates.recorded(db, "approval", version.name))
        if not is_given and len(given) == before:
            raise NotFound(f"you did not approve {version} for {alias}: nothing was taken back")
    return [one for one in given if one.manifest == version.manifest_digest and one.alias == alias]


def protections_of(registry: Registry, name: str) -> dict[str, Protection]:
    """Alias -> what protects it, of one name."""
    return gates.protections(registry.database.rows(gates.RECORDS, ("protection", name)))


def lacking(registry: Registry, version: Version) -> dict[str, list[str]]:
    """Protected alias -> all that a version lacks before the current actor may move it there, nothing if it may."""
    found = protections_of(registry, version.name)
    return {alias: gates.lacking(registry.database.rows, one, version.number) for alias, one in found.items()}


def approvals_of(registry: Registry, version: Version) -> list[Approval]:
    """The approvals of a version, for whatever alias."""
    given = gates.approvals(registry.database.rows(gates.RECORDS, ("approval", version.name)))
    return [one for one in given if one.manifest == version.manifest_digest]


def given_to(registry: Registry, name: str) -> list[dict[str, Any]]:
    """The approvals of versions of a name, the oldest first: reference, alias, actor and time of each."""
    given = gates.approvals(registry.database.rows(gates.RECORDS, ("approval", name)))
    references = {version.manifest_digest: str(version) for version in registry.versions(name)} if given else {}
    return [
        {"reference": references[one.manifest], "alias": one.alias, "actor": one.actor, "at": one.at}
        for one in given
        if one.manifest in references
    ]


def scores_without_values(registry: Registry, protection: Protection) -> list[str]:
    """The scores that a protection asks and that no version of its name has yet."""
    scores = {
        (task, metric): 0.0
        for metrics in metrics_of(registry, registry.versions(protection.name)).values()
        for task, found in metrics.items() if isinstance(found, dict) and isinstance(found.get("adapter"), dict)
        for metric in found["adapter"]
    }  # fmt: skip
    return [str(one.score) for one in protection.require if not one.values(scores)]


def check_reachable(registry: Registry, name: str, alias: str | None) -> None:
    """Raise Protected if no new version of `name` can get `alias`: before hours of work, not after them."""
    protection = protections_of(registry, name).get(alias) if alias is not None else None
    if protection is not None and protection.approvals:
        raise Protected(
            f"{name}@{alias} is protected and needs approvals, which a version that is not there yet cannot have: "
            f"leave the alias out, have the version approved, then `qhub alias set {name} {alias} VERSION`"
        )
