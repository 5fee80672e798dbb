"""Which threads compute in parallel: only the one that steps the engine.

GNU OpenMP gives every thread that computes helpers of its own. When there are more of all these than cores, none of
them waits awake any more, and every small product of a step pays for waking its helper: a third of the speed.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


SLOW = 1.5  # times the usual: something else computes here
TRIES = 3  # slow steps in a row before one thread is tried
AGAIN = 64  # steps of one thread before all are tried again


class Team:
    """How many threads compute a step: all, or one while other work holds the other cores.

    Threads of a step wait for each other some hundred times. When one of them has lost its core to another process, all
    of them stand still until it has it back, and one thread alone is faster.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most = most
        self._clock = clock
        self._usual: dict[tuple[int, int], float] = {}  # (tokens, threads) -> seconds of a step
        self._threads = most
        self._slow = 0  # steps of all threads in a row that took too long
        self._alone = 0  # steps of one thread since all were tried

    @contextmanager
    def step(self, tokens: int) -> Iterator[int]:
        """The number of threads for a step of this many tokens, whose time is taken."""
        threads = self._threads
        start = self._clock()
        yield threads
        if self.most > 1:
            self._note(tokens, threads, self._clock() - start)

    def _note(self, tokens: int, threads: int, seconds: float) -> None:
        key = (tokens, threads)
        usual = self._usual.get(key, seconds)
        if threads == 1:
            self._usual[key] = seconds
            self._alone += 1
            if self._alone >= AGAIN:
                self._threads = self.most
                self._slow = TRIES - 1  # one slow step is enough now
            return
        is_slow = seconds > SLOW * usual
        # what is usual falls at once and rises slowly: a machine that stays slower is not busy forever
        self._usual[key] = min(seconds, usual * 1.01)
        self._slow = self._slow + 1 if is_slow else 0
        alone = self._usual.get((tokens, 1))
        if self._slow >= TRIES and (alone is None or alone < seconds):
            self._threads, self._alone, self._slow = 1, 0, 0
