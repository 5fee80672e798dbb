"""Adapters on the experts of a mixture: an expert's layers are given a few of the batch's tokens, not all of them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from adapterhub_local.base.experts import Expert, Experts
from adapterhub_local.base.model import Modules

if TYPE_CHECKING:
    from serve.lora.linear import LinearGroup, LoraContext, MultiLoraLinear


def shared_inputs_of_experts(model: Modules) -> list[list[str]]:
    """Names of the gate and the up matrix of every expert, which are given the same tensor."""
    return [
        [f"{name}.{module.family.gate}", f"{name}.{module.family.up}"]
        for name, module in model.named_modules()
        if isinstance(module, Expert)
    ]


def follow_routes(model: Modules, context: "LoraContext", layers: Mapping[str, "MultiLoraLinear"]) -> None:
    """Have `context` say, while an expert of `model` computes, which of its tokens have which adapter.

    `layers` are the model's wrapped linear layers by module name.
    """
    groups: dict[str, set[LinearGroup]] = {}
    for name, layer in layers.items():
        groups.setdefault(name.rpartition(".")[0], set()).add(layer.group)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.visit = _Visit(context, [groups[f"{name}.{number}"] for number in range(len(module))])


class _Visit:
    """What is entered around an expert's work."""

    def __init__(self, context: "LoraContext", groups: list[set["LinearGroup"]]) -> None:
        self.context = context
        self.groups = groups

    def __call__(self, number: int, tokens: torch.Tensor) -> AbstractContextManager[None]:
        if self.context.tokens is None:
            return nullcontext()
        # an adapter that is loaded meanwhile is none of this step's: what it brings must not be asked for its tokens
        batch, groups = self.context.tokens.in_place, self.groups[number]
        own = {each.slot.parts for each in batch.segments if each.slot.parts is not None} if batch is not None else ()
        is_changed = any(group.a or any(parts.get(group) is not None for parts in own) for group in groups)
        return self.context.only(tokens.tolist() if is_changed else ())
