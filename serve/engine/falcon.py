"""Falcon's attention over a packed batch: its own module knows nothing of transformers' attention interface.

Source of the computation: `FalconAttention.forward` in transformers 5; keys and values are not repeated for each query
head here, and ALiBi (https://arxiv.org/abs/2108.12409) is added as the model adds it, rounded to bfloat16 first.
"""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb, build_alibi_tensor

from adapterhub_local.base.model import BaseModel
from serve.engine.attention import packed_attention
from serve.engine.packed import PackedBatch


def replace_attention(model: BaseModel) -> Callable[[], None]:
    """Let Falcon's attention layers use the packed batch that is given to the model's forward; how to undo it.

    Other architectures are left as they are: they hand the batch on by themselves.
    """
    layers = [module for module in model.modules() if isinstance(module, FalconAttention)]
    if not layers:
        return lambda: None
    held: list[PackedBatch] = []  # of the forward pass that runs

    def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        held[:] = [kwargs.pop("packed")]
        return args, kwargs

    hook = model.register_forward_pre_hook(take, with_kwargs=True)
    for layer in layers:
        layer.__dict__["forward"] = MethodType(_forward_with(held), layer)

    def undo() -> None:
        hook.remove()
        for layer in layers:
            del layer.__dict__["forward"]

    return undo


def _forward_with(held: list[PackedBatch]) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        attention: Any,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            each.transpose(1, 2) for each in _heads(attention, attention.query_key_value(hidden_states))
        )
        if alibi is None:
            cos, sin = position_embeddings or (None, None)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        out, _ = packed_attention(
            attention,
            query,
            key,
            value,
            None,  # not `attention_mask`, which takes the packed row for one sequence
            packed=held[0],
            scaling=attention.inv_norm_factor,
            bias=None if alibi is None else _alibi,
        )
        return attention.dense(out.flatten(2)), None

    return forward


def _heads(attention: Any, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value (1, tokens, heads or kv_heads, head_dim) out of the fused projection's three layouts."""
    head_dim, heads = attention.head_dim, attention.num_heads
    if attention.new_decoder_architecture:
        groups = fused.unflatten(-1, (attention.num_kv_heads, heads // attention.num_kv_heads + 2, head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    if attention.multi_query:
        rows = fused.unflatten(-1, (heads + 2, head_dim))
        return rows[..., :-2, :], rows[..., -2:-1, :], rows[..., -1:, :]
    rows = fused.unflatten(-1, (heads, 3, head_dim))
    return rows[..., 0, :], rows[..., 1, :], rows[..., 2, :]


def _alibi(heads: int, places: int, like: torch.Tensor) -> torch.Tensor:
    """(heads, places): what is added to the scaled scores of every query."""
    mask = torch.ones(1, places, dtype=torch.int64, device=like.device)
    return build_alibi_tensor(mask, heads, like.dtype)[:, 0] / math.sqrt(like.shape[-1])
