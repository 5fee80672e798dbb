"""The header of a safetensors file: hostile, cut and changed ones are refused or read as what they say."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import BadFile, NotFound, QhubError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.header import MAX_HEADER_BYTES, read_header
from tests.patience import ends


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, as a value or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: Any, end: Any, shape: Any = (1,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """The header's entry of one tensor."""
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, end],
        **more,
    }


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    """Metadata and entries are read in the order of their bytes; empty tensors and padding are allowed."""
    header = {"b": entry(4, 8), "a": entry(0, 4), "e": entry(4, 4, (0, 3)), "__metadata__": {"k": "v"}}
    read = read_header(raw_file(tmp_path / "f", json.dumps(header).encode() + b"   ", bytes(8)))
    assert list(read.tensors) == ["a", "e", "b"]
    assert read.metadata == {"k": "v"}
    assert read_header(raw_file(tmp_path / "empty", {})).tensors == {}


HOSTILE: dict[str, tuple[Any, int]] = {  # name -> header, bytes of data
    "hole at the start": ({"a": entry(4, 8)}, 8),
    "hole in the middle": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "overlap": ({"a": entry(0, 8, (2,)), "b": entry(4, 8)}, 8),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "trailing bytes": ({"a": entry(0, 4)}, 5),
    "missing bytes": ({"a": entry(0, 4)}, 3),
    "no tensors but bytes": ({}, 1),
    "size that does not fit": ({"a": entry(0, 4, (2,))}, 4),
    "negative offset": ({"a": entry(-4, 0)}, 0),
    "backwards": ({"a": entry(4, 0)}, 4),
    "negative shape": ({"a": entry(0, 4, (-1, -1))}, 4),
    "bool as a number": ({"a": entry(False, 4)}, 4),
    "bool in the shape": ({"a": entry(0, 4, (True,))}, 4),
    "float offset": ({"a": entry(0.0, 4.0)}, 4),
    "text offset": ({"a": entry("0", "4")}, 4),
    "shape as text": ({"a": entry(0, 4, "1")}, 4),
    "shape as a table": ({"a": entry(0, 4, {"1": 1})}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4),
    "extra field": ({"a": entry(0, 4, more=1)}, 4),
    "unknown dtype": ({"a": entry(0, 4, dtype="F31")}, 4),
    "dtype as a list": ({"a": entry(0, 4, dtype=["F32"])}, 4),
    "entry as a list": ({"a": [1, 2]}, 4),
    "entry as null": ({"a": None}, 0),
    "metadata as a list": ({"__metadata__": []}, 0),
    "metadata as null": ({"__metadata__": None}, 0),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0),
    "duplicate tensors": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0),
    "duplicate fields": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', 0),
    "not JSON": (b"{not json}", 0),
    "a list": (b"[]", 0),
    "a list in spaces": (b" {}", 0),
    "two documents": (b"{}{}", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "UTF-16": ("{}".encode("utf-16-le"), 0),
    "deep nesting": (b'{"a":' + b"[" * 100_000, 0),
    "huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}', 0),
    "huge product": ({"a": entry(0, 4, (2**62, 2**62))}, 4),
    "100,000 large dimensions": ({"a": entry(0, 4, (2**62,) * 100_000)}, 4),
    "1,200,000 dimensions": ({"a": entry(0, 4, (1,) * 1_200_000)}, 4),
    "5,000 long numbers": (b'{"a":{"dtype":"U8","shape":[' + b",".join([b"9" * 4_299] * 1_000) + b"]}}", 0),
    "offsets of 30 digits": ({"a": entry(10**30, 10**30, (0,))}, 0),
    "zero hides a huge product": ({"a": entry(0, 4, (0, *((2**60,) * 50_000)))}, 4),
    "a name of a megabyte": ({"a" * 1_000_000: entry(0, 4)}, 4),
    "40,000 tensors in one place": ({str(number): entry(0, 4) for number in range(40_000)}, 4),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    """A header that describes anything but tensors side by side in the whole file is BadFile."""
    header, size = HOSTILE[case]
    path = raw_file(tmp_path / "f", header, bytes(size))
    with ends(), pytest.raises(BadFile) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**32, 2**63, 2**64 - 1])
def test_impossible_header_lengths_are_refused_at_once(tmp_path: Path, length: int) -> None:
    """A header that claims to be larger than any is refused before a byte of it is read."""
    with pytest.raises(BadFile, match="claims"):
        read_header(raw_file(tmp_path / "f", b"{}", length=length))


def test_what_is_no_file(tmp_path: Path) -> None:
    """A missing file is NotFound, a folder is BadFile."""
    with pytest.raises(NotFound):
        read_header(tmp_path / "none")
    with pytest.raises(BadFile):
        read_header(tmp_path)


def test_every_truncation_is_refused(small_file: Path, tmp_path: Path) -> None:
    """A file cut off after any of its bytes is BadFile, and so is one with a byte more."""
    data = small_file.read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(BadFile):
            open_adapter(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    with pytest.raises(BadFile, match="extra bytes"):
        open_adapter(tmp_path / "cut")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_changed_bytes_are_read_or_refused(small_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A file with some bytes of its header changed is opened and read whole, or refused; nothing else happens."""
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "changed").write_bytes(content)
    with contextlib.suppress(QhubError):
        for _, delta in open_adapter(tmp_path / "changed").deltas():
            assert torch.isfinite(delta.A).all()
            assert torch.isfinite(delta.B).all()
