"""Version: one immutable registry entry, and its manifest in the shape of an OCI image manifest."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from sqlite3 import Row
from typing import Any

from adapterhub_local.digests import PATTERN
from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import Corrupt

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.qhub.adapter.v1+json"
ROUTER = "router"  # the kind that a router's lineage says
ROUTER_TYPE = "application/vnd.qhub.router.v1+json"
ARTIFACT_TYPES = (ARTIFACT_TYPE, ROUTER_TYPE)
LINEAGE_TYPE = "application/vnd.qhub.lineage.v1+json"
FILE_TYPES = {".safetensors": "application/vnd.safetensors", ".json": "application/json"}
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
NAME = "org.qhub.name"
VERSION = "org.qhub.version"
_FILE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class File:
    """A named blob: `path` inside the version, `digest` as `sha256:<hex>`, `size` in bytes."""

    path: str
    digest: str
    size: int

    def __post_init__(self) -> None:
        # a name inside a version is never a way out of its folder, whoever wrote the manifest
        if not _FILE_PATH.fullmatch(self.path) or not PATTERN.fullmatch(self.digest) or self.size < 0:
            raise Corrupt(f"{self.path!r} ({self.digest}, {self.size} bytes) cannot be a file of a version")

    def descriptor(self, media_type: str | None = None) -> dict[str, Any]:
        """The OCI descriptor of this file."""
        kind = media_type or FILE_TYPES.get(Path(self.path).suffix, "application/octet-stream")
        return {"mediaType": kind, "digest": self.digest, "size": self.size, "annotations": {TITLE: self.path}}

    @classmethod
    def of(cls, path: str, data: bytes) -> "File":
        """The entry of these bytes."""
        return cls(path, digest_bytes(data), len(data))

    @classmethod
    def from_descriptor(cls, descriptor: Mapping[str, Any]) -> "File":
        return cls(descriptor["annotations"][TITLE], descriptor["digest"], descriptor["size"])


def content_digest(files: tuple[File, ...]) -> str:
    """The identity of the files alone: equal training output has equal content, whatever its lineage."""
    return digest_bytes(canonical_json({file.path: file.digest for file in files}))


@dataclass(frozen=True)
class Version:
    """An entry `name@number`: files, and the lineage that says where they came from.

    `manifest_digest` identifies the entry with its lineage, `content_digest` the files alone.
    `path` is a folder with the files, after their bytes were checked; plain PEFT loads it.
    """

    name: str
    number: int
    created_at: str
    files: tuple[File, ...]
    lineage_file: File
    lineage: Mapping[str, Any] = field(compare=False)
    _folder: Callable[["Version"], Path] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @cached_property
    def content_digest(self) -> str:
        return content_digest(self.files)

    @property
    def artifact_type(self) -> str:
        """What other OCI tools see it as."""
        return ROUTER_TYPE if self.lineage.get("kind") == ROUTER else ARTIFACT_TYPE

    @cached_property
    def manifest(self) -> bytes:
        """The manifest as canonical JSON; it holds all that is needed to list this version again."""
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": self.artifact_type,
                "config": self.lineage_file.descriptor(LINEAGE_TYPE),
                "layers": [file.descriptor() for file in self.files],
                "annotations": {NAME: self.name, VERSION: str(self.number), CREATED: self.created_at},
            }
        )

    @cached_property
    def manifest_digest(self) -> str:
        return digest_bytes(self.manifest)

    @property
    def base_fingerprint(self) -> str | None:
        return (self.lineage.get("base") or {}).get("fingerprint")

    @property
    def path(self) -> Path:
        assert self._folder is not None, "a version that is in no registry has no path"
        return self._folder(self)

    @classmethod
    def from_manifest(
        cls, manifest: bytes, lineage: bytes, folder: Callable[["Version"], Path] | None = None
    ) -> "Version":
        """The version that a manifest and its lineage blob describe. Raises Corrupt if they describe none."""
        try:
            fields = json.loads(manifest)
            notes = fields["annotations"]
            return cls(
                name=notes[NAME],
                number=int(notes[VERSION]),
                created_at=notes[CREATED],
                files=tuple(File.from_descriptor(layer) for layer in fields["layers"]),
                lineage_file=File.from_descriptor(fields["config"]),
                lineage=json.loads(lineage),
                _folder=folder,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"a manifest cannot be read: {type(error).__name__}: {error}") from None


def version_of_row(row: Row) -> Version:
    """The version of a row of `versions`. Raises Corrupt unless all its columns are what its digests say."""
    version = Version.from_manifest(row["manifest"].encode(), row["lineage"].encode())
    columns = (
        *(version.name, version.number, version.manifest_digest, version.content_digest),
        *(version.base_fingerprint, version.created_at),
    )
    names = ("name", "number", "manifest_digest", "content_digest", "base_fingerprint", "created_at")
    wrong = [name for name, value in zip(names, columns, strict=True) if row[name] != value]
    if version.manifest != row["manifest"].encode():
        wrong.append("manifest")
    if File.of("lineage.json", row["lineage"].encode()) != version.lineage_file:
        wrong.append("lineage")
    if wrong:
        raise Corrupt(f"its row in the database is damaged ({', '.join(wrong)})")
    return version
