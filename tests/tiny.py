"""Tiny real models: a random Llama and a byte-level tokenizer with a chat template, built from a config."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, plus the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=chat_template
    )


def llama_config(**changes) -> PreTrainedConfig:
    """Two layers, grouped heads, shapes divisible by NF4's block of 64."""
    tokenizer = byte_tokenizer()
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "initializer_range": 0.2,  # so that a random model has clear preferences
            **changes,
        }
    )


def save_tiny_model(folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, **changes) -> Path:
    """A transformers folder with a random 16-bit Llama and its tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config(**changes)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder
