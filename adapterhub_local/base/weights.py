"""The weights a base computes with, dequantised from its files one at a time, without loading the model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from adapterhub_local.base.load import import_bitsandbytes
from adapterhub_local.base.store import BaseInfo
from adapterhub_local.errors import Incompatible

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def dequantised(info: BaseInfo, modules: Iterable[str]) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """(module, weight (out_features, in_features) in float32, as products in float32 use it, dtype it was made from).

    Raises Incompatible naming the first module that the base does not have.
    """
    functional = import_bitsandbytes().functional
    places = _places(info.folder)
    for module in modules:
        name = f"{module}.weight"
        if name not in places:
            raise Incompatible(f"base '{info.name}' ({info.architecture}) has no {module}: name the adapter's own base")
        with safe_open(places[name], framework="pt") as file:
            stored = file.get_tensor(name)
            parts = {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - no mapping
                if key.startswith(f"{name}.")
            }
        if parts:  # what has no constants was not quantised
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            dtype, state.dtype = state.dtype, torch.float32  # in its own dtype it would be rounded once more
            stored = functional.dequantize_4bit(stored, state)
        else:
            dtype = stored.dtype
        yield module, stored.float(), dtype


def _places(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file it is in."""
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        return {name: folder / shard for name, shard in weight_map.items()}
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)
