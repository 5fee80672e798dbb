"""The base under a PEFT model once more: modules of its own over the very same tensors, as if no adapter were there."""

import copy
from typing import Any

from adapterhub_local.base.model import AdaptedModel, BaseModel


def twin_of(model: AdaptedModel) -> BaseModel:
    """Another module tree over the parameters, buffers and 4-bit states of a PEFT model's base, in evaluation mode.

    No tensor is copied, so what changes one of them in place changes both; modules, configuration and what is set on
    them are apart, so that the twin may be wrapped, given another attention, and so on. Its layers are those under
    the adapter's.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    shared: dict[int, Any] = {}
    for module in base.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), getattr(module, "quant_state", None))
        shared.update({id(value): value for value in own if value is not None})
    for module in base.modules():  # an adapter's own parts are left behind: its layer stands for the one below it
        if isinstance(module, LoraLayer):
            shared[id(module)] = copy.deepcopy(module.base_layer, shared)
    twin: BaseModel = copy.deepcopy(base, shared)
    return twin.eval()
