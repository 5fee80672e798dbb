"""How the weights W of a loaded base become numbers, of whatever kind (`base/quantisation.py`) they are."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch

from adapterhub_local.base.load import import_bitsandbytes


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a loaded weight is held in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W (out_features, in_features) of a loaded weight in `dtype`: of 4 bits what bitsandbytes multiplies with."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().to(dtype)
    if not state.nested:  # what bitsandbytes calls in the end, without what it does in Python before
        op: Callable[..., torch.Tensor] = torch.ops.bitsandbytes.dequantize_4bit.default
        return op(weight.data, state.absmax, state.blocksize, state.quant_type, state.shape, dtype)
    state = copy(state)
    state.dtype = dtype  # rounded once, from float32 to what is computed in
    plain: torch.Tensor = import_bitsandbytes().functional.dequantize_4bit(weight.data, state)
    return plain


def unnest(weight: torch.Tensor) -> None:
    """Hold a weight's constants in float32 from now on, if they are quantised themselves: the same W, with two launches
    less whenever it is dequantised, for three bytes more a block of 64 weights."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None or not state.nested:
        return
    functional = import_bitsandbytes().functional
    state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.offset, state.state2 = False, None, None


def made_from(weight: torch.Tensor) -> torch.dtype:
    """The dtype that a loaded weight had before it was quantised, or has if it was not."""
    state: Any = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if state is None else state.dtype
    return dtype


def read_dense(stored: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.dtype]:
    """W in float32, and the dtype it was made from, of a weight as a base's file holds it with its constants."""
    functional = import_bitsandbytes().functional
    state = functional.QuantState.from_dict(dict(constants), device=torch.device("cpu"))
    dtype, state.dtype = state.dtype, torch.float32  # in its own dtype it would be rounded once more
    return functional.dequantize_4bit(stored, state), dtype
