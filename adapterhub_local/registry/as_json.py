"""A version as `--json` shows it: whole, or as one entry of a list."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.registry.version import Version


def whole(version: Version) -> dict[str, Any]:
    """All that is immutable about a version, its lineage included."""
    return {
        **_named(version),
        "content_digest": version.content_digest,
        "manifest_digest": version.manifest_digest,
        "created_at": version.created_at,
        "files": [vars(file) for file in version.files],
        "lineage": version.lineage,
    }


def entry(version: Version, aliases: Mapping[str, int], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a list shows of a version; `aliases` are those of its name, `metrics` its scores by task."""
    lineage = version.lineage
    return {
        **_named(version),
        "aliases": dict(aliases),
        "base": lineage.get("base"),
        "adapter": lineage.get("adapter"),
        "metrics": dict(metrics),
        "kind": lineage.get("kind"),
        "content_digest": version.content_digest,
        "created_at": version.created_at,
    }


def _named(version: Version) -> dict[str, Any]:
    return {"name": version.name, "version": version.number, "reference": str(version)}
