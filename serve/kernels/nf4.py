"""x @ W^T straight from the 4-bit weights of bitsandbytes, for more tokens than its own fused product takes.

Beyond a few tokens bitsandbytes writes the whole weight out in 16 bits and reads it again; here each weight is expanded
in registers, once for every 64 tokens. Rounded as its `dequantize_4bit` rounds, so it is the same function.
"""

import torch
import triton
import triton.language as tl

from serve.kernels.launch import BUSY, dot, precision

BLOCK = 64  # weights with one absmax, and what a program takes of a row at a time
BLOCK_OUT = 64


@triton.jit(do_not_specialize=["tokens", "blocks"])  # else it is compiled anew for one token, and for every 16th
def _multiply(
    x, packed, absmax, code, out, x_stride, tokens, in_features, out_features, blocks,
    BLOCK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part] = x[:, part] @ W[:, part]^T for a block of outputs and of tokens; (outputs, tokens, part)."""
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    part = tl.program_id(2)
    span = blocks * BLOCK  # in whole blocks, so that the compiler knows where loads begin
    is_output = outputs < out_features
    is_row = (rows < tokens)[:, None]
    pairs = tl.arange(0, BLOCK // 2)  # two weights a byte, the first in its high half
    bytes_ = packed + outputs.to(tl.int64)[:, None] * (in_features // 2) + pairs[None, :]
    scales = absmax + outputs.to(tl.int64) * (in_features // BLOCK)
    own_x = x + rows.to(tl.int64)[:, None] * x_stride + 2 * pairs[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, in_features), BLOCK):
        both = tl.load(bytes_ + begin // 2, mask=is_output[:, None], other=0).to(tl.int32)
        scale = tl.load(scales + begin // BLOCK, mask=is_output, other=0.0)[:, None]
        first = (tl.load(code + (both >> 4)) * scale).to(x.dtype.element_ty)
        second = (tl.load(code + (both & 15)) * scale).to(x.dtype.element_ty)
        total = dot(tl.load(own_x + begin, mask=is_row, other=0.0), tl.trans(first), total, PRECISION)
        total = dot(tl.load(own_x + begin + 1, mask=is_row, other=0.0), tl.trans(second), total, PRECISION)
    target = out + (part * tokens.to(tl.int64) + rows)[:, None] * out_features + outputs[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_row & is_output[None, :])


def multiply(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out_features: int
) -> torch.Tensor:
    """`reference.multiply` on the GPU; the last dimension of x must be contiguous."""
    tokens, in_features = x.shape
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    block_tokens = min(64, max(16, triton.next_power_of_2(tokens)))
    programs = triton.cdiv(out_features, BLOCK_OUT), triton.cdiv(tokens, block_tokens)
    parts = max(1, min(triton.cdiv(BUSY, programs[0] * programs[1]), in_features // (4 * BLOCK)))
    blocks = triton.cdiv(triton.cdiv(in_features, parts), BLOCK)  # of each part
    parts = triton.cdiv(in_features, blocks * BLOCK)
    sums = out[None] if parts == 1 else out.new_empty(parts, tokens, out_features, dtype=torch.float32)
    _multiply[(*programs, parts)](
        x, packed, absmax, code, sums, x.stride(0), tokens, in_features, out_features, blocks,
        BLOCK=BLOCK, BLOCK_OUT=BLOCK_OUT, BLOCK_TOKENS=block_tokens, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return out if parts == 1 else sums.sum(0).to(x.dtype)
