"""Adding low-rank deltas to the tokens of a packed batch: two ways with the same answer. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """Ranks [start, end) of the stacked factors: the place of one adapter."""

    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the batch, all with the adapter in `slot`."""

    start: int
    end: int
    slot: Slot


@dataclass(frozen=True)
class LoraBatch:
    """Which tokens have which adapter. Tokens [0, num_tokens) have one, in contiguous segments; the rest have none.

    `mask` (num_tokens, ranks) says which ranks of the stacked factors a token may use; None: go by segments.
    """

    segments: tuple[Segment, ...]
    num_tokens: int
    mask: torch.Tensor | None


def lora_batch(segments: Sequence[Segment], device: torch.device, max_masked_tokens: int) -> LoraBatch | None:
    """The batch of `segments`, which start at token 0 and follow one another; None if there are none.

    Few tokens go through one product with all adapters and a mask, many through one product a segment.
    """
    if not segments:
        return None
    num_tokens = segments[-1].end
    mask = None
    if len(segments) > 1 and num_tokens <= max_masked_tokens:
        mask = torch.zeros(num_tokens, max(segment.slot.end for segment in segments), dtype=torch.bool)
        for segment in segments:
            mask[segment.start : segment.end, segment.slot.start : segment.slot.end] = True
        mask = mask.to(device)
    return LoraBatch(tuple(segments), num_tokens, mask)


def add_by_segment(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, segments: Sequence[Segment]
) -> None:
    """out[segment] += x[segment] @ A_slot^T @ B_slot^T in place, one adapter after the other.

    out (tokens, out_features), x (tokens, in_features); a (ranks, in_features) and b (ranks, out_features)
    are the stacked factors, b transposed and with the scaling in it.
    """
    for segment in segments:
        tokens, ranks = slice(segment.start, segment.end), slice(segment.slot.start, segment.slot.end)
        out[tokens].addmm_(x[tokens] @ a[ranks].T, b[ranks])


def add_by_mask(out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> None:
    """The same as `add_by_segment`, as two products with all adapters at once.

    What other adapters make of a token is replaced by zero, not multiplied by it: an overflow stays theirs.
    """
    ranks = mask.shape[1]
    inner = (x @ a[:ranks].T).masked_fill_(~mask, 0.0)
    out.addmm_(inner, b[:ranks])
