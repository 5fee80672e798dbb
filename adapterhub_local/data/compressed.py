"""Data files as bytes, unpacked where their name says that they are compressed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub_local.errors import BadData, InputError
from adapterhub_local.regular import open_regular

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def open_bytes(path: Path) -> BinaryIO:
    """The file, unpacked. Raises InputError where a package is missing for that."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return _zstandard(path)
    file = open_regular(path)
    opener: Any = OPENERS.get(suffix)
    if opener is None:
        return file
    file.close()  # these close what they opened themselves, and nothing else
    return opener(path)  # type: ignore[no-any-return]


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """What the modules that unpack raise about a broken file, as BadData."""
    try:
        yield
    except (lzma.LZMAError, zlib.error) as error:
        raise BadData(f"{path} cannot be unpacked: {error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a package that may not be there
            raise
        raise BadData(f"{path} cannot be unpacked: {error}") from None


def _zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{path}: Zstandard needs the package zstandard: pip install zstandard, or unpack the file"
        ) from None
    return io.BufferedReader(_Frames(open_regular(path), zstandard.ZstdDecompressor().decompressobj))


class _Frames(io.RawIOBase):
    """All frames of a Zstandard file. The package's own reader stops behind the first, and takes a cut for the end."""

    def __init__(self, file: BinaryIO, begin: Callable[[], Any]) -> None:
        super().__init__()
        self.file, self.begin = file, begin
        self.frame: Any = None
        self.packed = self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.packed = self.packed or self.file.read(io.DEFAULT_BUFFER_SIZE)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends before the end of what is compressed in it")
                return 0
            self.frame = self.frame or self.begin()
            self.ready, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
