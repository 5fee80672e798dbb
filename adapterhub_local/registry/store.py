"""An opened remote: objects by path, in a folder or whatever fsspec opens. Knows nothing of versions.

An object appears whole or not at all. `create` never replaces one: a hard link in a folder, a conditional
write (`If-None-Match: *`) on S3. Where a store has neither, nothing can be pushed to it.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import filesystem

from adapterhub_local.digests import from_hex
from adapterhub_local.durable import on_full_disk, sync_file, sync_folder
from adapterhub_local.errors import Corrupt, InputError, NotFound, QhubError, RemoteError
from adapterhub_local.registry.object_store import S3, bounded, code_of, refused, with_bounds
from adapterhub_local.registry.remotes import Remote, check_kind

BLOCK = 8 << 20  # bytes asked for at once
CONDITIONAL = S3  # stores whose client refuses to write what exists, in one step


@dataclass(frozen=True)
class Store:
    """The objects of one remote; paths are relative, with '/'."""

    remote: Remote
    fs: Any  # an fsspec filesystem
    root: str

    @property
    def url(self) -> str:
        return self.remote.url

    def size(self, path: str) -> int | None:
        """Bytes of the object, None if there is none."""
        with self._answering():
            try:
                entry = self.fs.info(self._at(path))
            except FileNotFoundError:
                return None
        return entry["size"] if entry["type"] == "file" else None

    def names(self, folder: str, *, deep: bool = False) -> list[str]:
        """Paths of the objects in a folder, relative to it; with `deep` in all folders below it, too."""
        at = self._at(folder)
        with self._answering():
            try:
                if self.url.partition("://")[0] in S3:
                    self._list_one()  # to `find` a missing bucket is empty, and it asks a silent server thrice
                found = self.fs.find(at, maxdepth=None if deep else 1)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise refused(self.url, error) from None
                return []
        return sorted(path[len(at) + 1 :] for path in found)

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of a small object. Raises NotFound, Corrupt if it has more than `limit`."""
        with self._answering(), self._open(path) as source:
            data: bytes = source.read(limit + 1)
        if len(data) > limit:
            raise Corrupt(f"{self.url}/{path} has more than {limit:,} bytes: no object of qhub is that large")
        return data

    def blocks(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of an object from `start` on, block by block. Raises NotFound."""
        with self._answering(), self._open(path) as source:
            source.seek(start)
            while block := source.read(BLOCK):
                yield block

    def digest(self, path: str) -> str:
        """`sha256:<hex>` of the bytes that come back."""
        hasher = hashlib.sha256()
        for block in self.blocks(path):
            hasher.update(block)
        return from_hex(hasher.hexdigest())

    def put(self, path: str, source: Path | bytes) -> None:
        """Write an object. Whoever else writes this path writes the same bytes, so it does not matter who is last."""
        if self.remote.folder is not None:
            with self._staged(path) as temporary:
                if isinstance(source, bytes):
                    temporary.write_bytes(source)
                else:
                    shutil.copyfile(source, temporary)
                sync_file(temporary)
                temporary.rename(self._at(path))
                sync_folder(Path(self._at(path)).parent)
            return
        with self._answering(), self._existing():
            if isinstance(source, bytes):
                self.fs.pipe_file(self._at(path), source)
            else:
                self.fs.put_file(str(source), self._at(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object that does not exist; False if one with other bytes does, which stays as it is."""
        try:
            if self.remote.folder is not None:
                with self._staged(path) as temporary:
                    temporary.write_bytes(data)
                    sync_file(temporary)
                    _create(temporary, Path(self._at(path)))
            else:
                with self._answering(), self._existing():
                    self.fs.pipe_file(self._at(path), data, mode="create")
        except (FileExistsError, RemoteError):
            # Not every store says why it refused, and a client that asks again after a lost answer meets its own
            # object: what counts is what is there.
            found = self.size(path)
            if found is None:
                raise
            return found == len(data) and self.read(path, len(data)) == data
        return True

    def remove(self, path: str) -> None:
        """Remove an object of our own that nobody else knows of."""
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._at(path))

    def check_writable(self) -> None:
        """Raise InputError unless `create` holds what it promises here."""
        if self.remote.folder is None and self.url.partition("://")[0] not in CONDITIONAL:
            raise InputError(f"{self.url} cannot create an object only if it does not exist yet, so two people could "
                             "overwrite one another: push to a folder or to S3")  # fmt: skip

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _open(self, path: str) -> Any:
        return self.fs.open(self._at(path), "rb", **({} if self.remote.folder else {"cache_type": "none"}))

    @contextmanager
    def _staged(self, path: str) -> Iterator[Path]:
        folder = self.remote.folder
        assert folder is not None, "only a folder has temporary files"
        with self._answering(), on_full_disk(folder, "nothing was left there"):
            (folder / "tmp").mkdir(exist_ok=True)
            Path(self._at(path)).parent.mkdir(parents=True, exist_ok=True)
            temporary = folder / "tmp" / uuid.uuid4().hex
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _existing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise refused(self.url, error) from None
            raise NotFound(f"{self.url} is not there ({error}): create the bucket or container first") from None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Whatever the store's client raises becomes RemoteError; what is not there stays FileNotFoundError."""
        try:
            yield
        except (QhubError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # clients of stores have no common root of errors
            again = self._list_one if self.url.partition("://")[0] in S3 else None
            raise refused(self.url, error, again) from error

    def _list_one(self) -> None:
        self.fs.call_s3("list_objects_v2", Bucket=self.root.partition("/")[0], MaxKeys=1)


def _create(temporary: Path, target: Path) -> None:
    """Make a finished file visible under a name that is free. Raises FileExistsError."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a filesystem without hard links
        with open(target, "xb") as file:
            file.write(temporary.read_bytes())
        sync_file(target)
    sync_folder(target.parent)


def open_store(remote: Remote) -> Store:
    """The objects of `remote`. Raises InputError if its client is not installed, NotFound for a folder that is gone."""
    if (folder := remote.folder) is not None:
        if not folder.is_dir():
            raise NotFound(f"the folder {folder} of remote '{remote.name}' is not there: is its disk mounted?")
        return Store(remote, filesystem("file"), os.fspath(folder))
    scheme = remote.url.partition("://")[0]
    check_kind(scheme)
    try:
        # others write there, too: listings are asked for anew
        options = with_bounds(scheme, remote.options)
        fs = bounded(scheme, filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options))
    except Exception as error:
        raise InputError(f"remote '{remote.name}' cannot be opened: {type(error).__name__}: {error}") from None
    # a URL's own form belongs to its client: http keeps the scheme, s3 does not
    return Store(remote, fs, fs._strip_protocol(remote.url).rstrip("/"))
