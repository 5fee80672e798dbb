"""Whether an adapter's modules are a base's modules, told from headers and config, without loading weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import AdapterFile


def linear_shapes(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of the base's linear layers."""
    with quiet_loading(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base.folder)
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def check_shapes(adapter: AdapterFile, base: BaseInfo) -> None:
    """Raises Incompatible naming the first module that the base does not have, or has in another shape."""
    known = linear_shapes(base)
    for module, shape in adapter.shapes.items():
        wanted = known.get(module)
        if wanted is None:
            raise Incompatible(
                f"{adapter.path} adapts {module}, which base '{base.name}' ({base.architecture}) does not have"
            )
        if wanted != (shape.out_features, shape.in_features):
            raise Incompatible(
                f"{adapter.path}: {module} is {shape.out_features} x {shape.in_features}, "
                f"in base '{base.name}' it is {wanted[0]} x {wanted[1]}"
            )
