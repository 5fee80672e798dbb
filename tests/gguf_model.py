"""A base as a whole GGUF model, dequantised, so that llama.cpp can be asked what it makes of an adapter."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.export.gguf import ARCHITECTURES, permute


def write_gguf_model(base: BaseInfo, target: Path, *, dtype: torch.dtype = torch.float32, like: Path | None = None):
    """Write the dequantised base; vocabulary and settings come from the GGUF file `like`, or else are plain bytes."""
    config = AutoConfig.from_pretrained(base.folder)
    name, is_permuted = ARCHITECTURES[config.model_type]
    architecture = getattr(gguf.MODEL_ARCH, name)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    if like is None:
        _settings(writer, config)
    else:
        for field in gguf.GGUFReader(like).fields.values():
            if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
                writer.add_key_value(field.name, field.contents(), field.types[0], _element(field))
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = BaseWeights(base)
    for key in weights.names:
        tensor = weights.read(key).float()
        if is_permuted and key.endswith("q_proj.weight"):
            tensor = permute(tensor, config.num_attention_heads)
        elif is_permuted and key.endswith("k_proj.weight"):
            tensor = permute(tensor, config.num_key_value_heads)
        stored = tensor.to(dtype) if tensor.dim() == 2 else tensor
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(stored.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _element(field):
    return field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None


def _settings(writer: gguf.GGUFWriter, config) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
