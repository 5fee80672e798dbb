"""A base's hyper-parameters as the keys of a GGUF model, and the tensors of rotary factors that belong to them."""

import math
from typing import Any

import torch

from adapterhub_local.export.families import GgufLayout, head_size, key_heads, limits, llama3_factors, rope_settings


def write_settings(writer: Any, layout: GgufLayout, context: int) -> None:
    """Add what llama.cpp reads of a model beside its tensors and vocabulary."""
    config = layout.config
    size = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(
        config.ffn_hidden_size if config.model_type == "falcon" else config.intermediate_size
    )
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_heads(config))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    _write_rope(writer, layout, size)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.model_type in ("gemma2", "gemma3_text"):
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "phi3":
        writer.add_sliding_window(0)  # the context ends where its window does, see `limits`
    if config.model_type == "falcon":
        writer.add_tensor_data_layout("jploski")
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)


def _write_rope(writer: Any, layout: GgufLayout, size: int) -> None:
    import gguf

    settings = rope_settings(layout.config)
    rope = settings.get("full_attention") or settings[""]
    writer.add_rope_dimension_count(rotary_size(rope, size))
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in settings:
        writer.add_rope_freq_base_swa(settings["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    elif kind == "longrope":
        original = _original(layout)
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = layout.config.max_position_embeddings / original
        factor = rope.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)
    elif layout.config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(layout.config.max_position_embeddings)


def rotary_tensors(layout: GgufLayout) -> dict[str, torch.Tensor]:
    """GGUF's names -> factors of rotary frequencies, (half a head) float32: Llama 3's scaling, Phi-3's longrope."""
    settings = rope_settings(layout.config)
    rope = settings.get("full_attention") or settings[""]
    kind, size = rope.get("rope_type", "default"), head_size(layout.config)
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, size)}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


def rotary_size(rope: dict[str, Any], size: int) -> int:
    """How many dimensions of a head are turned."""
    return int(size * float(rope.get("partial_rotary_factor") or 1.0))


def _original(layout: GgufLayout) -> int:
    """The context that a longrope model was trained with first."""
    rope = rope_settings(layout.config)[""]
    found = rope.get("original_max_position_embeddings") or layout.config.original_max_position_embeddings
    return int(found)


__all__ = ["limits", "rotary_size", "rotary_tensors", "write_settings"]
