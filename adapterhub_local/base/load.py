"""Load a base for training or serving: from its quantised file, on one device, with CPU packing off."""

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.falcon import modeling_falcon
from transformers.utils import logging as transformers_logging

from adapterhub_local import settings
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import read_model
from adapterhub_local.base.model import AdaptedModel, BaseModel, Modules, as_module
from adapterhub_local.cores import Cores, most_threads
from adapterhub_local.errors import Corrupt, InputError
from adapterhub_local.lora.loadable import loadable
from adapterhub_local.noise import hush
from adapterhub_local.recipe.derived import compute_on

logger = logging.getLogger(__name__)
_importing = threading.Lock()


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory: the 4-bit model in evaluation mode, frozen, and its tokenizer.

    `cores`: how many threads its blocks compute with on a CPU, if that follows what other work takes.
    """

    info: BaseInfo
    model: BaseModel
    tokenizer: PreTrainedTokenizerBase
    cores: Cores | None = None


def load_base(
    info: BaseInfo,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    note: Callable[[str], None] = logger.info,
) -> LoadedBase:
    """Load a base; `dtype` is what everything but the 4-bit weights is held and computed in.

    Default device: the GPU if there is one and QHUB_DEVICE does not say otherwise. Default dtype: what
    `gpu_dtype` says on a GPU, float32 on the CPU. There its forward and backward passes leave the cores that other work
    takes; `note` gets a line when that first happens. Raises Corrupt if the folder cannot be loaded.
    """
    device = choose_device(device)
    dtype = dtype or (gpu_dtype() if device == "cuda" else torch.float32)
    # with its number: accelerate takes `cuda` for another device than the `cuda:0` it trains on
    place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    import_bitsandbytes()
    with quiet_loading(), plain_linear():
        try:
            model = read_model(info.folder, dtype=dtype, device_map={"": place})
            tokenizer = AutoTokenizer.from_pretrained(info.folder, trust_remote_code=False)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError, but no fault of the base
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise Corrupt(
                f"base '{info.name}' cannot be loaded from {info.folder}: {str(error).splitlines()[0]}"
            ) from None
    close_packing_trap(model, dtype)
    for parameter in model.parameters():
        # transformers 5.23 keeps the file's dtype in a pre-quantised model, whatever was asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    cores = Cores(most_threads(torch.get_num_threads()), note=note) if device == "cpu" else None
    if cores is not None:
        leave_cores(model, cores)
    return LoadedBase(info, model.eval(), tokenizer, cores)


def leave_cores(model: Modules, cores: Cores) -> None:
    """Have each block of a model compute with as many threads as `cores` gives at that moment."""

    def adapt(*_: object) -> None:
        if (threads := cores.threads()) != torch.get_num_threads():
            torch.set_num_threads(threads)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(adapt)


def put_on(model: BaseModel, folder: Path) -> AdaptedModel:
    """PEFT's model over this one, in evaluation mode, with the adapter in a PEFT folder on it.

    Raises what `loadable` raises.
    """
    import_bitsandbytes()  # before peft imports it
    from peft import PeftModel

    with loadable(folder) as place:
        made: Any = PeftModel.from_pretrained(as_module(model), str(place))
    adapted: AdaptedModel = made.eval()
    return adapted


@contextmanager
def plain_linear() -> Iterator[None]:
    """Build Falcon of plain linear layers: its own subclass computes the same, but transformers 5.23 does not load
    its 4-bit weights (`replace_with_bnb_linear` looks for exactly nn.Linear)."""
    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own  # type: ignore[misc]


def close_packing_trap(model: Modules, dtype: torch.dtype) -> None:
    """Fix the compute dtype of every 4-bit layer, and keep bitsandbytes from repacking it.

    On CPUs with AVX512-BF16 the first evaluation forward would round absmax to bfloat16 and so change
    the base for good (bitsandbytes 0.50, `_convert_weight_packed_for_cpu`).
    """
    linear_4bit = import_bitsandbytes().nn.Linear4bit
    for module in model.modules():
        if isinstance(module, linear_4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True


def choose_device(device: str | None = None) -> str:
    """`cpu` or `cuda`: the one asked for, else QHUB_DEVICE. Raises InputError if there is no GPU to give."""
    wanted = device or settings.device()
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("a GPU was asked for (cuda) and torch sees none: set QHUB_DEVICE to auto or cpu")
    return wanted


def has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 itself: before compute capability 8 it is emulated, many times slower."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def compute_dtype(wanted: str = "auto") -> torch.dtype:
    """The dtype of activations here as a recipe's `train.compute` names it: what runs, and what scores, loads with.

    A run measures its result in what it computed in, so whatever scores an adapter later asks here, too: between
    float32 and bfloat16 a loss differs in the third digit.
    """
    device = choose_device()
    name = compute_on(wanted, device, has_bfloat16=device == "cuda" and has_bfloat16())
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def gpu_dtype() -> torch.dtype:
    """What a GPU computes fastest in: bfloat16, or float16 on cards without it (T4, V100, RTX 20)."""
    return torch.bfloat16 if has_bfloat16() else torch.float16


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without its complaint that a CPU kernel could not be downloaded: it is not wanted."""
    hush()
    with _importing:
        if "bitsandbytes" not in sys.modules:
            with _compiling_later():
                return importlib.import_module("bitsandbytes")
    return sys.modules["bitsandbytes"]


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Have functions that are decorated with torch.compile meanwhile compiled when they are first called.

    bitsandbytes decorates a handful, and torch loads its whole compiler for the first: seconds of every start, for
    functions of optimizers and of other devices that most processes never call.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return lambda decorated: compile_later(decorated, **options)
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **named)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


class quiet_loading:
    """Silence transformers' weight-loading bars and notes; errors still raise."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()


import_bitsandbytes()  # here, since PEFT and transformers' Trainer import it as well, and torch's compiler with it
