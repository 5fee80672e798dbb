"""Fetch objects of a remote into a folder, checked by digest, going on where an interrupted fetch stopped.

What came is kept in a folder all fetches share until the work is done: whole files by their digests, the
beginning of one as `<hex>.part`. A fetch takes such a part by renaming it, so two never write to one file.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from adapterhub_local.digests import from_hex, hex_of
from adapterhub_local.durable import CHUNK, link, share_parents
from adapterhub_local.errors import Corrupt, RemoteError
from adapterhub_local.registry.blobs import is_sound
from adapterhub_local.registry.remote_layout import blob_path
from adapterhub_local.registry.store import Store
from adapterhub_local.registry.version import File


class Download:
    """`with Download(...)`: the files are in `folder`, named by their digests, and sound.

    If the remote stops answering or the user stops, what came stays in `shared` for the next time; else, and
    when the block ends, it is removed from there. Raises RemoteError, and Corrupt for other bytes.
    """

    def __init__(
        self, store: Store, files: Sequence[File], folder: Path, shared: Path, progress: Callable[[int, int], None]
    ) -> None:
        self.store, self.files, self.folder, self.shared = store, files, folder, shared
        self._progress = progress
        self._total = sum(file.size for file in files)
        self._done = 0

    def __enter__(self) -> None:
        share_parents(self.shared)
        try:
            for file in self.files:
                self._fetch(file)
        except (RemoteError, KeyboardInterrupt):
            raise
        except BaseException:
            self._forget()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()

    def _forget(self) -> None:
        for file in self.files:
            for name in (_hex(file), f"{_hex(file)}.part"):
                (self.shared / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others use it
            self.shared.rmdir()

    def _fetch(self, file: File) -> None:
        target, whole = self.folder / _hex(file), self.shared / _hex(file)
        with contextlib.suppress(FileNotFoundError):
            link(whole, target)
            if is_sound(target, file.digest, file.size):
                self._report(file.size)
                return
            target.unlink()
            whole.unlink(missing_ok=True)
        part, given = self.folder / "part", self.shared / f"{_hex(file)}.part"
        with contextlib.suppress(FileNotFoundError):
            given.rename(part)
        try:
            resumed = part.exists()
            digest = self._download(file, part)
            if digest != file.digest and resumed:  # the beginning was not what it should be
                part.unlink()
                digest = self._download(file, part)
        except (RemoteError, KeyboardInterrupt):
            if part.exists():
                share_parents(self.shared)
                with contextlib.suppress(FileNotFoundError):  # what was begun is lost, no more
                    part.replace(given)
            raise
        if digest != file.digest:
            raise Corrupt(f"{self.store.url}/{blob_path(file.digest)} does not match the digest in its name: "
                          "nothing was registered")  # fmt: skip
        part.rename(target)
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # or the last of the others removed the folder
            link(target, whole)

    def _download(self, file: File, part: Path) -> str:
        """Append what is missing of `file` to `part`; the digest of all of it."""
        hasher, size = hashlib.sha256(), 0
        if part.exists():
            with open(part, "rb") as begun:
                while chunk := begun.read(CHUNK):
                    hasher.update(chunk)
                    size += len(chunk)
        self._report(size)
        try:
            with open(part, "ab") as out:
                for block in self.store.blocks(blob_path(file.digest), size) if size < file.size else ():
                    size += len(block)
                    if size > file.size:  # whoever serves it may never end
                        break
                    out.write(block)
                    hasher.update(block)
                    self._report(len(block))
        except FileNotFoundError:
            raise Corrupt(f"{self.store.url} lacks {file.path} ({blob_path(file.digest)}): push it again") from None
        return from_hex(hasher.hexdigest()) if size == file.size else "of another size"

    def _report(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(min(self._done, self._total), self._total)


def _hex(file: File) -> str:
    return hex_of(file.digest)
