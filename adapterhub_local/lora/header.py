"""The header of a safetensors file, read strictly and without torch; the file may be hostile.

Format: 8 bytes little-endian header length, a JSON object, then the tensors' bytes with no holes
(https://github.com/huggingface/safetensors#format). Knows nothing of adapters.
"""

import gc
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adapterhub_local.errors import BadFile, NotFound
from adapterhub_local.regular import open_regular

MAX_HEADER_BYTES = 25_000_000  # the limit of the Hub's own client
_MAX_DIGITS = 19  # of a number: no file has 10^19 bytes
_LONG_NUMBER = re.compile(rb"[0-9]{20}")
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_NAME = 1_000  # characters of a tensor's name
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
}


class TensorEntry(NamedTuple):
    """One tensor: dtype as safetensors spells it, shape, and its bytes as [start, end) of the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensor entries of one file, in the order of their bytes; `start` is where the data part begins."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    start: int


def read_header(path: Path) -> Header:
    """The header of the file at `path`.

    Raises NotFound if there is no file, BadFile if the header is too long, truncated, not JSON, has
    duplicate keys, or describes tensors that overlap, leave holes or do not fill the file exactly.
    """
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise BadFile(f"{path} is not a safetensors file: its header claims {length:,} bytes")
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) < length or not raw.startswith(b"{"):
        raise BadFile(f"{path} is not a safetensors file, or is truncated: {size:,} bytes, header of {length:,}")
    with _no_collection():
        metadata, tensors = _parse(path, raw, size)
    position = 0
    for name, entry in tensors.items():
        if entry.start != position:
            raise BadFile(f"{path} has a damaged header: {name[:100]!r} overlaps another tensor or follows a hole")
        position = entry.end
    if 8 + length + position != size:
        raise BadFile(
            f"{path} is truncated or has extra bytes: {8 + length + position:,} bytes expected, {size:,} there"
        )
    return Header(metadata, tensors, 8 + length)


def _parse(path: Path, raw: bytes, size: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    try:
        # digits may also stand in a name; bytes could be read as UTF-16
        parse_int = _short_int if _LONG_NUMBER.search(raw) else None
        fields = json.loads(raw.decode(), object_pairs_hook=no_duplicates, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} has a damaged header: {str(error)[:200]}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"{path} has a damaged header: __metadata__ is not a table of strings")
    entries = {name: _entry(path, name, value, size) for name, value in fields.items()}
    return metadata, dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cycles meanwhile: a header makes many small objects and none, and looking took most of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _entry(path: Path, name: str, value: Any, size: int) -> TensorEntry:
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    try:
        if len(name) > _MAX_NAME:
            raise ValueError
        dtype, dimensions, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        if len(value) != 3 or dtype not in DTYPE_BYTES:
            raise ValueError
        if type(dimensions) is not list or len(dimensions) > _MAX_DIMENSIONS:
            raise ValueError
        for number in (*dimensions, start, end):
            if type(number) is not int or number < 0:
                raise ValueError
        if end - start != _num_bytes(dimensions, DTYPE_BYTES[dtype], size):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise BadFile(f"{path} has a damaged header: the entry of {shown!r} is not valid") from None
    return TensorEntry(dtype, tuple(dimensions), start, end)


def _num_bytes(shape: list[int], itemsize: int, limit: int) -> int:
    """The bytes of a tensor. Raises ValueError as soon as they are more than `limit`, before numbers grow."""
    if 0 in shape:
        return 0
    total = itemsize
    for dimension in shape:
        total *= dimension
        if total > limit:
            raise ValueError
    return total


def _short_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of these keys, for `json`. Raises ValueError for one that is there twice: which counts?"""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        first = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {first[:60]!r} occurs twice")
    return fields
