"""Several examples in one row of tokens, exactly as if each were alone; what they begin with is computed once.

    prefix | rest of example 1 | rest of example 2 | ...

In a causal model the states of a common prefix do not depend on what follows, so one copy serves all
examples: each rest attends to the prefix and itself. Chats with one system prompt and instruction
shrink to half and less. `is_exact` tells whether a model's code honours the layout.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.train.examples import Example

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """One row of T tokens.

    input_ids, position_ids, labels: (1, T) int64; labels are IGNORE where nothing is learned.
    segments: (T,) int64, 0 for the prefix, i + 1 for example i.
    mask: (1, 1, T, T) bool, True where a token (row) may attend to another (column); None for a single
    example, which the model's own causal mask fits.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    mask: torch.Tensor | None


def pack(examples: Sequence[Example]) -> Packed:
    """The examples in one row, behind what they all begin with."""
    prefix = common_prefix(examples) if len(examples) > 1 else 0
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
    segment = torch.tensor(segments)
    row = (torch.tensor([ids]), torch.tensor([positions]), torch.tensor([labels]), segment)
    if len(examples) == 1:
        return Packed(*row, mask=None)
    order = torch.arange(len(ids))
    earlier = order[:, None] >= order[None]
    visible = earlier & ((segment[:, None] == segment[None]) | (segment[None] == 0))
    return Packed(*row, mask=visible[None, None])


def common_prefix(examples: Sequence[Example]) -> int:
    """How many leading tokens all examples share, ending before the token that predicts a first label."""
    shared = len(os.path.commonprefix([example.ids for example in examples]))
    return max(0, min(shared, *(example.spans[0][0] - 1 for example in examples)))


def forward(model: Any, packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the model on a packed row; the head is applied only where something is to be predicted.

    Returns logits (n, vocabulary), their targets (n,), and the example each belongs to (n,), from 0.
    """
    device = model.device
    targets = (packed.labels[0] != IGNORE).nonzero()[:, 0]
    assert len(targets), "every example has an answer"
    logits = model(
        input_ids=packed.input_ids.to(device),
        position_ids=packed.position_ids.to(device),
        attention_mask=None if packed.mask is None else packed.mask.to(device),
        use_cache=False,
        logits_to_keep=(targets - 1).to(device),  # a token is predicted by the one before it
    ).logits[0]
    return logits, packed.labels[0, targets].to(device), packed.segments[targets] - 1


def is_exact(model: Any, examples: Sequence[Example]) -> bool:
    """Whether packed examples give this model the same logits as each example alone.

    Probed on the first three. False for model code that ignores mask or positions, and where an
    example is longer than an attention window, which the mask does not have.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(len(example.ids) for example in examples) > window:
        return False
    probes = examples[:3]
    with torch.inference_mode():
        together, _, owner = forward(model, pack(probes))
        for number, example in enumerate(probes):
            ids = torch.tensor([example.ids], device=model.device)
            alone = model(input_ids=ids, use_cache=False).logits[0]
            at = [position - 1 for start, end in example.spans for position in range(start, end)]
            wanted, got = alone[at].float(), together[owner == number].float()
            # rounding of bfloat16 stays below 2 %, a leak between examples is far above
            tolerance = 1e-4 if alone.dtype == torch.float32 else 2e-2
            if (wanted - got).norm() > tolerance * wanted.norm():
                return False
    return True


def micro_batch_size(examples: Sequence[Example], batch_size: int, max_tokens: int) -> int:
    """The largest divisor of `batch_size` that packs into about `max_tokens` tokens, by the mean example."""
    prefix = common_prefix(examples)
    mean = sum(len(example.ids) - prefix for example in examples) / len(examples)
    divisors = (size for size in range(batch_size, 0, -1) if batch_size % size == 0)
    return next((size for size in divisors if prefix + size * mean <= max_tokens), 1)
