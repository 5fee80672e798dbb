"""Memory in huge pages for weights that a CPU reads at every step.

In pages of 4 kB a core reads half as fast: it looks up where each of them lies, on a virtual machine twice, and stops
reading ahead at its end. Pages of 2 MB are asked for of Linux (`MADV_HUGEPAGE`); elsewhere nothing is moved.
"""

import contextlib
import mmap
import sys

import torch

CHUNK = 32 << 20
HUGE = 2 << 20
SMALL = 64 << 10  # bytes that are not worth a mapping of their own
ALIGNED = 64  # where a tensor begins, as torch's own do


class Arena:
    """Tensors one behind the other, in the order in which they come: that in which they will be read.

    `chunk` bytes are mapped at once; what is never written takes no memory. Memory that comes and goes is better not
    `is_huge`: to find and clear such pages takes longer than what is written to them.
    """

    def __init__(self, chunk: int = CHUNK, *, is_huge: bool = True) -> None:
        self._chunk = chunk
        self._is_huge = is_huge
        self._free = torch.empty(0, dtype=torch.uint8)

    def moved(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A contiguous copy in this memory, in `dtype`; where there are no such pages, a copy only if one is needed."""
        dtype = dtype or tensor.dtype
        if sys.platform != "linux" or tensor.device.type != "cpu":
            return tensor.to(dtype).contiguous()
        num_bytes = tensor.numel() * dtype.itemsize
        size = -(-num_bytes // ALIGNED) * ALIGNED
        if size > len(self._free):
            self._free = _mapped(max(size, self._chunk), self._is_huge)
        room, self._free = self._free[:num_bytes], self._free[size:]
        return room.view(dtype).view(tensor.shape).copy_(tensor)


def _mapped(size: int, is_huge: bool) -> torch.Tensor:
    """Zeros (size,) uint8, beginning with a huge page if asked for; the memory goes with the last tensor in it."""
    if size < SMALL:
        return torch.zeros(size, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has huge pages by another setting
    memory = mmap.mmap(-1, size + HUGE * is_huge, flags=flags)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    if not is_huge:
        return whole
    begin = -whole.data_ptr() % HUGE
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a C library, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return whole[begin : begin + size]
