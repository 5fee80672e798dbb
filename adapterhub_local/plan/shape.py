"""The shape of a decoder from its config.json: what decides memory and time, without torch or transformers.

Families are known by `model_type`; a config with the same names (hidden_size, intermediate_size, ...) is read as
a llama and says so. Mixtures of experts of other families than a base may be of, and models that are not decoders,
are refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.base.mixtures import FAMILIES, Family
from adapterhub_local.base.quantisation import OURS, Quantisation, find_kind
from adapterhub_local.errors import BadFile, InputError, NotFound

# model_type -> what differs from a llama: norms of a layer, norms of queries and keys, gate, fused projections
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "smollm3": {},
    "granite": {},
    "qwen3": {"head_norms": True},
    "gemma": {},
    "gemma2": {"norms": 4, "scores": "eager"},
    "gemma3_text": {"norms": 4, "head_norms": True},
    "phi3": {"fused": True},
    "qwen3_moe": {"head_norms": True},
    "qwen2_moe": {},
    "mixtral": {},
    "olmoe": {"wide_norms": True},
}
OTHERS = ("gpt_neox", "falcon")  # no gate, layer norms, one projection for queries, keys and values
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense")
TIED = ("gemma", "gemma2", "gemma3_text", "falcon")  # where the config does not say


@dataclass(frozen=True)
class Linear:
    """One linear layer of every decoder block: `reads` names the tensor it takes, which others may take too.

    Of experts there are `copies`, of which every token meets `active`.
    """

    name: str
    out_features: int
    in_features: int
    reads: str
    copies: int = 1
    active: int = 1

    @property
    def group(self) -> str:
        """The part of the block it is in: attention or mlp."""
        return "attention" if self.name in ATTENTION else "mlp"

    @property
    def size(self) -> int:
        """Of one copy."""
        return self.out_features * self.in_features

    @property
    def total(self) -> int:
        return self.size * self.copies


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` equal blocks. Sizes in elements; `norms` counts the norms of a block.

    `intermediate` is how wide the inside of an MLP is, all experts together that a token meets: `active` of `experts`
    (0: a dense model).
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    is_gated: bool
    linears: tuple[Linear, ...]
    norms: int
    is_layer_norm: bool
    has_head_norms: bool
    is_fused: bool
    copies_result: bool
    scores: str
    makes_mask: bool
    max_length: int
    window: int | None
    is_known: bool
    experts: int = 0
    active: int = 0
    has_wide_norms: bool = False  # of queries and keys, over all heads at once
    quantisation: Quantisation = OURS  # of the linear layers

    @property
    def linear_size(self) -> int:
        """Parameters in 4 bits."""
        return self.layers * sum(linear.total for linear in self.linears)

    @property
    def active_size(self) -> int:
        """Of these, the parameters that a token is multiplied with."""
        return self.layers * sum(linear.size * linear.active for linear in self.linears)

    @property
    def embedding_size(self) -> int:
        """Parameters of input and output embeddings, which stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        others = self.hidden * (self.layers * (self.norms + self.experts) + 1)  # norms and routers
        return self.linear_size + self.embedding_size + others


def read_config(path: Path) -> Shape:
    """The shape in a config.json, or in a folder that has one. Raises NotFound, BadFile, InputError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}: give a config.json or a folder that has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{file} is not a config.json: {error}") from None
    if not isinstance(config, dict):
        raise BadFile(f"{file} is not a config.json: it is not a JSON object")
    return read_shape(config, str(file))


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape a transformers config describes. Raises InputError for a model this does not know how to count."""
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    kind = str(config.get("model_type", "unknown"))
    mixture = FAMILIES.get(kind)
    experts = config.get("num_local_experts") or config.get("num_experts")
    if mixture is None and isinstance(experts, int) and experts > 1:
        raise InputError(
            f"{where}: {kind} is a mixture of experts that is not supported, so its memory is not known. "
            f"Supported are {', '.join(sorted(FAMILIES))}"
        )
    if mixture is not None and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise InputError(
            f"{where}: only some layers of this {kind} have experts, which `qhub plan` cannot count yet; "
            "`qhub train --dry-run` shows whether it fits"
        )

    def number(name: str, *others: str, default: int | None = None) -> int:
        value = next((config[key] for key in (name, *others) if config.get(key) is not None), default)
        if type(value) is not int or not 0 < value < 2**40:
            raise InputError(f"{where}: {name} must be a whole number of 1 or more, not {value!r} ({kind})")
        return value

    hidden, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    layers, head_dim = number("num_hidden_layers", "n_layer"), number("head_dim", default=max(1, hidden // heads))
    if kind == "falcon":
        grouped = config.get("new_decoder_architecture", False)
        kv_heads = (
            number("num_kv_heads", default=heads) if grouped else (1 if config.get("multi_query", True) else heads)
        )
    else:
        kv_heads = heads if kind == "gpt_neox" else number("num_key_value_heads", default=heads)
    inner = number("intermediate_size", "ffn_hidden_size", default=4 * hidden)
    routed: tuple[Linear, ...] | None = None
    count = active = 0
    if mixture is not None:
        count, active = number("num_local_experts", "num_experts"), number("num_experts_per_tok")
        own = number(mixture.inner)
        shared = number("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0
        inner, routed = active * own + shared, _experts(mixture, hidden, own, count, active, shared)
    traits = LLAMAS.get(kind, {})
    is_fused = bool(traits.get("fused"))
    norms = _num_norms(kind, config, traits)
    method = config.get("quantization_config")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return Shape(
        model_type=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocabulary=number("vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", kind in TIED)),
        is_gated=kind not in OTHERS,
        linears=_linears(kind, norms, is_fused, hidden, heads * head_dim, kv_heads * head_dim, inner, routed),
        norms=norms,
        is_layer_norm=kind in OTHERS,
        has_head_norms=bool(traits.get("head_norms")),
        is_fused=is_fused,
        copies_result=is_fused or kind == "gpt_neox",
        scores=_scores(kind, kv_heads, heads, traits),
        makes_mask=kind == "falcon",
        max_length=number("max_position_embeddings", default=2048),
        window=window if isinstance(window, int) else None,
        is_known=kind in LLAMAS or kind in OTHERS,
        experts=count,
        active=active,
        has_wide_norms=bool(traits.get("wide_norms")),
        quantisation=(find_kind(method)[0] if isinstance(method, Mapping) else None) or OURS,
    )


def _experts(mixture: Family, hidden: int, inner: int, count: int, active: int, shared: int) -> tuple[Linear, ...]:
    """The linear layers of a block's MLP: those of the experts, and of one that all tokens meet, if there is one."""
    found = [
        Linear(mixture.gate, inner, hidden, "experts", count, active),
        Linear(mixture.up, inner, hidden, "experts", count, active),
        Linear(mixture.down, hidden, inner, "inner", count, active),
    ]
    if shared:
        found += [
            Linear("gate_proj", shared, hidden, "mlp"),
            Linear("up_proj", shared, hidden, "mlp"),
            Linear("down_proj", hidden, shared, "shared inner"),
            Linear("shared_expert_gate", 1, hidden, "mlp"),
        ]
    return tuple(found)


def _scores(kind: str, kv_heads: int, heads: int, traits: Mapping[str, Any]) -> str:
    """Whether attention keeps its scores: `none` (fused kernels), `math` (one head of keys, broadcast), `eager`."""
    return "math" if kind == "falcon" and kv_heads == 1 < heads else str(traits.get("scores", "none"))


def _num_norms(kind: str, config: Mapping[str, Any], traits: Mapping[str, Any]) -> int:
    if kind == "falcon" and config.get("parallel_attn", True) and not config.get("new_decoder_architecture", False):
        return 1
    return int(traits.get("norms", 2))


def _linears(
    kind: str,
    norms: int,
    is_fused: bool,
    hidden: int,
    queries: int,
    keys: int,
    inner: int,
    routed: tuple[Linear, ...] | None,
) -> tuple[Linear, ...]:
    """The linear layers of a block, in the order in which they are computed."""
    if kind in OTHERS:
        return (
            Linear("query_key_value", queries + 2 * keys, hidden, "attention"),
            Linear("dense", hidden, queries, "heads"),
            Linear("dense_h_to_4h", inner, hidden, "mlp" if norms > 1 else "attention"),
            Linear("dense_4h_to_h", hidden, inner, "inner"),
        )
    if is_fused:
        return (
            Linear("qkv_proj", queries + 2 * keys, hidden, "attention"),
            Linear("o_proj", hidden, queries, "heads"),
            Linear("gate_up_proj", 2 * inner, hidden, "mlp"),
            Linear("down_proj", hidden, inner, "inner"),
        )
    attention = (
        Linear("q_proj", queries, hidden, "attention"),
        Linear("k_proj", keys, hidden, "attention"),
        Linear("v_proj", keys, hidden, "attention"),
        Linear("o_proj", hidden, queries, "heads"),
    )
    if routed is not None:
        return attention + routed
    return (
        *attention,
        Linear("gate_proj", inner, hidden, "mlp"),
        Linear("up_proj", inner, hidden, "mlp"),
        Linear("down_proj", hidden, inner, "inner"),
    )
