"""Content-addressed files: `blobs/sha256/ab/<hex>`, read-only, never changed once visible."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from adapterhub_local.durable import CHUNK, digest_file, sync_folder
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.version import File
from adapterhub_local.settings import Home, make_folder

READ_ONLY = 0o444


class Blobs:
    """The blobs of one home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def path(self, digest: str) -> Path:
        """Where the blob `sha256:<hex>` is or would be."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.home.blobs / hexadecimal[:2] / hexadecimal

    def put(self, name: str, source: Path | bytes) -> File:
        """Store a file's bytes and return its entry, named `name`.

        The bytes are hashed while they are copied to a new file in `tmp/`, which is flushed to disk
        and renamed to its digest; the same bytes are stored once. A blob that is there but damaged is
        replaced, so publishing or pulling again repairs it.
        """
        make_folder(self.home.tmp)
        temporary = self.home.tmp / uuid.uuid4().hex
        hasher, size = hashlib.sha256(), 0
        try:
            with open(temporary, "xb") as out:
                for chunk in _chunks(source):
                    hasher.update(chunk)
                    out.write(chunk)
                    size += len(chunk)
                out.flush()
                os.fchmod(out.fileno(), READ_ONLY)
                os.fsync(out.fileno())
            digest = "sha256:" + hasher.hexdigest()
            target = self.path(digest)
            if not is_sound(target, digest, size):
                if not target.parent.is_dir():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    sync_folder(target.parent.parent)
                temporary.rename(target)
                sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return File(name, digest, size)

    def check(self, file: File) -> Path:
        """The blob of `file`, after hashing its bytes again. Raises Corrupt if it is not what it should be."""
        path = self.path(file.digest)
        if not path.is_file():
            raise Corrupt(f"{file.path} is missing from the registry (blob {file.digest}): pull or publish it again")
        if not is_sound(path, file.digest, file.size):
            raise Corrupt(f"{file.path} is damaged (blob {file.digest}): pull or publish it again")
        return path

    def set_aside(self, path: Path) -> Path:
        """Move a file of the home to `quarantine/`, under a name of its own, and return where it is."""
        make_folder(self.home.quarantine)
        target = self.home.quarantine / f"{path.name}.{uuid.uuid4().hex[:8]}"
        path.rename(target)
        sync_folder(self.home.quarantine)
        sync_folder(path.parent)
        return target


def is_sound(path: Path, digest: str, size: int) -> bool:
    """Whether the file is there with these bytes."""
    return path.is_file() and path.stat().st_size == size and digest_file(path) == digest


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
