"""Attention of one new token a row over pages of keys and values, in place: no page is copied and no row is padded.

The places of a row are split over programs (flash-decoding) and their results joined; query heads that share a key
head are one product. Sliding windows and soft caps are honoured, pages outside a window are not read.
"""

import torch
import triton
import triton.language as tl

from adapterhub_local.base.attention import AttentionKind
from serve.kernels.launch import BUSY, dot, precision

MIN_SPAN = 256  # places that one program should at least have
MAX_SPAN = 512  # and at most: else one long row among short ones is the time of all
MAX_PARTS = 16  # but no more parts than this, most of which have nothing to do where tables are wide and rows short


# `table_row` and how a row is split differ from step to step: kernels must not be compiled anew for each
@triton.jit(do_not_specialize=["table_row", "span", "num_parts"])
def _attend(
    query, keys, values, tables, lengths, parts, peaks, sums,
    query_row, query_head, table_row, key_page, key_head, key_place, value_page, value_head, value_place,
    heads, span, num_parts, scale, window, softcap,
    HEAD_DIM: tl.constexpr, REPEATS: tl.constexpr, PAGE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """One part of one row's places, for the query heads of one key head: its unnormalised result, peak and sum.

    IS_WHOLE: there is no other part, and `parts` is the output.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    begin = tl.maximum(part * span, first)
    end = tl.minimum((part + 1) * span, length)
    if not IS_WHOLE:  # noqa: SIM102 (one is known when it is compiled, the other when it runs)
        if begin >= end:
            return
    own = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    head = kv_head * REPEATS + own
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + dims[None, :],
        mask=(own < REPEATS)[:, None] & is_dim[None, :],
        other=0.0,
    )
    peak = tl.full((BLOCK_HEADS,), float("-inf"), dtype=tl.float32)
    sum_ = tl.zeros((BLOCK_HEADS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_HEADS, BLOCK_DIM), dtype=tl.float32)
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_place = (places >= begin) & (places < end)
        pages = tl.load(tables + row * table_row + places // PAGE, mask=is_place, other=0).to(tl.int64)
        inside = places % PAGE
        at = pages * key_page + kv_head * key_head + inside * key_place
        k = tl.load(keys + at[None, :] + dims[:, None], mask=is_place[None, :] & is_dim[:, None], other=0.0)
        scores = dot(q, k, tl.zeros((BLOCK_HEADS, BLOCK), dtype=tl.float32), PRECISION) * scale
        if HAS_SOFTCAP:  # tanh(y) = 1 - 2 / (exp(2 y) + 1), right for any size of y
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(is_place[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_peak[:, None])
        shrunk = tl.exp(peak - new_peak)
        at = pages * value_page + kv_head * value_head + inside * value_place
        v = tl.load(values + at[:, None] + dims[None, :], mask=is_place[:, None] & is_dim[None, :], other=0.0)
        total = dot(weights.to(v.dtype), v, total * shrunk[:, None], PRECISION)
        sum_ = sum_ * shrunk + tl.sum(weights, axis=1)
        peak = new_peak
    is_out = (own < REPEATS)[:, None] & is_dim[None, :]
    if IS_WHOLE:
        result = total / tl.where(sum_ > 0, sum_, 1.0)[:, None]
        target = parts + (row * heads + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, result.to(parts.dtype.element_ty), mask=is_out)
        return
    place = (row * num_parts + part) * heads + head
    tl.store(peaks + place, peak, mask=own < REPEATS)
    tl.store(sums + place, sum_, mask=own < REPEATS)
    tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], total, mask=is_out)


@triton.jit(do_not_specialize=["span", "num_parts"])
def _join(
    parts, peaks, sums, lengths, out, heads, span, num_parts, window,
    HEAD_DIM: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The result of one row's one head, from those parts of it that have places."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0) // span if HAS_WINDOW else 0
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    peak = tl.full((1,), float("-inf"), dtype=tl.float32)
    sum_ = tl.zeros((1,), dtype=tl.float32)
    total = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for part in range(first, tl.cdiv(length, span)):
        place = (row * num_parts + part) * heads + head
        own_peak = tl.load(peaks + place)
        new_peak = tl.maximum(peak, own_peak)
        shrunk = tl.exp(peak - new_peak)
        grown = tl.exp(own_peak - new_peak)
        total = total * shrunk + tl.load(parts + place * HEAD_DIM + dims, mask=is_dim, other=0.0) * grown
        sum_ = sum_ * shrunk + tl.load(sums + place) * grown
        peak = new_peak
    result = total / tl.where(length > 0, sum_, 1.0)
    tl.store(out + (row * heads + head) * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=is_dim)


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    kind: AttentionKind,
) -> torch.Tensor:
    """`reference.paged_attention` on the GPU. The last dimension of query, keys and values must be contiguous."""
    rows, heads, head_dim = query.shape
    kv_heads, page = keys.shape[1:3]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not rows:
        return out
    block = 64 if head_dim <= 128 else 32
    places = tables.shape[1] * page
    num_parts = _num_parts(rows * kv_heads, places)
    span = triton.cdiv(triton.cdiv(places, num_parts), block) * block
    num_parts = triton.cdiv(places, span)
    is_whole = num_parts == 1
    parts, peaks, sums = out, out, out
    if not is_whole:
        parts = torch.empty(rows, num_parts, heads, head_dim, dtype=torch.float32, device=query.device)
        peaks, sums = torch.empty(2, rows, num_parts, heads, dtype=torch.float32, device=query.device)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    _attend[(rows, kv_heads, num_parts)](
        query, keys, values, tables, lengths, parts, peaks, sums,
        *query.stride()[:2], tables.stride(0), *keys.stride()[:3], *values.stride()[:3],
        heads, span, num_parts, kind.scale, kind.window or 0, kind.softcap or 0.0,
        HEAD_DIM=head_dim, REPEATS=heads // kv_heads, PAGE=page, HAS_WINDOW=kind.window is not None,
        HAS_SOFTCAP=kind.softcap is not None, BLOCK_HEADS=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_DIM=block_dim, BLOCK=block, PRECISION=precision(query.dtype), IS_WHOLE=is_whole,
    )  # fmt: skip
    if is_whole:
        return out
    _join[(rows, heads)](
        parts, peaks, sums, lengths, out, heads, span, num_parts, kind.window or 0,
        HEAD_DIM=head_dim, HAS_WINDOW=kind.window is not None, BLOCK_DIM=block_dim,
    )  # fmt: skip
    return out


def _num_parts(programs: int, places: int) -> int:
    """Into how many parts rows are split: enough to fill the GPU, none longer than MAX_SPAN if it can be helped."""
    wanted = max(triton.cdiv(BUSY, programs), min(MAX_PARTS, triton.cdiv(places, MAX_SPAN)))
    return int(max(1, min(wanted, places // MIN_SPAN)))
