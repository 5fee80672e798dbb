"""A tiny random model of every architecture that training is promised for, made from its config."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

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
}


def save_architecture(name: str, folder: Path) -> Path:
    """A transformers folder with a random 16-bit model of this architecture and its tokenizer."""
    kind, shape = SHAPES[name]
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = kind(**_LAYERS, **special, vocab_size=VOCABULARY, max_position_embeddings=512, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
