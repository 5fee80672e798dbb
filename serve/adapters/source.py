"""Source: what an adapter is read from, a version of the registry or a folder, or a mix of several of them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adapterhub_local.durable import digest_file
from adapterhub_local.registry import File, Version
from adapterhub_local.registry.version import content_digest

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Folder:
    """A PEFT folder that was loaded under a name, for the `number`th time; known by its content, as a version is."""

    name: str
    number: int
    created_at: str
    path: Path
    files: tuple[File, ...]
    base_fingerprint: None = None  # nobody says what it was made for but its own files

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @classmethod
    def read(cls, name: str, number: int, created_at: str, path: Path) -> "Folder":
        """The folder at `path` as its bytes are now. Raises OSError."""
        files = tuple(File(each, digest_file(path / each), (path / each).stat().st_size) for each in FILES)
        return cls(name, number, created_at, path, files)

    @cached_property
    def content_digest(self) -> str:
        return content_digest(self.files)


Source = Version | Folder
