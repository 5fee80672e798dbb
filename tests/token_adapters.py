"""Adapters with rows of embeddings of their own, made by PEFT on a tiny base whose head is tied to them or not."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapterhub_local.adopt import adopt
from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home
from tests.tiny import save_tiny_model

Indices = list[int] | dict[str, list[int]]
EMBEDDINGS = "model.embed_tokens"


def base_of_kind(kind: str, home: Home, folder: Path) -> BaseInfo:
    """The base `tiny`, "tied" or "untied"."""
    return add_base("tiny", save_tiny_model(folder / kind, tie_word_embeddings=kind == "tied"), home)


def save_tokens(
    info: BaseInfo, folder: Path, indices: Indices, seed: int, *, strength: float = 1.0, **settings: Any
) -> Path:
    """What PEFT saves of random factors, and rows moved at random by as much as `strength` times a row's entries."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    config = LoraConfig(trainable_token_indices=indices, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(info, device="cpu").model, config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data = parameter.data + 0.2 * strength * torch.randn(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folder


def register(registry: Registry, name: str, info: BaseInfo, folder: Path) -> Version:
    """The folder as `qhub add` takes it in."""
    staging = folder.with_name(f"{folder.name}-{name}-staging")
    staging.mkdir()
    return adopt(folder, name, registry, info.lineage(), staging_folder=staging, info=info, confirmed=True)


def publish(registry: Registry, name: str, info: BaseInfo, folder: Path, indices: Indices, seed: int) -> Version:
    """A random adapter with rows of these tokens as the next version of `name`."""
    return register(registry, name, info, save_tokens(info, folder / f"{name}-{seed}", indices, seed))


def loaded_by_peft(info: BaseInfo, folder: Path | None) -> Any:
    """The base in float32 with the adapter in a folder on it, by plain PEFT; None: the base alone."""
    model = load_base(info, device="cpu").model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return model.eval() if folder is None else PeftModel.from_pretrained(model, folder).eval()


@torch.inference_mode()
def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary)."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return found
