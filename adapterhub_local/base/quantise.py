"""Which layers of a model are quantised, and a weight as the tensors that transformers itself loads."""

from collections.abc import Iterator

import torch
from torch import nn

from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.quantisation import Quantisation
from adapterhub_local.errors import BadFile


def quantised_modules(model: BaseModel) -> tuple[str, ...]:
    """The linear layers of `model` that are stored in 4 bits: all but the output head, those of experts included.

    Raises BadFile if there is none.
    """
    head = model.get_output_embeddings()
    names = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    )
    if not names:
        raise BadFile(f"{type(model).__name__} has no linear layers that can be quantised")
    return names


def skipped_modules(model: BaseModel) -> list[str]:
    """The linear layers of `model` that stay in 16 bits, as `llm_int8_skip_modules` names them."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if id(module) == id(head)]


def quantise(name: str, weight: torch.Tensor, kind: Quantisation) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of one weight (out_features, in_features), a floating dtype.

    Yields `name` (uint8, numel/2 x 1) and `name.` with each of the kind's `parts`: the format of bitsandbytes.
    """
    from adapterhub_local.base.load import import_bitsandbytes

    functional = import_bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=kind.block, compress_statistics=kind.nested is not None, quant_type=kind.codes
    )
    yield name, codes
    for key, value in state.as_dict(packed=True).items():
        yield f"{name}.{key}", value
