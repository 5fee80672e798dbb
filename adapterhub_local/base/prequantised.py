"""Checkpoints that are quantised already: what bitsandbytes saves is taken as it is, FP8 in blocks is dequantised.

A kind that a base may be of is what `base/quantise.py` writes, so the same bytes become the base: an adapter that was
trained on them (Unsloth's *-bnb-4bit) meets the very weights that it knows.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.quantisation import CONSTANT, KINDS, Quantisation, find_kind
from adapterhub_local.errors import BadFile

SCALE = "_scale_inv"  # behind the name of a weight in FP8: the scale of each block
FP8 = "fp8"
Read = Callable[[str], torch.Tensor]
Parts = dict[str, torch.Tensor]


def check_method(method: Mapping[str, Any], folder: Path) -> Quantisation | str:
    """The kind that is taken as it is, or FP8. Raises BadFile for what is neither, with what to give instead."""
    kind = method.get("quant_method")
    if kind == "bitsandbytes" and method.get("load_in_4bit"):
        found, wrong = find_kind(method)
        if found is not None and not wrong:
            return found
        taken = " or ".join(dict.fromkeys(each.title for each in KINDS.values()))
        raise BadFile(
            f"{folder} is quantised already, with {' and '.join(wrong)}: only {taken} in bytes is taken as it is. Give "
            "the 16-bit model it was made from"
        )
    if kind == FP8 and method.get("weight_block_size"):
        return FP8
    raise BadFile(f"{folder} is quantised already ({kind}): give the 16-bit model it was made from")


def weight_names(stored: Mapping[str, str], kind: Quantisation | str) -> dict[str, str]:
    """The model's tensors without the constants of their quantisation."""
    if kind == FP8:
        return {name: key for name, key in stored.items() if not name.endswith(SCALE)}
    return {name: key for name, key in stored.items() if not CONSTANT.fullmatch(name)}


def held_parts(
    kind: Quantisation, name: str, shape: tuple[int, ...], read: Read, stored: Mapping[str, str]
) -> Parts | None:
    """The stored tensors of a weight that is of this kind, by their names; None for one that is not quantised.

    shape: what the architecture wants. Raises BadFile for constants that do not fit it.
    """
    if f"{name}.{kind.state}" not in stored:
        return None
    if missing := next((part for part in kind.parts if f"{name}.{part}" not in stored), None):
        raise BadFile(f"{name} is in {kind.title} and has no {missing}")
    parts = {name: read(name), **{f"{name}.{part}": read(f"{name}.{part}") for part in kind.parts}}
    try:
        state = json.loads(bytes(parts[f"{name}.{kind.state}"].tolist()))
        found = (state["quant_type"], state["blocksize"], state.get("nested_blocksize"), tuple(state["shape"]))
    except (ValueError, KeyError, TypeError):
        raise BadFile(f"{name}: its constants cannot be read") from None
    if (found[2] is None) != (kind.nested is None):
        raise BadFile(f"{name}: its constants are not what config.json says (bnb_4bit_use_double_quant)")
    if parts[f"{name}.absmax"].dtype != (torch.uint8 if kind.nested else torch.float32):
        raise BadFile(f"{name}: its constants are {parts[f'{name}.absmax'].dtype}, which no {kind.title} has")
    blocks = math.ceil(math.prod(shape) / kind.block)
    sizes = [parts[name].numel(), *(parts[f"{name}.{part}"].numel() for part in kind.constants)]
    wanted = [math.ceil(math.prod(shape) / 2), blocks, *([math.ceil(blocks / kind.nested)] if kind.nested else [])]
    if found != (kind.codes, kind.block, kind.nested, shape) or sizes != wanted or parts[name].dtype != torch.uint8:
        raise BadFile(
            f"{name} is stored as {found[0]} of shape {found[3]} in blocks of {found[1]}: its architecture wants "
            f"{shape}, and {kind.title} has blocks of {kind.block}"
        )
    table = parts[f"{name}.quant_map"]
    if table.shape != (16,) or not torch.allclose(table.float(), torch.tensor(kind.table), rtol=0, atol=1e-6):
        raise BadFile(f"{name}: its 4 bits do not stand for the values of {kind.title} (quant_map)")
    return parts


def from_fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], name: str) -> torch.Tensor:
    """A weight (out, in) in FP8 as bfloat16: each block of it times its scale (arXiv 2412.19437, section 3.3.2)."""
    wanted = tuple(math.ceil(size / part) for size, part in zip(weight.shape, block, strict=False))
    if tuple(scales.shape) != wanted:
        raise BadFile(f"{name} is in FP8 with scales of {tuple(scales.shape)}: blocks of {block} need {wanted}")
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * spread[: weight.shape[0], : weight.shape[1]]).to(torch.bfloat16)
