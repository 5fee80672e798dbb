"""A tiny random model of every architecture that training is promised for, made from its config."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from adapterhub_local.base.load import close_packing_trap, import_bitsandbytes
from adapterhub_local.base.quantise import quantised_modules
from tests.tiny import VOCABULARY, byte_tokenizer

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "initializer_range": 0.2}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 128}
WINDOW = 16  # shorter than the examples of the tests

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "mistral-window": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "falcon": (FalconConfig, {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-new": (FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": (Gemma3TextConfig, {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}),
    "phi3": (Phi3Config, {**_GROUPED, "sliding_window": None}),
    "gpt-neox": (GPTNeoXConfig, {"intermediate_size": 128}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            **_GROUPED,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-partly": (
        Qwen3MoeConfig,
        {
            **_GROUPED,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [0],  # one layer without experts
        },
    ),
    "mixtral": (
        MixtralConfig,
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "olmoe": (OlmoeConfig, {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        Qwen2MoeConfig,
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
}


def save_architecture(name: str, folder: Path, **changes: Any) -> Path:
    """A transformers folder with a random 16-bit model of this architecture and its tokenizer."""
    kind, shape = SHAPES[name]
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = kind(**_LAYERS, **special, vocab_size=VOCABULARY, max_position_embeddings=512, **{**shape, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_nf4(model: Any) -> Any:
    """The model with its linear layers in NF4, as a loaded base has them; what they are computed in stays."""
    bnb = import_bitsandbytes().nn
    for name in quantised_modules(model):
        old = model.get_submodule(name)
        layer = bnb.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4")
        layer.weight = bnb.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu")
        layer.bias = old.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    model.is_loaded_in_4bit = True  # PEFT then takes its 4-bit layer, and leaves the embeddings alone
    close_packing_trap(model, model.dtype)
    return model.requires_grad_(False)
