"""Attention over a packed batch: one row [1, tokens] that holds the tokens of many requests.

Registered with transformers under NAME; a model set to it hands every layer's query, key and value to
`packed_attention`, together with the `PackedBatch` that was given to its forward as `packed`.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from adapterhub_local.errors import Incompatible
from serve.engine.packed import Group, PackedBatch

NAME = "qhub"
# What models pass along that has no bearing on packed causal attention.
_HARMLESS = frozenset(
    (
        "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "output_router_logits",
    )
)  # fmt: skip


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None,
    dropout: float = 0.0,
    is_written: bool = False,
    **extra: object,
) -> tuple[torch.Tensor, None]:
    """Write keys and values into their pages, unless that `is_written`, then attend to them.

    `bias(heads, places, query)` (heads, places), if given, is added to the scores of every token.
    query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim); the result is
    (1, tokens, heads, head_dim). Raises Incompatible for a kind of attention that is not computed here.
    """
    unknown = [name for name, given in extra.items() if given is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None or dropout:
        raise Incompatible(f"this model's attention needs {', '.join(unknown) or 'a mask of its own'}, not supported")
    index = module.layer_idx
    assert isinstance(index, int)
    if packed.watch is not None:
        packed.watch(index, sliding_window)
    if is_written:
        keys, values = packed.cache.pair(index, key.shape[1], key.shape[3], like=key)
    else:
        keys, values = packed.cache.write(index, packed.pages, packed.offsets, key[0], value[0])
    _, heads, num_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    repeats = heads // kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    # query heads that share a key head become one head with more queries: nothing is repeated in memory
    grouped = query[0].view(kv_heads, repeats, num_tokens, head_dim)
    out = query.new_empty(num_tokens, kv_heads, repeats, values.shape[-1])
    added = None
    if bias is not None:  # (kv_heads, repeats, places) up to the longest row
        added = bias(heads, packed.num_places, query).view(kv_heads, repeats, -1)

    def attend(queries: torch.Tensor, group: Group, spread: int) -> torch.Tensor:
        mask = packed.mask(group, query.dtype, sliding_window, repeats)
        if added is not None:
            mask = mask + added[:, :, None, : mask.shape[-1]].expand(-1, -1, spread, -1).flatten(1, 2)
        read = packed.read(index, group, (key[0], value[0]))
        return _attend(queries, read[0], read[1], mask, scale, softcap)

    # every row that has one token, or few
    in_place = packed.kernels is not None and added is None and values.shape[-1] == head_dim
    if packed.kernels is not None and in_place and packed.decode is not None:
        rows = packed.decode
        queries = query[0].transpose(0, 1)
        result = packed.kernels.paged_attention(
            queries if rows.tokens is None else queries[rows.tokens], keys, values, rows.tables, rows.lengths,
            scale=scale, window=sliding_window, softcap=softcap,
        )  # fmt: skip
        if rows.tokens is None:
            return result[None], None
        out[rows.tokens] = result.view(-1, kv_heads, repeats, head_dim)
    for group, tokens in () if in_place else packed.decode_groups:
        out[tokens] = attend(grouped[:, :, tokens].permute(2, 0, 1, 3), group, 1)
    for group in packed.prefills(in_place=in_place):
        row = group.rows[0]
        count = row.end - row.start
        queries = grouped[:, :, row.start : row.end].reshape(1, kv_heads, repeats * count, head_dim)
        result = attend(queries, group, count)
        out[row.start : row.end] = result[0].view(kv_heads, repeats, count, -1).permute(2, 0, 1, 3)
    return out.view(1, num_tokens, heads, -1), None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(scale * query @ keys^T) + mask) @ values; tensors (rows, kv_heads, queries or places, head_dim)."""
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(scale * (query @ keys.transpose(-1, -2)) / softcap) + mask
    return torch.softmax(scores.float(), dim=-1).to(values.dtype) @ values


def register() -> None:
    """Make NAME known to transformers. Its masks are left out: positions in the batch say all."""
    AttentionInterface.register(NAME, packed_attention)
