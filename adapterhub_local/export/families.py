"""How GGUF holds the model families: names of tensors, order of rows, offsets of norms, settings, what is left out.

A family is what https://github.com/ggml-org/llama.cpp computes, so what its graph of a family does not have (another
activation, another scale of attention, a kind of rotary scaling) is refused here by name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible

Order = Callable[[str, PreTrainedConfig], torch.Tensor | None]


@dataclass(frozen=True)
class Family:
    """One model_type of transformers in GGUF.

    `order` gives, for a linear layer, the rows of ours in their order there (None: as they are). `biases` matches the
    layers that may have one. `norm_offset` is added to the weights of norms.
    """

    architecture: str  # the name in gguf.MODEL_ARCH
    activations: tuple[str, ...]
    order: Order = lambda module, config: None
    biases: str = "(?!)"
    norm_offset: float = 0.0
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")


def _interleaved(module: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """llama's q and k: each head's two rotary halves become pairs."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": key_heads(config)}.get(module.rpartition(".")[2])
    if heads is None:
        return None
    return torch.arange(heads * head_size(config)).view(heads, 2, -1).swapaxes(1, 2).flatten()


def _neox(module: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """GPT-NeoX's q, k and v stand side by side in each head; there all q, all k, all v."""
    if not module.endswith("query_key_value"):
        return None
    return torch.arange(3 * config.hidden_size).view(config.num_attention_heads, 3, -1).swapaxes(0, 1).flatten()


def _falcon(module: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """Falcon's groups of queries with their key and value; there all q, all k, all v."""
    if not module.endswith("query_key_value"):
        return None
    groups, size = key_heads(config), head_size(config)
    rows = torch.arange((config.num_attention_heads + 2 * groups) * size).view(groups, -1, size)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


_LLAMA = Family("LLAMA", ("silu",), _interleaved, biases=".*", rope_kinds=("default", "linear", "yarn", "llama3"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("QWEN2", ("silu",), biases=r".*\.(q|k|v)_proj"),
    "qwen3": Family("QWEN3", ("silu",)),
    "gemma2": Family("GEMMA2", ("gelu_pytorch_tanh",), norm_offset=1.0, rope_kinds=("default", "linear")),
    "gemma3_text": Family("GEMMA3", ("gelu_pytorch_tanh",), norm_offset=1.0, rope_kinds=("default", "linear")),
    "phi3": Family("PHI3", ("silu",), rope_kinds=("default", "longrope")),
    "falcon": Family("FALCON", ("gelu",), _falcon, biases=r".*(ln_\w+|layernorm)", rope_kinds=("default",)),
    "gpt_neox": Family(
        "GPTNEOX", ("gelu", "gelu_new", "gelu_fast"), _neox, biases=".*", rope_kinds=("default", "linear")
    ),
}


def head_size(config: PreTrainedConfig) -> int:
    """Rows of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values."""
    if config.model_type == "falcon":  # num_kv_heads counts in the new layout only
        if config.new_decoder_architecture or not config.multi_query:
            return int(config.num_kv_heads)
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class GgufLayout:
    """A base's family in GGUF. Raises Incompatible for a family or a setting that llama.cpp does not compute."""

    def __init__(self, base: BaseInfo) -> None:
        import gguf

        self.base = base
        self.config = AutoConfig.from_pretrained(base.folder)
        found = FAMILIES.get(self.config.model_type)
        if found is None:
            raise Incompatible(
                f"base '{base.name}' ({base.architecture}) is of a family whose tensors GGUF names in ways not known "
                f"here: GGUF is known for {', '.join(FAMILIES)}"
            )
        self.family = found
        self.architecture = getattr(gguf.MODEL_ARCH, found.architecture)
        self._names = gguf.get_tensor_name_map(self.architecture, self.config.num_hidden_layers)
        for setting in unsupported(self.config, found):
            raise Incompatible(
                f"llama.cpp does not compute base '{base.name}' ({base.architecture}) as it is: {setting}"
            )

    def tensor_name(self, name: str) -> str | None:
        """GGUF's name of one of the base's tensors, such as `model.norm.weight`; None if it has no place there."""
        module, _, kind = name.rpartition(".")
        known = self._names.get_name(module)
        if known is None or kind not in ("weight", "bias"):
            return None
        if kind == "bias" and not re.fullmatch(self.family.biases, module):
            return None
        return f"{known}.{kind}"

    def to_gguf(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """Weights, biases or factors B of a linear layer, with their rows in GGUF's order."""
        order = self.family.order(module, self.config)
        return rows if order is None else rows[order].contiguous()

    def from_gguf(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_gguf`; rows of another number than the layer has are left to whoever checks shapes."""
        order = self.family.order(module, self.config)
        return rows if order is None or len(order) != len(rows) else rows[torch.argsort(order)].contiguous()

    def offset(self, name: str) -> float:
        """What is added to a tensor there: Gemma's norms are stored without their 1 here."""
        return self.family.norm_offset if name.endswith("norm.weight") else 0.0


def unsupported(config: PreTrainedConfig, family: Family) -> list[str]:
    """What of a config the family's graph in llama.cpp does not have, each as a sentence."""
    kind = config.model_type
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = config.activation if kind == "falcon" else activation
    faults = []
    if activation not in family.activations:
        faults.append(f"its activation is {activation}, there it is {family.activations[0]}")
    for name, rope in rope_settings(config).items():
        if rope.get("rope_type", "default") not in family.rope_kinds:
            faults.append(f"its rotary embeddings are scaled by {rope['rope_type']} {name}".rstrip())
        odd = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & rope.keys()
        if rope.get("rope_type") == "yarn" and any(rope[key] is not None for key in odd):
            faults.append(f"its yarn scaling has {sorted(odd)[0]}")
    if kind in ("gemma2", "gemma3_text"):
        is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[kind]
        size = config.hidden_size // config.num_attention_heads if is_27b else head_size(config)
        if config.query_pre_attn_scalar != size:
            faults.append(f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, there it is {size}")
        if list(config.layer_types) != expected_layers(config):
            faults.append("its sliding-window layers differ from the family's")
    if kind in ("qwen2", "qwen3") and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        faults.append("it has layers with a sliding window (use_sliding_window)")
    if kind == "gemma2" and not config.tie_word_embeddings:
        faults.append("its output head is not tied to the embeddings")
    if kind == "falcon" and (config.alibi or not config.parallel_attn):
        faults.append("it has alibi positions" if config.alibi else "its layers are not parallel")
    if kind == "gpt_neox" and not config.attention_bias:
        faults.append("its attention has no bias")
    return faults


def expected_layers(config: PreTrainedConfig) -> list[str]:
    """The attention of Gemma's layers as llama.cpp has it: every second (sixth) layer sees all, the others a window."""
    period = 2 if config.model_type == "gemma2" else 6
    return [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]


def rope_settings(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The rotary settings: under "" for most, for Gemma 3 those of full and sliding attention."""
    rope = config.rope_parameters or {}
    return {name: value for name, value in rope.items() if isinstance(value, dict)} or {"": rope}


def limits(config: PreTrainedConfig) -> tuple[int, list[str]]:
    """The context up to which llama.cpp computes the same, and why it is shorter than the model's."""
    longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3") and window and window < longest:
        return window, [
            f"llama.cpp has no sliding window for {config.model_type}: the context is limited to {window} tokens"
        ]
    return longest, []


def llama3_factors(rope: dict[str, Any], size: int) -> torch.Tensor:
    """By what each rotary frequency is divided, (size / 2) float32, for Llama 3's scaling."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    length = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
