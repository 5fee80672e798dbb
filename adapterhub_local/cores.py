"""How many threads compute: as many as there are cores that nothing else uses, watched while they do.

The threads of a product wait for each other, hundreds of times a second. When other work takes the core of one of them,
all stand still until it has it back, or burn the cores that it could move to: two threads beside one busy process on
two cores are several times slower than one thread there (benchmarks/busy.py). The bits of a product are the same.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from adapterhub_local import settings
from adapterhub_local.machine import core_quota, usable_cores

WINDOW = 0.5  # seconds over which use is measured
FIRST = 0.1  # the same after a rest
STALE = 10.0  # seconds after which nothing is concluded from what was measured before
SPARE = 0.3  # of a core, which other work may use before the core counts as taken

logger = logging.getLogger(__name__)


class Use(NamedTuple):
    """Seconds of processor time since some moment: of all cores that this process may use, and its own."""

    everything: float
    own: float


def measure() -> Use | None:
    """The use so far; None where the system does not say."""
    import psutil

    try:
        each = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError):  # such as a container without /proc, or a system that psutil does not know
        return None
    cores = usable_cores()
    times = [each[core] for core in cores if core < len(each)]
    busy = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) - _counted_twice(core) for core in times)
    return Use(busy, time.process_time())


def _counted_twice(times: object) -> float:
    """Seconds of guests, which are in `user` and `nice` as well."""
    return float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))


class Cores:
    """The threads that computations of this process should take, at most `most`.

    `note` gets one line when other work first takes some of them away. Call from one thread.
    """

    def __init__(
        self,
        most: int,
        *,
        note: Callable[[str], None] = logger.info,
        use: Callable[[], Use | None] = measure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self._note, self._use, self._clock = note, use, clock
        self._is_fixed = most == 1 or settings.are_threads_given()
        self._count = len(usable_cores())
        self._threads = most
        self._since = self._found = clock()
        self._window = WINDOW
        self._last = None if self._is_fixed else use()
        self._has_noted = False

    def threads(self) -> int:
        """How many now, from 1 to `most`; measured anew twice a second."""
        if self._last is None:
            return self._threads
        seconds = self._clock() - self._since
        if seconds >= self._window:
            self._measure(self._last, seconds)
        return self._threads

    def resume(self) -> None:
        """Computing begins again after a rest: what others did meanwhile says nothing of what they will do now.

        So many threads as before the rest, if that was not long ago, until a first short window is over.
        """
        if self._last is None:
            return
        now = self._clock()
        if now - self._found > STALE:
            self._threads = self.most
        self._last, self._since, self._window = self._use(), now, FIRST

    def _measure(self, last: Use, seconds: float) -> None:
        self._last = now = self._use()
        self._since = self._found = self._clock()
        self._window = WINDOW
        if now is None:
            return
        others = max(0.0, (now.everything - last.everything) - (now.own - last.own)) / seconds
        free = math.floor(self._count - others + SPARE)
        self._threads = max(1, min(self.most, free))
        if self._threads < self.most and not self._has_noted:
            self._has_noted = True
            threads = "one thread" if self._threads == 1 else f"{self._threads} threads"
            self._note(
                f"other work takes {others:.1f} of {self._count} cores: computing with {threads} while it does "
                "(OMP_NUM_THREADS sets a fixed number)"
            )


def most_threads(default: int) -> int:
    """The threads of a process that would start `default`: no more than its container has processor time for."""
    quota = core_quota()
    return default if quota is None or settings.are_threads_given() else max(1, min(default, math.ceil(quota)))
