"""The tensors a base computes with, dequantised from its files one at a time, without loading the model."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.held import read_dense
from adapterhub_local.base.quantisation import CONSTANT
from adapterhub_local.base.shapes import tied_weights
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.header import read_header


class BaseWeights:
    """The tensors of a base as they are multiplied with: 4 bits dequantised to float32, the others as stored."""

    def __init__(self, base: BaseInfo) -> None:
        self.base = base
        self.files = {
            name: path for path in sorted(base.folder.glob("*.safetensors")) for name in read_header(path).tensors
        }
        self.constants: dict[str, list[str]] = {}
        self._open: dict[Path, Any] = {}
        for name in self.files:
            if match := CONSTANT.fullmatch(name):
                self.constants.setdefault(match[1], []).append(name)

    @property
    def names(self) -> list[str]:
        return [name for name in self.files if not CONSTANT.fullmatch(name)]

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Weights that the model has and its files do not, each with the one it shares: an output head's embeddings."""
        return {name: other for name, other in tied_weights(self.base).items() if name not in self.files}

    def read(self, name: str) -> torch.Tensor:
        """One tensor of `names`, on the CPU."""
        return self._read(name)[0]

    def of(self, module: str) -> tuple[torch.Tensor, torch.dtype]:
        """The weight of a linear module (out_features, in_features) in float32, and the dtype it was made from.

        A tied output head has the embeddings' weight. Raises Incompatible if the base has no such module.
        """
        name = f"{module}.weight"
        if name not in self.files:
            name = self.tied.get(name, name)
        if name not in self.files:
            info = self.base
            raise Incompatible(f"base '{info.name}' ({info.architecture}) has no {module}: name the adapter's own base")
        weight, dtype = self._read(name)
        return weight.float(), dtype

    def _read(self, name: str) -> tuple[torch.Tensor, torch.dtype]:
        stored = self._stored(name)
        if name not in self.constants:  # it was not quantised
            return stored, stored.dtype
        return read_dense(stored, {key: self._stored(key) for key in self.constants[name]})

    def _stored(self, name: str) -> torch.Tensor:
        path = self.files[name]
        if path not in self._open:  # once: each time the header of the whole file is read
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor


def dequantised(info: BaseInfo, modules: Iterable[str]) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """(module, weight, dtype it was made from) one at a time, as `BaseWeights.of` gives them."""
    weights = BaseWeights(info)
    for module in modules:
        yield module, *weights.of(module)
