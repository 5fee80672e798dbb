"""Models of Llama's kind, as transformers builds them: what is read of one that is computed by code of our own."""

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch

from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from serve.lora.linear import MultiLoraLinear

KINDS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class RmsNorm(Protocol):
    """An RMSNorm: its weight (size,), and what it adds below the root."""

    weight: torch.Tensor
    variance_epsilon: float


class Attention(Protocol):
    """The attention of a layer."""

    q_proj: MultiLoraLinear
    k_proj: MultiLoraLinear
    v_proj: MultiLoraLinear
    o_proj: MultiLoraLinear
    head_dim: int
    scaling: float
    layer_idx: int


class Mlp(Protocol):
    """down(silu(gate(x)) * up(x))."""

    gate_proj: MultiLoraLinear
    up_proj: MultiLoraLinear
    down_proj: MultiLoraLinear


class DecoderLayer(Protocol):
    """x + attention(norm(x)), and of that y + mlp(norm(y))."""

    input_layernorm: RmsNorm
    self_attn: Attention
    post_attention_layernorm: RmsNorm
    mlp: Mlp


class Rotary(Protocol):
    """Cosines and sines (1, tokens, head_dim) of positions (1, tokens), in the dtype of `x`."""

    rope_type: str

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Body(Protocol):
    """All below the head."""

    embed_tokens: torch.nn.Embedding
    layers: Sequence[DecoderLayer]
    norm: RmsNorm
    rotary_emb: Rotary


class Llama(BaseModel, Protocol):
    """A model of Llama's kind whose linear layers are wrapped, the head too."""

    model: Body

    def get_output_embeddings(self) -> MultiLoraLinear: ...


def llama(model: BaseModel) -> Llama:
    """The model, if it is of Llama's kind. Raises Incompatible, with the reason."""
    if not _is_llama(model):
        activation = getattr(model.config, "hidden_act", "?")
        raise Incompatible(f"{type(model).__name__} with {activation} is not of a kind that it computes")
    return model


def head_norms(attention: Attention) -> tuple[RmsNorm, RmsNorm] | None:
    """The norms of its queries and of its keys, which Qwen 3 has."""
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return None if query is None or key is None else (query, key)


def _is_llama(model: BaseModel) -> TypeGuard[Llama]:
    return type(model).__name__ in KINDS and model.config.hidden_act == "silu"
