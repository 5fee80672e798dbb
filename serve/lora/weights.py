"""How W x is computed: from the 4-bit weights each time, or from a copy of the dequantised weights. The same function.

The copy is of what 4 bits stand for, not of the weights before quantisation; on the CPU it lies in oneDNN's own layout.
Which is faster depends on the processor, the shape and the number of tokens, and is measured.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from adapterhub_local.base.held import dense, is_quantised, made_from
from adapterhub_local.base.load import import_bitsandbytes
from serve.kernels.choose import Kernels
from serve.lora.crossover import PROBES, gain
from serve.lora.linear import LinearGroup, Product


def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """W (out_features, in_features) in `dtype`: of 4 bits exactly what bitsandbytes multiplies with."""
    return dense(layer.weight, dtype)


def own_weight(layer: nn.Linear) -> torch.Tensor:
    """W (out_features, in_features) as PEFT's DoRA takes its norms: rounded to what the base was quantised from."""
    return dense(layer.weight, made_from(layer.weight))


def dense_product(bases: Sequence[nn.Linear], dtype: torch.dtype) -> Product:
    """x -> W x + bias of each of `bases`, from a copy of their weights."""
    sizes = [base.out_features for base in bases]
    weight = torch.cat([dense_weight(base, dtype) for base in bases])
    bias = None
    if any(base.bias is not None for base in bases):
        parts = [weight.new_zeros(base.out_features) if base.bias is None else base.bias.to(dtype) for base in bases]
        bias = torch.cat(parts)
    packed = _packed(weight)
    if packed is None:
        return lambda x: list(linear(x, weight, bias).split(sizes, dim=-1))

    def product(x: torch.Tensor) -> list[torch.Tensor]:
        count = x.shape[-2]
        padded = pad(x, (0, 0, 0, padded_count(count) - count)) if count != padded_count(count) else x
        out = torch.ops.mkldnn._linear_pointwise(padded, packed, bias, "none", [], "")[..., :count, :]
        return list(out.split(sizes, dim=-1))

    return product


def padded_count(count: int) -> int:
    """So many tokens are multiplied where `count` are asked for: at most a quarter more, exact up to 16.

    oneDNN keeps code of about 0.6 MB for every shape and number of tokens it has seen, 1,024 of them: without
    this, prompts of all lengths cost a server half a gigabyte.
    """
    if count <= 16:
        return count
    step = 1 << (count - 1).bit_length() - 3  # a quarter of the power of two below
    return -(-count // step) * step


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's layout, which saves reordering it in every product; None where there is no such thing."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PROBES[-2])
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # an op of torch's compiler, not of its public interface
        return None
    return packed


def dense_bytes(group: LinearGroup, dtype: torch.dtype) -> int:
    """What the copy for one group takes."""
    return sum(base.in_features * base.out_features for base in group.bases) * dtype.itemsize


def use_dense(groups: Sequence[LinearGroup], dtype: torch.dtype, mode: str, max_bytes: int) -> int:
    """Give groups copies of their weights, those first that gain most a byte, within `max_bytes`; the bytes taken.

    `nf4` gives none, `dequant-cache` all that fit, `auto` those that were measured to gain, for as many tokens as
    they gain at.
    """
    if mode == "nf4":
        return 0
    measured: dict[tuple[object, ...], tuple[float, int]] = {}
    ranked = []
    for group in groups:
        if not _is_quantised(group) and group.bases[0].weight.device.type != "cpu":
            continue  # a copy in the very same layout
        key = (group.in_features, *group.sizes, _is_quantised(group))
        if key not in measured:
            measured[key] = gain(group, dtype, dense_product(group.bases, dtype))
        saved, min_tokens = measured[key]
        if mode == "dequant-cache":
            min_tokens = 1
        elif saved <= 0:
            continue
        ranked.append((saved / dense_bytes(group, dtype), min_tokens, group))
    taken = 0
    for _, min_tokens, group in sorted(ranked, key=lambda each: -each[0]):
        size = dense_bytes(group, dtype)
        if taken + size <= max_bytes:
            group.dense, group.min_tokens = dense_product(group.bases, dtype), min_tokens
            taken += size
    return taken


def use_four_bit_always(groups: Sequence[LinearGroup], kernels: Kernels) -> int:
    """Let the kernel of a CPU multiply where weights are in 4 bits and there is no copy; how many groups it does.

    It reads an eighth of what a copy is, and expands a weight once for many tokens: nothing is left to be measured.
    """
    count = 0
    for group in groups:
        if group.dense is None and all(is_four_bit(base.weight) for base in group.bases):
            group.dense = four_bit_product(group.bases, kernels)
            count += 1
    return count


def is_four_bit(weight: torch.Tensor) -> bool:
    """Whether a weight is held in 4 bits, in blocks of 64 that do not run from one row into the next."""
    state = getattr(weight, "quant_state", None)
    return (
        state is not None
        and len(state.shape) == 2
        and state.blocksize == 64
        and state.shape[1] % 64 == 0
        and weight.dtype == torch.uint8
    )


def plain_absmax(state: Any) -> torch.Tensor:
    """The absmax of each block in float32, freed of its own quantisation: half a bit a weight instead of an eighth."""
    absmax: torch.Tensor = state.absmax
    if state.nested:
        absmax = import_bitsandbytes().functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.float()


def four_bit_product(bases: Sequence[nn.Linear], kernels: Kernels) -> Product:
    """x -> W x + bias of each of `bases`, by the kernel that reads their 4-bit weights."""
    parts = []
    for base in bases:
        state: Any = getattr(base.weight, "quant_state")  # noqa: B009 (mypy knows of no such attribute)
        parts.append((base.weight.data, plain_absmax(state), state.code.float(), base.out_features, base.bias))

    def product(x: torch.Tensor) -> list[torch.Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        outs = []
        for packed, absmax, code, out_features, bias in parts:
            out = kernels.multiply(flat, packed, absmax, code, out_features).view(*x.shape[:-1], -1)
            outs.append(out if bias is None else out + bias)
        return outs

    return product


def _is_quantised(group: LinearGroup) -> bool:
    return any(is_quantised(base.weight) for base in group.bases)
