"""Answers drawn by the serving engine over the very base that is trained, with the factors as they are at that moment.

No second copy of the base is in memory. All prompts of a step are one batch without padding, what several answers share
is computed once, and who has ended makes room for the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.errors import Incompatible, QhubError
from adapterhub_local.rows.bounds import DRAWN_AT_ONCE, drawn_tokens
from adapterhub_local.train.twin import twin_of
from serve.adapters.record import Label
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams

PREFIX = "base_model.model."  # of PEFT's names


@dataclass(frozen=True)
class Draw:
    """How answers are drawn: `samples` of each prompt, temperature 0 for the likeliest; `ends` are the stop tokens."""

    samples: int
    max_tokens: int
    temperature: float
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Live:
    """The adapter that is trained, as it was at one step: a source that is in memory already."""

    content_digest: str
    name: str = "trained"
    base_fingerprint: None = None

    def __str__(self) -> str:
        return self.name


class Drawer:
    """Draws answers of a PEFT model by an engine of its own.

    tokens: the most of prompt and answer together; longest: tokens of the longest prompt that is trained.
    Raises Incompatible for what the engine cannot compute: this base, or this kind of adapter.
    """

    def __init__(
        self, model: AdaptedModel, info: BaseInfo, tokenizer: PreTrainedTokenizerBase, how: Draw, longest: int,
        tokens: int,
    ) -> None:  # fmt: skip
        if reason := why_not(model):
            raise Incompatible(reason)
        self.model, self.steps = model, 0
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or tokens
        held = _kv_bytes(config, drawn_tokens(how.samples, how.max_tokens, longest, tokens), model.dtype)
        options = EngineOptions.on(
            model.device.type, max_rows=DRAWN_AT_ONCE, max_length=min(tokens, limit), tokens_per_step=1024,
            max_adapters=1, adapter_bytes=2**50, queue_limit=2**20, kv_bytes=held, prefix_bytes=held,
            base_bytes=0,
            speculation="off",  # which measures how long steps take, and so is not the same in every run
        )  # fmt: skip
        self.engine = build_engine(LoadedBase(info, twin_of(model), tokenizer), options)

    def draw(self, prompts: Sequence[Sequence[int]], how: Draw) -> list[list[list[int]]]:
        """The ids of the answers to each prompt, each up to a token that ends it. Raises QhubError.

        Repeatable: seeds are torch's, which a run keeps.
        """
        self.steps += 1
        live = Live(f"trained-{self.steps}")
        engine, pool = self.engine, self.engine.pool
        pool.insert(live.content_digest, live_factors(self.model), Label(live.name, (live.name,)))
        seeds = torch.randint(2**31, (len(prompts) * how.samples,)).tolist()
        requests = []
        for number, seed in enumerate(seeds):
            prompt = tuple(prompts[number // how.samples])
            most = max(1, min(how.max_tokens, engine.max_length - len(prompt)))  # answers end with the context
            settings = SamplingParams(most, how.temperature, seed=seed, stop_token_ids=frozenset(how.ends))
            requests.append(Request(str(number), prompt, settings, engine.acquire(live).digest))  # type: ignore[arg-type]
        engine.submit(*requests)
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise QhubError(f"an answer could not be drawn: {output.error}")
        engine.release(live.content_digest)
        pool.drop(live.content_digest)  # its slot is the next one's
        found = [list(request.output) for request in requests]
        return [found[start : start + how.samples] for start in range(0, len(found), how.samples)]


def why_not(model: AdaptedModel) -> str | None:
    """Why the engine cannot compute with the adapter as it is trained, None if it can."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if any(layer.lora_variant for layer in layers):
        return "DoRA's lengths change with every step"
    if any(isinstance(layer, TrainableTokensLayer) for layer in model.modules()):
        return "the engine is not given rows of the embeddings as they are trained"
    return None


def _kv_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Of keys and values of so many tokens."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = (getattr(config, "num_key_value_heads", None) or heads) * size
    return int(2 * config.num_hidden_layers * kept * dtype.itemsize * tokens)


@torch.no_grad()
def live_factors(model: AdaptedModel) -> dict[str, tuple[torch.Tensor, ...]]:
    """Module -> A (in, r) and B (r, out) with the scaling in it, in the dtype of the base, as slots take them."""
    from peft.tuners.lora import LoraLayer

    factors: dict[str, tuple[torch.Tensor, ...]] = {}
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        active = layer.active_adapters[0]
        if active in layer.lora_A:
            A, B = layer.lora_A[active].weight, layer.lora_B[active].weight
            scaled = B.T.float() * layer.scaling[active]
            factors[name.removeprefix(PREFIX)] = (A.T.to(model.dtype).contiguous(), scaled.to(model.dtype).contiguous())
    return factors
