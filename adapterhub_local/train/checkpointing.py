"""What of a forward pass is kept for the backward pass: everything, each block's input, or that in host memory.

`offload` is for long rows on small GPUs: the inputs of checkpointed blocks leave for pinned host memory and come back
before the block is computed again, its MLP a part of the row at a time; input embeddings that are not the head's as
well stay in host memory, for only their rows are read. On the CPU nothing can move, and it is plain checkpointing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from adapterhub_local.base.model import CausalModel, inner_model
from adapterhub_local.rows.bounds import MLP_TOKENS
from adapterhub_local.train.recompute import CHECKPOINT, recompute_blocks

OFFLOAD = "offload"  # train.activation_checkpointing
PIECE = 32 << 20  # bytes: torch gives pinned memory in powers of two, so a tensor whole could take twice its size


def enable_checkpointing(model: CausalModel, wanted: bool | str) -> None:
    """Compute each block again in the backward pass, if that is wanted. model: causal, with or without PEFT."""
    if not wanted:
        return
    is_offloaded = wanted == OFFLOAD and model.device.type == "cuda"
    if is_offloaded:
        move_embeddings(model)  # first: what makes their output require a gradient is hooked to them
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    recompute_blocks(model)
    if is_offloaded:
        move_boundaries(model)
        split_mlps(model)


def move_boundaries(model: CausalModel) -> None:
    """Have checkpointed blocks save their inputs in host memory.

    Nothing else of a block is saved outside the checkpoint, and masks and rotary embeddings, which all blocks share,
    are not inputs in this sense. Copies are on the stream that computes, so nothing is read too early or overwritten;
    that takes a few percent of a step (2 x 8 KB a token and block over the bus for a hidden size of 4096).
    transformers' own `offload=True` fails where there is no GPU, and is not in the oldest version supported here.
    """
    for module in model.modules():
        if plain := getattr(module, CHECKPOINT, None):
            setattr(module, CHECKPOINT, partial(_saving_on_host, plain))


def _saving_on_host(plain: Callable[..., Any], *arguments: Any) -> Any:
    with saved_tensors_hooks(to_host, from_host):
        return plain(*arguments)


@dataclass(frozen=True)
class OnHost:
    """A tensor in host memory, pinned where there is a GPU, in flat pieces of PIECE bytes."""

    device: torch.device
    shape: torch.Size
    pieces: list[torch.Tensor]


def to_host(tensor: torch.Tensor) -> OnHost:
    """Begin to copy a tensor to the host. torch.autograd.graph.save_on_cpu does so too, but whole."""
    pieces = []
    for part in tensor.reshape(-1).split(PIECE // tensor.itemsize):
        piece = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        pieces.append(piece.copy_(part, non_blocking=True))
    return OnHost(tensor.device, tensor.shape, pieces)


def from_host(moved: OnHost) -> torch.Tensor:
    """The tensor where it was."""
    tensor = torch.empty(moved.shape, dtype=moved.pieces[0].dtype, device=moved.device)
    for part, piece in zip(tensor.view(-1).split(PIECE // tensor.itemsize), moved.pieces, strict=True):
        part.copy_(piece, non_blocking=True)
    return tensor


def split_mlps(model: CausalModel, tokens: int = MLP_TOKENS) -> None:
    """Have the MLPs of checkpointed blocks take this many tokens of a row at once, and keep of each part its input.

    An MLP is much wider than the rest of its block: at long rows it takes most of the memory, and little of the time.
    """
    for module in model.modules():
        mlp = getattr(module, "mlp", None)
        if hasattr(module, CHECKPOINT) and isinstance(mlp, nn.Module):
            mlp.forward = partial(_in_parts, mlp.forward, tokens)


def _in_parts(forward: Callable[..., torch.Tensor], tokens: int, states: torch.Tensor) -> torch.Tensor:
    """An MLP on states (batch, T, hidden), computed again in the backward pass where T is more than one part."""
    if states.shape[1] <= tokens:
        return forward(states)
    parts = states.split(tokens, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


def move_embeddings(model: CausalModel) -> None:
    """Keep input embeddings in host memory, unless the head shares them or they do more than look up rows."""
    inner = inner_model(model)
    layer, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    rows = getattr(layer, "token_adapter", None)  # PEFT's, which has the layer and an adapter's own rows of it
    if rows is not None:
        if type(rows.base_layer) is nn.Embedding and not hasattr(head, "token_adapter"):
            rows.base_layer = HostEmbedding(rows.base_layer)
    elif type(layer) is nn.Embedding and (head is None or head.weight is not layer.weight):
        inner.set_input_embeddings(HostEmbedding(layer))


class HostEmbedding(nn.Module):
    """Rows of a frozen table in host memory: ids (...) int64 on any device -> rows (..., hidden) where the table was.

    The table is not a parameter, so the model's device is that of the others, and nothing moves it.
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
