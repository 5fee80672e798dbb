"""The factors that are trained: put on a base by PEFT as a recipe says, and written as the files of an adapter."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.held import unnest
from adapterhub_local.base.load import LoadedBase, import_bitsandbytes
from adapterhub_local.base.model import AdaptedModel, CausalModel, as_module
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.base.vocabulary import Vocabulary
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.names import parse_name, rows_name
from adapterhub_local.lora.write import tensor_name, write_adapter, write_safetensors
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.schema import Adapter
from adapterhub_local.registry import Version
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import Packed, inputs, pack
from adapterhub_local.rows.token_rows import use_token_rows
from adapterhub_local.train.fused_lora import fuse
from adapterhub_local.train.targets import target_names
from adapterhub_local.train.tokens import ids_of

MAGNITUDE = "lora_magnitude_vector"  # DoRA's, as PEFT names it in a file
ROWS = ".token_adapter.trainable_tokens_delta"  # of embeddings, likewise


def with_adapter(
    base: LoadedBase, recipe: Recipe, *, start: Version | None = None, examples: Sequence[Example] = ()
) -> AdaptedModel:
    """The base as a PEFT model with fresh factors: A random by the recipe's seed, B zero; or those of `start`.

    `examples` are what EVA looks at; `check_run` has seen that targets and patterns match, and that `start` fits.
    Raises InputError for targets that PEFT does not take.
    """
    import_bitsandbytes()  # before peft imports it
    from peft import EvaConfig, LoraConfig, get_peft_model
    from transformers import set_seed

    adapter = recipe.adapter
    opened = open_adapter(start.path, dora=True, tokens=True) if start else None
    # of a version's own patterns PEFT would match any, and a version may come from anywhere
    config = opened.config.for_modules(opened.modules) if opened else _config_of(base, adapter)
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    set_seed(recipe.train.seed)  # before the factors are drawn
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        eva_config=EvaConfig(rho=1.0) if adapter.init == "eva" and not opened else None,  # rank as asked, everywhere
        init_lora_weights=True if opened else {"default": True}.get(adapter.init, adapter.init),  # type: ignore[arg-type]
        trainable_token_indices={name: list(ids) for name, ids in config.tokens.items()} or None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")  # of EVA, whose factors fit here
            made: Any = get_peft_model(as_module(base.model), settings)
    except ValueError as error:
        raise InputError(f"adapter.target_modules = {targets!r}: {str(error).split('. ')[0]}") from None
    model: AdaptedModel = made
    if opened:
        load_factors(model, _parts(opened))
    elif adapter.init == "eva":
        initialise_eva(model, examples)
    if adapter.dtype == "bfloat16":
        for name, factor in factors_of(model).items():
            if MAGNITUDE not in name and ROWS not in name:  # their steps are smaller than bfloat16 can hold
                factor.data = factor.data.bfloat16()
    for name, factor in factors_of(model).items():
        if ROWS in name:
            factor.data = factor.data.float()
    fuse(model)
    use_token_rows(model)
    if model.device.type == "cuda" and not recipe.train.activation_checkpointing:  # there is room
        for parameter in model.parameters():
            unnest(parameter)
    return model


def _parts(adapter: AdapterFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of an adapter's factors, of its lengths if it has DoRA, and of its rows of embeddings."""
    for module, delta in adapter.deltas():
        yield tensor_name(module, "A"), delta.A
        yield tensor_name(module, "B"), delta.B
        if module in adapter.magnitudes:
            yield f"base_model.model.{module}.{MAGNITUDE}", adapter.magnitude(module)
    for module in adapter.tokens:
        yield rows_name(module), adapter.rows(module)


def _config_of(base: LoadedBase, adapter: Adapter) -> AdapterConfig:
    """The recipe's shape of an adapter on this base."""
    targets = target_names(base.model, adapter.target_modules)
    tokens: dict[str, tuple[int, ...]] = {}
    if adapter.train_tokens:
        vocabulary = Vocabulary.of(base.model)
        ids = ids_of(adapter.train_tokens, base.tokenizer, vocabulary.rows, base.info.name)
        tokens = {vocabulary.embeddings: tuple(sorted(ids.values()))}
    return AdapterConfig(
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        rank_pattern=adapter.rank_pattern or {},
        alpha_pattern=adapter.alpha_pattern or {},
        tokens=tokens,
    )


def initialise_eva(model: AdaptedModel, examples: Sequence[Example]) -> None:
    """A from the directions that explain most of each layer's inputs (EVA, https://arxiv.org/abs/2410.07170).

    Looks at up to 256 examples, without drawing random numbers. Raises QhubError if they do not settle.
    """
    from peft import initialize_lora_eva_weights

    rows = [pack([example]) for example in examples[:256]]
    passes = 0

    def look(body: CausalModel, row: Packed) -> None:
        nonlocal passes
        passes += 1
        if passes > 20 * len(rows):
            raise QhubError("adapter.init = 'eva': the layers' inputs do not settle: give more data or a lower rank")
        body(**inputs(body, row))

    with torch.random.fork_rng(devices=random_devices(model)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a row is not moved to the device: `inputs` does
        initialize_lora_eva_weights(
            as_module(model),
            dataloader=rows,
            forward_fn=look,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda given, row, name: given[0].reshape(-1, given[0].shape[-1]).float(),
            gather_distributed_inputs=False,  # every process looks at the same
            show_progress_bar=False,
        )


def random_devices(model: AdaptedModel) -> list[torch.device]:
    """Whose random state, beside the CPU's, work with this model changes; torch would ask every GPU there is."""
    return [model.device] if model.device.type == "cuda" else []


def factors_of(model: AdaptedModel) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their name in an adapter file, sorted."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ROWS in name:
            found[rows_name(name.removeprefix("base_model.model.").partition(ROWS)[0])] = parameter
        elif parameter.requires_grad:
            module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            key = f"base_model.model.{module}.{MAGNITUDE}" if factor[0] == "m" else tensor_name(module, factor[0])
            found[key] = parameter
    return dict(sorted(found.items()))


def write_factors(model: AdaptedModel, path: Path) -> None:
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


def load_factors(model: AdaptedModel, factors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give the model's factors these values; every one of them, or it is an error of ours."""
    wanted = factors_of(model)
    with torch.no_grad():
        for name, tensor in factors:
            wanted.pop(name).copy_(tensor)
    assert not wanted, f"no value for {next(iter(wanted))}"


def save(model: AdaptedModel, recipe: Recipe, info: BaseInfo, folder: Path) -> dict[str, Path | bytes]:
    """Write the trained factors as the two files of an adapter; equal factors give equal files."""
    factors = {name: factor.detach().cpu() for name, factor in factors_of(model).items()}
    settings = model.peft_config["default"]
    named = map(parse_name, factors)
    modules = {parts.module for parts in named if parts.kind != "tokens"}
    grouped = isinstance(recipe.adapter.target_modules, str)
    config = AdapterConfig(
        rank=settings.r,
        alpha=settings.lora_alpha,
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in modules}))
        if isinstance(settings.target_modules, str) or (grouped and recipe.adapter.target_modules == "all-linear")
        else tuple(sorted(settings.target_modules)),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        base_model=info.hub_id,
        tokens={name: tuple(ids) for name, ids in (settings.trainable_token_indices or {}).items()},
    )
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in factors.items()}
    return write_adapter(folder, config, shapes, factors.items(), info.fingerprint, known=linear_modules(info))
