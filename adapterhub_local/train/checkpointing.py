"""What of a forward pass is kept for the backward pass: everything, each block's input, or that in host memory.

`offload` is for long rows on small GPUs: the inputs of checkpointed blocks leave for pinned host memory and come back
before the block is computed again; input embeddings that are not the head's as well stay in host memory, for only
their rows are read. On the CPU there is nothing to move, and it is plain checkpointing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.functional import embedding

OFFLOAD = "offload"  # train.activation_checkpointing


def enable_checkpointing(model: Any, wanted: bool | str) -> None:
    """Compute each block again in the backward pass, if that is wanted. model: causal, with or without PEFT."""
    if not wanted:
        return
    is_offloaded = wanted == OFFLOAD and model.device.type == "cuda"
    if is_offloaded:
        move_embeddings(model)  # first: what makes their output require a gradient is hooked to them
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if is_offloaded:
        move_boundaries(model)


def move_boundaries(model: Any) -> None:
    """Have checkpointed blocks save their inputs in host memory.

    Nothing else of a block is saved outside the checkpoint, and masks and rotary embeddings, which all blocks share,
    are no inputs in this sense. Copies wait for nothing but the stream they are on, so none can be read too early; that
    takes a few percent of a step (2 x 8 KB a token and block over the bus for a hidden size of 4096). transformers'
    own `offload=True` is the same, but fails where there is no GPU and is not in the oldest version supported here.
    """
    for module in model.modules():
        if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = partial(_saving_on_host, checkpoint)


def _saving_on_host(checkpoint: Callable[..., Any], *arguments: Any) -> Any:
    with save_on_cpu(pin_memory=True):  # pinned where there is a GPU
        return checkpoint(*arguments)


def move_embeddings(model: Any) -> None:
    """Keep input embeddings in host memory, unless the head shares them or they do more than look up rows."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if type(layer) is nn.Embedding and (head is None or head.weight is not layer.weight):
        inner.set_input_embeddings(HostEmbedding(layer))


class HostEmbedding(nn.Module):
    """Rows of a frozen table in host memory: ids (...) int64 on any device -> rows (..., hidden) where the table was.

    The table is no parameter, so the model's device is that of the others, and nothing moves it.
    """

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.device = layer.weight.device
        self.weight = layer.weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = embedding(ids.cpu(), self.weight)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)
