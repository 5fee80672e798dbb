"""What points to versions of one name: aliases, with their protection, approvals and moves, and the split."""

from typing import Any

from adapterhub_local.registry.marks import alias_log
from adapterhub_local.registry.protecting import given_to, protections_of
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.split import split_of


def pointers_of(registry: Registry, name: str) -> dict[str, Any]:
    """All of it, as JSON. Raises NotFound for a name that has nothing of it and no version."""
    found = {
        "aliases": registry.aliases(name),
        "split": [{"alias": alias, "share": share} for alias, share in split_of(registry, name)],
        "protections": [one.to_json() for one in protections_of(registry, name).values()],
        "approvals": given_to(registry, name),
        "alias_log": alias_log(registry, name),
    }
    if not any(found.values()):
        registry.resolve(name)  # which says what there is
    return found
