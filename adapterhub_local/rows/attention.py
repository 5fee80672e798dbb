"""Attention over a packed row in transformers' models: each example sees the prefix and itself, and nothing is masked.

Registered with transformers beside what a model uses, so that rows of one example and generation stay with
the model's own attention. A model whose code is not on that interface (Falcon) keeps masks.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adapterhub_local.base.attention import AttentionKind, read_kind
from adapterhub_local.base.model import CausalModel, inner_model
from adapterhub_local.errors import Incompatible
from adapterhub_local.rows.flash import attend_in_pieces
from adapterhub_local.rows.layout import Groups, Layout, visible
from adapterhub_local.rows.varlen import has_packed_kernel, packed_kernel

NAMES = {"sdpa": "qhub_layout_sdpa", "eager": "qhub_layout_eager"}  # what a model used -> its name with ours beside it
Route = Callable[..., torch.Tensor]


def attach(model: CausalModel) -> bool:
    """Let a model take `layout=` in its forward; False where its code is not on transformers' attention interface."""
    inner = inner_model(model)
    used = inner.config._attn_implementation
    if used in NAMES.values():
        return True
    if used not in NAMES or not getattr(inner, "_supports_attention_backend", False):
        return False
    for theirs, name in NAMES.items():
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[theirs])
    inner.set_attn_implementation(NAMES[used])
    return True


def detach(model: CausalModel) -> None:
    """Give a model its own attention back."""
    inner = inner_model(model)
    for theirs, name in NAMES.items():
        if inner.config._attn_implementation == name:
            inner.set_attn_implementation(theirs)


def is_attached(model: CausalModel) -> bool:
    """Whether the model takes `layout=`."""
    return model.config._attn_implementation in NAMES.values()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout | Groups | None = None,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a layer calls: the model's own attention, or with a layout that of the packed row, whatever the mask.

    query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim); the result is (1, T, heads, head_dim).
    Raises Incompatible for a kind of attention that is not computed here.
    """
    if layout is None:
        return _own_attention(module)(module, query, key, value, attention_mask, **given)
    if isinstance(layout, Groups):
        outs = []
        for own, (start, end) in zip(layout.layouts, layout.bounds, strict=True):
            q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
            outs.append(_attention(module, q, k, v, attention_mask, layout=own, **given)[0])
        return torch.cat(outs, dim=1), None
    dropout = given.pop("dropout", 0.0)
    kind, unknown = read_kind(given, query.shape[-1])
    unknown += ["bias"] if kind.bias is not None else []
    if unknown:
        raise Incompatible(f"this model's attention needs {', '.join(unknown)}, which packed rows do not have")
    route = choose_route(query, value, kind, dropout)
    if route is each_alone:
        return each_alone(query, key, value, layout, kind, dropout), None
    return route(query, key, value, layout, kind), None


def _own_attention(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The attention the model would have without ours; eager attention is a function beside the module's class."""
    if module.config._attn_implementation == NAMES["sdpa"]:  # type: ignore[union-attr]
        own: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return own
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


def choose_route(query: torch.Tensor, value: torch.Tensor, kind: AttentionKind, dropout: float) -> Route:
    """The cheapest function that computes this attention on the tensors' device."""
    if not kind.is_fused or dropout or query.shape[-1] != value.shape[-1]:
        return each_alone
    if query.device.type == "cpu":
        return attend_in_pieces
    return packed_kernel if has_packed_kernel(query) else each_alone


def each_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    kind: AttentionKind,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One attention an example, over the prefix's and its own keys: for what no kernel for packed rows computes."""
    kind = kind.within(layout.longest)
    sizes = [end - start for start, end in layout.spans]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outs = []
    for number, span in enumerate(layout.spans):
        own, before = (keys[number], values[number]), layout.before(span)
        if before:
            own = (torch.cat([keys[0], own[0]], dim=2), torch.cat([values[0], own[1]], dim=2))
        mask = visible(sizes[number], before, kind, query.device)
        if not kind.is_fused:
            outs.append(_by_hand(queries[number], *own, mask, kind, dropout))
            continue
        # kernels know by themselves who sees whom where nothing comes before
        how: dict[str, Any] = {"attn_mask": mask} if before or not kind.sees_all else {"is_causal": True}
        repeats = query.shape[1] // key.shape[1]
        if (
            "attn_mask" in how and query.device.type == "cuda"
        ):  # no kernel takes a mask and grouped heads there: without
            own = tuple(each.repeat_interleave(repeats, dim=1) for each in own)  # this all scores would be in memory
            repeats = 1
        how |= {"scale": kind.scale, "dropout_p": dropout, "enable_gqa": repeats > 1}
        out = scaled_dot_product_attention(queries[number], *own, **how)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    kind: AttentionKind,
    dropout: float,
) -> torch.Tensor:
    """What torch has no function for, rounded as Gemma 2 rounds it: (1, n, heads, head_dim)."""
    kv_heads, (heads, count) = key.shape[1], query.shape[1:3]
    # query heads that share a key head become one head with more queries: nothing is repeated in memory
    grouped = query.reshape(1, kv_heads, -1, query.shape[-1])
    scores = kind.scores(grouped @ key.transpose(-1, -2))
    scores = scores.view(1, heads, count, -1).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = drop(kind.weights(scores).to(query.dtype), dropout)
    out = weights.view(1, kv_heads, -1, weights.shape[-1]) @ value
    return out.view(1, heads, count, -1).transpose(1, 2)
