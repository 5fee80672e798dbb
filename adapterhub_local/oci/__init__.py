"""Versions at OCI registries, which serve container images, where manifests and blobs are the same bytes."""
