"""Slots: the stacked factors of the adapters in the running batch, on the accelerator.

Adapters of one rank share a stack, so that none is padded to another's rank. Knows nothing of requests.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from serve.adapters.record import Record, Records
from serve.lora.linear import LinearGroup, MultiLoraLinear
from serve.lora.product import Factors, Slot
from serve.lora.rows import rows_of


class Slots:
    """At most `max_slots` adapters in the stacks of all wrapped layers, at the same place in each layer.

    Which adapter is where stands in its record. One thread at a time fills and frees slots; a step reads those of its
    own adapters, which are left alone but for `between_steps`, so neither needs a lock.
    """

    def __init__(
        self,
        layers: Mapping[str, MultiLoraLinear],
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
        records: Records | None = None,
    ) -> None:
        self.records = records or Records()
        self.layers = layers
        self.groups: list[LinearGroup] = list({id(each.group): each.group for each in layers.values()}.values())
        self.dtype = dtype
        self.device = device
        self.max_slots = max_slots
        self.num_loads = 0
        self.num_evictions = 0
        self._num_finds = 0
        self._filled: list[Record] = []  # those that have a slot
        self._capacity: dict[int, int] = {}  # rank -> slots in its stack
        self.moving = threading.Lock()  # held while stacks are exchanged, and while a graph that reads them is captured
        self.moves: Counter[int] = Counter()  # rank -> how often its stacks were exchanged
        self._stream: Any = None  # for copies beside the steps

    def __len__(self) -> int:
        return len(self._filled)

    def __contains__(self, digest: str) -> bool:
        record = self.records.get(digest)
        return record is not None and record.slot is not None

    @property
    def num_bytes(self) -> int:
        rows = sum(record.slot.rows.nbytes for record in list(self._filled) if record.slot and record.slot.rows)
        return rows + sum(
            stack.nbytes
            for group in self.groups
            for stacks in (group.a, *group.b, *group.scales)
            for stack in list(stacks.values())
        )

    @property
    def ranks(self) -> list[int]:
        """Ranks that have stacks."""
        return sorted(self._capacity.copy())  # which another thread may change meanwhile

    def find(self, digests: Iterable[str]) -> dict[str, Slot]:
        """Where these adapters are in the step that begins now; they count as used."""
        self._num_finds += 1
        found: dict[str, Slot] = {}
        for digest in digests:
            if digest not in found:
                record = self.records[digest]
                assert record.slot is not None, digest
                record.slot_step = self._num_finds
                found[digest] = record.slot
        return found

    def make_room(self, factors: Factors, keep: Set[str]) -> bool:
        """Evict the least recently used adapter that is not in `keep`, if the new one needs its place.

        Whether there is room now, or can be made by moving adapters together.
        """
        if self._free(_rank(factors)) is not None or len(self._filled) < self.max_slots:
            return True
        idle = [record for record in self._filled if record.digest not in keep]
        if not idle:
            return False
        self._leave(min(idle, key=lambda record: record.slot_step))
        self.num_evictions += 1
        return True

    def put(
        self,
        digest: str,
        factors: Factors,
        keep: Set[str],
        between_steps: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Slot:
        """Copy an adapter's factors into a slot, freeing one that is not in `keep` if need be.

        To be called by one thread at a time, which may be another than the one that computes: stacks grow beside
        those in use, and only `between_steps` are adapters moved.
        """
        has_room = self.make_room(factors, keep)
        assert has_room, "more adapters run than there are slots"
        rank = _rank(factors)
        if self._free(rank) is None and sum(self._capacity.values()) >= self.max_slots:
            for other in self._capacity.keys() - {rank}:
                self.compact(other, between_steps)
        with self._exchanging(rank):
            if self._free(rank) is None:
                held = self._capacity.get(rank, 0)
                spare = self.max_slots - sum(self._capacity.values())
                for stacks, stack in self._resized(rank, range(held), held + min(max(1, held), spare)):
                    stacks[rank] = stack  # the same at every place that is in use
                self._capacity[rank] = held + min(max(1, held), spare)
            for name, factor in factors.items():
                self._make_stacks(self.layers[name], rank, factor)
        place = self._free(rank)
        assert place is not None
        given = rows_of(factors)
        rows = None if given is None else given.empty_on(self.device)  # not on the stream that fills it either
        slot = Slot(rank, place, is_scaled=any(len(factor) > 2 for factor in factors.values()), rows=rows)
        with self._copying():
            if rows is not None and given is not None:
                rows.copy_from(given)
            for name, layer in self.layers.items():
                self._fill(layer, slot, factors.get(name))
        with self.records.lock:
            record = self.records.make(digest)
            record.slot_step = self._num_finds
            record.slot = slot
            self._filled.append(record)
        self.num_loads += 1
        return slot

    def free(self, digest: str) -> int | None:
        """Take an adapter that no running request uses out of its slot, which stays; its rank, None if it has none."""
        record = self.records.get(digest)
        if record is None or record.slot is None:
            return None
        return self._leave(record).rank

    def stacks(self, rank: int) -> list[torch.Tensor]:
        """All stacks of a rank; as long as they are held, a step may read those of its requests even if others took
        their place meanwhile."""
        found = (each.get(rank) for group in self.groups for each in (group.a, *group.b, *group.scales))
        return [stack for stack in found if stack is not None]

    @contextmanager
    def _exchanging(self, rank: int) -> Iterator[None]:
        """Count it if stacks of `rank` are others afterwards, also if there was no memory for all of them."""
        with self.moving:
            before = self.stacks(rank)
            try:
                yield
            finally:
                self.moves[rank] += [*map(id, before)] != [*map(id, self.stacks(rank))]

    def _make_stacks(self, layer: MultiLoraLinear, rank: int, factors: tuple[torch.Tensor, ...]) -> None:
        """Have stacks of zeros for what these factors need. Not on the stream that fills them: torch gives the memory
        of a tensor away again when the stream it was made on has no use for it, whatever others do."""
        group, capacity = layer.group, self._capacity[rank]
        stacks, scales = group.b[layer.place], group.scales[layer.place]
        if rank not in group.a:
            group.a[rank] = self._zeros(capacity, group.in_features, len(group.bases) * rank)
        if rank not in stacks:
            stacks[rank] = self._zeros(capacity, rank, layer.out_features)
        if len(factors) > 2 and rank not in scales:
            scales[rank] = self._zeros(capacity, layer.out_features)

    def _fill(self, layer: MultiLoraLinear, slot: Slot, factors: tuple[torch.Tensor, ...] | None) -> None:
        group, rank = layer.group, slot.rank
        stacks = group.b[layer.place]
        if rank not in stacks:
            return
        a = group.a[rank][slot.index][:, layer.place * rank : (layer.place + 1) * rank]
        b = stacks[rank][slot.index]
        filled = 0
        if factors is not None:
            filled = factors[0].shape[1]
            a[:, :filled].copy_(factors[0], non_blocking=True)
            b[:filled].copy_(factors[1], non_blocking=True)
        a[:, filled:].zero_()  # what was there before is nobody's now
        b[filled:].zero_()
        scales = group.scales[layer.place]
        scale = factors[2] if factors is not None and len(factors) > 2 else None
        if scale is not None:
            scales[rank][slot.index].copy_(scale, non_blocking=True)
        elif rank in scales:
            scales[rank][slot.index].zero_()

    def _leave(self, record: Record) -> Slot:
        assert record.slot is not None, record.digest
        with self.records.lock:
            slot, record.slot = record.slot, None
            self._filled.remove(record)
            self.records.forget(record)
        return slot

    def _of_rank(self, rank: int) -> dict[int, Record]:
        """Place -> the record of who has it, in a rank's stack."""
        found = ((record.slot, record) for record in list(self._filled))
        return {slot.index: record for slot, record in found if slot is not None and slot.rank == rank}

    def _free(self, rank: int) -> int | None:
        """A free place in the stack of `rank`: the lowest, so that those in use stay close together."""
        taken = self._of_rank(rank)
        return next((place for place in range(self._capacity.get(rank, 0)) if place not in taken), None)

    def compact(self, rank: int, between_steps: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Move the adapters of a rank together and give back the memory of the rest."""
        held = sorted(self._of_rank(rank).items(), key=lambda item: item[0])
        if len(held) == self._capacity.get(rank, 0):
            return
        moved = list(self._resized(rank, [index for index, _ in held], len(held)))
        with between_steps():
            self.moves[rank] += 1
            for stacks, stack in moved:
                if held:
                    stacks[rank] = stack
                else:
                    del stacks[rank]
            for place, (_, record) in enumerate(held):
                assert record.slot is not None
                record.slot = replace(record.slot, index=place)
            if held:
                self._capacity[rank] = len(held)
            else:
                del self._capacity[rank]

    def _resized(
        self, rank: int, places: Sequence[int], capacity: int
    ) -> Iterator[tuple[dict[int, torch.Tensor], torch.Tensor]]:
        """For each stack of `rank` one with room for `capacity` adapters, those at `places` in front."""
        for stacks in (each for group in self.groups for each in (group.a, *group.b, *group.scales)):
            if rank in stacks:
                stack = torch.empty((capacity, *stacks[rank].shape[1:]), dtype=self.dtype, device=self.device)
                stack[: len(places)] = stacks[rank][list(places)]
                stack[len(places) :].zero_()  # a layer that no adapter has had is not filled, and must be nothing
                yield stacks, stack

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On a GPU copies run beside the step that is computed, and are done at the end."""
        if self.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # a new stack must have been zeroed
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _rank(factors: Factors) -> int:
    return max(factor[0].shape[1] for factor in factors.values())
