"""Slots: the stacked factors of the adapters in the running batch, on the accelerator.

Adapters of one rank share a stack, so that none is padded to another's rank. Knows nothing of requests.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set

import torch

from serve.lora.linear import LinearGroup, MultiLoraLinear
from serve.lora.product import Slot

# module -> (A (in_features, rank), B (rank, out_features) with the scaling in it), and with DoRA a third tensor: by how
# much more than once W x counts (out_features)
Factors = Mapping[str, tuple[torch.Tensor, ...]]


class Slots:
    """At most `max_slots` adapters in the stacks of all wrapped layers, at the same place in each layer."""

    def __init__(
        self, layers: Mapping[str, MultiLoraLinear], dtype: torch.dtype, device: torch.device, max_slots: int
    ) -> None:
        self.layers = layers
        self.groups: list[LinearGroup] = list({id(each.group): each.group for each in layers.values()}.values())
        self.dtype = dtype
        self.device = device
        self.max_slots = max_slots
        self.num_loads = 0
        self.num_evictions = 0
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # digest -> slot, least recently used first
        self._scaled: set[str] = set()  # digests of adapters with DoRA
        self._capacity: dict[int, int] = {}  # rank -> slots in its stack

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    @property
    def num_bytes(self) -> int:
        return sum(
            stack.nbytes
            for group in self.groups
            for stacks in (group.a, *group.b, *group.scales)
            for stack in stacks.values()
        )

    def find(self, digests: Iterable[str]) -> dict[str, Slot]:
        """Where these adapters are, until the next `put` or `drop`; they count as used."""
        found = {}
        for digest in digests:
            self._slots.move_to_end(digest)
            found[digest] = self._slots[digest]
        scaled = frozenset(slot for digest, slot in found.items() if digest in self._scaled)
        for context in {id(group.context): group.context for group in self.groups}.values():
            context.scaled = scaled
        return found

    def put(self, digest: str, factors: Factors, keep: Set[str]) -> Slot:
        """Copy an adapter's factors into a slot, freeing the least recently used that is not in `keep` if need be.

        Others may be moved to make room: what `find` said before is no longer so.
        """
        rank = max(factor[0].shape[1] for factor in factors.values())
        slot = Slot(rank, self._find_room(rank, keep))
        for name, layer in self.layers.items():
            self._fill(layer, slot, factors.get(name))
        self._slots[digest] = slot
        if any(len(factor) > 2 for factor in factors.values()):
            self._scaled.add(digest)
        self.num_loads += 1
        return slot

    def drop(self, digest: str) -> int:
        """Free the slot of an adapter that no running request uses; the bytes that are free now."""
        before, slot = self.num_bytes, self._slots.pop(digest, None)
        self._scaled.discard(digest)
        if slot is not None:
            self._compact(slot.rank)
        return before - self.num_bytes

    def _fill(self, layer: MultiLoraLinear, slot: Slot, factors: tuple[torch.Tensor, ...] | None) -> None:
        group, rank, capacity = layer.group, slot.rank, self._capacity[slot.rank]
        stacks = group.b[layer.place]
        if factors is not None and rank not in stacks:
            if rank not in group.a:
                group.a[rank] = self._zeros(capacity, group.in_features, len(group.bases) * rank)
            stacks[rank] = self._zeros(capacity, rank, layer.out_features)
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
            if rank not in scales:
                scales[rank] = self._zeros(capacity, layer.out_features)
            scales[rank][slot.index].copy_(scale, non_blocking=True)
        elif rank in scales:
            scales[rank][slot.index].zero_()

    def _find_room(self, rank: int, keep: Set[str]) -> int:
        """A free place in the stack of `rank`: the lowest, so that those in use stay close together."""
        if self._free(rank) is None and sum(self._capacity.values()) >= self.max_slots:
            if len(self._slots) >= self.max_slots:
                evicted = next(digest for digest in self._slots if digest not in keep)
                del self._slots[evicted]
                self._scaled.discard(evicted)
                self.num_evictions += 1
            for other in self._capacity.keys() - {rank}:
                self._compact(other)
        if self._free(rank) is None:
            held = self._capacity.get(rank, 0)
            spare = self.max_slots - sum(self._capacity.values())
            assert spare > 0, "more adapters run than there are slots"
            self._resize(rank, held + min(max(1, held), spare))
        place = self._free(rank)
        assert place is not None
        return place

    def _free(self, rank: int) -> int | None:
        taken = {slot.index for slot in self._slots.values() if slot.rank == rank}
        return next((place for place in range(self._capacity.get(rank, 0)) if place not in taken), None)

    def _compact(self, rank: int) -> None:
        """Move the adapters of a rank together and give back the memory of the rest."""
        held = sorted((slot.index, digest) for digest, slot in self._slots.items() if slot.rank == rank)
        if len(held) == self._capacity.get(rank, 0):
            return
        self._resize(rank, len(held), [index for index, _ in held])
        for place, (_, digest) in enumerate(held):
            self._slots[digest] = Slot(rank, place)

    def _resize(self, rank: int, capacity: int, places: Sequence[int] | None = None) -> None:
        """Give the stack of `rank` room for `capacity` adapters; `places` are taken over, by default all."""
        order = list(range(self._capacity.get(rank, 0)) if places is None else places)
        for stacks in (each for group in self.groups for each in (group.a, *group.b, *group.scales)):
            if rank not in stacks:
                continue
            old = stacks.pop(rank)
            if capacity:
                stacks[rank] = self._zeros(capacity, *old.shape[1:])
                stacks[rank][: len(order)] = old[order]
        if capacity:
            self._capacity[rank] = capacity
        else:
            self._capacity.pop(rank, None)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
