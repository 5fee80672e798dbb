"""A linear layer with LoRA over 4-bit weights as one operation: y = x W^T + s (x A^T) B^T, and its gradients.

PEFT's layer is a chain of operations that keeps a copy of x where dtypes differ, makes several passes over outputs
and gradients to clone, scale and add them, and dequantises W for the backward pass by way of the dtype it was stored
in. Here x is kept once for all layers that read it, sums are the products' own, and W is the one of the forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adapterhub_local.base.held import dense


def fuse(model: Any) -> int:
    """Have plain LoRA layers over 4-bit weights compute by `LoraProduct`; returns how many.

    Layers with dropout, DoRA or a bias of their own, and whatever is not one active, unmerged adapter, stay PEFT's.
    Nothing of what is saved changes.
    """
    from peft.tuners.lora.bnb import Linear4bit

    count = 0
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and all(_is_plain(layer, name) for name in layer.lora_A):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any, name: str) -> bool:
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    return not (dropout or name in layer.lora_variant or layer.lora_bias[name])


def _forward(
    layer: Any, peft_forward: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any, **kwargs: Any
) -> Any:
    names = layer.active_adapters
    is_usual = len(names) == 1 and names[0] in layer.lora_A and not (layer.disable_adapters or layer.merged)
    if not is_usual or others or kwargs or torch.is_autocast_enabled(x.device.type):
        return peft_forward(x, *others, **kwargs)
    A, B = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    apply: Callable[..., torch.Tensor] = LoraProduct.apply
    return apply(x, A, B, layer.scaling[names[0]], layer.base_layer)


class LoraProduct(torch.autograd.Function):
    """y (..., out) of x (..., in), A (r, in), B (out, r), the scaling, and the 4-bit layer of W (out, in).

    Computed in the dtype of x, to which A and B are converted; gradients are given in their own dtypes. W and
    its layer's bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, layer: torch.nn.Module
    ) -> torch.Tensor:
        y: torch.Tensor = layer(x)  # new, so that it can be added to
        low = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(low, B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, low, A, B)
        ctx.scaling, ctx.layer = scaling, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, A, B = ctx.saved_tensors
        grad_y, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_low = (grad_y @ B.to(x.dtype)).mul_(ctx.scaling)
        grad_A = (grad_low.T @ rows).to(A.dtype) if ctx.needs_input_grad[1] else None
        grad_B = (grad_y.T @ low).mul_(ctx.scaling).to(B.dtype) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ dequantised(ctx.layer, x.dtype)).addmm_(grad_low, A.to(x.dtype)).view_as(x)
        return grad_x, grad_A, grad_B, None, None


def dequantised(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a bitsandbytes layer, at once in this dtype: what its forward pass multiplies with."""
    return dense(layer.weight, dtype)
