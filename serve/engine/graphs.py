"""Decode steps as CUDA graphs: captured once for a batch size, then replayed without Python between the kernels.

What differs from step to step lies in tensors that stay where they are. Steps without adapters have graphs of their
own, so that adapters cost nothing where none is used. A graph is used only after it gave what its step gave.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from serve.adapters.stacked import StackedSlots
from serve.engine.cache import KVCache
from serve.engine.lean import LeanForward
from serve.engine.packed import DecodeRows
from serve.engine.pages import PAGE, pages_for
from serve.engine.request import Scheduled
from serve.kernels.choose import Kernels
from serve.lora.linear import LoraContext
from serve.lora.product import LoraBatch, Segment, Tiles, tile_rows

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a graph; smaller batches are filled up
SETTLED = 16  # steps of one kind before it is captured, which takes as long as many steps
MAX_GRAPHS = 64
MIN_TILES, FEW = 4, 8  # few adapters: at most a tile for every 8 rows, and 4 in small batches
MAX_SETS = 3  # of ranks that a size has graphs of its own for; beyond, one takes the ranks of all adapters in slots
TOLERANCE = 2e-2  # of the largest logit, between a step and its graph: the same kernels, but other sums in libraries
# rows, the ranks of their adapters, and of how many tiles each rank has a table: an empty tile is a program, too
Key = tuple[int, tuple[int, ...], int]


@dataclass
class StaticBatch:
    """What attention reads of a batch (as `PackedBatch`): one token a row, everything in place."""

    cache: KVCache
    kernels: Kernels
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    decode: DecodeRows
    kinds: dict[int, AttentionKind] = field(default_factory=dict)

    @property
    def decode_groups(self) -> Any:
        """Only asked for by attention that the kernel does not compute."""
        raise Incompatible("its attention is not the kernel's kind")

    num_places = decode_groups

    def prefills(self, *, in_place: bool) -> tuple[()]:
        """There are none."""
        return ()


class StaticStep:
    """At most `size` rows with one token each, of adapters of `ranks` in at most `num_tiles` tiles each, as a function.

    Its arguments are tensors of its own. A request with guesses has a row for each of its tokens.
    """

    def __init__(self, graphs: "Graphs", size: int, ranks: tuple[int, ...], num_tiles: int) -> None:
        self.graphs = graphs
        self.size = size
        width = graphs.max_pages
        device, is_pinned = graphs.device, graphs.device.type == "cuda"
        # one tensor for each type, so that a step is sent in two copies
        self._long = torch.zeros(4 * size, dtype=torch.int64, pin_memory=is_pinned)
        self._int = torch.zeros(
            size * (1 + width) + 3 * num_tiles * len(ranks), dtype=torch.int32, pin_memory=is_pinned
        )
        self._long_there, self._int_there = self._long.to(device), self._int.to(device)
        parts = [size, size * width] + [3 * num_tiles] * len(ranks)
        lengths, tables, *tiles = self._int_there.split(parts)
        self._lengths, self._tables, *self._tiles = (part.numpy() for part in self._int.split(parts))
        self.tokens, positions, pages, offsets = self._long_there.split(size)
        self.batch = StaticBatch(
            graphs.cache,
            graphs.kernels,
            positions,
            pages,
            offsets,
            DecodeRows(None, tables.view(size, width), lengths),
        )
        self._known: list[list[int]] = [[]] * size  # of each row, the pages in its table
        self.ranks = ranks
        self.lora = None
        if ranks:
            tables_of = zip(ranks, tiles, strict=True)
            self.lora = LoraBatch((), (), tuple(Tiles(rank, part.view(num_tiles, 3)) for rank, part in tables_of))

    def fill(self, batch: Sequence[Scheduled], segments: Sequence[Segment]) -> None:
        """Send what these rows are; those beyond belong to no request and write to page 0."""
        width = self.graphs.max_pages
        tokens, places, pages, offsets = self._long.numpy().reshape(4, self.size)
        placed = [(item, *each) for item in batch for each in enumerate(item.tokens, item.start)]
        for row, (item, place, _) in enumerate(placed):
            own = item.request.pages[: place // PAGE + 1]
            if self._known[row] != own:  # a page more in one step of PAGE
                self._tables[row * width : row * width + len(own)] = own
                self._known[row] = own
        count = len(placed)
        tokens[:count] = [token for _, _, token in placed]
        places[:count] = [place for _, place, _ in placed]
        pages[:count] = [own[-1] for own in self._known[:count]]
        np.remainder(places, PAGE, out=offsets)
        self._lengths[:count] = places[:count] + 1
        self._long.view(4, self.size)[:, count:] = 0
        self._lengths[count:] = 0
        rows = tile_rows(segments)
        for rank, table in zip(self.ranks, self._tiles, strict=True):
            flat = [number for tile in rows.get(rank, ()) for number in tile]
            table[:] = 0
            table[: len(flat)] = flat
        self._long_there.copy_(self._long, non_blocking=True)
        self._int_there.copy_(self._int, non_blocking=True)

    def run(self) -> torch.Tensor:
        """Logits (size, vocabulary) of what was filled in."""
        context = self.graphs.context
        context.replay(self.lora)
        try:
            if self.graphs.lean is not None:
                return self.graphs.lean(self.tokens, self.batch)
            logits: torch.Tensor = self.graphs.model(
                input_ids=self.tokens[None],
                position_ids=self.batch.positions[None],
                use_cache=False,
                packed=self.batch,
            ).logits[0]
            return logits
        finally:
            context.end()


@dataclass(frozen=True)
class Captured:
    """A step that can be replayed as long as the stacks of its ranks are the same: `moves` of each.

    It holds them: they may be exchanged beside a step, which then reads what it read before, not memory of others.
    """

    step: StaticStep
    replay: Callable[[], torch.Tensor]
    moves: tuple[int, ...]
    stacks: list[torch.Tensor]


@dataclass
class Graphs:
    """The steps that were captured, by size and ranks. `is_captured` is False in tests, where steps just run."""

    model: BaseModel
    cache: KVCache
    context: LoraContext
    slots: StackedSlots
    kernels: Kernels
    max_length: int
    is_captured: bool = True
    settled: int = SETTLED
    lean: LeanForward | None = None  # the model in fewer launches
    reason: str | None = None  # why there are no graphs any more
    _captured: OrderedDict[Key, "Captured"] = field(default_factory=OrderedDict)
    _seen: Counter[Key] = field(default_factory=Counter)
    _lost: Counter[Key] = field(default_factory=Counter)  # how often there was no room for it
    _pool: Any = None

    @property
    def device(self) -> torch.device:
        return self.slots.device

    @property
    def max_pages(self) -> int:
        return pages_for(self.max_length)

    def __len__(self) -> int:
        return len(self._captured)

    def forward(self, batch: Sequence[Scheduled], segments: Sequence[Segment]) -> torch.Tensor | None:
        """Logits (tokens, vocabulary), float32; None where the batch has to go the ordinary way."""
        num_tokens = sum(item.num_tokens for item in batch)
        if not self._is_for_graphs(batch, segments, num_tokens):
            return None
        size = next(size for size in SIZES if size >= num_tokens)
        tiles = tile_rows(segments)
        key = self._kind(size, set(tiles), max(map(len, tiles.values()), default=0))
        captured = self._captured.get(key)
        if captured is not None and captured.moves != self._moves(key[1]):
            self._forget_moved()
            captured = None
        if captured is None:
            self._seen[key] += 1
            # of a kind that was pushed out before, the more often the longer: no room is no reason to capture anew
            if self._seen[key] <= self.settled << min(self._lost[key], 10) or not self.slots.moving.acquire(
                blocking=False
            ):
                return None
            try:
                return self._capture_step(key, batch, segments)
            finally:
                self.slots.moving.release()
        self._captured.move_to_end(key)
        self._reserve(batch)
        captured.step.fill(batch, segments)
        return captured.replay()[:num_tokens].to(torch.float32, copy=True)

    def _is_for_graphs(self, batch: Sequence[Scheduled], segments: Sequence[Segment], num_tokens: int) -> bool:
        return (
            self.reason is None
            and num_tokens <= SIZES[-1]
            and all(item.num_tokens == item.num_choices for item in batch)
            # DoRA's tokens are gathered by tensors of no fixed size
            and not any(segment.slot.is_scaled for segment in segments)
            # nor are there tables for rows of the embeddings, which few adapters have
            and not any(segment.slot.rows is not None for segment in segments)
            and (not self.is_captured or (self.kernels.has("add_lora") and self.kernels.has("paged_attention")))
        )

    def _kind(self, size: int, ranks: Set[int], num_tiles: int) -> Key:
        """Whose graph a batch needs: that of its ranks, or of more, whose tables are then empty.

        There is one for a few adapters, whose rows share tiles, and one for as many adapters as rows.
        """
        few = min(size, max(MIN_TILES, size // FEW))
        room = 0 if not ranks else few if num_tiles <= few else size
        sets = [own for other, own, others_room in self._captured if (other, others_room) == (size, room) and own]
        wider = [own for own in sets if ranks <= set(own)]
        if not ranks or tuple(sorted(ranks)) in sets or len(sets) < MAX_SETS:
            return size, tuple(sorted(ranks)), room
        return size, min(wider, key=len) if wider else tuple(sorted({*ranks, *self.slots.ranks})), room

    def _moves(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.slots.moves[rank] for rank in ranks)

    def _forget_moved(self) -> None:
        """Let go of the steps whose stacks were exchanged, and of the memory they hold."""
        for key in [key for key, captured in self._captured.items() if captured.moves != self._moves(key[1])]:
            del self._captured[key]
            self._seen[key] = 0

    @torch.inference_mode()
    def prepare(self, max_rows: int) -> None:
        """Capture the steps without adapters of all sizes up to `max_rows`, before anybody waits; the largest first,
        whose memory the others use again."""
        enough = next((size for size in SIZES if size >= max_rows), SIZES[-1])
        for size in [each for each in reversed(SIZES) if each <= enough]:
            if self._is_for_graphs((), (), 0):
                self._capture_step((size, (), 0), (), ())

    def _reserve(self, batch: Sequence[Scheduled]) -> None:
        self.cache.reserve(max((max(item.request.pages) for item in batch), default=0))

    def _capture_step(self, key: Key, batch: Sequence[Scheduled], segments: Sequence[Segment]) -> torch.Tensor | None:
        """Capture a step, and its logits for this batch; None and a warning if it cannot be captured."""
        try:
            step = StaticStep(self, *key)
            self._reserve(batch)
            step.fill(batch, segments)
            logits = step.run()  # compiles what is to be captured
            replay = self._capture(step, logits) if self.is_captured else step.run
        except torch.OutOfMemoryError:
            self.reason = "there was no memory for them"
        except Exception as error:
            # models and libraries that wait for the GPU in a forward pass say so in many ways
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason'}"
        if self.reason is not None:
            logger.warning("steps are not captured as CUDA graphs: %s. They run without, more slowly", self.reason)
            self._captured.clear()
            return None
        stacks = [stack for rank in key[1] for stack in self.slots.stacks(rank)]
        self._captured[key] = Captured(step, replay, self._moves(key[1]), stacks)
        while len(self._captured) > MAX_GRAPHS:
            lost, _ = self._captured.popitem(last=False)
            self._seen[lost] = 0
            self._lost[lost] += 1
        return logits[: sum(item.num_tokens for item in batch)].to(torch.float32, copy=True)

    def _capture(self, step: StaticStep, wanted: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # adapters are read on other threads meanwhile: what these do is no fault of the capture. A capture that fails
        # leaves its own stream the current one: the outer `stream` undoes that
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                logits = step.run()
        except BaseException:
            # nor does the allocator know it is over (torch 2.13, `CUDAGraph::capture_end`), which would keep it from
            # giving memory back for good
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            raise

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        # a row of an adapter that overflows is not a number either way
        got, known = (torch.nan_to_num(each.float(), posinf=0.0, neginf=0.0) for each in (replay(), wanted))
        difference = float((got - known).abs().max() / known.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"a replayed step gives other logits (by {difference:.1e} of the largest)")
        return replay
