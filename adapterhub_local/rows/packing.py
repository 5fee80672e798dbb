"""Several examples in one row of tokens, exactly as if each were alone; what they begin with is computed once.

    prefix | rest of example 1 | rest of example 2 | ...

In a causal model the states of a common prefix do not depend on what follows, so one copy serves all
examples: each rest attends to the prefix and itself. Chats with one system prompt and instruction
shrink to half and less. `is_exact` finds out how a model's code takes the layout, and whether it does.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.base.model import CausalModel
from adapterhub_local.errors import Incompatible
from adapterhub_local.rows.attention import attach, detach, is_attached
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.layout import Groups, Layout

IGNORE = -100
# relative differences up to which logits are the same, in float32 and, at least, in 16 bits; beyond LEAK they never are
SAME, SAME_ROUNDED, LEAK = 1e-4, 2e-2, 0.15


@dataclass(frozen=True)
class Packed:
    """One row of T tokens.

    input_ids, position_ids, labels: (1, T) int64; labels are IGNORE where nothing is learned.
    segments: (T,) int64, 0 for a prefix, i + 1 for example i; layout says the same.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    layout: Layout | Groups

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORE).sum())


def pack(examples: Sequence[Example], *, share: bool = True) -> Packed:
    """The examples in one row, behind what they all begin with; each whole where nothing may be shared."""
    prefix = common_prefix(examples) if share and len(examples) > 1 else 0
    ids, positions, labels = list(examples[0].ids[:prefix]), list(range(prefix)), [IGNORE] * prefix
    segments = [0] * prefix
    for number, example in enumerate(examples, 1):
        length = len(example.ids)
        learned = [IGNORE] * length
        for start, end in example.spans:
            learned[start:end] = example.ids[start:end]
        ids += example.ids[prefix:]
        labels += learned[prefix:]
        positions += range(prefix, length)
        segments += [number] * (length - prefix)
    layout = Layout(prefix, tuple(len(example.ids) - prefix for example in examples))
    return Packed(
        torch.tensor([ids]), torch.tensor([positions]), torch.tensor([labels]), torch.tensor(segments), layout
    )


def pack_groups(groups: Sequence[Sequence[Example]], *, share: bool = True) -> Packed:
    """Groups of examples in one row, each group behind what its own examples begin with."""
    if len(groups) == 1:
        return pack(groups[0], share=share)
    packs = [pack(group, share=share) for group in groups]
    segments, before = [], 0
    for one, group in zip(packs, groups, strict=True):
        segments.append(torch.where(one.segments > 0, one.segments + before, 0))
        before += len(group)
    return Packed(
        torch.cat([one.input_ids for one in packs], dim=1),
        torch.cat([one.position_ids for one in packs], dim=1),
        torch.cat([one.labels for one in packs], dim=1),
        torch.cat(segments),
        Groups(tuple(one.layout for one in packs if isinstance(one.layout, Layout))),
    )


def common_prefix(examples: Sequence[Example]) -> int:
    """How many leading tokens all examples share, ending before the token that predicts a first label."""
    shared = len(os.path.commonprefix([example.ids for example in examples]))
    return max(0, min(shared, *(example.spans[0][0] - 1 for example in examples)))


def pack_rows(
    examples: Sequence[Example], max_tokens: int, max_examples: int, *, share: bool = True
) -> list[list[Example]]:
    """A batch cut into rows of at most about `max_tokens` tokens and `max_examples` examples, by best-fit decreasing.

    The longest example goes first, each into the fullest row that still has room for it. An example longer
    than a row has one of its own. Rows, and the examples in them, keep the order of the batch.
    """
    prefix = common_prefix(examples) if share and len(examples) > 1 else 0
    lengths = [len(example.ids) - prefix for example in examples]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: -lengths[index]):
        fits = [row for row, left in enumerate(room) if lengths[index] <= left and len(rows[row]) < max_examples]
        if fits:
            row = min(fits, key=lambda row: room[row])
            rows[row].append(index)
            room[row] -= lengths[index]
        else:
            rows.append([index])
            room.append(max_tokens - prefix - lengths[index])
    return [[examples[index] for index in row] for row in sorted(sorted(row) for row in rows)]


def forward(model: CausalModel, packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the model on a packed row; the head is applied only where something is to be predicted.

    Returns logits (n, vocabulary), their targets (n,), and the example each belongs to (n,), from 0.
    """
    targets = label_positions(packed)
    # a token is predicted by the one before it
    logits = model(**inputs(model, packed), logits_to_keep=(targets - 1).to(model.device)).logits[0]
    return logits, packed.labels[0, targets].to(model.device), packed.segments[targets] - 1


def label_positions(packed: Packed) -> torch.Tensor:
    """Where a token is learned: (n,) int64."""
    targets = (packed.labels[0] != IGNORE).nonzero()[:, 0]
    assert len(targets), "every example has an answer"
    return targets


def inputs(model: CausalModel, packed: Packed) -> dict[str, Any]:
    """The keyword arguments by which the model, or its body below the head, sees a row as separate examples."""
    device = model.device
    positions = packed.position_ids.to(device)
    row = {"input_ids": packed.input_ids.to(device), "position_ids": positions, "use_cache": False}
    if packed.layout.is_single:  # the model's own causal attention fits
        return {**row, "attention_mask": None}
    if is_attached(model):  # a mask, of one element, keeps the model from making one
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {**row, "attention_mask": _for_layers(model, seen, seen), "layout": packed.layout}
    if isinstance(packed.layout, Groups):
        raise Incompatible("a mask for groups would need the square of the row: compute them one by one")
    return {**row, "attention_mask": _mask(model, packed.segments.to(device), positions[0])}


def _mask(model: CausalModel, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """Of T x T, with the attention windows of the model's layers, in the form its attention code adds or applies."""
    order = torch.arange(len(segments), device=segments.device)
    mask = (order[:, None] >= order) & ((segments[:, None] == segments) | (segments == 0))
    window = getattr(model.config, "sliding_window", None)
    windowed = mask & (positions[:, None] - positions < window) if window else mask

    def formed(one: torch.Tensor) -> torch.Tensor:
        if model.config._attn_implementation != "eager":
            return one[None, None]
        # eager attention adds the mask
        return torch.zeros_like(one, dtype=model.dtype).masked_fill(~one, torch.finfo(model.dtype).min)[None, None]

    return _for_layers(model, formed(mask), formed(windowed))


def _for_layers(model: CausalModel, full: torch.Tensor, windowed: torch.Tensor) -> Any:
    """The masks as the model takes them: where its layers differ (Gemma, Qwen), each kind takes its own."""
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        return {"full_attention": full, "sliding_attention": windowed}
    return windowed


def is_exact(model: CausalModel, examples: Sequence[Example], *, share: bool = True) -> bool:
    """Whether packed examples give this model the same logits as each example alone; how it does is set in the model.

    Probed on the first two and the longest, with attention by layout and then with masks. False for model code that
    ignores or cannot take both, or ignores positions. In 16 bits, where rounding errors grow with the depth of a model,
    logits count as the same if they differ by no more than a few times `rounding`.
    """
    longest = max(range(len(examples)), key=lambda index: len(examples[index].ids))
    probes = [examples[index] for index in sorted({0, min(1, len(examples) - 1), longest})]
    return is_exact_row(model, probes, pack(probes, share=share))


def is_exact_row(model: CausalModel, probes: Sequence[Example], packed: Packed) -> bool:
    """`is_exact` for one packed row of these examples."""
    was_attached = is_attached(model)
    with torch.inference_mode():
        detach(model)
        alone = [forward(model, pack([example]))[0] for example in probes]
        tolerance = SAME
        if alone[0].dtype != torch.float32:
            tolerance = min(max(SAME_ROUNDED, 6 * rounding(model, probes[0], alone[0])), LEAK)
        if attach(model) and _agrees(model, packed, alone, tolerance):
            return True
        detach(model)
        if _agrees(model, packed, alone, tolerance):
            return True
    if was_attached:  # by a training run, whose rows were found exact
        attach(model)
    return False


def rounding(model: CausalModel, example: Example, logits: torch.Tensor) -> float:
    """How far an example's `logits` (n, vocabulary) move, relative to their norm, when each of its embeddings moves by
    a unit in the last place.

    Whatever sums in another order moves them at least as far: a kernel for other shapes, or another kernel.
    """
    draws = torch.Generator().manual_seed(0)

    def shaken(_: torch.nn.Module, __: Any, states: torch.Tensor) -> torch.Tensor:
        signs = 2 * torch.randint(2, states.shape, generator=draws).to(states) - 1
        return states * (1 + torch.finfo(states.dtype).eps * signs)

    hook = model.get_input_embeddings().register_forward_hook(shaken)
    try:
        got = forward(model, pack([example]))[0].float()
    finally:
        hook.remove()
    return float((got - logits.float()).norm() / logits.float().norm())


def _agrees(model: CausalModel, packed: Packed, alone: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Whether examples in one row have the logits (n, vocabulary) that each has alone."""
    try:
        together, _, owner = forward(model, packed)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, KeyError, Incompatible):
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False
    for number, wanted in enumerate(alone):
        got = together[owner == number].float()
        if not (wanted.float() - got).norm() <= tolerance * wanted.float().norm():
            return False
    return True
