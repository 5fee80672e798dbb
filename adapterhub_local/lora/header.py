"""The header of a safetensors file, read strictly and without torch; the file may be hostile.

Format: 8 bytes little-endian header length, a JSON object, then the tensors' bytes with no holes
(https://github.com/huggingface/safetensors#format). Knows nothing of adapters.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile, NotFound
from adapterhub_local.regular import open_regular

MAX_HEADER_BYTES = 25_000_000  # the limit of the Hub's own client
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
}


@dataclass(frozen=True)
class TensorEntry:
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
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)  # bytes could be read as UTF-16
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} has a damaged header: {error}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"{path} has a damaged header: __metadata__ is not a table of strings")
    entries = {name: _entry(path, name, value) for name, value in fields.items()}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, entry in tensors.items():
        if entry.start != position:
            raise BadFile(f"{path} has a damaged header: {name} overlaps another tensor or follows a hole")
        position = entry.end
    if 8 + length + position != size:
        raise BadFile(
            f"{path} is truncated or has extra bytes: {8 + length + position:,} bytes expected, {size:,} there"
        )
    return Header(metadata, tensors, 8 + length)


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if set(value) != {"dtype", "shape", "data_offsets"} or dtype not in DTYPE_BYTES:
            raise ValueError
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError
        if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise BadFile(f"{path} has a damaged header: the entry of {name!r} is not valid") from None
    return TensorEntry(dtype, shape, start, end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")  # the format forbids it, not every reader notices
    return fields
