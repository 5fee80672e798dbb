"""Content-addressed files: `blobs/sha256/ab/<hex>`, read-only, never changed once visible."""

import hashlib
import os
import uuid
from pathlib import Path

from adapterhub_local.durable import CHUNK, digest_file, sync_folder
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.version import File
from adapterhub_local.settings import Home

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
        and renamed to its digest; the same bytes are stored once. A blob that is there with another
        size is damaged and replaced.
        """
        self.home.tmp.mkdir(parents=True, exist_ok=True)
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
            if not (target.exists() and target.stat().st_size == size):
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
        if path.stat().st_size != file.size or digest_file(path) != file.digest:
            raise Corrupt(f"{file.path} is damaged (blob {file.digest}): pull or publish it again")
        return path


def _chunks(source: Path | bytes):
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
