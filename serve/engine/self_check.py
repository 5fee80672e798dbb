"""The check at load: does a packed batch give what the model gives for each sequence alone?

Some architectures take the attention function and ignore it, or need a mask only they can make. They
are refused here, in numbers, before a single wrong answer is given.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapterhub_local.base.attention import AttentionKind, lacks_window, unknown_layers
from adapterhub_local.base.model import BaseModel
from adapterhub_local.cores import Cores
from adapterhub_local.errors import Incompatible
from serve.engine.attention import NAME, register
from serve.engine.cache import KVCache
from serve.engine.falcon import replace_attention
from serve.engine.fused import FusedStep
from serve.engine.lean import LeanForward
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.engine.runner import Runner
from serve.kernels.choose import Kernels
from serve.lora.linear import LoraContext

logger = logging.getLogger(__name__)

LENGTHS = (20, 6)  # two pages, and one
# of the norm of the logits; half precision rounds to 3 or 4 digits in every layer
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Checked:
    """What the check found: bytes of a page of the KV cache; what each layer's attention does; and the model's own last
    logits (2, vocabulary) of the two sequences."""

    page_bytes: int
    kinds: list[AttentionKind]
    logits: torch.Tensor


def use_packed_attention(model: BaseModel, kernels: Kernels | None = None) -> Checked:
    """Give `model` the packed attention, after checking that it is right.

    Raises Incompatible, and leaves the model as it was. Should only the kernel be wrong, it is dropped.
    """
    register()
    before = model.config._attn_implementation
    sequences = _sequences(model)
    expected = [_plain_logits(model, sequence) for sequence in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in expected):
        dtype = str(model.dtype).removeprefix("torch.")
        raise Incompatible(f"{type(model).__name__} gives no finite logits in {dtype}: try another --dtype")
    undo: Callable[[], None] = lambda: None  # noqa: E731
    found = _Found(unknown_layers(model.config.get_text_config()), KVCache(4), {})
    if found.reason is None:
        model.set_attn_implementation(NAME)
        undo = replace_attention(model)
        used = kernels if kernels is not None and kernels.has("paged_attention") else None
        found = _compare(model, sequences, expected, used)
        if found.reason is not None and used is not None:  # the kernel's fault, or the model's?
            plain = _compare(model, sequences, expected, None)
            if plain.reason is None:
                used.drop("paged_attention", found.reason)
            found = plain
    if found.reason is not None:
        undo()
        model.set_attn_implementation(before)
        raise Incompatible(f"{type(model).__name__} cannot be served with mixed adapters: {found.reason}")
    kinds = [found.kinds[layer] for layer in sorted(found.kinds)]
    return Checked(found.cache.page_bytes, kinds, torch.stack(expected))


@dataclass(frozen=True)
class _Found:
    """Why the packed model is not the plain model, or None; the pages it wrote; and each layer's attention."""

    reason: str | None
    cache: KVCache
    kinds: dict[int, AttentionKind]


def _compare(
    model: BaseModel, sequences: list[list[int]], expected: list[torch.Tensor], kernels: Kernels | None
) -> _Found:
    runner = Runner(model, KVCache(4), LoraContext(kernels=kernels))
    runner.kinds = {}
    reason = _difference(runner, sequences, expected)
    return _Found(reason, runner.cache, runner.kinds)


def _difference(runner: Runner, sequences: list[list[int]], expected: list[torch.Tensor]) -> str | None:
    model, kinds = runner.model, runner.kinds
    try:
        logits = _in_steps(runner, sequences)
    except Incompatible as error:
        return str(error)
    except Exception as error:
        # a foreign model's forward may raise anything when it is used in a way it was not written for
        return f"its forward pass does not take a packed batch ({type(error).__name__}: {error})"
    if set(kinds) != set(range(model.config.get_text_config().num_hidden_layers)):
        return "not all of its attention goes through transformers' attention interface"
    if lacks_window(model.config.get_text_config(), kinds):
        return "its sliding windows are in a mask of its own"
    wanted = torch.stack(expected)
    tolerance = TOLERANCE.get(model.dtype, 5e-2)
    difference = float((logits - wanted).norm() / wanted.norm())
    if not difference <= tolerance:
        return f"a packed batch gives other logits than each sequence alone (relative difference {difference:.1e})"
    return None


def choose_fused(model: BaseModel, checked: Checked, cores: Cores | None = None) -> FusedStep | None:
    """The model's steps of few tokens as one call, if that is possible and gives what the model gives."""
    try:
        fused = FusedStep(model, KVCache(4), checked.kinds, cores)
    except Incompatible as error:
        logger.info("steps are not fused: %s", error)
        return None
    logits = _in_steps(Runner(model, fused.cache, LoraContext(), fused=fused), _sequences(model))
    difference = float((logits - checked.logits).norm() / checked.logits.norm())
    if not difference <= TOLERANCE[model.dtype]:
        logger.warning("steps are not fused: their logits differ from the model's by %.1e of their norm", difference)
        return None
    return fused


def choose_lean(model: BaseModel, checked: Checked, kernels: Kernels) -> LeanForward | None:
    """The model in fewer launches, if it is of a kind for which that is possible and gives what the model gives."""
    context = LoraContext(kernels=kernels)
    try:
        lean = LeanForward(model, kernels, checked.kinds)
        logits = _in_steps(Runner(model, KVCache(4), context, lean=lean), _sequences(model))
    except Incompatible as error:
        logger.info("kernels between products are not used: %s", error)
        return None
    difference = float((logits - checked.logits).norm() / checked.logits.norm())
    if not difference <= TOLERANCE.get(model.dtype, 5e-2):
        logger.warning(
            "kernels between products are not used: logits differ from the model's by %.1e of their norm", difference
        )
        return None
    return lean


def _in_steps(runner: Runner, sequences: list[list[int]]) -> torch.Tensor:
    """The last logits of two sequences, of which the long one comes in two chunks and a token."""
    params = SamplingParams(max_tokens=1)
    first, second = (
        Request(str(pages), tuple(sequence), params, pages=pages)
        for sequence, pages in zip(sequences, ([3, 1], [4]), strict=True)
    )
    steps = [[(first, 0, 9)], [(first, 9, 10), (second, 0, 5)], [(first, 19, 1), (second, 5, 1)]]
    for step in steps:
        logits = runner.forward([Scheduled(*item) for item in step], {})
    return logits


@torch.inference_mode()
def _plain_logits(model: BaseModel, sequence: list[int]) -> torch.Tensor:
    tokens = torch.tensor([sequence], device=model.get_input_embeddings().weight.device)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0, -1].float()


def _sequences(model: BaseModel) -> list[list[int]]:
    """Two sequences of tokens all over the vocabulary, the same every time."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (length,), generator=generator).tolist() for length in LENGTHS]
