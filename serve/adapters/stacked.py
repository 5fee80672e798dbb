"""StackedSlots: the stacked factors of the adapters in the running batch, on the accelerator.

Adapters of one rank share a stack, so that none is padded to another's rank.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from serve.adapters.record import Record, Records
from serve.adapters.slots import Slots, is_scaled, max_rank
from serve.lora.linear import MultiLoraLinear
from serve.lora.product import Factors, Slot
from serve.lora.rows import rows_of


class StackedSlots(Slots):
    """Slots in the stacks of all wrapped layers, an adapter at the same place in each layer.

    Stacks grow beside those in use, and only `between_steps` are adapters moved.
    """

    def __init__(
        self,
        layers: Mapping[str, MultiLoraLinear],
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
        records: Records | None = None,
    ) -> None:
        super().__init__(layers, max_slots, records)
        self.dtype = dtype
        self.device = device
        self._capacity: dict[int, int] = {}  # rank -> slots in its stack
        self.moving = threading.Lock()  # held while stacks are exchanged, and while a graph that reads them is captured
        self.moves: Counter[int] = Counter()  # rank -> how often its stacks were exchanged
        self._stream: Any = None  # for copies beside the steps

    @property
    def num_bytes(self) -> int:
        rows = sum(record.slot.rows.nbytes for record in self._filled if record.slot and record.slot.rows)
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

    def _has_place(self, factors: Factors) -> bool:
        return self._free(max_rank(factors)) is not None or super()._has_place(factors)

    def _fill(self, factors: Factors, between_steps: Callable[[], AbstractContextManager[None]]) -> Slot:
        rank = max_rank(factors)
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
        slot = Slot(rank, place, is_scaled(factors), rows)
        with self._copying():
            if rows is not None and given is not None:
                rows.copy_from(given)
            for name, layer in self.layers.items():
                self._copy(layer, slot, factors.get(name))
        return slot

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

    def _copy(self, layer: MultiLoraLinear, slot: Slot, factors: tuple[torch.Tensor, ...] | None) -> None:
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
