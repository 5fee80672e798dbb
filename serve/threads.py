"""Which threads compute in parallel: only the one that steps the engine.

GNU OpenMP gives every thread that computes helpers of its own. When there are more of all these than cores, none of
them waits awake any more, and every small product of a step pays for waking its helper: a third of the speed.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def compute_alone() -> None:
    """Have the calling thread compute without helpers from now on; nothing where OpenMP is not to be found."""
    torch.get_num_threads()  # on its first call torch sets the thread's number, and must not do so later
    try:
        ctypes.CDLL(None).omp_set_num_threads(1)
    except (AttributeError, OSError, TypeError):  # another OpenMP, or another system
        return


def in_passing(work: Callable[[], Result]) -> Result:
    """What `work` gives, done in a thread that ends with it, and its helpers with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
