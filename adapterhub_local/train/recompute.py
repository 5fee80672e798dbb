"""A block that keeps of its forward pass its inputs alone, and is computed again in the backward pass.

torch.utils.checkpoint does so too, with hooks in Python around every tensor that the block saves: on a GPU a block of
an 8B model is computed before they have run. Here the block is one operation of the graph, with a graph of its own that
is made and used up in its backward pass. Gradients are the same to the bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from adapterhub_local.base.model import CausalModel
from adapterhub_local.train.fused_lora import LoraProduct, unread

CHECKPOINT = "_gradient_checkpointing_func"  # of a block for which transformers' checkpointing is enabled
Run = Callable[..., Any]


def recompute_blocks(model: CausalModel) -> bool:
    """Have the blocks for which transformers' checkpointing is enabled compute by `Recomputed`, if that is the same.

    Returns whether it is: a forward pass that draws random numbers stays torch's, which draws them anew alike.
    """
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or draws(model.config):
        return False
    for module in model.modules():
        if plain := getattr(module, CHECKPOINT, None):
            setattr(module, CHECKPOINT, Block(plain))
    return True


def draws(config: Any) -> bool:
    """Whether a model of this configuration draws random numbers while it trains."""
    given = config.get_text_config().to_dict()
    rates = [value for key, value in given.items() if "drop" in key or "jitter" in key]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


class Block:
    """What calls a block, in place of `plain`, torch's checkpoint: block(run, *inputs) -> outputs of run(*inputs)."""

    def __init__(self, plain: Run) -> None:
        self.plain = plain
        self.last: Any = ...  # the layer whose output the backward pass does not read, once that is known

    def __call__(self, run: Any, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*inputs)
        if any(isinstance(each, torch.Tensor) and torch.is_autocast_enabled(each.device.type) for each in inputs):
            return self.plain(run, *inputs)  # which computes again in the same dtypes
        named = getattr(run, "keywords", {}).values()
        if not any(needs_gradient(each) for each in inputs) or any(needs_gradient(each) for each in named):
            return self.plain(run, *inputs)  # no gradient would reach the block, or one would not leave it
        apply: Run = Recomputed.apply
        return apply(self, run, *inputs)


def needs_gradient(value: Any) -> bool:
    """Whether a value is or holds a tensor that requires a gradient."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return isinstance(value, tuple | list) and any(needs_gradient(each) for each in value)


class Recomputed(torch.autograd.Function):
    """Outputs of run(*inputs), of which only the inputs are kept; parameters get their gradients as leaves do."""

    @staticmethod
    def forward(ctx: Any, block: Block, run: Run, *inputs: Any) -> Any:
        ctx.block, ctx.run = block, run
        ctx.is_tensor = [isinstance(each, torch.Tensor) for each in inputs]
        ctx.others = [None if isinstance(each, torch.Tensor) else each for each in inputs]
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, torch.Tensor)))
        return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved, inputs = iter(ctx.saved_tensors), []
        for place, is_tensor in enumerate(ctx.is_tensor):
            needs = ctx.needs_input_grad[2 + place]
            inputs.append(next(saved).detach().requires_grad_(needs) if is_tensor else ctx.others[place])
        block = ctx.block
        with torch.enable_grad(), unread(block.last if block.last is not ... else None):
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if block.last is ...:
            block.last = last_product(outputs)
        given = {
            output: grad
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and isinstance(output, torch.Tensor) and output.requires_grad
        }
        if given:
            torch.autograd.backward(list(given), list(given.values()))
        return None, None, *(each.grad if isinstance(each, torch.Tensor) else None for each in inputs)


def last_product(outputs: tuple[Any, ...]) -> Any:
    """The layer whose product is a term of the only output, a sum, and is read by nothing else; None without one.

    A sum keeps none of its terms, so the value of such a product is of no use to the backward pass.
    """
    if len(outputs) != 1:
        return None
    end = outputs[0].grad_fn
    if end is None or end.name() != "AddBackward0":
        return None
    ends = [node for node, _ in end.next_functions if getattr(node, "_forward_cls", None) is LoraProduct]
    readers = dict.fromkeys(ends, 0)
    for node in nodes(end):
        for read, _ in node.next_functions:
            if read in readers:
                readers[read] += 1
    found = [node.layer for node in ends if readers[node] == 1]
    return found[0] if len(found) == 1 else None


def nodes(end: Any) -> Iterator[Any]:
    """All operations of the graph that ends here, once each."""
    seen, left = {end}, [end]
    while left:
        node = left.pop()
        yield node
        for read, _ in node.next_functions:
            if read is not None and read not in seen:
                seen.add(read)
                left.append(read)
