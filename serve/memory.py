"""What grows in a server that runs for weeks, bounded: glibc's heaps and what oneDNN remembers.

glibc makes a heap for nearly every thread, and what is freed in one is lost to all others. oneDNN keeps 0.6 MB for
every shape and number of tokens it has multiplied, 1,024 of them.
"""

import ctypes
import os

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2  # the stepping thread's and one for all that runs beside it
REMEMBERED = 96  # five products of a layer and the head with each number of rows up to 16, and some lengths of prompts


def bound_memory() -> None:
    """Have threads started from now on share ARENAS heaps, and oneDNN, if nothing was multiplied yet, remember less.

    Nothing where the C library has no such setting.
    """
    os.putenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(REMEMBERED))
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
