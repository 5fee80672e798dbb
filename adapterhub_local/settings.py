"""Where things live: the only reader of this project's environment variables.

QHUB_HOME    the home of registry, bases and runs      default ~/.qhub
QHUB_API_KEY what `qhub chat` sends to the server      default none
QHUB_DEVICE  where bases are loaded: auto, cpu, cuda   default auto (the GPU if there is one)
"""

import os
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.errors import InputError

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Home:
    """The folders of one QHUB_HOME. Nothing is created until something is written."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "registry.db"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def bases(self) -> Path:
        return self.root / "bases"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def folders(self) -> Path:
        """Folders of links to blobs that PEFT can load; may be deleted at any time."""
        return self.root / "folders"

    @property
    def keys(self) -> Path:
        """The API keys of the server, as hashes."""
        return self.root / "keys.json"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def quarantine(self) -> Path:
        """What was set aside: damaged blobs and databases, and blobs nothing needs any more."""
        return self.root / "quarantine"


def api_key() -> str | None:
    """The value of QHUB_API_KEY, None if there is none."""
    return os.environ.get("QHUB_API_KEY") or None


def home(root: str | Path | None = None) -> Home:
    """The home at `root`, else at $QHUB_HOME, else ~/.qhub."""
    chosen = root if root is not None else os.environ.get("QHUB_HOME") or "~/.qhub"
    path = Path(os.path.expanduser(chosen)).absolute()  # Path.expanduser raises for ~nobody
    if path.exists() and not path.is_dir():
        raise InputError(f"QHUB_HOME is {path}, which is a file: name a folder")
    return Home(path)


def make_folder(folder: Path) -> None:
    """Create a folder of a home. Raises InputError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error.strerror}. Set QHUB_HOME to a writable folder") from None


def device() -> str:
    """The value of QHUB_DEVICE: auto, cpu or cuda."""
    value = os.environ.get("QHUB_DEVICE") or "auto"
    if value not in DEVICES:
        raise InputError(f"QHUB_DEVICE is '{value}': use one of {', '.join(DEVICES)}")
    return value
