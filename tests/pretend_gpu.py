"""A GPU that is not there: tensors that say they are on `cuda:0`, compute on the CPU, and refuse what a GPU refuses.

An operation on tensors of both devices raises as on a GPU, and every wait for the device is counted. Streams, graphs,
speed and what kernels do are beyond it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class OnGpu(torch.Tensor):
    """A tensor of the CPU, `inner`, behind one that says it is on the GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        # to torch's C++ it is on the CPU: a torch without GPUs has nothing for tensors on one
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    def cpu(self, *_: Any) -> torch.Tensor:  # type: ignore[override]
        return aten._to_copy(self, device=torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        given = [*args, *kwargs.values()]
        device = next((torch.device(each) for each in given if isinstance(each, (str, torch.device))), self.device)
        like = next((each for each in given if isinstance(each, torch.Tensor)), None)
        if like is not None:
            device, given = like.device, [like.dtype]
        dtype = next((each for each in given if isinstance(each, torch.dtype)), self.dtype)
        if device == self.device and dtype == self.dtype and not kwargs.get("copy"):
            return self
        return aten._to_copy(self, device=device, dtype=dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


waits: Counter[str] = Counter()  # operation -> how often the CPU waited for the GPU


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` gives, on the device that a GPU's torch would give it on. Raises RuntimeError for mixed devices."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    asked = kwargs.get("device")
    if func.__name__.startswith("new_") or "_like." in func.__name__:
        asked = None  # torch's C++ asks for what it takes for the tensor's own device
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    is_gpu = torch.device(asked).type == "cuda" if asked is not None else any(isinstance(t, OnGpu) for t in tensors)
    if not is_gpu and not any(isinstance(each, OnGpu) for each in tensors):
        return func(*args, **kwargs)
    if func not in MOVES:
        fixed = tensors
        if func in INDEXED:  # where the indices may lie on the CPU
            fixed = [args[0], *args[2:3]]
            fixed = [each for each in fixed if isinstance(each, torch.Tensor)]
        host = [each for each in fixed if not isinstance(each, OnGpu) and each.dim()]
        if host and len(host) < len(fixed):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, {host[0].shape} is on the CPU")
    if func in WAITS or (func is aten._to_copy.default and not is_gpu):
        waits[str(func)] += 1
    if func is aten.copy_.default and isinstance(args[1], OnGpu) and not isinstance(args[0], OnGpu):
        waits[str(func)] += 1
    inner = [each.inner if isinstance(each, OnGpu) else each for each in flat]
    own_args, own_kwargs = tree_unflatten(inner, spec)
    if asked is not None and is_gpu:
        own_kwargs["device"] = torch.device("cpu")
    own_kwargs.pop("pin_memory", None)
    if func is aten.record_stream.default:
        return None
    result = func(*own_args, **own_kwargs)
    known = {id(each.inner): each for each in flat if isinstance(each, OnGpu)}
    # torch 2.11 takes no tensor of inference for a view of one that is none
    is_inference = torch.is_inference_mode_enabled() and all(each.is_inference() for each in known.values())

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or isinstance(each, OnGpu):
            return each
        if id(each) in known:  # changed in place, or `out`
            return known[id(each)]
        if not is_gpu:
            return each
        with torch.inference_mode(is_inference):
            return OnGpu(each)

    return tree_map(wrapped, result)


class Gpu(TorchDispatchMode):
    """Catches what makes tensors on the GPU out of nothing, or moves them there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Numbered(TorchFunctionMode):
    """Gives the GPU its number, which a torch without GPUs cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def numbered(each: Any) -> Any:
            return GPU if isinstance(each, (str, torch.device)) and str(each) == "cuda" else each

        kwargs = {key: numbered(each) for key, each in (kwargs or {}).items() if key != "pin_memory"}
        return func(*(numbered(each) for each in args), **kwargs)


def in_this_thread() -> None:
    """Let this thread see the GPU, too, as long as it lives."""
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    Gpu().__enter__()
    Numbered().__enter__()


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 30) -> Iterator[Counter[str]]:
    """Within, torch sees two GPUs, of which one is used, with `free` bytes; counts of waits for it."""
    properties = SimpleNamespace(name="Pretended", total_memory=free, major=9, minor=0, multi_processor_count=132)
    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None, record_event=lambda: None)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (free, free),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": list,
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    monkeypatch.setattr("serve.adapters.loader.compute_alone", in_this_thread)
    waits.clear()
    before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    try:
        with Gpu(), Numbered():
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the GPU; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, old in [*part._parameters.items(), *part._buffers.items()]:
            if old is None:
                continue
            if id(old) not in made:
                new: torch.Tensor = OnGpu(old.detach())
                is_parameter = isinstance(old, torch.nn.Parameter)
                made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
            (part._parameters if name in part._parameters else part._buffers)[name] = made[id(old)]  # type: ignore[assignment]
    return module
