"""Adding low-rank deltas to the tokens of a packed batch: ways with the same answer. Pure functions.

Grids and segments are for torch, tiles for the kernels (`serve.kernels`): of a GPU on stacks, of a CPU in place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from serve.kernels.part import Parts
from serve.kernels.reference import TILE
from serve.lora.rows import OwnRows

# module -> (A (in_features, rank), B (rank, out_features) with the scaling in it), and with DoRA a third tensor: by how
# much more than once W x counts (out_features); `WithRows` for an adapter that has rows of the embeddings, too
Factors = Mapping[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True, order=True)
class Slot:
    """The place of one adapter: number `index` of the stack of its rank, or `parts`, where it is kept anyway.

    `is_scaled`: it has DoRA. `rows`: its own of the embeddings, on the device.
    """

    rank: int
    index: int
    is_scaled: bool = False
    rows: OwnRows | None = field(default=None, compare=False)
    parts: Parts | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the batch, all with the adapter in `slot`."""

    start: int
    end: int
    slot: Slot


@dataclass(frozen=True)
class Grid:
    """Tokens of the slots [first, end) of one rank as a table (slots, width), multiplied slot by slot in one call.

    `tokens` (slots * width,) says which token stands at each place; where a slot has fewer tokens than `width`, any
    token fills up. `real` (n,) are the places that count and `targets` (n,) their tokens. All three are None if
    the table is just the tokens [start, start + slots * width) in order.
    """

    rank: int
    first: int
    end: int
    width: int
    start: int
    tokens: torch.Tensor | None = None
    real: torch.Tensor | None = None
    targets: torch.Tensor | None = None


@dataclass(frozen=True)
class Tiles:
    """Few tokens in a row with one slot each: `table` (n, 3) int32, first token, number of tokens, slot."""

    rank: int
    table: torch.Tensor


@dataclass(frozen=True)
class InPlace:
    """Tokens whose adapters lie in their own memory: `tiles` (n, 3) int32 of first token, number of tokens, and which
    of `adapters` for the kernel; `long` segments are one product each. `segments` are both."""

    segments: tuple[Segment, ...]
    long: tuple[Segment, ...]
    adapters: tuple[Parts, ...]
    tiles: torch.Tensor


@dataclass(frozen=True)
class LoraBatch:
    """Which tokens have which adapter, as grids, segments and tiles, or in place; tokens in none of them have none."""

    grids: tuple[Grid, ...]
    segments: tuple[Segment, ...]
    tiles: tuple[Tiles, ...] = ()
    in_place: InPlace | None = None


LONG = 64  # a segment of more tokens is not work for tiles, each of which reads the factors


def tiled_batch(segments: Sequence[Segment], device: torch.device) -> LoraBatch | None:
    """The batch of `segments` for the kernels: long segments one product each, the others in tiles."""
    if not segments:
        return None
    long = tuple(each for each in segments if each.end - each.start > LONG)
    tables = tile_rows([each for each in segments if each.end - each.start <= LONG])
    tiles = [Tiles(rank, torch.tensor(rows, dtype=torch.int32).to(device)) for rank, rows in sorted(tables.items())]
    return LoraBatch((), long, tuple(tiles))


def batch_in_place(segments: Sequence[Segment], *, has_kernel: bool) -> LoraBatch | None:
    """The batch of `segments` whose adapters are in place; without a kernel each segment is one product."""
    if not segments:
        return None
    long = tuple(each for each in segments if not has_kernel or each.end - each.start > LONG)
    owns, rows = tiles_in_place([each for each in segments if each not in long])
    tiles = torch.tensor([(*row, number) for number, row in enumerate(rows)], dtype=torch.int32)
    return LoraBatch((), (), in_place=InPlace(tuple(segments), long, tuple(owns), tiles))


def tiles_in_place(segments: Sequence[Segment]) -> tuple[list[Parts], list[tuple[int, int]]]:
    """Of each tile its adapter's parts, and (first token, number of tokens)."""
    owns, rows = [], []
    for each in segments:
        assert each.slot.parts is not None, each.slot
        for start in range(each.start, each.end, TILE):
            owns.append(each.slot.parts)
            rows.append((start, min(TILE, each.end - start)))
    return owns, rows


def tile_rows(segments: Sequence[Segment]) -> dict[int, list[tuple[int, int, int]]]:
    """Rank -> (first token, number of tokens, index of the slot) of each of its tiles."""
    rows: dict[int, list[tuple[int, int, int]]] = {}
    for each in segments:
        for start in range(each.start, each.end, TILE):
            tile = (start, min(TILE, each.end - start), each.slot.index)
            rows.setdefault(each.slot.rank, []).append(tile)
    return rows


def lora_batch(segments: Sequence[Segment], device: torch.device, max_grid: int) -> LoraBatch | None:
    """The batch of `segments`; None if there are none.

    Several slots of one rank with few tokens each become a grid of at most `max_grid` places: then every factor is
    read once, in one call. Many tokens go one product a segment.
    """
    if not segments:
        return None
    grids, single = [], []
    for rank, same in groupby(sorted(segments, key=lambda each: each.slot), key=lambda each: each.slot.rank):
        group = list(same)
        first, end = group[0].slot.index, group[-1].slot.index + 1
        width = max(segment.end - segment.start for segment in group)
        if len(group) == 1 or end - first > 2 * len(group) or (end - first) * width > max_grid:
            single += group
        else:
            grids.append(_grid(group, rank, first, end, width, device))
    return LoraBatch(tuple(grids), tuple(single))


def _grid(group: Sequence[Segment], rank: int, first: int, end: int, width: int, device: torch.device) -> Grid:
    start = group[0].start
    in_order = [(each.start, each.end) for each in group] == [
        (start + i * width, start + (i + 1) * width) for i in range(len(group))
    ]
    if in_order and len(group) == end - first:
        return Grid(rank, first, end, width, start)
    tokens = [start] * ((end - first) * width)
    real = []
    for segment in group:
        corner = (segment.slot.index - first) * width
        for offset, token in enumerate(range(segment.start, segment.end)):
            tokens[corner + offset] = token
            real.append(corner + offset)
    targets = [tokens[place] for place in real]
    return Grid(
        rank, first, end, width, start, *(torch.tensor(each, device=device) for each in (tokens, real, targets))
    )


def add_by_segment(
    outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: Sequence[torch.Tensor | None],
    segment: Segment,
) -> None:
    """out[segment] += x[segment] @ A_slot @ B_slot in place, for every layer that is given this x.

    outs (tokens, out_features) and bs (slots, rank, out_features) of each layer, b with the scaling in it, None for a
    layer that no adapter of this rank changes; x (tokens, in_features); a (slots, in_features, layers * rank).
    """
    tokens, slot = slice(segment.start, segment.end), segment.slot
    inner = x[tokens] @ a[slot.index]
    for out, b, part in zip(outs, bs, inner.split(slot.rank, dim=-1), strict=True):
        if b is not None:
            out[tokens].addmm_(part, b[slot.index])


def add_by_grid(
    outs: Sequence[torch.Tensor], x: torch.Tensor, a: torch.Tensor, bs: Iterable[torch.Tensor | None], grid: Grid
) -> None:
    """The same as `add_by_segment` for all slots of `grid` at once. A token meets no factor but its own."""
    shape = (grid.end - grid.first, grid.width)
    tokens = slice(grid.start, grid.start + shape[0] * shape[1])
    table = x[tokens] if grid.tokens is None else x.index_select(0, grid.tokens)
    inner = torch.bmm(table.unflatten(0, shape), a[grid.first : grid.end])
    for out, b, part in zip(outs, bs, inner.split(grid.rank, dim=-1), strict=True):
        if b is None:
            continue
        own = b[grid.first : grid.end]
        if grid.tokens is None:
            target = out[tokens].unflatten(0, shape)
            if target.is_contiguous():
                target.baddbmm_(part, own)
            else:  # for which torch would loop over the slots
                target.add_(torch.bmm(part, own))
        else:
            assert grid.real is not None
            assert grid.targets is not None
            delta = torch.bmm(part, own).flatten(0, 1)
            out.index_add_(0, grid.targets, delta.index_select(0, grid.real))
