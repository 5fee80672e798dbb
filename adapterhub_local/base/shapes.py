"""Whether an adapter's modules are a base's modules, from headers and config, without loading weights."""

from collections.abc import Mapping

import torch
from transformers import AutoConfig

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.lora.names import is_router


def linear_shapes(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of the base's linear layers."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in skeleton(base).named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def weight_shapes(base: BaseInfo) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of the base's model, as they are before quantising; shared ones under each name."""
    return {name: tuple(tensor.shape) for name, tensor in skeleton(base).state_dict().items()}


def tied_weights(base: BaseInfo) -> dict[str, str]:
    """Name of each tensor that is also another one -> the name that comes first: an output head -> the embeddings."""
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in skeleton(base).state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            shared[name] = first[id(tensor)]
    return shared


def embeddings_name(base: BaseInfo) -> str:
    """The name of the tensor that the base's tokens are looked up in."""
    model = skeleton(base)
    weight = model.get_input_embeddings().weight
    names = (name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is weight)
    return next(names)


def skeleton(base: BaseInfo) -> BaseModel:
    """The base's model without memory for its weights."""
    with quiet_loading(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        return build_model(config)


def check_shapes(adapter: AdapterFile, base: BaseInfo, shapes: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Raises Incompatible naming the first module that the base does not have, or has in another shape.

    `shapes` are those of the base's linear layers, if they are known.
    """
    known = linear_shapes(base) if shapes is None else shapes
    for module, shape in adapter.shapes.items():
        wanted = known.get(module)
        if wanted is None and is_router(module):
            raise Incompatible(
                f"{adapter.path} adapts {module}, a router of experts, which stays as base '{base.name}' has it: train "
                "without it, or fuse all into the model (PEFT: merge_and_unload) and add that as a base of its own"
            )
        if wanted is None:
            raise Incompatible(
                f"{adapter.path} adapts {module}, which base '{base.name}' ({base.architecture}) does not have as a "
                "linear layer"
            )
        if wanted != (shape.out_features, shape.in_features):
            raise Incompatible(
                f"{adapter.path}: {module} is {shape.out_features} x {shape.in_features}, "
                f"in base '{base.name}' it is {wanted[0]} x {wanted[1]}"
            )
