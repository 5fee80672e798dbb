"""Content-addressed files: `blobs/sha256/ab/<hex>`, read-only, never changed once visible."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from adapterhub_local.digests import from_hex, hex_of
from adapterhub_local.durable import CHUNK, digest_file, on_full_disk, sync_file, sync_folder
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry.manifests import blob_paths
from adapterhub_local.registry.version import File
from adapterhub_local.settings import Home, make_folder

READ_ONLY = 0o444


class Blobs:
    """The blobs of one home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def path(self, digest: str) -> Path:
        """Where the blob `sha256:<hex>` is or would be."""
        hexadecimal = hex_of(digest)
        return self.home.blobs / hexadecimal[:2] / hexadecimal

    def put(self, name: str, source: Path | bytes, *, durable: bool = True) -> File:
        """Store a file's bytes and return its entry, named `name`; see `put_all`."""
        return self.put_all([(name, source)], durable=durable)[0]

    def put_all(self, files: Sequence[tuple[str, Path | bytes]], *, durable: bool = True) -> list[File]:
        """Store the bytes of several named files and return their entries, in the same order.

        The bytes are hashed while they are copied to new files in `tmp/`, which are flushed to disk and
        renamed to their digests; the same bytes are stored once. A blob that is there but damaged is
        replaced, so publishing or pulling again repairs it. Each step is taken for all files before the
        next: the first flush of a filesystem with a journal takes what was written before along, so those
        that follow have little left to do.

        With `durable=False` the blobs are visible to every process but their bytes are not flushed: call `sync`.
        """
        make_folder(self.home.tmp)
        staged: list[tuple[Path | None, File]] = []
        try:
            with on_full_disk(self.home.root):
                for name, source in files:
                    staged.append(self._stage(name, source, durable))
                targets = [self.path(file.digest) for _, file in staged]
                for temporary, _ in staged if durable else ():
                    if temporary is not None:
                        sync_file(temporary)
                if not all(target.parent.is_dir() for target in targets):
                    self._make_folders()
                for (temporary, file), target in zip(staged, targets, strict=True):
                    if temporary is not None and not is_sound(target, file.digest, file.size):
                        temporary.rename(target)
                for folder in {target.parent for target in targets} if durable else ():
                    sync_folder(folder)
        finally:
            for temporary, _ in staged:
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
        return [file for _, file in staged]

    def take(self, files: Iterable[tuple[File, Path]]) -> None:
        """Make files that lie in the home blobs by renaming them; their bytes must have been checked.

        A file whose blob is there and sound stays where it is.
        """
        targets = []
        with on_full_disk(self.home.root):
            for file, source in files:
                target = self.path(file.digest)
                targets.append(target)
                if is_sound(target, file.digest, file.size):
                    sync_file(target)
                    continue
                if not target.parent.is_dir():
                    self._make_folders()
                source.chmod(READ_ONLY)
                sync_file(source)
                source.rename(target)
            for folder in {target.parent for target in targets}:
                sync_folder(folder)

    def sync(self, file: File) -> None:
        """Make a blob and its name durable."""
        path = self.path(file.digest)
        sync_file(path)
        sync_folder(path.parent)

    def _stage(self, name: str, source: Path | bytes, durable: bool) -> tuple[Path | None, File]:
        """A temporary file with the bytes, not flushed yet, or None if they are a blob already."""
        if isinstance(source, bytes):
            file = File.of(name, source)
            if is_sound(path := self.path(file.digest), file.digest, file.size):
                with contextlib.suppress(FileNotFoundError):  # collected since
                    if durable:
                        sync_file(path)  # whoever wrote it may not have come to this yet
                    return None, file
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
            return temporary, File(name, from_hex(hasher.hexdigest()), size)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_folders(self) -> None:
        """All 256 folders at once and one flush, rather than one flush for each when its first blob comes."""
        for first in range(256):
            make_folder(self.home.blobs / f"{first:02x}")
        sync_folder(self.home.blobs)

    def check(self, file: File) -> Path:
        """The blob of `file`, after hashing its bytes again. Raises Corrupt if it is not what it should be."""
        path = self.path(file.digest)
        if not path.is_file():
            raise Corrupt(f"{file.path} is missing from the registry (blob {file.digest}): pull or publish it again")
        if not is_sound(path, file.digest, file.size):
            raise Corrupt(f"{file.path} is damaged (blob {file.digest}): pull or publish it again")
        return path

    def paths(self) -> list[Path]:
        """Everything that lies in the folders of the blobs, sorted."""
        return sorted(blob_paths(self.home))

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
    try:
        return path.is_file() and path.stat().st_size == size and digest_file(path) == digest
    except FileNotFoundError:  # collected since
        return False


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
