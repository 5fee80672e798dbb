"""Immutable adapter versions in content-addressed blobs, with movable aliases. Files and digests, never tensors."""

from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import File, Version

__all__ = ["File", "Registry", "Version"]
