"""The factors that are trained: put on a base by PEFT as a recipe says, and written as the files of an adapter."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapterhub_local.base.load import LoadedBase, import_bitsandbytes
from adapterhub_local.base.store import BaseInfo
from adapterhub_local.errors import InputError
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter, write_safetensors
from adapterhub_local.recipe import Recipe
from adapterhub_local.train.targets import target_names


def with_adapter(base: LoadedBase, recipe: Recipe) -> Any:
    """The base as a PEFT model with fresh factors: A random by the recipe's seed, B zero."""
    import_bitsandbytes()  # before peft imports it
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    adapter = recipe.adapter
    targets = target_names(base.model, adapter.target_modules)
    set_seed(recipe.train.seed)  # before the factors are drawn
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        use_rslora=adapter.rslora,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base.model, config)
    except ValueError as error:
        raise InputError(f"adapter.target_modules = {targets!r}: {str(error).split('. ')[0]}") from None
    if adapter.dtype == "bfloat16":
        for factor in factors_of(model).values():
            factor.data = factor.data.bfloat16()
    return model


def factors_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their name in an adapter file, sorted."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[tensor_name(module, factor[0])] = parameter
    return dict(sorted(found.items()))


def write_factors(model: Any, path: Path) -> None:
    """Write the trained factors alone; a reader sees the old file or the new one."""
    factors = {name: factor.detach().cpu() for name, factor in factors_of(model).items()}
    shapes = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
    staged = path.with_name(path.name + ".new")
    staged.unlink(missing_ok=True)
    write_safetensors(staged, shapes, factors.items(), {"format": "pt"})
    staged.replace(path)


def read_factors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a file of factors."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            yield name, file.get_tensor(name)


def load_factors(model: Any, factors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give the model's factors these values; every one of them, or it is an error of ours."""
    wanted = factors_of(model)
    with torch.no_grad():
        for name, tensor in factors:
            wanted.pop(name).copy_(tensor)
    assert not wanted, f"no value for {next(iter(wanted))}"


def save(model: Any, recipe: Recipe, info: BaseInfo, folder: Path) -> dict[str, Path | bytes]:
    """Write the trained factors as the two files of an adapter; equal factors give equal files."""
    factors = {name: factor.detach().cpu() for name, factor in factors_of(model).items()}
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in factors}
    targets = recipe.adapter.target_modules
    grouped = isinstance(targets, str)
    config = AdapterConfig(
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in modules})) if grouped else targets,
        use_rslora=recipe.adapter.rslora,
        base_model=info.hub_id,
    )
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in factors.items()}
    return write_adapter(folder, config, shapes, factors.items(), info.fingerprint)
