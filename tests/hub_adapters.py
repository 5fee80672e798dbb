"""Adapters with random factors for the tests of the Hub: published, pushed, pulled, or as plain PEFT leaves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapterhub_local.hub import pull, push
from adapterhub_local.lora import write
from adapterhub_local.lora.config import CONFIG, WEIGHTS, AdapterConfig
from adapterhub_local.registry import Registry, Version
from tests.hub_server import HubServer

REPO = "me/sentiment-lora"
BASE = "someone/tiny"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
LINEAGE = {
    "kind": "train",
    "task": "sentiment",
    "base": {"name": "tiny", "fingerprint": "sha256:" + "ab" * 32, "hub_id": BASE, "revision": None},
    "adapter": {"rank": 4, "alpha": 8.0, "target_modules": list(MODULES), "num_parameters": 896},
    "recipe": {"text": 'base = "tiny"\nnote = "a ``` fence"\n', "digest": "sha256:" + "cd" * 32},
    "data": [{"role": "train", "file": "sentiment|train.jsonl", "digest": "sha256:" + "ef" * 32, "rows": 100}],
    "seed": 0,
    "metrics": {
        "sentiment": {
            "rows": 20,
            "base": {"loss": 2.5, "exact_match": 0.25},
            "adapter": {"loss": 0.5, "exact_match": 0.875},
        }
    },
}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Random factors of rank 4 under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for module, rows in zip(MODULES, (64, 32), strict=True):  # as in the base `tiny`
        shapes |= {write.tensor_name(module, "A"): (4, 64), write.tensor_name(module, "B"): (rows, 4)}
    return {name: torch.randn(*size, generator=generator) for name, size in shapes.items()}


def publish(
    registry: Registry, name: str = "sentiment", *, seed: int = 0, hub_id: str | None = BASE, **lineage
) -> Version:
    """A version with random factors, as training would publish it; `hub_id` is that of its base."""
    factors = tensors(seed)
    folder = registry.home.root.parent / f"made-{name.replace('/', '-')}-{seed}-{len(registry.versions())}"
    folder.mkdir()
    config = AdapterConfig(4, 8.0, MODULES, base_model=hub_id)
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in factors.items()}
    lineage = {**LINEAGE, "base": {**LINEAGE["base"], "hub_id": hub_id}, **lineage}
    files = write.write_adapter(folder, config, shapes, factors.items(), lineage["base"]["fingerprint"])
    return registry.publish(name, files, lineage)


def peft_files(folder: Path, **settings) -> dict[str, bytes]:
    """What PEFT's save_pretrained leaves, with a base that was a folder of its author."""
    folder.mkdir()
    save_file(tensors(3), folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    config |= {"base_model_name_or_path": BASE, "use_dora": False, **settings}
    return {WEIGHTS: (folder / WEIGHTS).read_bytes(), CONFIG: json.dumps(config).encode()}


def pushed(hub: HubServer, registry: Registry, reference: str = "sentiment", **options):
    return push(registry, reference, REPO, token=hub.token, endpoint=hub.endpoint, **options)


def pulled(hub: HubServer, registry: Registry, **options):
    return pull(registry, REPO, token=hub.token, endpoint=hub.endpoint, **options)


def is_untouched(registry: Registry) -> bool:
    """Nothing registered, nothing left in the staging folder."""
    return registry.versions() == [] and (not registry.home.tmp.exists() or list(registry.home.tmp.iterdir()) == [])
