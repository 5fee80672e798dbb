"""The header of a GGUF file, read within bounds and before any library reads it; the file may be hostile.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Counts come from the file, so each is held against
the bytes that are left before anything is done that many times. Knows nothing of models.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile
from adapterhub_local.regular import open_regular

MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 4096, 100_000, 4_000_000  # items of all arrays: large vocabularies have a million
MAX_STRING, MAX_NAME, MAX_DIMENSIONS = 4 << 20, 1024, 8
STRING, ARRAY = 8, 9
# number of a type -> how struct reads it: u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class GgufHeader:
    """Settings (of an array its number of items) and the names of the tensors."""

    settings: Mapping[str, Any]
    tensors: frozenset[str]

    @property
    def architecture(self) -> str:
        return str(self.settings["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the file at `path`. Raises BadFile saying whether it is damaged, truncated or another kind."""
    with open_regular(path) as file:
        size = path.stat().st_size
        reading = _Reading(path, file, size)
        if file.read(4) != b"GGUF":
            raise BadFile(f"{path} is not a GGUF file: give a transformers folder, a .gguf file or a Hub id (ORG/NAME)")
        version = reading.number("I")
        if version not in (2, 3):
            raise BadFile(f"{path} is GGUF of version {version}, not 2 or 3" + (
                ": it was written on a big-endian machine" if version in (2 << 24, 3 << 24) else ""))  # fmt: skip
        num_tensors, num_keys = reading.number("Q"), reading.number("Q")
        reading.check_count("tensors", num_tensors, MAX_TENSORS, 24)
        reading.check_count("settings", num_keys, MAX_KEYS, 13)
        settings: dict[str, Any] = {}
        for _ in range(num_keys):
            name = reading.text(MAX_NAME, "the name of a setting")
            settings[name] = reading.value(reading.number("I"), name)
        named = settings.get("general.architecture")
        if not isinstance(named, str) or not _ARCHITECTURE.fullmatch(named):
            raise reading.damaged("general.architecture is not the name of an architecture")
        ends = {}
        for _ in range(num_tensors):
            name = reading.text(MAX_NAME, "the name of a tensor")
            if name in ends:
                raise reading.damaged("a tensor occurs twice")
            ends[name] = reading.tensor()
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20:
            raise reading.damaged("general.alignment is not valid")
        start = -(-file.tell() // alignment) * alignment if ends else 0
        if start + (end := max(ends.values(), default=0)) > size:
            raise BadFile(f"{path} is truncated: {start + end:,} bytes expected, {size:,} there")
    return GgufHeader(settings, frozenset(ends))


class _Reading:
    """A position in the header, which moves forward only, and what may still be read."""

    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self.file, self.size, self.items = path, file, size, 0

    def damaged(self, what: str) -> BadFile:
        return BadFile(f"{self.path} is a GGUF file with a damaged header: {what}")

    def bytes(self, count: int) -> bytes:
        data: bytes = self.file.read(count)
        if len(data) < count:
            raise BadFile(f"{self.path} is truncated: it ends within its header, at {self.size:,} bytes")
        return data

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def check_count(self, what: str, count: int, most: int, size: int) -> None:
        """Raise BadFile unless `count` things of `size` bytes at least can be there."""
        if count > most:
            raise self.damaged(f"it claims {count:,} {what}, more than the {most:,} that are read")
        if count * size > self.size - self.file.tell():
            raise BadFile(f"{self.path} is truncated: {count:,} {what} are announced, and it has {self.size:,} bytes")

    def text(self, most: int, what: str) -> str:
        length = self.number("Q")
        if length > most:
            raise self.damaged(f"{what} claims {length:,} bytes, more than the {most:,} that are read")
        try:
            text = self.bytes(length).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None
        if most == MAX_NAME and not text.isprintable():
            raise self.damaged(f"{what} has control characters in it")
        return text

    def value(self, kind: int, name: str) -> Any:
        """The value of a setting; of an array the number of its items."""
        if kind == STRING:
            return self.text(MAX_STRING, name)
        if kind in _SCALARS:
            number = self.number(_SCALARS[kind])
            if not math.isfinite(number):
                raise self.damaged(f"{name} is not a finite number")
            return number
        if kind != ARRAY:
            raise self.damaged(f"{name} is of type {kind}, which does not exist")
        inner, count = self.number("I"), self.number("Q")
        if inner != STRING and inner not in _SCALARS:
            raise self.damaged(f"{name} is a list of lists, or of a type that does not exist")
        each = 8 if inner == STRING else struct.calcsize(_SCALARS[inner])
        self.check_count(f"items of {name}", count, MAX_ITEMS - self.items, each)
        self.items += count
        if inner != STRING:
            self.file.seek(count * each, 1)
            return count
        for _ in range(count):
            length = self.number("Q")
            if length > MAX_STRING or length > self.size - self.file.tell():
                raise self.damaged(f"an item of {name} claims {length:,} bytes")
            self.file.seek(length, 1)
        return count

    def tensor(self) -> int:
        """Where the bytes of a tensor end, after the header."""
        import gguf

        count = self.number("I")
        if count > MAX_DIMENSIONS:
            raise self.damaged(f"a tensor claims {count:,} dimensions")
        shape = [self.number("Q") for _ in range(count)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.damaged(f"a tensor is of type {kind}, which is not known") from None
        end: int = offset + math.prod(shape) // block * size
        if end > 1 << 50:
            raise self.damaged("a tensor claims more bytes than any disk holds")
        return end
