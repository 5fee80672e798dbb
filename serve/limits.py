"""Limits: how often a key may ask and how much it may run at once, over one server or over all that share a counter.

Whatever counts implements `Limits`; all that passes through it are small frozen values, which any process can be sent.
`Counts` is the counting itself, for whoever is the one process that counts.
"""

import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, Protocol

Why = Literal["concurrency", "rate", "refusals"]
CONCURRENCY_WAIT = 1.0  # seconds after which to ask again: nobody knows when a running request ends


@dataclass(frozen=True)
class Bounds:
    """What a key may: `requests` in any `seconds`, and as many refused ones; `concurrency` requests at once.

    None where there is no bound; `requests` and `seconds` are both None then.
    """

    requests: int | None = None
    seconds: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class Lease:
    """A request that was counted in. `id` is its own alone, `seconds` how long a refused one is remembered."""

    key: str
    seconds: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Refusal:
    """Why a request may not run now, and in how many seconds it may be sent again."""

    why: Why
    seconds: float


class Limits(Protocol):
    """Counts requests of keys. Raises LimitsAway if it cannot know: what cannot be counted is not let in."""

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """Count a request of the key with this id in, if its bounds allow it."""

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """Count it out. One that did not run is given back to the rate, and counted among the refused. Never raises."""

    async def close(self) -> None:
        """End what it holds open."""


class Counts:
    """The counts of one process, exact: no window of `seconds` has more than `requests`, wherever it begins.

    Safe to use from several threads.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: defaultdict[str, set[str]] = defaultdict(set)  # of each key, the leases that are out
        self._asked: defaultdict[str, dict[str, float]] = defaultdict(dict)  # lease -> when, oldest first
        self._refused: defaultdict[str, dict[str, float]] = defaultdict(dict)  # the same of what did not run

    def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        with self._lock:
            if bounds.concurrency is not None and len(self._running[key]) >= bounds.concurrency:
                return Refusal("concurrency", CONCURRENCY_WAIT)
            lease = Lease(key, bounds.seconds)
            if bounds.requests is not None and bounds.seconds is not None:
                now = self._clock()
                windows: tuple[tuple[Why, dict[str, float]], ...] = (
                    ("rate", self._asked[key]),
                    ("refusals", self._refused[key]),
                )
                for why, times in windows:
                    while times and (oldest := next(iter(times.items())))[1] <= now - bounds.seconds:
                        del times[oldest[0]]
                    if len(times) >= bounds.requests:
                        return Refusal(why, next(iter(times.values())) + bounds.seconds - now)
                self._asked[key][lease.id] = now
            self._running[key].add(lease.id)
            return lease

    def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits. A lease that is not out, or was released before, changes nothing."""
        with self._lock:
            running = self._running[lease.key]
            if lease.id not in running:
                return
            running.discard(lease.id)
            if not running:
                del self._running[lease.key]
            if not ran and self._asked[lease.key].pop(lease.id, None) is not None:
                self._refused[lease.key][lease.id] = self._clock()


class LocalLimits:
    """The limits of one server alone: with several behind one address, each lets in as much."""

    def __init__(self, counts: Counts | None = None) -> None:
        self._counts = counts or Counts()

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        return self._counts.admit(key, bounds)

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits."""
        self._counts.release(lease, ran=ran)

    async def close(self) -> None:
        """See Limits."""
