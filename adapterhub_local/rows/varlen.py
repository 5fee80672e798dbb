"""One FlashAttention call for examples of several lengths, by torch's `varlen_attn` as its versions have it.

torch 2.11 takes no `enable_gqa` and does not document query heads that share a key head: whether its kernel computes
them is tried once, result and gradients, and the heads are repeated where it does not.
"""

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.rows.layout import Layout

NEEDED = {"scale", "window_size"}  # of its parameters; without them (torch 2.10) it has another way to say causal


def torch_kernel() -> Callable[..., Any] | None:
    """torch's function, None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def has_packed_kernel(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries: 16 bits, heads of a multiple of 8 up to 256, a card of Ampere or later."""
    head_dim = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256 or torch.version.hip:
        return False
    kernel = torch_kernel()
    if kernel is None or not _parameters(kernel) >= NEEDED or query.device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def packed_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, kind: AttentionKind
) -> torch.Tensor:
    """Each example's keys behind a copy of the prefix's, causal from the bottom right.

    query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim); the result is (1, T, heads, head_dim).
    """
    kernel = torch_kernel()
    assert kernel is not None
    ends_q, ends_k = _ends(layout, query.device)
    keys, values = (_behind_prefix(tensor.transpose(1, 2)[0], layout) for tensor in (key, value))
    repeats = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in _parameters(kernel):
        options["enable_gqa"] = repeats > 1
    elif repeats > 1 and not takes_shared_heads(kernel, query.device, query.dtype):
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    window = kind.within(layout.longest).window
    out: torch.Tensor = kernel(
        query.transpose(1, 2)[0],
        keys,
        values,
        ends_q,
        ends_k,
        max(end - start for start, end in layout.spans),
        layout.longest,
        scale=kind.scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return out[None]


@lru_cache(maxsize=8)
def _ends(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where queries and keys of each example end, from 0, in int32.

    All layers of a model, forwards and backwards, ask for the same, and a copy to a GPU waits for what it computes.
    """
    queries, keys = [0], [0]
    for start, end in layout.spans:
        queries.append(end)
        keys.append(keys[-1] + layout.before((start, end)) + end - start)
    with torch.inference_mode(False):  # an inference tensor could not be kept for a backward pass
        return tuple(torch.tensor(ends, dtype=torch.int32, device=device) for ends in (queries, keys))  # type: ignore[return-value]


@cache
def takes_shared_heads(kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel that has no `enable_gqa` computes 4 heads over 2 key heads as it does over 4, backwards too."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        q, k, v, toward = (torch.randn(24, heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4))
        ends = torch.tensor([0, 17, 24], dtype=torch.int32, device=device)

        def results(repeats: int) -> list[torch.Tensor]:
            given = [each.clone().requires_grad_() for each in (q, k, v)]
            keys, values = (each.repeat_interleave(repeats, dim=1) for each in given[1:])
            out = kernel(given[0], keys, values, ends, ends, 17, 17, scale=0.125, window_size=(-1, 0))
            return [out.detach(), *torch.autograd.grad(out, given, toward)]

        try:
            pairs = zip(results(1), results(2), strict=True)
            return all(
                got.shape == one.shape and float((got - one).abs().max()) <= 3e-2 * float(one.abs().max())
                for got, one in pairs
            )
        except (RuntimeError, ValueError):  # it refuses them
            return False


@cache
def _parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def _behind_prefix(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(T, heads, head_dim) -> the prefix, then the prefix and the rest of each example, in one tensor."""
    if not layout.prefix:
        return tensor
    prefix, *rests = tensor.split((layout.prefix, *layout.rests))
    return torch.cat([prefix, *(part for rest in rests for part in (prefix, rest))])
