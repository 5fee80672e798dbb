"""PackedBatch: where each token of a batch belongs, and what of the cache its attention reads. Made once a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from serve.engine.cache import KVCache
from serve.engine.pages import PAGE
from serve.kernels.choose import Kernels

# A group takes in shorter rows until they make it read this many places too many: about what one more group costs.
MAX_WASTE = 256
MAX_PLACES = 4096  # that a group of several rows reads: more do not stay in the processor's cache


@dataclass(frozen=True)
class Row:
    """Tokens [start, end) of the batch: positions `first`, `first` + 1, ... of a sequence that fills `pages`."""

    start: int
    end: int
    first: int
    pages: tuple[int, ...]

    @property
    def num_places(self) -> int:
        return self.first + self.end - self.start


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are read together: one token each, or one row with several."""

    rows: Sequence[Row]

    @property
    def is_answers(self) -> bool:
        return self.rows[0].end - self.rows[0].start == 1

    @property
    def num_pages(self) -> int:
        return max(len(row.pages) for row in self.rows)

    def table(self, device: torch.device) -> torch.Tensor:
        """(rows, num_pages) int64; shorter rows are filled up with page 0."""
        width = self.num_pages
        table = [[*row.pages, *[0] * (width - len(row.pages))] for row in self.rows]
        return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)


@dataclass(frozen=True)
class Answers:
    """Rows with one token, for a kernel: which tokens of the batch (n,), all if None; their pages (n, most) and their
    lengths (n,), the token included, as int32."""

    tokens: torch.Tensor | None
    tables: torch.Tensor
    lengths: torch.Tensor


@dataclass
class PackedBatch:
    """The rows of a batch in their order. `positions`: (tokens,) int64, of each token in its sequence.

    `kernels`, if there are any, read the pages of rows with one token where they lie.
    """

    cache: KVCache
    rows: Sequence[Row]
    positions: torch.Tensor
    windows: dict[int, int | None] = field(default_factory=dict)  # what each layer asked for, for the check at load
    kernels: Kernels | None = None
    _made: dict = field(default_factory=dict)  # indices and masks

    @cached_property
    def pages(self) -> torch.Tensor:
        """The page (tokens,) that each token is written to."""
        numbers = [row.pages[position // PAGE] for row in self.rows for position in range(row.first, row.num_places)]
        return self._tensor(numbers)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """The place (tokens,) of each token in its page."""
        return self.positions % PAGE

    @cached_property
    def num_places(self) -> int:
        """The length of the longest row, in whole pages."""
        return max(len(row.pages) for row in self.rows) * PAGE

    @cached_property
    def prompts(self) -> list[Group]:
        """The rows with several tokens, each by itself."""
        return [Group([row]) for row in self.rows if row.end - row.start > 1]

    @cached_property
    def answers(self) -> list[tuple[Group, torch.Tensor]]:
        """The rows with one token in groups of like length, each with its tokens' places (n,) in the batch."""
        groups: list[list[Row]] = []
        waste = 0
        for row in sorted((row for row in self.rows if row.end - row.start == 1), key=lambda row: -row.first):
            waste += groups[-1][0].first - row.first if groups else 0
            if not groups or waste > MAX_WASTE or (len(groups[-1]) + 1) * groups[-1][0].num_places > MAX_PLACES:
                groups.append([])
                waste = 0
            groups[-1].append(row)
        return [(Group(rows), self._tensor([row.start for row in rows])) for rows in groups]

    @cached_property
    def single(self) -> Answers | None:
        """The rows with one token all at once; None if there are none."""
        rows = [row for row in self.rows if row.end - row.start == 1]
        if not rows:
            return None
        device = self.positions.device
        tokens = None if len(rows) == len(self.positions) else self._tensor([row.start for row in rows])
        lengths = torch.tensor([row.num_places for row in rows], dtype=torch.int32).to(device, non_blocking=True)
        return Answers(tokens, Group(rows).table(device).int(), lengths)

    def index(self, group: Group, kv_heads: int) -> torch.Tensor:
        """Which (page, head) the rows of a group read, (rows * kv_heads * pages,) in the order of the result."""
        key = (group, kv_heads)
        if key not in self._made:
            heads = torch.arange(kv_heads, device=self.positions.device)[:, None]
            table = group.table(self.positions.device)
            self._made[key] = (table[:, None] * kv_heads + heads).flatten()
        return self._made[key]

    def mask(self, group: Group, dtype: torch.dtype, window: int | None, repeats: int) -> torch.Tensor:
        """Additive: (rows, 1, 1, places) of rows with one token, (repeats * tokens, places) of one with several."""
        key = (group, dtype, window, repeats)
        if key not in self._made:
            places = torch.arange(group.num_pages * PAGE, device=self.positions.device)
            last = self._tensor([place for row in group.rows for place in range(row.first, row.num_places)])[:, None]
            visible = places <= last  # itself and before, at most `window` of them
            if window is not None:
                visible &= places > last - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask = mask.masked_fill_(~visible, float("-inf"))
            self._made[key] = mask[:, None, None] if group.is_answers else mask.repeat(repeats, 1)
        return self._made[key]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.positions.device, non_blocking=True)
