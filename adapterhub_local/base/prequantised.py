"""Checkpoints that are quantised already: NF4 as bitsandbytes saves it is taken as it is, FP8 in blocks is dequantised.

NF4 with double quantisation is what `base/quantise.py` writes, so the same bytes become the base: an adapter that was
trained on them (Unsloth's *-bnb-4bit) meets the very weights that it knows.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.quantise import BLOCK_SIZE
from adapterhub_local.base.weights import CONSTANT
from adapterhub_local.errors import BadFile

SCALE = "_scale_inv"  # behind the name of a weight in FP8: the scale of each block
STATE = "quant_state.bitsandbytes__nf4"
NESTED = 256  # absmax values that share one of float32
PARTS = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE)
Read = Callable[[str], torch.Tensor]
Parts = dict[str, torch.Tensor]


def check_method(method: Mapping[str, Any], folder: Path) -> str:
    """`nf4` or `fp8`. Raises BadFile for what is neither, with what to give instead."""
    kind = method.get("quant_method")
    if kind == "bitsandbytes" and method.get("load_in_4bit"):
        wrong = [
            what
            for key, wanted, what in (
                ("bnb_4bit_quant_type", "nf4", "FP4 codes"),
                ("bnb_4bit_use_double_quant", True, "constants that are not quantised themselves"),
                ("bnb_4bit_quant_storage", "uint8", "storage other than uint8"),
            )
            if method.get(key, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8"}.get(key)) != wanted
        ]
        if not wrong:
            return "nf4"
        raise BadFile(
            f"{folder} is quantised already, with {' and '.join(wrong)}: only NF4 with double quantisation is taken as "
            "it is. Give the 16-bit model it was made from"
        )
    if kind == "fp8" and method.get("weight_block_size"):
        return "fp8"
    raise BadFile(f"{folder} is quantised already ({kind}): give the 16-bit model it was made from")


def weight_names(stored: Mapping[str, str], kind: str) -> dict[str, str]:
    """The model's tensors without the constants of their quantisation."""
    if kind == "fp8":
        return {name: key for name, key in stored.items() if not name.endswith(SCALE)}
    return {name: key for name, key in stored.items() if not CONSTANT.fullmatch(name)}


def nf4_parts(name: str, shape: tuple[int, ...], read: Read, stored: Mapping[str, str]) -> Parts | None:
    """The stored tensors of a weight that is held in NF4, by their names; None for one that is not.

    shape: what the architecture wants. Raises BadFile for constants that do not fit it.
    """
    if f"{name}.{STATE}" not in stored:
        return None
    if missing := next((part for part in PARTS if f"{name}.{part}" not in stored), None):
        raise BadFile(f"{name} is in NF4 and has no {missing}")
    parts = {name: read(name), **{f"{name}.{part}": read(f"{name}.{part}") for part in PARTS}}
    try:
        state = json.loads(bytes(parts[f"{name}.{STATE}"].tolist()))
        found = (state["quant_type"], state["blocksize"], state["nested_blocksize"], tuple(state["shape"]))
    except (ValueError, KeyError, TypeError):
        raise BadFile(f"{name}: its constants cannot be read") from None
    blocks = math.ceil(math.prod(shape) / BLOCK_SIZE)
    sizes = [parts[name].numel(), parts[f"{name}.absmax"].numel(), parts[f"{name}.nested_absmax"].numel()]
    wanted = [math.ceil(math.prod(shape) / 2), blocks, math.ceil(blocks / NESTED)]
    if found != ("nf4", BLOCK_SIZE, NESTED, shape) or sizes != wanted or parts[name].dtype != torch.uint8:
        raise BadFile(
            f"{name} is stored as {found[0]} of shape {found[3]} in blocks of {found[1]}: its architecture wants "
            f"{shape}, and NF4 has blocks of {BLOCK_SIZE}"
        )
    return parts


def from_fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], name: str) -> torch.Tensor:
    """A weight (out, in) in FP8 as bfloat16: each block of it times its scale (arXiv 2412.19437, section 3.3.2)."""
    wanted = tuple(math.ceil(size / part) for size, part in zip(weight.shape, block, strict=False))
    if tuple(scales.shape) != wanted:
        raise BadFile(f"{name} is in FP8 with scales of {tuple(scales.shape)}: blocks of {block} need {wanted}")
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * spread[: weight.shape[0], : weight.shape[1]]).to(torch.bfloat16)
