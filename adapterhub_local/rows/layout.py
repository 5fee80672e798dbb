"""Where the examples of a packed row lie, and who may attend to whom: a prefix, then the rest of each example.

Attention over a row is cut into pieces, spans of queries and the keys they see, so that its cost is the sum
over the examples and not the square of the row. Knows nothing of models.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from adapterhub_local.base.attention import AttentionKind

Span = tuple[int, int]  # [start, end) of the tokens of a row


@dataclass(frozen=True)
class Layout:
    """`prefix` tokens with which all examples begin, then `rests` tokens of each."""

    prefix: int
    rests: tuple[int, ...]

    @property
    def is_single(self) -> bool:
        return len(self.rests) == 1

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.rests)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The prefix, if there is one, and the rest of each example."""
        spans, start = [], 0
        for length in (self.prefix, *self.rests):
            if length:
                spans.append((start, start + length))
            start += length
        return tuple(spans)

    def before(self, span: Span) -> int:
        """How many tokens of the prefix come before the first of `span`, one of `spans`."""
        return self.prefix if span[0] else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest example, the prefix included."""
        return self.prefix + max(self.rests)


@dataclass(frozen=True)
class Groups:
    """Several layouts one behind another in a row, none of which sees another: pairs of answers with their prompts."""

    layouts: tuple[Layout, ...]

    @property
    def is_single(self) -> bool:
        return False

    @property
    def tokens(self) -> int:
        return sum(layout.tokens for layout in self.layouts)

    @property
    def bounds(self) -> tuple[Span, ...]:
        """Where each layout lies in the row."""
        ends = list(accumulate(layout.tokens for layout in self.layouts))
        return tuple(zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class Piece:
    """Queries and keys right before them, of which they see what `kind` sees."""

    queries: Span
    keys: Span
    kind: AttentionKind


def pieces(layout: Layout, kind: AttentionKind) -> tuple[list[Span], list[Piece]]:
    """Spans that attend to themselves causally, covering the row once, and the pieces of what they see before that.

    Work and masks of a window grow with tokens x window.
    """
    kind = kind.within(layout.longest)
    window = kind.window
    if window is None:
        rests = [Piece((layout.prefix, layout.tokens), (0, layout.prefix), kind)] if layout.prefix else []
        return list(layout.spans), rests
    own, earlier = [], []
    for start, end in layout.spans:
        for first in range(start, end, window):
            last = min(first + window, end)
            own.append((first, last))
            # keys before `first`: of the same example, or the prefix
            begin, stop = (start, first) if first > start else (0, layout.before((start, end)))
            begin, seeing = max(begin, stop - window + 1), min(last, first + window - 1)
            if begin < stop and first < seeing:
                earlier.append(Piece((first, seeing), (begin, stop), kind))
    return own, earlier


def visible(queries: int, before: int, kind: AttentionKind, device: torch.device) -> torch.Tensor:
    """(queries, before + queries) bool: which keys each query sees, `before` of which come before the first query."""
    query = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)[None]
    return kind.sees(query, key)
