"""Slots: the adapters that may be in the running batch. Knows nothing of requests."""

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext

from serve.adapters.record import Record, Records
from serve.lora.in_place import laid_out
from serve.lora.linear import LinearGroup, MultiLoraLinear
from serve.lora.product import Factors, Slot
from serve.lora.rows import rows_of


class Slots:
    """At most `max_slots` adapters, each read where it is kept: on a CPU, whose kernels need no stacks.

    Which adapter is where stands in its record. One thread at a time fills and frees slots; a step reads those of its
    own adapters, which are left alone but for `between_steps`, so neither needs a lock.
    """

    def __init__(self, layers: Mapping[str, MultiLoraLinear], max_slots: int, records: Records | None = None) -> None:
        self.records = records or Records()
        self.layers = layers
        self.groups: list[LinearGroup] = list({id(each.group): each.group for each in layers.values()}.values())
        self.max_slots = max_slots
        self.num_loads = 0
        self.num_evictions = 0
        self._num_finds = 0
        self._entered: list[Record] = []  # those that were given a slot, which one in place may have lost

    def __len__(self) -> int:
        return len(self._filled)

    def __contains__(self, digest: str) -> bool:
        record = self.records.get(digest)
        return record is not None and record.slot is not None

    @property
    def num_bytes(self) -> int:
        """Memory of the slots beside that of the adapters."""
        return 0

    @property
    def _filled(self) -> list[Record]:
        """The records of those that have a slot."""
        return [record for record in list(self._entered) if record.slot is not None]

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
        """Evict the least recently used adapter that is not in `keep`, if the new one needs its place; whether there
        is room now, or can be made by moving adapters together."""
        filled = self._filled
        if self._has_place(factors) or len(filled) < self.max_slots:
            return True
        idle = [record for record in filled if record.digest not in keep]
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
        """Give an adapter a slot, freeing one that is not in `keep` if need be.

        To be called by one thread at a time, which may be another than the one that computes.
        """
        has_room = self.make_room(factors, keep)
        assert has_room, "more adapters run than there are slots"
        slot = self._fill(factors, between_steps)
        with self.records.lock:
            record = self.records.make(digest)
            record.slot_step = self._num_finds
            record.slot = slot
            self._entered = [each for each in self._entered if each.slot is not None and each is not record] + [record]
        self.num_loads += 1
        return slot

    def free(self, digest: str) -> Slot | None:
        """Take an adapter that no running request uses out of its slot, which it had if this is not None."""
        record = self.records.get(digest)
        return None if record is None or record.slot is None else self._leave(record)

    def compact(self, rank: int, between_steps: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Give back the memory of empty slots of a rank."""

    def _has_place(self, factors: Factors) -> bool:
        """Whether a slot is free that these factors fit in."""
        return len(self._filled) < self.max_slots

    def _fill(self, factors: Factors, between_steps: Callable[[], AbstractContextManager[None]]) -> Slot:
        """A slot with these factors in it, which is used from now on only."""
        own = laid_out(factors, self.layers)
        taken = {record.slot.index for record in self._filled if record.slot is not None}
        index = next(place for place in range(len(taken) + 1) if place not in taken)
        return Slot(max_rank(own), index, is_scaled(own), rows_of(own), own.parts)

    def _leave(self, record: Record) -> Slot | None:
        with self.records.lock:
            slot, record.slot = record.slot, None
            self._entered.remove(record)
            self.records.forget(record)
        return slot


def max_rank(factors: Factors) -> int:
    """The largest rank of the factors of an adapter."""
    return max(factor[0].shape[1] for factor in factors.values())


def is_scaled(factors: Factors) -> bool:
    """Whether an adapter has DoRA."""
    return any(len(factor) > 2 for factor in factors.values())
