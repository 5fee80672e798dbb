"""How far a fused model is from its base with the adapter beside it: the KL divergence of their next-token
distributions over a text, in nats a token.
"""

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapterhub_local.base.attention import own_attention
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import load_base, put_on, quiet_loading
from adapterhub_local.base.model import AdaptedModel, BaseModel, CausalModel
from adapterhub_local.base.source import Source
from adapterhub_local.errors import QhubError

PROBE = (  # ordinary prose, questions, a list and a little code: enough to see a mistake, short enough for a CPU
    "The library opens at nine and closes at six, except on Sundays. Last winter the roof had to be repaired, and for "
    "two weeks the readers sat in the town hall. What did they read there? Mostly newspapers, said Mrs Keller, and a "
    "few brought their own novels. Is the sentiment of this review positive or negative? The film is long, but its "
    "last half hour is the best thing I have seen this year. Positive.\n\nTo make the soup you need:\n1. two onions\n"
    "2. 500 g of carrots\n3. a litre of water\n\ndef mean(values):\n    return sum(values) / len(values)\n\n"
    "In 1969 the first message between two computers was sent; it was meant to be LOGIN, but only two letters arrived."
)


LIMIT = 0.05  # nats a token, on average; rounding to 16 bits gives 1e-6 to 5e-3, a module left out a hundred times that


@dataclass(frozen=True)
class Divergence:
    """KL(unfused || fused) in nats: mean and largest over `tokens` positions, and the share of equal greedy tokens."""

    mean: float
    largest: float
    same_greedy: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL from base and adapter {self.mean:.1e} nats a token (largest {self.largest:.1e}), "
            f"{self.same_greedy:.1%} of {self.tokens} greedy tokens the same"
        )

    def check(self) -> None:
        """Raises QhubError if the model is further than LIMIT from base and adapter."""
        if not self.mean <= LIMIT:  # NaN fails too
            raise QhubError(
                f"the fused model failed its check and was not kept: {self}; at most {LIMIT} nats a token are "
                "allowed. Export with --no-check to look at it"
            )


def measure(
    base: BaseInfo, adapter: Path, fused: Path | BaseInfo, text: str = PROBE, *, onto: Source | None = None
) -> Divergence:
    """Compare `base`, or the 16-bit model `onto`, with the PEFT folder `adapter` beside it against the folder or base
    `fused`, in float32.

    One model is in memory at a time.
    """
    with quiet_loading():
        ids = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)(text, return_tensors="pt")[
            "input_ids"
        ]
    plain = load_base(base, dtype=torch.float32).model if onto is None else _load_source(onto)
    reference = _log_probabilities(_with_adapter(plain, adapter), ids)
    del plain
    gc.collect()
    if isinstance(fused, BaseInfo):
        model = load_base(fused, dtype=torch.float32).model
    else:
        with quiet_loading():
            own = own_attention(AutoConfig.from_pretrained(fused, trust_remote_code=False))
            made = AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32, trust_remote_code=False, **own)
            model = made.eval()
    ours = _log_probabilities(model, ids)
    each = (reference.exp() * (reference - ours)).sum(-1)
    same = (reference.argmax(-1) == ours.argmax(-1)).double().mean()
    return Divergence(float(each.mean()), float(each.max()), float(same), len(each))


def _load_source(source: Source) -> BaseModel:
    with quiet_loading():
        model = build_model(source.config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # of tied ones the first only
            parameter.copy_(source.read(name))
    return model


def _with_adapter(model: BaseModel, folder: Path) -> AdaptedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Model has `tie_word_embeddings=True`"
        )  # only the output is adapted: it is right
        return put_on(model, folder)


def _log_probabilities(model: CausalModel, ids: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary), float64 so that a small divergence is not rounding."""
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device)).logits[0]
    return torch.log_softmax(logits.double().cpu(), dim=-1)
