"""How glibc hands out large tensors on the CPU: each in pages of its own, which go back when it is freed.

By itself glibc takes the size above which it does so from what was freed last, up to 32 MB. Dequantised weights then
come to live in its heap, where the order of requests decides how large the holes are that they leave. A fixed size
makes the peak smaller and easier to foretell. Smaller tensors stay in the heap: new pages for each of those would
take a quarter more of processor time.
"""

import ctypes

from adapterhub_local.rows.bounds import HEAP_CHUNK

M_MMAP_THRESHOLD = -3  # malloc.h


def map_large_tensors() -> None:
    """Have tensors of HEAP_CHUNK bytes and more mapped, in all of this process. Nothing if glibc is not its C library.

    A size that the environment gives (MALLOC_MMAP_THRESHOLD_) is overridden: `qhub plan` counts on this one.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, HEAP_CHUNK)
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
