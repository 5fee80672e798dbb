"""How far the kernels between a decoder's products are from plain torch, with the heads of the model at hand."""

from collections.abc import Callable

import torch

from serve.kernels import reference

Heads = tuple[int, int, int]  # of queries, of keys and values, and the size of one


def _add_norm(kernel: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device, heads: Heads) -> float:
    draw = _drawer(dtype, device)
    size = heads[0] * heads[2]
    worst = 0.0
    for x in (None, draw(5, size)):
        residual, weight = draw(5, size), draw(size)
        own = residual.clone()
        pairs = [(kernel(x, own, weight, 1e-6), reference.add_norm(x, residual, weight, 1e-6)), (own, residual)]
        worst = max(worst, *(_apart(got, wanted) for got, wanted in pairs))
    return worst


def _rotate(kernel: Callable[..., None], dtype: torch.dtype, device: torch.device, heads: Heads) -> float:
    num_heads, kv_heads, size = heads
    draw = _drawer(dtype, device)
    worst = 0.0
    for norms in (None, (draw(size), draw(size))):
        mixed = draw(5, (num_heads + 2 * kv_heads) * size)  # one product's output, of which all three are views
        angles, cache = (draw(5, size), draw(5, size)), draw(2, 3, kv_heads, 16, size)
        places = (torch.tensor([2, 0, 0, 1, 2], device=device), torch.tensor([3, 0, 15, 7, 4], device=device))
        found = []
        for function in (kernel, reference.rotate_and_write):
            copy, pages = mixed.clone(), cache.clone()
            q, k, v = (
                each.unflatten(-1, (-1, size))
                for each in copy.split([num_heads * size, kv_heads * size, kv_heads * size], dim=-1)
            )
            function(q, k, v, angles, norms, 1e-6, (pages[0], pages[1]), places)
            found.append((copy, pages))
        worst = max(worst, *(_apart(got, wanted) for got, wanted in zip(*found, strict=True)))
    return worst


def _silu(kernel: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device, heads: Heads) -> float:
    gate, up = _drawer(dtype, device)(5, 2 * 700).split(700, dim=-1)
    return _apart(kernel(gate, up), reference.silu_multiply(gate, up))


CHECKS: dict[str, Callable[..., float]] = {
    "add_norm": _add_norm,
    "rotate_and_write": _rotate,
    "silu_multiply": _silu,
}


def _drawer(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator, device="cpu").to(device, dtype)


def _apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest entry; infinite if an entry is not a number."""
    apart = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return apart if apart < float("inf") else float("inf")
