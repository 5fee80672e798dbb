"""MultiLoraLinear: a linear layer of the base that adds to every token the delta of its own adapter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve.lora.product import LoraBatch, add_by_mask, add_by_segment


@dataclass
class LoraContext:
    """The batch being computed, set by the runner before a forward pass and read by all wrapped layers.

    `logits` is the same for the layer that makes logits, which sees only the tokens that need some.
    """

    tokens: LoraBatch | None = None
    logits: LoraBatch | None = None


class MultiLoraLinear(nn.Module):
    """A wrapped `Linear4bit` or `nn.Linear`; without an adapter in the batch it is that layer.

    `a` (ranks, in_features) and `b` (ranks, out_features) are the stacked factors of all slots, or None
    while no adapter has this module. They are buffers of the engine, not of the model's state.
    """

    def __init__(self, base: nn.Linear, context: LoraContext, *, makes_logits: bool = False) -> None:
        super().__init__()
        self.base = base
        self.context = context
        self.makes_logits = makes_logits
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        batch = self.context.logits if self.makes_logits else self.context.tokens
        if batch is None or self.a is None or self.b is None:
            return out
        flat_x = x.reshape(-1, x.shape[-1])[: batch.num_tokens].to(self.a.dtype)
        flat_out = out.view(-1, out.shape[-1])[: batch.num_tokens]
        total = flat_out if out.dtype == self.a.dtype else flat_out.to(self.a.dtype)
        if batch.mask is not None:
            add_by_mask(total, flat_x, self.a, self.b, batch.mask)
        else:
            add_by_segment(total, flat_x, self.a, self.b, batch.segments)
        if total is not flat_out:
            flat_out.copy_(total)
        return out


def wrap_linears(model: Any, context: LoraContext) -> dict[str, MultiLoraLinear]:
    """Replace every linear layer of `model` in place; the wrapped layers by module name."""
    logits_layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wrapped = {}
    for name, module in linears:
        parent_name, _, child = name.rpartition(".")
        wrapped[name] = MultiLoraLinear(module, context, makes_logits=module is logits_layer)
        setattr(model.get_submodule(parent_name), child, wrapped[name])
    return wrapped


def unwrap_linears(model: nn.Module, wrapped: dict[str, MultiLoraLinear]) -> None:
    """Put the base's own layers back."""
    for name, layer in wrapped.items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base)
