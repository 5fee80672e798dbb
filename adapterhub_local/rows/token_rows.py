"""Rows of embeddings that an adapter has of its own (PEFT's trainable tokens), computed without copying the others.

PEFT makes a copy of the whole matrix with these rows in it in every forward pass, and a gradient of the whole matrix in
every backward pass: for a vocabulary of 128,000 tokens of 4,096 numbers, a gigabyte each. Here only the tokens that
have such rows are looked up in them, and only their logits are computed again; the numbers are the same.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import embedding

from adapterhub_local.base.model import CausalModel


def use_token_rows(model: CausalModel) -> int:
    """Have PEFT's layers of trainable tokens compute so; returns how many. Nothing of what is saved changes."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    count = 0
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
            count += 1
    return count


def _forward(layer: Any, peft_forward: Any, x: torch.Tensor, *others: Any, **kwargs: Any) -> torch.Tensor:
    names, base = layer.active_adapters, layer.base_layer
    is_usual = len(names) == 1 and names[0] in layer.trainable_tokens_delta
    if not is_usual or layer.disable_adapters or layer.merged or others or kwargs:
        given: torch.Tensor = peft_forward(x, *others, **kwargs)
        return given
    rows = layer.trainable_tokens_delta[names[0]]
    ids, order = torch.tensor(layer.token_indices[names[0]]).sort()
    ids, order = ids.to(x.device, non_blocking=True), order.to(x.device, non_blocking=True)
    if isinstance(base, torch.nn.Linear):
        return _logits(base, x, ids, rows[order])
    return _vectors(base, x, ids, rows[order])


def _vectors(base: Any, tokens: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The vectors (..., hidden) of tokens (...), those of `ids` (n,), which ascend, from `rows` (n, hidden)."""
    vectors: torch.Tensor = base(tokens)
    rows = rows.to(vectors)
    scale = getattr(base, "embed_scale", None)  # of Gemma 3, whose layer multiplies what it looks up
    if scale is not None:
        rows = rows * torch.as_tensor(scale).to(vectors)
    places = torch.searchsorted(ids, tokens.contiguous()).clamp_(max=len(ids) - 1)
    return torch.where((ids[places] == tokens)[..., None], embedding(places, rows), vectors)


def _logits(base: torch.nn.Linear, states: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The logits (..., vocabulary) of states (..., hidden), those of `ids` (n,) with `rows` (n, hidden)."""
    logits: torch.Tensor = base(states)
    # in place: nothing that the head's product needs for its gradient is in its output
    return logits.index_copy_(-1, ids, states @ rows.to(states).T)
