"""A whole step of a decoder as one call of C (step.c), for models whose weights and cache stay in the CPU's memory.

The structures are those of weights.h and step.c, field by field; whoever fills them keeps the tensors they point to.
"""

import ctypes
from typing import Any

import torch

from serve.kernels.compiled import load_library
from serve.kernels.cpu import BF16, FP16, FP32, PART, Kind

Int, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
BLOCK = 64  # inputs are taken so many at a time
ROWS = 1024  # of a weight that are looked at together


class Linear(ctypes.Structure):
    """W (outputs, inputs) as it is held; absmax of 4 bits, and a bias, may be None."""

    _fields_ = (("weight", Pointer), ("absmax", Pointer), ("bias", Pointer), ("kind", Int), ("outputs", Int))


class Group(ctypes.Structure):
    """Up to three layers with one input."""

    _fields_ = (("linears", Linear * 3), ("count", Int), ("inputs", Int))


class Layer(ctypes.Structure):
    """Four groups, the norms' weights and what attention does."""

    _fields_ = (
        ("qkv", Group), ("out", Group), ("gate_up", Group), ("down", Group),
        ("norm_in", Pointer), ("norm_mlp", Pointer), ("norm_query", Pointer), ("norm_key", Pointer),
        ("attention", Kind),
    )  # fmt: skip


class Model(ctypes.Structure):
    """Sizes, layers, the last norm and the head; `code` are the 16 values of 4 bits."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", Int), ("hidden", Int), ("heads", Int), ("kv_heads", Int), ("dim", Int), ("mlp", Int),
        ("rotary", Int), ("page", Int), ("kind", Int),
        ("code", Pointer), ("norm", Pointer), ("head", Linear), ("eps", Float),
    )  # fmt: skip


class Step(ctypes.Structure):
    """What one call computes."""

    _fields_ = (
        ("x", Pointer), ("cos", Pointer), ("sin", Pointer), ("places", Pointer), ("wanted", Pointer),
        ("keys", ctypes.POINTER(Pointer)), ("values", ctypes.POINTER(Pointer)),
        ("tables", Pointer), ("lengths", Pointer), ("tiles", Pointer), ("owns", ctypes.POINTER(Pointer)),
        ("logits", Pointer), ("room", Pointer),
        ("tokens", Int), ("num_wanted", Int), ("num_tiles", Int), ("table_row", Int), ("spans", Int),
        ("page_step", Int), ("head_step", Int), ("place_step", Int), ("widest", Int),
    )  # fmt: skip


def load_step() -> Any:
    """`step(model, step, threads)` of the compiled library. Raises CannotCompile."""
    function = load_library().qhub_step
    function.argtypes, function.restype = (ctypes.POINTER(Model), ctypes.POINTER(Step)), None
    return function


def narrowest(weight: torch.Tensor) -> tuple[torch.dtype, int]:
    """The smallest dtype that holds the very same numbers, and its kind."""
    for dtype, kind in ((torch.bfloat16, BF16), (torch.float16, FP16)):
        if all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in weight.split(ROWS)):
            return dtype, kind
    return torch.float32, FP32


def room_for(model: Model, tokens: int, spans: int, widest: int, width: int) -> int:
    """Floats that a step needs beside its input and output; `width`: that of the widest part in the batch."""
    rows = 2 * widest + (model.heads + 2 * model.kv_heads) * model.dim + model.hidden + 2 * model.mlp
    parts = -(-widest // PART)
    size: int = tokens * (rows + model.heads * spans * (model.dim + 2) + parts * width)
    return size
