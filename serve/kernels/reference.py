"""What the kernels compute, in plain torch: what each is checked against, here and when a server starts."""

from collections.abc import Sequence

import torch

from adapterhub_local.base.attention import AttentionKind
from serve.kernels.part import Part

TILE = 16  # the most tokens of a tile: what one product of a tensor core takes


def add_lora(
    outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: Sequence[torch.Tensor | None],
    tiles: torch.Tensor,
) -> None:
    """out[token] += x[token] @ A_slot @ B_slot in place, for the tokens of each tile.

    outs (tokens, out_features) and bs (slots, rank, out_features) of each layer that is given x, b with the scaling in
    it, None for a layer that no adapter of this rank changes; x (tokens, in_features); a (slots, in_features,
    layers * rank); tiles (n, 3) int32: first token, number of tokens, slot; a tile without tokens or with slot -1 adds
    nothing.
    """
    for start, count, slot in tiles.tolist():
        if count == 0 or slot < 0:
            continue
        tokens = slice(start, start + count)
        inner = x[tokens] @ a[slot]
        for out, b, part in zip(outs, bs, inner.chunk(len(outs), dim=-1), strict=True):
            if b is not None:
                out[tokens] += part @ b[slot]


def add_parts(outs: Sequence[torch.Tensor], x: torch.Tensor, parts: Sequence[Part | None], tiles: torch.Tensor) -> None:
    """The same with one part an adapter instead of stacks: tiles (n, 3) int32 name first token, number of tokens, and
    which of `parts`, None for an adapter that changes none of these layers. Scales of DoRA are left to the caller."""
    for start, count, number in tiles.tolist():
        part = parts[number] if count and number >= 0 else None
        if part is not None:
            part.add([out[start : start + count] for out in outs], x[start : start + count])


def multiply(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out_features: int
) -> torch.Tensor:
    """x (tokens, in_features) @ W^T: (tokens, out_features), like x.

    `packed` is W as bitsandbytes holds it, two weights a byte, the first in its high half; `absmax` (blocks,) of 64
    weights and `code` (16,), what 4 bits stand for, are float32.
    """
    both = packed.flatten().int()
    weight = code[torch.stack([both >> 4, both & 15], dim=1)].view(-1, 64) * absmax[:, None]
    return x @ weight.view(out_features, -1).to(x.dtype).T


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    kind: AttentionKind,
) -> torch.Tensor:
    """Attention of one token a row, the last of the row's places, as `kind` says; a bias is not computed.

    query (n, heads, head_dim); keys and values (pages, kv_heads, page, head_dim); tables (n, max_pages) int32, the
    pages of each row in order; lengths (n,) int32, the places of each row, its own token included. The result is
    (n, heads, head_dim), zeros for a row of length 0.
    """
    num_rows, heads, _ = query.shape
    kv_heads, page = keys.shape[1:3]
    places = torch.arange(tables.shape[1] * page, device=query.device)
    visible = kind.sees(lengths[:, None] - 1, places)
    pages = torch.where(visible.unflatten(1, (-1, page)).any(-1), tables, 0).long()

    def gathered(cache: torch.Tensor) -> torch.Tensor:  # (n, kv_heads, places, head_dim), what is not visible zero
        rows = cache[pages].transpose(1, 2).flatten(2, 3)
        return torch.where(visible[:, None, :, None], rows, 0).float()

    grouped = query.float().view(num_rows, kv_heads, heads // kv_heads, -1)
    scores = kind.scores(grouped @ gathered(keys).transpose(-1, -2))
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    by_head = scores.view(num_rows, heads, 1, scores.shape[-1])
    weights = kind.weights(by_head).nan_to_num(0.0).view(scores.shape) if num_rows else scores
    return (weights @ gathered(values)).view(num_rows, heads, -1).to(query.dtype)


def add_norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x, in place, if there is an x; then RMSNorm(residual) * weight, rounded as transformers rounds.

    x, residual and the result (tokens, size), weight (size,).
    """
    if x is not None:
        residual += x
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(residual.dtype)


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
    """Rotate queries in place; rotate keys and write them, and values, to their pages.

    q (tokens, heads, dim), k and v (tokens, kv_heads, dim); `angles` are cosines and sines (tokens, dim); `norms` the
    weights (dim,) of an RMSNorm of each query's and key's head before that, None if there are none; `cache` keys and
    values (pages, kv_heads, page, dim); `places` which page (tokens,) and which place in it each token has, int64.
    """
    cos, sin = (each[:, None].float() for each in angles)

    def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            wide = (weight * (wide * scale).to(x.dtype)).to(x.dtype).float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    of_queries, of_keys = norms or (None, None)
    pages, offsets = places
    cache[0][pages, :, offsets] = rotated(k, of_keys)
    cache[1][pages, :, offsets] = v
    q.copy_(rotated(q, of_queries))


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up, all (tokens, size)."""
    return torch.nn.functional.silu(gate) * up
