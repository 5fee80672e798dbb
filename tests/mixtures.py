"""Tiny mixtures of experts as bases, and transformers' own model of the same weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.mixtures import checkpoint_name
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.settings import Home
from tests.architectures import save_architecture
from tests.tiny import byte_tokenizer

# other layers of these have the names of an expert's: PEFT joins the factors of experts, and drops those of the others
ALIKE = ("qwen2-moe", "qwen3-moe-partly")
MIXTURES = ("qwen3-moe", "qwen3-moe-partly", "mixtral", "olmoe", "qwen2-moe")


def add_mixture(name: str, home: Home, folder: Path) -> BaseInfo:
    """The architecture as the base `tiny`, made from the 16-bit model in `folder`."""
    return add_base("tiny", save_architecture(name, folder), home)


def dequantised_model(base: BaseInfo, folder: Path) -> Any:
    """transformers' own model, its experts joined as it joins them, with the base's dequantised weights, in float32."""
    weights, config = BaseWeights(base), AutoConfig.from_pretrained(base.folder)
    del config.quantization_config
    tensors = {checkpoint_name(name, config.model_type): weights.read(name).float() for name in weights.names}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(notes.values()), notes
    return model.eval().requires_grad_(False)
