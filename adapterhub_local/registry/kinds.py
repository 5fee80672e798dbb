"""Kinds of versions: an adapter changes what a base says, a router chooses among adapters.

Both are files with a lineage, so that numbers, aliases, tags, copies and signatures are the same for both.
"""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.errors import Incompatible
from adapterhub_local.registry.version import ROUTER, Version

ROUTER_FILES = ("router.json", "router.safetensors")


def is_router(lineage: Mapping[str, Any]) -> bool:
    """Whether a version of this lineage is a router."""
    return lineage.get("kind") == ROUTER


def check_adapter(version: Version) -> Version:
    """`version`, if it is an adapter. Raises Incompatible for a router, with what routers are for."""
    if is_router(version.lineage):
        parents = [str(parent.get("reference")) for parent in version.lineage.get("parents") or ()]
        among = f" ({', '.join(parents[:3])}{', ...' if len(parents) > 3 else ''})" if parents else ""
        raise Incompatible(
            f"{version} is a router: it has no weights to add to a base, it chooses among adapters{among}. Name one of "
            f"these, or `qhub serve --router {version}` and ask for the model 'auto'"
        )
    return version


def check_router(version: Version) -> Version:
    """`version`, if it is a router. Raises Incompatible for an adapter."""
    if not is_router(version.lineage):
        raise Incompatible(f"{version} is not a router but an adapter: `qhub router train` makes a router of several")
    return version
