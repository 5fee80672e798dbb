"""KVCache: keys and values of every row, one pair of tensors a layer. Which row is whose the scheduler knows."""

import torch

STEP = 256  # rows grow in steps of this many tokens


class KVCache:
    """Per layer two tensors (rows, kv_heads, length, head_dim), made when the layer is first written.

    `length` grows with the longest row, up to `max_length`. Unwritten places hold zeros, so that what is
    masked out is always finite.
    """

    def __init__(self, num_rows: int, max_length: int) -> None:
        self.num_rows = num_rows
        self.max_length = max_length
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        assert length <= self.max_length, (length, self.max_length)
        if length <= self.length:
            return
        wanted = max(length, self.length + self.length // 2)
        self.length = min(self.max_length, -(-wanted // STEP) * STEP)
        for index, (keys, values) in self._layers.items():
            self._layers[index] = (self._grown(keys), self._grown(values))

    def write(
        self, layer: int, rows: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values (kv_heads, tokens, head_dim) at (rows, positions); the layer's two tensors."""
        if layer not in self._layers:
            self._layers[layer] = (self._zeros(keys), self._zeros(values))
        all_keys, all_values = self._layers[layer]
        all_keys[rows, :, positions] = keys.transpose(0, 1)
        all_values[rows, :, positions] = values.transpose(0, 1)
        return all_keys, all_values

    @property
    def is_uniform(self) -> bool:
        """Whether keys and values have one shape in all layers."""
        return len({tensor.shape for layer in self._layers.values() for tensor in layer}) == 1

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of places [start, end) of a row: (2 * layers, kv_heads, places, head_dim), layers in their order."""
        return torch.stack([tensor[row, :, start:end] for tensor in self._in_order()])

    def fill(self, row: int, places: torch.Tensor) -> None:
        """Write what `read` gave to the beginning of a row."""
        self.reserve(places.shape[2])
        for tensor, own in zip(self._in_order(), places, strict=True):
            tensor[row, :, : own.shape[1]] = own

    def _in_order(self) -> list[torch.Tensor]:
        return [tensor for index in sorted(self._layers) for tensor in self._layers[index]]

    def clear(self, row: int) -> None:
        """Zero a row that may hold NaN or infinity."""
        for keys, values in self._layers.values():
            keys[row].zero_()
            values[row].zero_()

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self.num_rows, like.shape[0], self.length, like.shape[2])

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(*old.shape[:2], self.length, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new
