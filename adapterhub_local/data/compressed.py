"""Data files as bytes, unpacked where their name says that they are compressed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
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
    return io.BufferedReader(zstandard.open(open_regular(path), "rb", closefd=True))  # else the file would stay open
