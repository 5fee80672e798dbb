"""What lies between a decoder's products, one launch each: residual and RMSNorm; norms of heads, rotary embedding and
the writing of keys and values; SiLU times up. As 48 small operations of torch a layer they take longer than products.

Rounded where transformers' modules round, but for the rotary embedding, which is rounded once.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(
    x, residual, weight, out, x_stride, size, eps,
    HAS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual += x; out = RMSNorm(residual), for one token."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < size
    total = tl.load(residual + token * size + places, mask=inside, other=0.0)
    if HAS_X:
        total = (
            total.to(tl.float32) + tl.load(x + token * x_stride + places, mask=inside, other=0.0).to(tl.float32)
        ).to(residual.dtype.element_ty)
        tl.store(residual + token * size + places, total, mask=inside)
    wide = total.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + places, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head(place, weight, eps, size, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """Both halves of one head at `place`, float32; normed by `weight`, if there is a norm."""
    dims = tl.arange(0, HALF)
    half = size // 2
    inside = dims < half
    first = tl.load(place + dims, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half + dims, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt_rn((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / size + eps)
        kind = place.dtype.element_ty
        first = (first * scale).to(kind).to(tl.float32) * tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
        second = (second * scale).to(kind).to(tl.float32) * tl.load(weight + half + dims, mask=inside, other=0.0).to(
            tl.float32
        )
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    return first, second


@triton.jit
def _rotate_and_write(
    q, k, v, cos, sin, q_weight, k_weight, keys, values, pages, offsets,
    q_token, k_token, v_token, key_page, key_head, key_place, value_page, value_head, value_place,
    heads, kv_heads, size, eps,
    HAS_NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query's in place, a key's and a value's to their page."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HALF)
    half = size // 2
    inside = dims < half
    page = tl.load(pages + token)
    offset = tl.load(offsets + token)
    if head >= heads + kv_heads:  # a value: as it is
        own = head - heads - kv_heads
        source = v + token * v_token + own * size
        target = values + page * value_page + own * value_head + offset * value_place
        tl.store(target + dims, tl.load(source + dims, mask=inside, other=0.0), mask=inside)
        tl.store(target + half + dims, tl.load(source + half + dims, mask=inside, other=0.0), mask=inside)
        return
    angle = token * size + dims
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + half + angle, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + half + angle, mask=inside, other=0.0).to(tl.float32)
    if head < heads:
        place = q + token * q_token + head * size
        first, second = _head(place, q_weight, eps, size, HALF, HAS_NORM)
    else:
        own = head - heads
        place = keys + page * key_page + own * key_head + offset * key_place
        first, second = _head(k + token * k_token + own * size, k_weight, eps, size, HALF, HAS_NORM)
    kind = q.dtype.element_ty
    tl.store(place + dims, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(place + half + dims, (second * cos_second + first * sin_second).to(kind), mask=inside)


@triton.jit
def _silu_multiply(gate, up, out, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    """out = gate / (1 + exp(-gate)) * up, for a block of one token."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    x = tl.load(gate + token * gate_stride + places, mask=inside, other=0.0).to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
    y = tl.load(up + token * up_stride + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + places, (active * y).to(out.dtype.element_ty), mask=inside)


def add_norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference.add_norm` on the GPU; the residual must be contiguous, and the last dimension of x."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    if tokens:
        block = triton.next_power_of_2(size)
        _add_norm[(tokens,)](
            residual if x is None else x, residual, weight, out, 0 if x is None else x.stride(0), size, eps,
            HAS_X=x is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cache: tuple[torch.Tensor, torch.Tensor],
    places: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """`reference.rotate_and_write` on the GPU; heads of one token must lie one behind another."""
    tokens, heads, size = q.shape
    (cos, sin), (keys, values), (pages, offsets) = angles, cache, places
    kv_heads = k.shape[1]
    if not tokens:
        return
    q_weight, k_weight = norms or (cos, cos)
    _rotate_and_write[(tokens, heads + 2 * kv_heads)](
        q, k, v, cos, sin, q_weight, k_weight, keys, values, pages, offsets,
        q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:3], *values.stride()[:3],
        heads, kv_heads, size, eps,
        HAS_NORM=norms is not None, HALF=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference.silu_multiply` on the GPU; the last dimension of both must be contiguous."""
    tokens, size = gate.shape
    out = torch.empty(tokens, size, dtype=gate.dtype, device=gate.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(size))
        _silu_multiply[(tokens, triton.cdiv(size, block))](
            gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=block
        )
    return out
