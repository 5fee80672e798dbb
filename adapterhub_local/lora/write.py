"""Write safetensors files and adapters, byte for byte the same for equal tensors.

The `safetensors` package writes metadata in the order of a hash map, which differs from process to
process; content-addressed storage needs equal bytes, so the header is written here, keys sorted.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.lora.config import BASE_KEY, CONFIG, CONFIG_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.names import parse_name, tensor_name

__all__ = ["DTYPE_NAMES", "Shapes", "tensor_name", "write_adapter", "write_safetensors"]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_safetensors(
    path: Path, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose tensors may be made one at a time.

    `shapes` gives dtype and shape of every tensor, in the order in which `tensors` yields them.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        names = iter(shapes)
        for name, tensor in tensors:
            assert (name, (tensor.dtype, tuple(tensor.shape))) == (next(names), shapes[name]), name
            file.write(tensor_bytes(tensor))
        assert next(names, None) is None, "a tensor is missing"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as little-endian bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    shapes: Shapes,
    tensors: Iterable[tuple[str, torch.Tensor]],
    base_fingerprint: str | None,
    extra: Mapping[str, str] | None = None,
    known: Iterable[str] = (),
) -> dict[str, Path | bytes]:
    """Write the two files of an adapter into `folder` and return them by name.

    Tensor names are PEFT's, see `tensor_name`. The weights file carries its config and the fingerprint
    of its base in its own metadata, so it can be used alone; `extra` metadata is added. `known` are the linear modules
    of the base, as far as they are known: the config names just those that there are factors for.
    """
    named = map(parse_name, shapes)
    config = config.for_modules({parts.module for parts in named if parts.kind != "tokens"}, known)
    metadata = {**(extra or {}), "format": "pt", CONFIG_KEY: json.dumps(config.to_json(), allow_nan=False)}
    if base_fingerprint:
        metadata[BASE_KEY] = base_fingerprint
    write_safetensors(folder / WEIGHTS, shapes, tensors, metadata)
    (folder / CONFIG).write_bytes(config.to_bytes())
    return {WEIGHTS: folder / WEIGHTS, CONFIG: folder / CONFIG}
