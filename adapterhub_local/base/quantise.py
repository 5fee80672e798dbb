"""NF4 with double quantisation (https://arxiv.org/abs/2305.14314), in the tensors transformers itself loads.

A weight becomes 4-bit codes, an 8-bit absmax per block of 64, and a float32 absmax per 256 of those:
4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterhub_local.errors import BadFile

BLOCK_SIZE = 64
CONSTANTS = ("absmax", "nested_absmax")


def quantised_modules(model: nn.Module) -> tuple[str, ...]:
    """The linear layers of `model` that are stored in NF4: all but the output head, those of experts included.

    Raises BadFile if there is none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    )
    if not names:
        raise BadFile(f"{type(model).__name__} has no linear layers that can be quantised")
    return names


def skipped_modules(model: nn.Module) -> list[str]:
    """The linear layers of `model` that stay in 16 bits, as `llm_int8_skip_modules` names them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is head]


def quantise(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of one weight (out_features, in_features), a floating dtype.

    Yields `name` (uint8, numel/2 x 1) and `name.absmax`, `.nested_absmax`, `.nested_quant_map`,
    `.quant_map`, `.quant_state.bitsandbytes__nf4`: the format of bitsandbytes.
    """
    from adapterhub_local.base.load import import_bitsandbytes

    functional = import_bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    yield name, codes
    for key, value in state.as_dict(packed=True).items():
        yield f"{name}.{key}", value


def quantisation_config(skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers knows a pre-quantised folder."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
