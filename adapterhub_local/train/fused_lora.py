"""A linear layer with LoRA over 4-bit weights as one operation: y = x W^T + s (x A^T) B^T, and its gradients.

PEFT's layer is a chain of operations that keeps a copy of x where dtypes differ, makes several passes over outputs
and gradients to clone, scale and add them, and dequantises W for the backward pass by way of the dtype it was stored
in. Here x is kept once for all layers that read it, sums and scales are the products' own, and W is the one of the
forward pass. On a GPU a step of an 8B model is 450 such products whose kernels are short: what Python does beside them
takes longer than they do, so factors are converted once a step, and the constants of W once a run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from adapterhub_local.base.held import dense
from adapterhub_local.base.model import Modules

FEW_TOKENS = 512  # up to which bitsandbytes may have a product of its own that does not write W to memory
FUSED = "_qhub_fused"  # of a layer: its forward is ours
COPIES = "_qhub_copies"  # of a layer: A and B in the dtype of the activations, while a step lasts
UNREAD = "_qhub_unread"  # of W's layer: nobody reads what the product gives


def fuse(model: Modules) -> int:
    """Have plain LoRA layers over 4-bit weights compute by `LoraProduct`; returns how many.

    Layers with dropout, DoRA or a bias of their own, and whatever is not one active, unmerged adapter, stay PEFT's.
    Nothing of what is saved changes.
    """
    from peft.tuners.lora.bnb import Linear4bit

    count = 0
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and all(_is_plain(layer, name) for name in layer.lora_A):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
            setattr(layer, FUSED, True)
            count += 1
    return count


def _is_plain(layer: Any, name: str) -> bool:
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    return not (dropout or name in layer.lora_variant or layer.lora_bias[name])


def fused_layers(model: Modules) -> list[Any]:
    """The layers of a model that compute by `LoraProduct`."""
    return [layer for layer in model.modules() if getattr(layer, FUSED, False)]


@contextmanager
def converted(layers: Sequence[Any], dtype: torch.dtype) -> Iterator[None]:
    """While the block lasts these fused layers use A and B as they are now, in `dtype`: nothing may change them in it.

    On a GPU all are converted by one launch.
    """
    pairs = [(one.lora_A[name].weight, one.lora_B[name].weight) for one in layers for name in one.active_adapters[:1]]
    given = [factor.detach() for pair in pairs for factor in pair if factor.dtype != dtype]
    if len(given) != 2 * len(layers) or not given:
        yield
        return
    copies = [torch.empty_like(factor, dtype=dtype) for factor in given]
    torch._foreach_copy_(copies, given)
    for layer, A, B in zip(layers, copies[::2], copies[1::2], strict=True):
        setattr(layer, COPIES, (A, B))
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, COPIES, None)


@contextmanager
def unread(layer: Any) -> Iterator[None]:
    """While the block lasts nobody reads what this layer of W gives (if any): it takes its place in the graph alone."""
    if layer is not None:
        setattr(layer, UNREAD, True)
    try:
        yield
    finally:
        if layer is not None:
            setattr(layer, UNREAD, False)


def _forward(
    layer: Any, peft_forward: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any, **kwargs: Any
) -> Any:
    names = layer.active_adapters
    is_usual = len(names) == 1 and names[0] in layer.lora_A and not (layer.disable_adapters or layer.merged)
    if not is_usual or others or kwargs or torch.is_autocast_enabled(x.device.type):
        return peft_forward(x, *others, **kwargs)
    A, B = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    copies = getattr(layer, COPIES, None)
    if copies is not None and copies[0].dtype != x.dtype:
        copies = None
    apply: Callable[..., torch.Tensor] = LoraProduct.apply
    return apply(x, A, B, copies, layer.scaling[names[0]], layer.base_layer)


class LoraProduct(torch.autograd.Function):
    """y (..., out) of x (..., in), A (r, in), B (out, r), copies of both in the dtype of x, s, and W's layer.

    Computed in the dtype of x, to which A and B are converted without copies; gradients are given in the dtypes of A
    and B. W and its layer's bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, copies: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float, layer: Any,
    ) -> torch.Tensor:  # fmt: skip
        kept = copies or (A, B)
        A16, B16 = (factor.to(x.dtype) for factor in kept)
        rows = x.reshape(-1, x.shape[-1])
        is_dense = x.is_cuda and rows.shape[0] > FEW_TOKENS
        low = _scaled(rows, A16.T, scaling)
        if getattr(layer, UNREAD, False):
            y = x.new_empty(*x.shape[:-1], layer.out_features)
        else:
            # new, so that it can be added to
            y = linear(x, dequantised(layer, x.dtype), layer.bias) if is_dense else layer(x)
            y.view(-1, y.shape[-1]).addmm_(low, B16.T)
        ctx.save_for_backward(x, low, *kept)
        ctx.scaling, ctx.layer, ctx.dtypes = scaling, layer, (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, *kept = ctx.saved_tensors
        A16, B16 = (factor.to(x.dtype) for factor in kept)
        grad_y, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_low = _scaled(grad_y, B16, ctx.scaling)
        grad_A = _product(grad_low.T, rows, ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        grad_B = _product(grad_y.T, low, ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ dequantised(ctx.layer, x.dtype)).addmm_(grad_low, A16).view_as(x)
        return grad_x, grad_A, grad_B, None, None, None


def _scaled(one: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * (one @ other), without a pass of its own for the scaling."""
    unread = one.new_empty((one.shape[0], other.shape[1]))
    return torch.addmm(unread, one, other, beta=0, alpha=scaling)


def _product(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """one @ other in `dtype`; on a GPU not rounded to 16 bits on the way to 32."""
    if one.is_cuda and dtype == torch.float32 != one.dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


def dequantised(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a bitsandbytes layer, at once in this dtype: what its forward pass multiplies with."""
    return dense(layer.weight, dtype)
