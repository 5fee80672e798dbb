"""Mixtures of experts, each expert as three linear layers of its own: what is done with a linear layer is done with it.

transformers 5 holds the experts of a layer in two tensors of three dimensions, which bitsandbytes does not quantise
and LoRA layers do not wrap. Checkpoints on the Hub, transformers 4 and the adapters that people have name each
expert's matrices, and so does a base here. Routers are transformers' own, and stay in 16 bits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from adapterhub_local.base.attention import own_attention
from adapterhub_local.base.mixtures import FAMILIES, Family
from adapterhub_local.base.model import BaseModel, Modules
from adapterhub_local.errors import BadFile

# what a model with its experts apart says that it is: what transformers and PEFT do to the tensors and the adapters of
# the family on loading, joining what is apart here, must not be done to it
MARK = "apart:"
Visit = Callable[[int, torch.Tensor], AbstractContextManager[None]]


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) of x (tokens, hidden), its matrices named as in the family's checkpoints."""

    def __init__(self, hidden: int, inner: int, act: nn.Module, family: Family) -> None:
        super().__init__()
        self.family = family
        self.act = act
        for name in (family.gate, family.up):
            setattr(self, name, nn.Linear(hidden, inner, bias=False))
        setattr(self, family.down, nn.Linear(inner, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in (self.family.gate, self.family.up, self.family.down))
        out: torch.Tensor = down(self.act(gate(x)) * up(x))
        return out


class Experts(nn.ModuleList):
    """The experts of one layer: each computes the tokens that were routed to it, and one without tokens nothing.

    `visit(number, tokens)` is entered around an expert's work on `tokens` (n,) int64, places in the batch, ascending.
    """

    def __init__(self, count: int, hidden: int, inner: int, act: nn.Module, family: Family) -> None:
        super().__init__(Expert(hidden, inner, act, family) for _ in range(count))
        self.visit: Visit = lambda number, tokens: nullcontext()

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of its experts for every token. states (tokens, hidden); chosen, weights (tokens, k)."""
        numbers, order = chosen.reshape(-1).sort(stable=True)
        tokens = order // chosen.shape[-1]
        counts = torch.bincount(numbers, minlength=len(self)).tolist()
        parts = zip(states[tokens].split(counts), tokens.split(counts), strict=True)
        outs = []
        for number, (part, places) in enumerate(parts):
            if len(places):
                with self.visit(number, places):
                    outs.append(self[number](part))
        # back in the tokens' order and summed there: adding into one place from many is in no order on a GPU
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        each = torch.cat(outs)[back].view(*chosen.shape, -1) * weights[..., None]
        return each.sum(1).to(states.dtype)


def has_experts(model: Modules) -> bool:
    """Whether the model has experts that were taken apart here."""
    return any(isinstance(module, Experts) for module in model.modules())


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a config whose models have experts here, None for any other."""
    return FAMILIES.get(type(config).model_type)


def build_model(config: PreTrainedConfig, **options: Any) -> BaseModel:
    """The causal model of `config`, its experts apart. options: those of `from_config`."""
    options = {**own_attention(config), **options}
    if family_of(config) is None:
        made: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    else:
        made = _apart(config)._from_config(_marked(config), **options)
    model: BaseModel = made
    return model


def read_model(folder: Path, **options: Any) -> BaseModel:
    """The causal model in a base's folder, as `from_pretrained` reads it, its experts apart."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {**own_attention(config), **options}
    if family_of(config) is None:
        read: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    else:
        read = _apart(config).from_pretrained(folder, config=_marked(config), **options)
    model: BaseModel = read
    return model


@dataclass(frozen=True)
class Part:
    """One expert's matrix inside of the tensor `name`, which holds those of all: rows [start, end) of `number`."""

    name: str
    number: int
    start: int
    end: int

    def cut(self, joined: Any) -> torch.Tensor:
        """The matrix, of a slice of the file that has the tensor (safetensors' `get_slice`)."""
        matrix: torch.Tensor = joined[self.number, self.start : self.end].contiguous()
        return matrix


def joined_parts(config: PreTrainedConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
    """The experts' matrices of a checkpoint that holds them joined, as transformers 5 has them in memory.

    shapes: of its tensors, by the model's names. Nothing where they are apart already.
    """
    family = family_of(config)
    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        place, _, kind = name.rpartition(".")
        if family is None or len(shape) != 3 or not place.endswith(".experts"):
            continue
        for number in range(shape[0]):
            if kind == "down_proj":
                parts[f"{place}.{number}.{family.down}.weight"] = Part(name, number, 0, shape[1])
            elif kind == "gate_up_proj":
                half = shape[1] // 2
                parts[f"{place}.{number}.{family.gate}.weight"] = Part(name, number, 0, half)
                parts[f"{place}.{number}.{family.up}.weight"] = Part(name, number, half, shape[1])
    return parts


def check_experts(model: BaseModel) -> None:
    """Raise BadFile for a mixture of a family that is not here, or that routes tokens to more experts than it has.

    Of a family that is not here the experts are still tensors of three dimensions.
    """
    joined = [tensor for name, tensor in model.named_parameters() if tensor.dim() == 3 and "expert" in name]
    if joined:
        kind = type(getattr(model, "config", None))
        raise BadFile(
            f"{type(model).__name__} is a mixture of {joined[0].shape[0]} experts of a family "
            f"({getattr(kind, 'model_type', kind.__name__)}) that is not supported. Supported are "
            f"{', '.join(sorted(FAMILIES))}: use one of these, or a dense model of the family"
        )
    count = next((len(module) for module in model.modules() if isinstance(module, Experts)), None)
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", 1)
    if count is not None and not 1 <= chosen <= count:
        raise BadFile(f"config.json routes each token to {chosen} experts (num_experts_per_tok), of {count} there are")


def _apart(config: PreTrainedConfig) -> Any:
    """transformers' class for the config, whose models have their experts apart."""
    own: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    family = FAMILIES[type(config).model_type]

    class Apart(own):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **named: Any) -> None:
            super().__init__(config, *args, **named)
            _take_apart(self, family)

    Apart.__name__ = Apart.__qualname__ = own.__name__
    Apart.__module__ = own.__module__
    return Apart


def _marked(config: PreTrainedConfig) -> Any:
    """A copy of the config for a model with its experts apart. Its class still says the family."""
    ours = deepcopy(config)
    ours.model_type = MARK + type(config).model_type  # type: ignore[misc]  # of this config alone, not of its class
    ours.output_router_logits = False  # what only the loss that balances routers needs, and none is trained here
    return ours


def _take_apart(model: nn.Module, family: Family) -> None:
    for name, module in list(model.named_modules()):
        joined = getattr(module, "gate_up_proj", None)
        if isinstance(joined, nn.Parameter) and joined.dim() == 3:
            count, twice, hidden = joined.shape
            with joined.device:
                experts = Experts(count, hidden, twice // 2, module.act_fn, family)
            model.set_submodule(name, experts.to(joined.dtype))
