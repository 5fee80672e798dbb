"""What was written of a model is read back before it becomes a base: loaded, and compared with its source.

Every tensor must be the source's, but for what 4 bits lose. The logits of the loaded base must be those of the source's
architecture over the same dequantised tensors, computed one layer at a time: so a tensor that is missing, swapped or
laid out otherwise than it is loaded is found, and nothing depends on how much 4 bits lose.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import load_base
from adapterhub_local.base.model import as_module
from adapterhub_local.base.source import Source
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import BadFile, Corrupt
from adapterhub_local.machine import available_memory

NUM_TOKENS = 8
CLOSE = 0.02  # of the logits' spread; both are float32, and only the order of sums differs
LOST = 0.6  # of a tensor's norm, which 4 bits take at most of one with outliers; two that are swapped differ by 1.4
Progress = Callable[[int, int], None]


def read_back(info: BaseInfo, source: Source, dtype: torch.dtype, progress: Progress) -> str | None:
    """Compare the base in `info.folder` with its source, of which unquantised tensors were written in `dtype`.

    None if it was done, else why it was not: too little memory, or a model that cannot be computed here. Raises BadFile
    where the two differ, or the base cannot be loaded. Takes the base's memory and that of one layer in float32.
    """
    others = info.num_parameters - info.num_quantised
    layers = max(1, int(getattr(source.config, "num_hidden_layers", 1) or 1))
    needed, free = info.size + 12 * others + 8 * info.num_quantised // layers, available_memory()
    if needed > free:
        return f"it takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB is free"
    tensors = _Tensors(info, source, dtype, progress)
    rows = int(source.config.vocab_size)
    ids = torch.tensor([[(11 + 7919 * number) % rows for number in range(NUM_TOKENS)]])
    try:
        wanted = _reference(source.config, tensors, ids)
    except (BadFile, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign architecture raises where it has no way to compute on a CPU
        return (
            f"{info.architecture} cannot be computed here: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
        )
    tensors.check_rest()
    try:
        model = load_base(info, dtype=torch.float32, device="cpu").model
    except Corrupt as error:
        reason = str(error).partition(f"{info.folder}: ")[2] or str(error)
        raise BadFile(f"what was written of {info.source} cannot be loaded, so it is not added: {reason}") from None
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False).logits[0]
    if not are_close(found, wanted):
        raise BadFile(
            f"what was written of {info.source} does not compute what the model does, so it is not added: this "
            f"architecture ({info.architecture}) is not supported, please report it"
        )
    return None


def are_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits (tokens, vocabulary) agree for most tokens: a router may choose otherwise between two equals."""
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), wanted.isfinite()):
        return False
    found, wanted = found.nan_to_num(0, 0, 0).float(), wanted.nan_to_num(0, 0, 0).float()
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((found - wanted).norm(dim=-1) / (spread + 1e-6)).median() < CLOSE)


class _Tensors:
    """The written tensors in float32, each compared with the source's when it is first read."""

    def __init__(self, info: BaseInfo, source: Source, dtype: torch.dtype, progress: Progress) -> None:
        self._written, self._source, self._dtype, self._progress = BaseWeights(info), source, dtype, progress
        self._seen: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, or the one it is tied to. Raises BadFile if it is not the source's."""
        name = self._written.tied.get(name, name)
        if name not in self._written.files:
            raise BadFile(f"{name} was not written, so the base is not added: please report it")
        tensor = self._written.read(name)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if name not in self._seen:
            self._seen.add(name)
            self._check(name, tensor)
            self._progress(len(self._seen), len(self._written.names))
        return tensor

    def check_rest(self) -> None:
        """Compare those that the forward pass had no use for: experts that no token was sent to."""
        for name in self._written.names:
            if name not in self._seen:
                self.read(name)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if self._source.quantisation and name in self._written.constants:
            return  # the very bytes of the source
        theirs = self._source.read(name)
        if not theirs.is_floating_point():
            is_same = torch.equal(theirs, tensor)
        elif name in self._written.constants:
            theirs = theirs.float()
            is_same = bool((tensor - theirs).norm() <= LOST * theirs.norm())
        else:
            is_same = torch.equal(theirs.to(self._dtype).float().nan_to_num(), tensor.nan_to_num())
        if not is_same:
            raise BadFile(
                f"what was written of {name} is not what the model has, so the base is not added: please report it"
            )


def _reference(config: Any, tensors: _Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the architecture with these tensors, one layer of them in memory at a time."""
    config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = build_model(config, dtype=torch.float32).eval()
    layers = {
        f"{name}.{number}": layer
        for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        for number, layer in enumerate(module)
    }  # fmt: skip
    for name, layer in layers.items():
        _fill_when_called(name, layer, layers, tensors)
    with _filled("", as_module(model), layers, tensors), torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _fill_when_called(name: str, layer: nn.Module, layers: dict[str, nn.Module], tensors: _Tensors) -> None:
    inner: list[Any] = []

    def before(*_: Any) -> None:
        inner.append(_filled(name, layer, layers, tensors))
        inner[-1].__enter__()

    def after(*_: Any) -> None:
        inner.pop().__exit__(None, None, None)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


@contextmanager
def _filled(place: str, root: nn.Module, layers: dict[str, nn.Module], tensors: _Tensors) -> Iterator[None]:
    """`root` with its tensors, but for those of layers inside of it, which have them only while they compute."""
    empty: list[tuple[dict[str, Any], str, Any]] = []
    ready: dict[int, Any] = {}  # tied ones are one tensor
    for name, module in _own_modules(place, root, layers):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                empty.append((module._parameters, key, parameter))
                if id(parameter) not in ready:
                    tensor = tensors.read(f"{name}.{key}".lstrip("."))
                    ready[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
                module._parameters[key] = ready[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                empty.append((module._buffers, key, buffer))
                module._buffers[key] = tensors.read(f"{name}.{key}".lstrip("."))
    try:
        yield
    finally:
        for held, key, value in empty:
            held[key] = value


def _own_modules(place: str, root: nn.Module, layers: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    yield place, root
    for key, child in root.named_children():
        name = f"{place}.{key}".lstrip(".")
        if name not in layers:
            yield from _own_modules(name, child, layers)
