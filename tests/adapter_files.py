"""Adapter files for tests: sound ones as PEFT writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.write import tensor_name

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
Q = "model.layers.0.self_attn.q_proj"


def factors(modules: Mapping[str, tuple[int, int, int]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random factors under PEFT's names: module -> (in, out, rank)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (size_in, size_out, rank) in modules.items():
        tensors[tensor_name(module, "A")] = torch.randn(rank, size_in, generator=generator).to(dtype)
        tensors[tensor_name(module, "B")] = torch.randn(size_out, rank, generator=generator).to(dtype)
    return tensors


def save_peft(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **fields}))
    return folder
