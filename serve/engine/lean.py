"""A decoder of Llama's kind over a packed batch in few launches: its own layers' products, and kernels between them.

transformers' code spends 48 of 55 operations a layer on norms, rotary embeddings, residuals and the cache, each of
which costs a GPU as much as a small product. It is used only after it gave the logits that the model itself gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from serve.engine.attention import attend
from serve.engine.llama import Attention, RmsNorm, head_norms, llama
from serve.kernels.choose import Kernels

NEEDED = ("add_norm", "rotate_and_write", "silu_multiply")


@dataclass(frozen=True)
class Norm:
    """The weight (size,) of an RMSNorm and what it adds below the root."""

    weight: torch.Tensor
    eps: float


class LeanForward:
    """`model` as a function of a batch, by `kernels`; `kinds`: what each layer's attention does.

    Raises Incompatible, with the reason, if the model is not of a kind that is computed here.
    """

    def __init__(self, model: BaseModel, kernels: Kernels, kinds: Sequence[AttentionKind]) -> None:
        model = llama(model)
        if missing := [name for name in NEEDED if not kernels.has(name)]:
            raise Incompatible(f"there is no kernel {', '.join(missing)}")
        self.model = model
        self.kernels = kernels
        self.kinds = kinds
        self.layers = list(model.model.layers)
        self.norms = [(_norm(each.input_layernorm), _norm(each.post_attention_layernorm)) for each in self.layers]
        self.last = _norm(model.model.norm)
        of_heads = [head_norms(each.self_attn) for each in self.layers]
        self.of_heads = [None if pair is None else (_norm(pair[0]), _norm(pair[1])) for pair in of_heads]
        size = self.layers[0].self_attn.head_dim
        angles = self._angles(torch.zeros(1, 1, dtype=torch.int64, device=model.model.embed_tokens.weight.device))
        if angles[0].shape[-1] != size or size % 2:
            raise Incompatible("only a part of its heads is rotated")

    def __call__(self, tokens: torch.Tensor, packed: Any, places: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (n, vocabulary) of tokens (tokens,) at `places` (n,), None: of all."""
        decoder, kernels = self.model.model, self.kernels
        residual = decoder.embed_tokens(tokens)
        angles = self._angles(packed.positions[None])
        x: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            before, behind = self.norms[number]
            hidden = kernels.add_norm(x, residual, before.weight, before.eps)
            attended = self._attend(number, layer.self_attn, hidden, angles, packed)
            hidden = kernels.add_norm(attended, residual, behind.weight, behind.eps)
            gate, up = (each(hidden) for each in (layer.mlp.gate_proj, layer.mlp.up_proj))
            x = layer.mlp.down_proj(kernels.silu_multiply(gate, up))
        hidden = kernels.add_norm(x, residual, self.last.weight, self.last.eps)
        head = self.model.get_output_embeddings()
        return head(hidden if places is None else hidden[places])

    def _attend(
        self,
        number: int,
        attention: Attention,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        packed: Any,
    ) -> torch.Tensor:
        """What the layer's attention adds (tokens, hidden size)."""
        size = attention.head_dim
        q, k, v = (
            each(hidden).unflatten(-1, (-1, size)) for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        norms = self.of_heads[number]
        weights, eps = (None, 0.0) if norms is None else ((norms[0].weight, norms[1].weight), norms[0].eps)
        cache = packed.cache.pair(number, *k.shape[1:], like=k)
        self.kernels.rotate_and_write(q, k, v, angles, weights, eps, cache, (packed.pages, packed.offsets))
        query, key, value = (each.transpose(0, 1)[None] for each in (q, k, v))
        out = attend(number, self.kinds[number], query, key, value, packed, is_written=True)
        return attention.o_proj(out[0].flatten(1))

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (tokens, head_dim) in the model's dtype, of positions (1, tokens)."""
        like = self.model.model.embed_tokens.weight
        cos, sin = self.model.model.rotary_emb(like, positions)
        return cos[0].contiguous(), sin[0].contiguous()


def _norm(norm: RmsNorm) -> Norm:
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        raise Incompatible(f"its norms are {type(norm).__name__}")
    return Norm(norm.weight.detach().contiguous(), float(norm.variance_epsilon))
