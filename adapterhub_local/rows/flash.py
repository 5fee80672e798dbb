"""Attention over a packed row by torch's flash kernel for CPUs, piece by piece, exact forward and backward.

A query's keys may lie in two pieces: each gives a result and the logarithm of its softmax's sum, from which the
result over both follows. Backward needs no more: given the result and the sum over all keys, the kernel's
gradient of a piece is the part that piece has in the whole (as in ring attention, https://arxiv.org/abs/2310.01889).
So no key is copied or repeated, and autograd keeps what it keeps for a row of one example.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.rows.layout import Layout, Piece, pieces, visible


def attend_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, kind: AttentionKind
) -> torch.Tensor:
    """query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim) -> (1, T, heads, head_dim)."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    apply: Callable[..., torch.Tensor] = _InPieces.apply
    out = apply(query, key, value, layout, kind)
    return out.transpose(1, 2)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        kind: AttentionKind,
    ) -> torch.Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, heads, tokens, head_dim = query.shape
        out = query.new_empty(1, tokens, heads, head_dim).transpose(1, 2)
        q, k, v = _grouped(query, key, value)
        result = _by_group(out, key.shape[1])
        sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        own, earlier = pieces(layout, kind)
        for start, end in own:
            at = slice(start, end)
            result[:, :, at], sums[:, :, at] = flash(q[:, :, at], k[:, :, at], v[:, :, at], 0.0, True, scale=kind.scale)
        for piece in earlier:
            at, seen = slice(*piece.queries), slice(*piece.keys)
            part, part_sums = flash(
                q[:, :, at], k[:, :, seen], v[:, :, seen], attn_mask=_mask(piece, query), scale=kind.scale
            )
            share = torch.sigmoid(part_sums - sums[:, :, at])  # of the softmax, that these keys have
            result[:, :, at].lerp_(part, share.to(part.dtype)[..., None])
            sums[:, :, at] = torch.logaddexp(sums[:, :, at], part_sums)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.layout, ctx.kind = layout, kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, sums = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        q, k, v = _grouped(query, key, value)
        result, of_result = _by_group(out, kv_heads), _by_group(grad, kv_heads)
        of_query = torch.empty_like(query)
        of_q = _by_group(of_query, kv_heads)
        of_k, of_v = (key.new_empty(len(q), k.shape[2], *key.shape[1::2]).transpose(1, 2) for _ in range(2))

        def parts(at: slice, seen: slice, is_causal: bool, mask: torch.Tensor | None) -> Any:
            return flash(
                of_result[:, :, at], q[:, :, at], k[:, :, seen], v[:, :, seen], result[:, :, at], sums[:, :, at],
                0.0, is_causal, attn_mask=mask, scale=ctx.kind.scale,
            )  # fmt: skip

        own, earlier = pieces(ctx.layout, ctx.kind)
        for start, end in own:
            at = slice(start, end)
            of_q[:, :, at], of_k[:, :, at], of_v[:, :, at] = parts(at, at, True, None)
        for piece in earlier:
            at, seen = slice(*piece.queries), slice(*piece.keys)
            one, two, three = parts(at, seen, False, _mask(piece, query))
            of_q[:, :, at].add_(one)
            of_k[:, :, seen].add_(two)
            of_v[:, :, seen].add_(three)
        # query heads share keys and values
        return of_query, of_k.sum(0, keepdim=True), of_v.sum(0, keepdim=True), None, None


def _grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views (repeats, kv_heads, T, head_dim): the query heads that share a key head lie along the batch."""
    q = _by_group(query, key.shape[1])
    return q, key.expand(len(q), -1, -1, -1), value.expand(len(q), -1, -1, -1)


def _by_group(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(1, heads, T, head_dim) -> a view (heads / kv_heads, kv_heads, T, head_dim)."""
    grouped: torch.Tensor = tensor[0].unflatten(0, (kv_heads, -1))
    return grouped.transpose(0, 1)


def _mask(piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of a piece, in the dtype of the queries; None where all keys are seen."""
    (first, last), (begin, stop) = piece.queries, piece.keys
    before = stop - begin
    if piece.kind.window is None or last - first - 1 + before < piece.kind.window:
        return None
    seen = visible(last - first, before, piece.kind, like.device)[:, :before]
    return like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
