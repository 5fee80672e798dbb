"""What is asked of a model: a causal language model of transformers, with or without PEFT's adapter around it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import torch
from torch import nn


class CausalModel(Protocol):
    """A causal language model. `generation_config` is None for a model that has none.

    Called with `input_ids` (batch, tokens) int64 and keyword arguments of transformers it gives an output whose
    `logits` are (batch, tokens, vocabulary), of the tokens in `logits_to_keep` if that is given.
    """

    config: Any
    generation_config: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, **inputs: Any) -> Any: ...

    def eval(self) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def generate(self, **given: Any) -> torch.Tensor: ...


class AdaptedModel(CausalModel, Protocol):
    """PEFT's model over a causal language model: the same, with an adapter that can be switched off."""

    peft_config: Any

    def get_base_model(self) -> Any: ...

    def disable_adapter(self) -> AbstractContextManager[None]: ...
