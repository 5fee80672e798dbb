"""Slots: the stacked factors of the adapters in the running batch, on the accelerator.

An adapter takes as many ranks as it has, whatever the others have. Knows nothing of requests.
"""

from collections.abc import Mapping, Set

import torch

from serve.lora.linear import MultiLoraLinear
from serve.lora.product import Slot

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Slots:
    """Ranges of ranks in the stacked factors of all wrapped layers, the same range in each layer."""

    def __init__(self, layers: Mapping[str, MultiLoraLinear], dtype: torch.dtype, device: torch.device) -> None:
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.capacity = 0  # ranks
        self._slots: dict[str, Slot] = {}  # digest -> slot, least recently put first

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def get(self, digest: str) -> Slot | None:
        return self._slots.get(digest)

    def put(self, digest: str, factors: Factors, keep: Set[str]) -> Slot:
        """Copy an adapter's factors into a slot, freeing others that are not in `keep` if there is no room.

        `factors`: module -> (A (rank, in_features), B (rank, out_features) with the scaling in it).
        """
        width = max(a.shape[0] for a, _ in factors.values())
        slot = self._find_room(width, keep)
        for name, layer in self.layers.items():
            if name in factors and layer.a is None:
                layer.a = torch.zeros(self.capacity, layer.in_features, dtype=self.dtype, device=self.device)
                layer.b = torch.zeros(self.capacity, layer.out_features, dtype=self.dtype, device=self.device)
            if layer.a is None or layer.b is None:
                continue
            ranks = slice(slot.start, slot.end)
            for stacked, factor in zip((layer.a, layer.b), factors.get(name, (None, None)), strict=True):
                filled = 0 if factor is None else factor.shape[0]
                if factor is not None:
                    stacked[ranks][:filled].copy_(factor)
                stacked[ranks][filled:].zero_()  # what was there before is nobody's now
        self._slots[digest] = slot
        return slot

    def _find_room(self, width: int, keep: Set[str]) -> Slot:
        gap = self._first_gap(width)
        for digest in list(self._slots):
            if gap is not None:
                break
            if digest not in keep:
                del self._slots[digest]
                gap = self._first_gap(width)
        if gap is None:
            gap = max((slot.end for slot in self._slots.values()), default=0)
            self._grow(max(gap + width, 2 * self.capacity))
        return Slot(gap, gap + width)

    def _first_gap(self, width: int) -> int | None:
        """The lowest start with `width` free ranks: low slots keep the masked product small."""
        start = 0
        for slot in sorted(self._slots.values(), key=lambda slot: slot.start):
            if slot.start - start >= width:
                return start
            start = slot.end
        return start if self.capacity - start >= width else None

    def _grow(self, capacity: int) -> None:
        for layer in self.layers.values():
            if layer.a is not None and layer.b is not None:
                layer.a, layer.b = _grown(layer.a, capacity), _grown(layer.b, capacity)
        self.capacity = capacity


def _grown(old: torch.Tensor, capacity: int) -> torch.Tensor:
    new = old.new_zeros(capacity, old.shape[1])
    new[: old.shape[0]] = old
    return new
