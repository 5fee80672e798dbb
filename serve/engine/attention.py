"""Attention over a packed batch: one row [1, tokens] that holds the tokens of many requests.

Registered with transformers under NAME; a model set to it hands every layer's query, key and value to
`packed_attention`, together with the `PackedBatch` that was given to its forward as `packed`.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from adapterhub_local.base.attention import AttentionKind, read_kind
from adapterhub_local.errors import Incompatible
from serve.engine.packed import Group, PackedBatch

NAME = "qhub"


class Numbered(Protocol):
    """The attention of a layer, which knows its number."""

    @property
    def layer_idx(self) -> int | None: ...


def packed_attention(
    module: Numbered,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What a layer of transformers calls: `attend` as the layer asked for when it was first called.

    Raises Incompatible for a kind of attention that is not computed here.
    """
    index = module.layer_idx
    assert isinstance(index, int)
    kind = packed.kinds.get(index)
    if kind is None or attention_mask is not None:
        kind = packed.kinds[index] = _kind(given, attention_mask, query.shape[-1])
    return attend(index, kind, query, key, value, packed), None


def _kind(given: dict[str, Any], mask: torch.Tensor | None, head_dim: int) -> AttentionKind:
    dropout = given.pop("dropout", 0.0)
    kind, unknown = read_kind(given, head_dim)
    if unknown or mask is not None or dropout:
        raise Incompatible(f"this model's attention needs {', '.join(unknown) or 'a mask of its own'}, not supported")
    return kind


def attend(
    layer: int,
    kind: AttentionKind,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedBatch,
    *,
    is_written: bool = False,
) -> torch.Tensor:
    """Write keys and values of a layer into their pages, unless that `is_written`, then attend to them.

    query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim); the result is
    (1, tokens, heads, head_dim).
    """
    if is_written:
        keys, values = packed.cache.pair(layer, key.shape[1], key.shape[3], like=key)
    else:
        keys, values = packed.cache.write(layer, packed.pages, packed.offsets, key[0], value[0])
    _, heads, num_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    repeats = heads // kv_heads
    # query heads that share a key head become one head with more queries: nothing is repeated in memory
    grouped = query[0].view(kv_heads, repeats, num_tokens, head_dim)
    out = query.new_empty(num_tokens, kv_heads, repeats, values.shape[-1])
    added = None
    if kind.bias is not None:  # (kv_heads, repeats, places) up to the longest row
        added = kind.bias(heads, packed.num_places, query).view(kv_heads, repeats, -1)

    def attend_together(queries: torch.Tensor, group: Group, spread: int) -> torch.Tensor:
        mask = packed.mask(group, query.dtype, kind, repeats)
        if added is not None:
            mask = mask + added[:, :, None, : mask.shape[-1]].expand(-1, -1, spread, -1).flatten(1, 2)
        read = packed.read(layer, group, (key[0], value[0]))
        return _attend(queries, read[0], read[1], mask, kind, heads)

    # every row that has one token, or few
    in_place = packed.kernels is not None and kind.has_kernels and values.shape[-1] == head_dim
    if packed.kernels is not None and in_place and packed.decode is not None:
        rows = packed.decode
        queries = query[0].transpose(0, 1)
        result = packed.kernels.paged_attention(
            queries if rows.tokens is None else queries[rows.tokens], keys, values, rows.tables, rows.lengths, kind
        )
        if rows.tokens is None:
            return result[None]
        out[rows.tokens] = result.view(-1, kv_heads, repeats, head_dim)
    for group, tokens in () if in_place else packed.decode_groups:
        out[tokens] = attend_together(grouped[:, :, tokens].permute(2, 0, 1, 3), group, 1)
    for group in packed.prefills(in_place=in_place):
        row = group.rows[0]
        count = row.end - row.start
        queries = grouped[:, :, row.start : row.end].reshape(1, kv_heads, repeats * count, head_dim)
        result = attend_together(queries, group, count)
        out[row.start : row.end] = result[0].view(kv_heads, repeats, count, -1).permute(2, 0, 1, 3)
    return out.view(1, num_tokens, heads, -1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    kind: AttentionKind,
    heads: int,
) -> torch.Tensor:
    """Attention with a mask to add; tensors (rows, kv_heads, queries or places, head_dim), those of query heads that
    share a key head behind one another."""
    if kind.is_fused:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=kind.scale)
    scores = kind.scores(query @ keys.transpose(-1, -2)) + mask
    weights = kind.weights(scores.view(len(scores), heads, -1, scores.shape[-1])).view(scores.shape)
    return weights.to(values.dtype) @ values


def register() -> None:
    """Make NAME known to transformers. Its masks are left out: positions in the batch say all."""
    AttentionInterface.register(NAME, packed_attention)
