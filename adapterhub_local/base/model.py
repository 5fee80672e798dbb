"""What a model is here: a causal language model of transformers, and the same with PEFT's adapter around it.

Neither library says so in types: transformers gives back Any, and PEFT hands on by `__getattr__` what it wraps. Named
here is all that is asked of either, their private parts included; an attribute that is not named is an error of mypy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig


class Modules(Protocol):
    """A tree of modules, which every module of torch is."""

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...


class TokenLayer(Protocol):
    """What tokens are looked up in, or logits are made with: its weight (tokens, hidden) has a row for each."""

    @property
    def weight(self) -> torch.Tensor: ...

    def __call__(self, given: torch.Tensor, /) -> torch.Tensor: ...

    def register_forward_hook(self, hook: Callable[..., Any]) -> RemovableHandle: ...


class Output(Protocol):
    """What a model answers: `logits` (batch, tokens, vocabulary), and its cache of keys and values if one is used."""

    logits: torch.Tensor
    past_key_values: Any  # of a class of transformers' for each kind of cache


class CausalModel(Modules, Protocol):
    """A causal language model, with or without an adapter. `generation_config` is None for a model that has none.

    Called with `input_ids` (batch, tokens) int64 and keyword arguments of transformers it gives an output whose
    `logits` are (batch, tokens, vocabulary), of the tokens in `logits_to_keep` if that is given.
    """

    config: Any  # each family's has attributes of its own
    generation_config: GenerationConfig | None
    training: bool
    zero_grad: Callable[..., None]  # an attribute, as the trainer puts one of its own in its place

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, **inputs: Any) -> Output: ...

    def eval(self) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def state_dict(self, *, keep_vars: bool = False) -> Mapping[str, torch.Tensor]: ...

    def get_input_embeddings(self) -> TokenLayer: ...

    def get_output_embeddings(self) -> TokenLayer | None: ...

    def generate(self, **given: Any) -> torch.Tensor: ...

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any]) -> None: ...

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> RemovableHandle: ...


class BaseModel(CausalModel, Protocol):
    """A causal language model itself. `base_model` is its body, the part below the head."""

    @property
    def base_model(self) -> nn.Module: ...

    def set_input_embeddings(self, value: nn.Module) -> None: ...

    def set_attn_implementation(self, attn_implementation: str) -> None: ...


class Tuner(Protocol):
    """What PEFT keeps of the layers that an adapter changes."""

    targeted_module_names: list[str]


class AdaptedModel(CausalModel, Protocol):
    """PEFT's model over a causal language model: the same, with an adapter that can be switched off."""

    peft_config: Mapping[str, Any]  # the adapter's is "default"
    _is_accelerate_prepared: bool  # accelerate wraps a model in DistributedDataParallel unless this is set

    @property
    def base_model(self) -> Tuner: ...

    def get_base_model(self) -> BaseModel: ...

    def disable_adapter(self) -> AbstractContextManager[None]: ...

    def unload(self) -> object: ...


def inner_model(model: CausalModel) -> BaseModel:
    """The model without PEFT around it; an adapter's layers stay where they are."""
    given: Any = model  # which of the two it is shows at run time only
    base: BaseModel = given.get_base_model() if hasattr(given, "get_base_model") else given
    return base


def as_module(model: CausalModel) -> nn.Module:
    """The same model as what other libraries ask for: a module of torch, which each of them is."""
    assert isinstance(model, nn.Module)
    return model
