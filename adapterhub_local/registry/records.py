"""The records that are blobs, too: each names its version by the digest of the manifest, so rows can be made again."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.durable import canonical_json


def evaluation_record(manifest_digest: str, task: str, evaluation: Mapping[str, Any]) -> bytes:
    """The blob of a later evaluation."""
    return canonical_json({"evaluation": evaluation, "manifest": manifest_digest, "task": task})


def removal_record(manifest_digest: str, removed_at: str) -> bytes:
    """The blob that says that a version was removed, so that its number stays taken whatever happens."""
    return canonical_json({"removed": manifest_digest, "removed_at": removed_at})
