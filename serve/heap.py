"""glibc's heaps, of which a server with many threads would make one for nearly each: memory freed in one is lost to all
others, so a server that loads and drops adapters for hours would go on growing."""

import ctypes

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2  # the stepping thread's and one for all that runs beside it


def bound_heaps() -> None:
    """Have all threads started from now on share ARENAS heaps; nothing where the C library has no such setting."""
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
