"""LoRA for a packed batch in two launches: shrink to the rank, expand into the outputs of all layers of one input.

A tile is up to TILE tokens in a row with one adapter; in decode with different adapters each token is a tile, and what
costs is reading its factors once. Sums are float32; partial sums of a split input are added in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from serve.kernels.launch import BUSY, dot, precision
from serve.kernels.reference import TILE

FUSED = 3  # layers of one launch
BLOCK_IN = 64  # places of the input, of shrink's columns and of the output that one program takes at a time
BLOCK_WIDTH = 64
BLOCK_OUT = 128
MOST_READS = 320  # blocks of outputs times parts: each of these blocks reads all partial sums


# how many tokens there are, and how the work is split, differ from step to step: no kernel is compiled anew for that
@triton.jit(do_not_specialize=["tokens", "blocks"])
def _shrink(
    x, a, inner, tiles, x_stride, slot_stride, tokens, in_features, width, blocks,
    TILE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner[part, tokens, columns] = x[tokens, part] @ a[slot][part, columns]; (tile, block of columns, part)."""
    tile = tiles + 3 * tl.program_id(0)
    start = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    slot = tl.load(tile + 2).to(tl.int64)
    if (count == 0) | (slot < 0):
        return
    span = blocks * BLOCK_IN  # in whole blocks, so that the compiler knows where loads begin
    rows = tl.arange(0, TILE)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    part = tl.program_id(2)
    is_row = (rows < count)[:, None]
    is_column = (columns < width)[None, :]
    own_x = x + (start + rows)[:, None] * x_stride
    own_a = a + slot * slot_stride + columns[None, :]
    end = tl.minimum((part + 1) * span, in_features)
    total = tl.zeros((TILE, BLOCK_WIDTH), dtype=tl.float32)
    for begin in range(part * span, end, BLOCK_IN):
        places = begin + tl.arange(0, BLOCK_IN)
        is_place = places < end
        left = tl.load(own_x + places[None, :], mask=is_row & is_place[None, :], other=0.0)
        right = tl.load(own_a + places[:, None] * width, mask=is_place[:, None] & is_column, other=0.0)
        total = dot(left, right, total, PRECISION)
    out = inner + (part * tokens.to(tl.int64) + start + rows)[:, None] * width + columns[None, :]
    tl.store(out, total, mask=is_row & is_column)


@triton.jit(do_not_specialize=["first1", "first2", "tokens", "parts"])
def _expand(
    inner, tiles, b0, b1, b2, out0, out1, out2, size0, size1, size2, stride0, stride1, stride2,
    column0, column1, column2, first1, first2, tokens, width, rank, parts,
    TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[tokens] += inner[tokens, the layer's columns] @ b[slot], of the layer that this block of outputs is in."""
    tile = tiles + 3 * tl.program_id(0)
    start = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    slot = tl.load(tile + 2).to(tl.int64)
    if (count == 0) | (slot < 0):
        return
    block = tl.program_id(1)
    is1 = block >= first1
    is2 = block >= first2
    b = tl.where(is2, b2, tl.where(is1, b1, b0))
    out = tl.where(is2, out2, tl.where(is1, out1, out0))
    size = tl.where(is2, size2, tl.where(is1, size1, size0))
    stride = tl.where(is2, stride2, tl.where(is1, stride1, stride0))
    column = tl.where(is2, column2, tl.where(is1, column1, column0))
    block -= tl.where(is2, first2, tl.where(is1, first1, 0))
    rows = tl.arange(0, TILE)
    places = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row = (rows < count)[:, None]
    is_place = (places < size)[None, :]
    target = out + (start + rows)[:, None] * stride + places[None, :]
    mask = is_row & is_place
    before = tl.load(target, mask=mask, other=0.0)  # asked for first: what follows waits for no other load
    total = tl.zeros((TILE, BLOCK_OUT), dtype=tl.float32)
    for begin in range(0, rank, BLOCK_RANK):
        ranks = begin + tl.arange(0, BLOCK_RANK)
        is_rank = ranks < rank
        right = tl.load(
            b + (slot * rank + ranks[:, None]) * size + places[None, :], mask=is_rank[:, None] & is_place, other=0.0
        )
        own = inner + (start + rows)[:, None] * width + column + ranks[None, :]
        left = tl.zeros((TILE, BLOCK_RANK), dtype=tl.float32)
        for part in tl.static_range(PARTS):  # unrolled, so that all parts are on their way at once
            is_part = is_row & is_rank[None, :] & (part < parts)
            left += tl.load(own + part * tokens.to(tl.int64) * width, mask=is_part, other=0.0)
        total = dot(left.to(right.dtype), right, total, PRECISION)
    tl.store(target, (before + total).to(out.dtype.element_ty), mask=mask)


def add_lora(
    outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: Sequence[torch.Tensor | None],
    tiles: torch.Tensor,
) -> None:
    """`reference.add_lora` on the GPU, with tiles of at most TILE tokens. No tensor is looked at on the host."""
    num_tiles = len(tiles)
    if not num_tiles:
        return
    in_features, width = a.shape[1:]
    rank = width // len(outs)
    columns = triton.cdiv(width, BLOCK_WIDTH)
    outputs = sum(triton.cdiv(out.shape[1], BLOCK_OUT) for out in outs)
    parts = _parts(num_tiles * columns, in_features, max(2, MOST_READS // outputs))
    blocks = triton.cdiv(triton.cdiv(in_features, parts), BLOCK_IN)  # of each part
    parts = triton.cdiv(in_features, blocks * BLOCK_IN)
    inner = torch.empty(parts, len(x), width, dtype=torch.float32, device=x.device)
    _shrink[(num_tiles, columns, parts)](
        x, a, inner, tiles, x.stride(0), a.stride(0), len(x), in_features, width, blocks,
        TILE=TILE, BLOCK_IN=BLOCK_IN, BLOCK_WIDTH=BLOCK_WIDTH, PRECISION=precision(a.dtype),
    )  # fmt: skip
    layers = [(out, b, place * rank) for place, (out, b) in enumerate(zip(outs, bs, strict=True)) if b is not None]
    for start in range(0, len(layers), FUSED):
        some = layers[start : start + FUSED]
        sizes = [triton.cdiv(out.shape[1], BLOCK_OUT) for out, _, _ in some]
        firsts = [sum(sizes[:1]), sum(sizes[:2])]
        some += [some[0]] * (FUSED - len(some))  # never reached: their first block lies behind the last
        _expand[(num_tiles, sum(sizes))](
            inner, tiles, *(b for _, b, _ in some), *(out for out, _, _ in some), *(out.shape[1] for out, _, _ in some),
            *(out.stride(0) for out, _, _ in some), *(column for _, _, column in some), *firsts, len(x), width,
            rank, parts, TILE=TILE, PARTS=triton.next_power_of_2(parts), BLOCK_OUT=BLOCK_OUT,
            BLOCK_RANK=min(64, max(16, triton.next_power_of_2(rank))), PRECISION=precision(a.dtype),
        )  # fmt: skip


def _parts(programs: int, in_features: int, most: int) -> int:
    """Into how many parts the input is split, so that a few tiles still fill the GPU; at least 4 blocks each."""
    return int(max(1, min(triton.cdiv(BUSY, programs), in_features // (4 * BLOCK_IN), most)))
