"""KVCache: keys and values in pages, one pair of tensors a layer. Which page is whose the PagePool knows."""

from collections.abc import Sequence

import torch

from serve.engine.pages import PAGE

FIRST = 64  # pages to begin with


class KVCache:
    """Per layer two tensors (pages, kv_heads, PAGE, head_dim), made when the layer is first written.

    On the CPU they grow with the highest page in use, up to `num_pages` and page 0; elsewhere they are made whole at
    once and stay where they are. Unwritten places hold zeros, so that what is masked out is always finite. Each of two
    copies that `read` keeps may have `max_copied` pages.
    """

    def __init__(self, num_pages: int, max_copied: int = 0) -> None:
        self.num_pages = num_pages
        self.max_copied = max_copied
        self._capacity = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # what `read` fills, again and again: memory that is new costs more than the copying
        self._copies: dict[tuple[int | None, int | None, int], torch.Tensor] = {}
        self._latest: dict[tuple[int, int], list[torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the pages and of the copies that are read."""
        return self.page_bytes * self._capacity + sum(copy.nbytes for copy in self._copies.values())

    @property
    def page_bytes(self) -> int:
        """Memory of one page in all layers written so far."""
        return sum(tensor[0].nbytes for layer in self._layers.values() for tensor in layer)

    def reserve(self, last: int) -> None:
        """Make room for page `last` and all before it."""
        assert last <= self.num_pages, (last, self.num_pages)
        if last < self._capacity:
            return
        self._capacity = min(self.num_pages + 1, max(last + 1, self._capacity * 3 // 2, FIRST))
        for index, (keys, values) in self._layers.items():
            self._layers[index] = (self._grown(keys), self._grown(values))

    def write(
        self, layer: int, pages: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values (kv_heads, tokens, head_dim) at (pages, offsets); the layer's two tensors."""
        if layer not in self._layers:
            if keys.device.type != "cpu":
                self._capacity = self.num_pages + 1
            self._layers[layer] = (self._zeros(keys), self._zeros(values))
        all_keys, all_values = self._layers[layer]
        all_keys[pages, :, offsets] = keys.transpose(0, 1)
        all_values[pages, :, offsets] = values.transpose(0, 1)
        return all_keys, all_values

    def pair(
        self, layer: int, kv_heads: int, head_dim: int, like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's two tensors for whoever writes to them by itself; float32 in the CPU's memory, or as `like`."""
        if layer not in self._layers:
            like = torch.empty(0) if like is None else like
            if like.device.type != "cpu":
                self._capacity = self.num_pages + 1
            shape = self._capacity, kv_heads, PAGE, head_dim
            self._layers[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self._layers[layer]

    def read(self, layer: int, index: torch.Tensor, keep: int | None = None) -> list[torch.Tensor]:
        """Copies of keys and values (n, PAGE, head_dim) of n pairs page * kv_heads + head.

        They are good until the next call, or until the next with the same layer and `keep`, a place for them.
        """
        found = []
        for which, tensor in enumerate(self._layers[layer]):
            flat = tensor.view(-1, PAGE * tensor.shape[3])
            count = len(index) * flat.shape[1]
            key = (None if keep is None else layer, keep, which)
            if key not in self._copies or self._copies[key].numel() < count:
                self._copies[key] = flat.new_empty(count + count // 4)
            copy = self._copies[key][:count].view(len(index), -1)
            found.append(torch.index_select(flat, 0, index, out=copy).view(len(index), PAGE, -1))
        if keep is not None:
            self._latest[layer, keep] = found
        return found

    def latest(self, layer: int, keep: int) -> list[torch.Tensor]:
        """What `read` gave with that layer and `keep`."""
        return self._latest[layer, keep]

    def clear(self, pages: list[int]) -> None:
        """Zero pages that may hold NaN or infinity."""
        made = [page for page in pages if page < self._capacity]
        for keys, values in self._layers.values():
            keys[made] = 0
            values[made] = 0

    def clear_places(self, pages: Sequence[int], places: range) -> None:
        """Zero the places of a sequence that fills `pages`."""
        for keys, values in self._layers.values():
            for place in places:
                keys[pages[place // PAGE], :, place % PAGE] = 0
                values[pages[place // PAGE], :, place % PAGE] = 0

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._capacity, like.shape[0], PAGE, like.shape[2])

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self._capacity, *old.shape[1:])
        new[: len(old)] = old
        return new
