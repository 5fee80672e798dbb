"""PackedBatch: where each token of a batch belongs, and what of the cache its attention reads. Made once a step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from adapterhub_local.base.attention import AttentionKind
from serve.engine.cache import KVCache
from serve.engine.pages import PAGE
from serve.engine.speculate import MAX_DRAFT
from serve.kernels.choose import Kernels

# A group takes in shorter rows until they make it read this many places too many: about what one more group costs.
MAX_WASTE = 256
SHORT = 1 + MAX_DRAFT  # tokens of a row that a kernel takes for as many rows with one
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
    """Rows that are read together: one token each, or one row with several.

    A copy of what decoding rows read may be kept at `copy_index` of the cache, with room for `room` pages a row;
    when the same rows come again (`continues`) only their newest token is added to it.
    """

    rows: Sequence[Row]
    copy_index: int | None = None
    room: int = 0
    continues: bool = False

    @property
    def is_decode(self) -> bool:
        return self.rows[0].end - self.rows[0].start == 1

    @property
    def num_places(self) -> int:
        """Of the longest row, in whole pages."""
        return max(len(row.pages) for row in self.rows) * PAGE

    def table(self, device: torch.device) -> torch.Tensor:
        """(rows, pages) int64; shorter rows are filled up with page 0."""
        width = max(self.room, self.num_places // PAGE)
        table = [[*row.pages, *[0] * (width - len(row.pages))] for row in self.rows]
        return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)

    def is_next(self, rows: Sequence[Row]) -> bool:
        """Whether `rows` are these, a token later, and there is room for it."""
        return len(rows) == len(self.rows) and all(
            new.first == old.num_places and new.pages[: len(old.pages)] == old.pages and len(new.pages) <= self.room
            for old, new in zip(self.rows, rows, strict=True)
        )


@dataclass(frozen=True)
class DecodeRows:
    """Rows with one token each, for a kernel: which tokens of the batch (n,), all if None; their pages (n, most) and
    their lengths (n,), the token included, as int32."""

    tokens: torch.Tensor | None
    tables: torch.Tensor
    lengths: torch.Tensor


@dataclass
class PackedBatch:
    """The rows of a batch in their order. `positions`: (tokens,) int64, of each token in its sequence.

    `kernels`, if there are any, read the pages of rows with few tokens where they lie. `kinds` has what each
    layer asked for, by its number, as the runner's steps before learnt it.
    """

    cache: KVCache
    rows: Sequence[Row]
    positions: torch.Tensor
    kernels: Kernels | None = None
    before: Sequence[Group] = ()  # of the step before, whose copies are still there
    kinds: dict[int, AttentionKind] = field(default_factory=dict)
    _memo: dict[Hashable, Any] = field(default_factory=dict)  # indices and masks

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

    def prefills(self, *, in_place: bool) -> list[Group]:
        """The rows with several tokens, each by itself; `in_place`: without those that are in `decode`."""
        if in_place not in self._memo:
            most = SHORT if in_place else 1
            self._memo[in_place] = [Group([row]) for row in self.rows if row.end - row.start > most]
        groups: list[Group] = self._memo[in_place]
        return groups

    @cached_property
    def decode_groups(self) -> list[tuple[Group, torch.Tensor]]:
        """The rows with one token in groups of like length, each with its tokens' places (n,) in the batch."""
        groups: list[list[Row]] = []
        waste = 0
        for row in sorted((row for row in self.rows if row.end - row.start == 1), key=lambda row: -row.first):
            waste += groups[-1][0].first - row.first if groups else 0
            if not groups or waste > MAX_WASTE or (len(groups[-1]) + 1) * groups[-1][0].num_places > MAX_PLACES:
                groups.append([])
                waste = 0
            groups[-1].append(row)
        before = [next((old for old in self.before if old.is_next(rows)), None) for rows in groups]
        free = list({0, 1} - {old.copy_index for old in before if old})
        return [
            (
                Group(rows, old.copy_index, old.room, continues=True) if old else self._new_group(rows, free),
                self._tensor([row.start for row in rows]),
            )
            for rows, old in zip(groups, before, strict=True)
        ]

    @cached_property
    def decode(self) -> DecodeRows | None:
        """The rows with few tokens all at once, a row of its own for each token; None if there are none."""
        rows = [
            Row(row.start + number, row.start + number + 1, row.first + number, row.pages)
            for row in self.rows
            if row.end - row.start <= SHORT
            for number in range(row.end - row.start)
        ]
        if not rows:
            return None
        device = self.positions.device
        tokens = None if len(rows) == len(self.positions) else self._tensor([row.start for row in rows])
        lengths = torch.tensor([row.num_places for row in rows], dtype=torch.int32).to(device, non_blocking=True)
        return DecodeRows(tokens, Group(rows).table(device).int(), lengths)

    def _new_group(self, rows: Sequence[Row], free: list[int]) -> Group:
        num_pages = len(rows[0].pages)
        room = num_pages + num_pages // 4 + 1
        may_copy = free and len(rows) * room <= self.cache.max_copied
        return Group(rows, free.pop(), room) if may_copy else Group(rows)

    def read(self, layer: int, group: Group, written: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of keys and values (rows, kv_heads, places, head_dim) for a group, good until the next call.

        `written`: this step's keys and values (kv_heads, tokens, head_dim), which are in their pages already.
        """
        kv_heads = written[0].shape[0]
        if group.continues and group.copy_index is not None:
            copies = self.cache.latest(layer, group.copy_index)
        else:
            copies = self.cache.read(layer, self._index(group, kv_heads), group.copy_index)
        copies = [copy.view(len(group.rows), kv_heads, -1, copy.shape[-1]) for copy in copies]
        if group.continues:
            rows, tokens, positions = self._newest(group)
            for copy, new in zip(copies, written, strict=True):
                copy[rows, :, positions] = new[:, tokens].transpose(0, 1)
        return [copy[:, :, : group.num_places] for copy in copies]

    def _newest(self, group: Group) -> tuple[torch.Tensor, ...]:
        """Of each decoding row its number, the place of its token in the batch and in the row."""
        if group not in self._memo:
            tokens = self._tensor([row.start for row in group.rows])
            self._memo[group] = (torch.arange(len(tokens)), tokens, self.positions[tokens])
        newest: tuple[torch.Tensor, ...] = self._memo[group]
        return newest

    def _index(self, group: Group, kv_heads: int) -> torch.Tensor:
        """Which (page, head) the rows of a group read, (rows * kv_heads * pages,) in the order of the result."""
        key = (group, kv_heads)
        if key not in self._memo:
            heads = torch.arange(kv_heads, device=self.positions.device)[:, None]
            table = group.table(self.positions.device)
            self._memo[key] = (table[:, None] * kv_heads + heads).flatten()
        index: torch.Tensor = self._memo[key]
        return index

    def mask(self, group: Group, dtype: torch.dtype, kind: AttentionKind, repeats: int) -> torch.Tensor:
        """Additive: (rows, 1, 1, places) of rows with one token, (repeats * tokens, places) of one with several."""
        key = (group, dtype, id(kind), repeats)  # layers of one kind share the object, which hashes in Python
        if key not in self._memo:
            places = torch.arange(group.num_places, device=self.positions.device)
            last = self._tensor([place for row in group.rows for place in range(row.first, row.num_places)])[:, None]
            visible = kind.sees(last, places)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
            self._memo[key] = mask[:, None, None] if group.is_decode else mask.repeat(repeats, 1)
        made: torch.Tensor = self._memo[key]
        return made

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.positions.device, non_blocking=True)
