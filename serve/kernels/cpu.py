"""The kernels for a CPU, in float32: what `reference` computes, by the C library of `compiled`.

Plain torch spends as long on starting many small products as on the products; here a layer's adapters are one call.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from adapterhub_local.base.attention import AttentionKind
from serve.kernels.compiled import load_library
from serve.kernels.part import Part

PART = 192  # inputs of x @ A that one task sums up: two layers' worth of tasks for each core of a small machine
SPAN = 512  # as in cpu.h
LAYERS = 3  # of a part, as in region.h
FOUR_BIT, BF16, FP16, FP32 = range(4)  # as in cpu.h: how numbers are held
KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
TYPES = (*KINDS, torch.int32, torch.uint8)
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


class PartInC(ctypes.Structure):
    """`part_t` of region.h; all zero: nothing."""

    _fields_ = (
        ("a", Pointer), ("b", Pointer * LAYERS), ("scales", Pointer * LAYERS),
        ("columns", Int * LAYERS), ("kinds_b", Int * LAYERS), ("kind_a", Int), ("width", Int), ("rank", Int),
    )  # fmt: skip


def part_in_c(part: Part | None, layers: slice = slice(LAYERS)) -> PartInC:
    """A part for C, or that of some layers; C reads its tensors where they are: they must be kept. Raises TypeError."""
    if part is None:
        return PartInC()
    _check(part.a, *(each for each in (*part.bs, *part.scales) if each is not None))
    bs, scales = part.bs[layers], part.scales[layers]
    return PartInC(
        part.a.data_ptr(),
        tuple(None if b is None else b.data_ptr() for b in bs),
        tuple(None if scale is None else scale.data_ptr() for scale in scales),
        part.columns[layers],
        tuple(FP32 if b is None else KINDS[b.dtype] for b in bs),
        KINDS[part.a.dtype], part.a.shape[1], part.rank,
    )  # fmt: skip


def load_kernels() -> dict[str, Callable[..., Any]]:
    """The kernels by name. Raises CannotCompile."""
    library = load_library()
    library.qhub_add_parts.argtypes = [*[Pointer] * 4, Int, Int, Int, Pointer, Pointer, Int, Pointer, Int]
    library.qhub_paged_attention.argtypes = [ctypes.POINTER(Attention)]
    library.qhub_multiply.argtypes = [Pointer, Int, Pointer, Int, Pointer, Pointer, Pointer, Int, Int, Int, Pointer]
    for name in ("qhub_add_parts", "qhub_paged_attention", "qhub_multiply"):
        getattr(library, name).restype = None

    known: WeakKeyDictionary[Part, dict[int, PartInC]] = WeakKeyDictionary()  # they come again at every step
    nothing = PartInC()

    def part_of(part: Part, first: int) -> PartInC:
        """What C needs to know of a part's layers from `first` on; scales are the caller's business, before that."""
        made = known.setdefault(part, {})
        if first not in made:
            made[first] = part_in_c(part, slice(first, first + LAYERS))
            made[first].scales = (Pointer * LAYERS)()
        return made[first]

    def add_parts(
        outs: Sequence[torch.Tensor], x: torch.Tensor, parts: Sequence[Part | None], tiles: torch.Tensor
    ) -> None:
        """`reference.add_parts`; outs and x with neighbours in their last dimension."""
        _check(x, tiles, *outs)
        inputs = x.shape[1]
        rows = [row for row in tiles.tolist() if row[1] and row[2] >= 0]
        table = torch.tensor([row[:2] for row in rows], dtype=torch.int32)
        widest = max((part.a.shape[1] for part in parts if part is not None), default=0)
        inner = torch.empty(-(-inputs // PART) * sum(row[1] for row in rows) * widest)
        for first in range(0, len(outs), LAYERS):
            some = outs[first : first + LAYERS]
            made = [nothing if part is None else part_of(part, first) for part in parts]
            pointers, numbers = Pointer * len(some), Int * len(some)
            library.qhub_add_parts(
                pointers(*[out.data_ptr() for out in some]),
                numbers(*[out.stride(0) for out in some]),
                numbers(*[out.shape[1] for out in some]),
                x.data_ptr(), x.stride(0), inputs, len(some),
                (Pointer * len(rows))(*[ctypes.addressof(made[row[2]]) for row in rows]),
                table.data_ptr(), len(rows), inner.data_ptr(), PART,
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

    return {"add_parts": add_parts, "paged_attention": paged_attention, "multiply": multiply}


def _check(*tensors: torch.Tensor) -> None:
    """What C gets as bare addresses must be what it takes it for. Raises TypeError."""
    for tensor in tensors:
        is_dense = tensor.shape[-1] < 2 or tensor.stride(-1) == 1
        if tensor.dtype not in TYPES or tensor.device.type != "cpu" or not is_dense:
            raise TypeError(f"a tensor {tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}")
