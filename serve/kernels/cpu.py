"""The kernels for a CPU, in float32: what `reference` computes, by the C library of `compiled`.

Plain torch spends as long on starting many small products as on the products; here a layer's adapters are one call.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adapterhub_local.base.attention import AttentionKind
from serve.kernels.compiled import load_library

PART = 192  # inputs of x @ A that one task sums up: two layers' worth of tasks for each core of a small machine
SPAN = 512  # as in cpu.c
FOUR_BIT, BF16, FP16, FP32 = range(4)  # as in cpu.h: how numbers are held
TYPES = (torch.float32, torch.int32, torch.uint8)
Int, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Cached(ctypes.Structure):
    """Keys or values: steps between pages, heads and places."""

    _fields_ = (("data", Pointer), ("page", Int), ("head", Int), ("place", Int), ("kind", Int))


class Kind(ctypes.Structure):
    """`kind_t` of attention.h."""

    _fields_ = (("scale", Float), ("softcap", Float), ("window", Int))


def in_c(kind: AttentionKind) -> tuple[float, float, int]:
    """The fields of `Kind`; 0 where there is no cap and no window."""
    return kind.scale, kind.softcap or 0.0, kind.window or 0


class Attention(ctypes.Structure):
    """`attention_t` of region.h."""

    _fields_ = (
        ("out", Pointer), ("query", Pointer), ("query_row", Int), ("query_head", Int),
        ("keys", Cached), ("values", Cached), ("tables", Pointer), ("table_row", Int), ("lengths", Pointer),
        ("rows", Int), ("heads", Int), ("kv_heads", Int), ("dim", Int), ("page", Int), ("spans", Int),
        ("kind", Kind), ("parts", Pointer),
    )  # fmt: skip


def load_kernels() -> dict[str, Callable[..., Any]]:
    """The kernels by name. Raises CannotCompile."""
    library = load_library()
    library.qhub_add_lora.argtypes = [
        *[Pointer] * 4, Int, Int, Pointer, Int, Pointer, Pointer, Int, Int, Pointer, Int, Pointer, Int,
    ]  # fmt: skip
    library.qhub_paged_attention.argtypes = [ctypes.POINTER(Attention)]
    library.qhub_multiply.argtypes = [Pointer, Int, Pointer, Int, Pointer, Pointer, Pointer, Int, Int, Int, Pointer]
    for name in ("qhub_add_lora", "qhub_paged_attention", "qhub_multiply"):
        getattr(library, name).restype = None

    def add_lora(
        outs: Sequence[torch.Tensor],
        x: torch.Tensor,
        a: torch.Tensor,
        bs: Sequence[torch.Tensor | None],
        tiles: torch.Tensor,
    ) -> None:
        """`reference.add_lora`; outs and x with neighbours in their last dimension."""
        _check(x, a, tiles, *outs, *(b for b in bs if b is not None))
        layers, width = len(outs), a.shape[2]
        tokens, inputs = x.shape
        parts = -(-inputs // PART)
        inner = torch.empty(parts * tokens * width)
        pointers, numbers = Pointer * layers, Int * layers
        library.qhub_add_lora(
            pointers(*[out.data_ptr() for out in outs]),
            numbers(*[out.stride(0) for out in outs]),
            numbers(*[out.shape[1] for out in outs]),
            x.data_ptr(), x.stride(0), inputs,
            a.data_ptr(), a.stride(0),
            pointers(*[None if b is None else b.data_ptr() for b in bs]),
            numbers(*[0 if b is None else b.stride(0) for b in bs]),
            layers, width // layers, tiles.data_ptr(), len(tiles), inner.data_ptr(), PART,
        )  # fmt: skip

    def paged_attention(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        kind: AttentionKind,
    ) -> torch.Tensor:
        """`reference.paged_attention`; query, keys and values with neighbours in their last dimension."""
        _check(query, keys, values, tables, lengths)
        rows, heads, dim = query.shape
        kv_heads, page = keys.shape[1:3]
        spans = -(-tables.shape[1] * page // SPAN)
        out = torch.empty(rows, heads, dim)
        room = torch.empty(rows * heads * spans * (dim + 2))
        now = Attention(
            out.data_ptr(), query.data_ptr(), *query.stride()[:2], Cached(keys.data_ptr(), *keys.stride()[:3], FP32),
            Cached(values.data_ptr(), *values.stride()[:3], FP32), tables.data_ptr(), tables.stride(0),
            lengths.data_ptr(), rows, heads, kv_heads, dim, page, spans, in_c(kind), room.data_ptr(),
        )  # fmt: skip
        library.qhub_paged_attention(ctypes.byref(now))
        return out

    def multiply(
        x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out_features: int
    ) -> torch.Tensor:
        """`reference.multiply`; x with neighbours in its last dimension, in_features a multiple of 64."""
        _check(x, packed.flatten(), absmax, code)
        tokens, inputs = x.shape
        out = torch.empty(tokens, out_features)
        room = torch.empty(tokens * inputs)
        library.qhub_multiply(
            out.data_ptr(), out_features, x.data_ptr(), x.stride(0), packed.data_ptr(), absmax.data_ptr(),
            code.data_ptr(), tokens, inputs, out_features, room.data_ptr(),
        )  # fmt: skip
        return out

    return {"add_lora": add_lora, "paged_attention": paged_attention, "multiply": multiply}


def _check(*tensors: torch.Tensor) -> None:
    """What C gets as bare addresses must be what it takes it for. Raises TypeError."""
    for tensor in tensors:
        is_dense = tensor.shape[-1] < 2 or tensor.stride(-1) == 1
        if tensor.dtype not in TYPES or tensor.device.type != "cpu" or not is_dense:
            raise TypeError(f"a tensor {tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}")
