"""Versions at registries of containers (OCI distribution), where manifests and blobs are the same bytes."""
