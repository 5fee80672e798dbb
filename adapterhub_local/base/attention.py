"""What the attention of a layer does, as one value: read once from what its model hands over, and computed from by all.

Packed rows, the engine's pages, kernels and their reference take an `AttentionKind` and not what it consists of. A new
variant is a field here with what it means in plain torch, which computes it everywhere; until its name is in `KERNELS`
no kernel is given a layer that has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

FUSED = frozenset(("window", "bias"))  # what torch's own fused attention computes, by the mask that is added
KERNELS = frozenset(("window", "softcap"))  # what the kernels over pages compute, all of them
# names that models pass along -> ours; a model's other arguments have no bearing on causal attention, or are refused
_NAMES = {"scaling": "scale", "sliding_window": "window", "softcap": "softcap", "bias": "bias"}
_HARMLESS = frozenset(
    (
        "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "output_router_logits",
    )
)  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class AttentionKind:
    """softmax(cap(scale * query @ keys^T) + bias) @ values over what each token sees, which is none behind itself.

    `window`: how many places a token sees at most, its own included. `softcap`, as Gemma 2 has it: cap * tanh(score /
    cap). `bias(heads, places, like)` (heads, places) is added to the scores of every token. None: without it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    bias: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None

    @cached_property
    def needs(self) -> frozenset[str]:
        """The fields that make it another attention than the plain one."""
        return frozenset(
            field.name for field in fields(self) if field.name != "scale" and getattr(self, field.name) is not None
        )

    @cached_property
    def is_fused(self) -> bool:
        """Whether torch's fused attention computes it, given a mask with what is seen and the bias."""
        return self.needs <= FUSED

    @cached_property
    def has_kernels(self) -> bool:
        """Whether the kernels over pages compute it."""
        return self.needs <= KERNELS

    @property
    def sees_all(self) -> bool:
        """Whether a token sees all before it."""
        return self.window is None

    def within(self, places: int) -> "AttentionKind":
        """The same for sequences of at most `places`: without a window that none of them is longer than."""
        return self if self.window is None or self.window < places else replace(self, window=None)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Which of the places `key` a token at `query` attends to: bool, of the shape they broadcast to."""
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """What softmax takes, of query @ keys^T; what is not seen is masked and a bias added afterwards."""
        scores = self.scale * products
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """The shares of the values (n, heads, queries, places) in float32, of masked scores of this shape."""
        return torch.softmax(scores, dim=-1, dtype=torch.float32)


def read_kind(given: Mapping[str, Any], head_dim: int) -> tuple[AttentionKind, list[str]]:
    """The kind that a layer asks for by the keyword arguments `given`, and those arguments that are not known here."""
    known = {_NAMES[name]: value for name, value in given.items() if name in _NAMES and value is not None}
    unknown = [name for name, value in given.items() if value is not None and name not in _HARMLESS | _NAMES.keys()]
    return _shared(tuple(sorted({"scale": head_dim**-0.5, **known}.items()))), unknown


@lru_cache(maxsize=64)
def _shared(values: tuple[tuple[str, Any], ...]) -> AttentionKind:
    """One object for all layers that ask for the same."""
    return AttentionKind(**dict(values))


def own_attention(config: Any) -> dict[str, str]:
    """Options with which a model of this config is loaded, so that the attention of its own code is right.

    transformers 5.17 gives models that cap their scores (Gemma 2) to torch's attention, which computes them without the
    cap and says nothing.
    """
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if is_capped else {}


def unknown_layers(config: Any) -> str | None:
    """Why layers of a model (its text config) may attend in ways that short sequences do not show; None if not."""
    if kinds := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"its layers of type {', '.join(sorted(kinds))} are not supported"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention is not supported"
    return None


def lacks_window(config: Any, kinds: Mapping[int, AttentionKind]) -> bool:
    """Whether the config speaks of a sliding window that a layer (by number) did not ask for."""
    if types := getattr(config, "layer_types", None):
        return any(each == "sliding_attention" and kinds[layer].window is None for layer, each in enumerate(types))
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(has_window) and all(kind.window is None for kind in kinds.values())


def probes(scale: float) -> tuple[AttentionKind, ...]:
    """One kind of each that kernels compute, as they are checked at start, over some hundred places."""
    return AttentionKind(scale), AttentionKind(scale, window=20), AttentionKind(scale, softcap=5.0)
