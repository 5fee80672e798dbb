"""Random adapters for a base, strong enough to change its answers, published the ordinary way."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.weights import dequantised
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.registry import Registry, Version

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_shapes(config) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of a Llama but the one that makes logits."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {
        f"model.layers.{layer}.{part}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for part, linears in (("self_attn", attention), ("mlp", mlp))
        for name, shape in linears.items()
    }


def write_random(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    seed: int,
    rank: int = 8,
    modules: Sequence[str] = LINEARS,
    strength: float = 0.5,
    fingerprint: str | None = None,
    norms: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | None = None,
    **config,
) -> dict[str, Path | bytes]:
    """The files of an adapter with random factors in the layers whose names end in one of `modules`.

    With `norms` of the base's rows (out_features) it has DoRA. Numbers are rounded to `dtype`, and written in `held`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (in_features, out_features) in shapes.items():
        if module.rpartition(".")[2] in modules:
            scale = strength / (rank * in_features) ** 0.5
            tensors[tensor_name(module, "A")] = torch.randn(rank, in_features, generator=generator)
            tensors[tensor_name(module, "B")] = torch.randn(out_features, rank, generator=generator) * scale
            if norms is not None:
                noise = 1 + 0.3 * torch.randn(out_features, generator=generator)
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = norms[module] * noise
    tensors = {name: tensor.to(dtype).to(held or dtype) for name, tensor in tensors.items()}
    settings = AdapterConfig(
        **{"rank": rank, "alpha": 2.0 * rank, "target_modules": tuple(modules), "use_dora": bool(norms), **config}
    )
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_adapter(folder, settings, entries, tensors.items(), fingerprint)


def publish(
    registry: Registry, name: str, base: BaseInfo, *, alias: str | None = None, dora: bool = False, **settings
) -> Version:
    """A random adapter for a Llama base as the next version of `name`."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = llama_shapes(AutoConfig.from_pretrained(base.folder))
        norms = {module: weight.norm(dim=1) for module, weight, _ in dequantised(base, shapes)} if dora else None
        files = write_random(Path(folder), shapes, fingerprint=base.fingerprint, norms=norms, **settings)
        return registry.publish(name, files, {"base": base.lineage()}, alias=alias)


@pytest.fixture(scope="session")
def served_registry(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with three adapters of different ranks and modules, one of them with an alias."""
    registry = Registry(tmp_path_factory.mktemp("served"))
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=8, alias="prod")
    publish(registry, "beta", base, seed=2, rank=3, modules=("q_proj", "v_proj"))
    publish(registry, "gamma", base, seed=3, rank=16, use_rslora=True)
    return registry
