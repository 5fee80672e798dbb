"""The simulated fleet: random traffic, the gateway's own placement and limits, and replicas, in a counted time."""

import heapq
import math
import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import accumulate, count
from typing import Any

from benchmarks.fleet_model import Asked, Costs, Shape, Tally
from benchmarks.fleet_replica import Replica
from serve.cluster.pins import affinity_of
from serve.cluster.placement import FIRST, Placement
from serve.limits import Bounds, Counts, Lease

BACKOFF, MAX_BACKOFF = 0.025, 0.5  # seconds: of Ray, between rounds of asking for one request; doubled each time


@dataclass(frozen=True)
class Traffic:
    """How much of what is asked: adapters by Zipf's law with exponent `zipf`; `load` as a part of what the replicas can
    do at best; lengths are means. The first `warm` seconds are not counted, the `seconds` after them are."""

    replicas: int = 10
    adapters: int = 1000
    zipf: float = 1.0
    load: float = 0.7
    prompt: int = 256
    answer: int = 128
    keys: int = 100
    rate: int | None = None  # requests a key may ask in a minute
    waiting: int = 256  # requests that may wait at each gateway
    gateways: int = 1
    warm: float = 8.0
    seconds: float = 4.0
    seed: int = 0
    others: str = "few"  # or "all": placement asks all others at once, as it did before


@dataclass
class Fleet:
    """One run. `run` makes it, and says what was seen."""

    traffic: Traffic
    shape: Shape = field(default_factory=Shape)
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        traffic = self.traffic
        self.random = random.Random(traffic.seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self.asked: list[Asked] = []
        self.leases: dict[Asked, Lease] = {}
        self.counts = Counts(lambda: self.now)
        self.num_waiting = 0
        self.num_probes = 0
        digests = [f"sha256:{number:064x}" for number in range(traffic.adapters)]
        self.affinities = [affinity_of([(digest, 1.0)]) for digest in digests]
        weights = [1 / (rank + 1) ** traffic.zipf for rank in range(traffic.adapters)]
        self.shares = [each / sum(weights) for each in weights]
        self._until = [*accumulate(self.shares)]
        names = [f"{self.random.getrandbits(40):010x}"[:8] for _ in range(traffic.replicas)]
        self.replicas = {
            name: Replica(name, self.shape, self.costs, self.at, self.end, digests) for name in dict.fromkeys(names)
        }
        self.placement = Placement(self.replicas, self.random)
        for adapter in reversed(range(traffic.adapters)):  # what is asked for most was used last
            self.replicas[self.placement.tiers(self.affinities[adapter])[0][0]].hold(adapter)

    @property
    def rate(self) -> float:
        """Requests a second: of the time that one takes of a full replica, so many fit into a second."""
        traffic, costs, rows = self.traffic, self.costs, self.shape.requests
        step = costs.step + costs.row * rows + costs.adapter * min(self.shape.slots, rows)
        each = costs.prompt_token * traffic.prompt + traffic.answer * step / rows
        return traffic.load * len(self.replicas) / each

    def at(self, time: float, call: Callable[[float], None]) -> None:
        """Have `call` called at that time."""
        heapq.heappush(self._events, (time, next(self._order), call))

    def run(self) -> dict[str, Any]:
        """Ask, until all that was asked for has ended; what was seen."""
        window: list[Tally] = []
        for time in (self.traffic.warm, self.traffic.warm + self.traffic.seconds):
            self.at(time, lambda _: window.append(self.total()))
        self.at(self._gap(), self._arrive)
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call(self.now)
        return self._seen(*window)

    def total(self) -> Tally:
        """What all replicas have done so far."""
        tallies = [replica.tally for replica in self.replicas.values()]
        return Tally(*(sum(getattr(tally, item.name) for tally in tallies) for item in fields(Tally)))

    def _gap(self) -> float:
        return self.random.expovariate(self.rate)

    def _arrive(self, now: float) -> None:
        traffic = self.traffic
        if now > traffic.warm + traffic.seconds:
            return
        self.at(now + self._gap(), self._arrive)
        adapter = min(bisect(self._until, self.random.random()), traffic.adapters - 1)
        lengths = (
            min(limit, max(1, math.ceil(self.random.expovariate(1 / mean))))
            for mean, limit in ((traffic.prompt, 8 * traffic.prompt), (traffic.answer, 8 * traffic.answer))
        )
        key = f"key{self.random.randrange(traffic.keys)}"
        asked = Asked(len(self.asked), adapter, key, *lengths, came=now)
        self.asked.append(asked)
        bounds = Bounds(traffic.rate, None if traffic.rate is None else 60, None)
        lease = self.counts.admit(asked.key, bounds)
        if not isinstance(lease, Lease):
            asked.ended, asked.why = now, "rate"
            return
        self.leases[asked] = lease
        self._place(asked, now)

    def _place(self, asked: Asked, now: float) -> None:
        """Send a request where the placement says, or have it wait and try again, as Ray does."""
        groups = self.placement.tiers(self.affinities[asked.adapter])
        if self.traffic.others == "all":
            first = {group[0] for group in groups[:FIRST]}
            groups = [*groups[:FIRST], [name for name in self.replicas if name not in first]]
        for number, group in enumerate(groups):
            free = [name for name in group if not self.replicas[name].is_full]
            self.num_probes += len(group) - len(free)  # Ray asks each that it believes is full
            if free:
                num_own = FIRST + 1 if self.traffic.others == "few" else FIRST
                asked.place = "first" if number == 0 else "close" if number < num_own else "drawn"
                self.num_waiting -= asked.tries > 0
                self.replicas[min(free, key=lambda name: self.replicas[name].num_running)].send(asked, now)
                return
        if not asked.tries:
            if self.num_waiting >= self.traffic.waiting * self.traffic.gateways:
                asked.why = "waiting"
                self.end(asked, now)
                return
            self.num_waiting += 1
        wait = 0.0 if not asked.tries else min(MAX_BACKOFF, BACKOFF * 2 ** (asked.tries - 1))
        asked.tries += 1
        self.at(now + max(wait, 0.001), lambda then: self._place(asked, then))

    def end(self, asked: Asked, now: float) -> None:
        """A request has ended, or was refused."""
        asked.ended = now
        self.counts.release(self.leases.pop(asked), ran=asked.why is None)

    def _seen(self, before: Tally, after: Tally) -> dict[str, Any]:
        """Of requests that came, and of steps that ended, in the seconds that count; of all what became of them."""
        traffic = self.traffic
        counted = [each for each in self.asked if each.came >= traffic.warm]
        sent = [each for each in counted if each.place]
        firsts = sorted(each.first - each.came + self.costs.hop for each in counted if each.first is not None)
        places, num_sent = Counter(each.place for each in sent), max(1, len(sent))
        done = Tally(*(getattr(after, item.name) - getattr(before, item.name) for item in fields(Tally)))
        seconds = len(self.replicas) * traffic.seconds
        return {
            "asked": len(self.asked),
            "answered": sum(each.why is None for each in self.asked),
            "refused": dict(Counter(each.why for each in self.asked if each.why)),
            "requests_per_second": round(self.rate, 1),
            "tokens_per_second": round(done.num_tokens / traffic.seconds),
            "warm": round(sum(each.is_warm for each in sent) / num_sent, 4),
            "places": {place: round(places[place] / num_sent, 4) for place in ("first", "close", "drawn")},
            "waited": round(sum(each.tries > 0 for each in sent) / num_sent, 4),
            "probes": round(self.num_probes / max(1, len(self.asked)), 2),
            "reads_per_second": round(done.num_read / traffic.seconds, 2),
            "brought_per_second": round(done.num_brought / traffic.seconds, 2),
            "first_token_ms": {name: _ms(firsts, part) for name, part in (("p50", 0.5), ("p99", 0.99))},
            "rows": round(done.row_seconds / max(done.busy, 1e-9), 1),
            "busy": round(done.busy / seconds, 3),
            "gpu_seconds_per_1000_tokens": round(1000 * seconds / max(1, done.num_tokens), 4),
        }


def _ms(values: list[float], part: float) -> float | None:
    """The milliseconds below which that part of sorted seconds lies."""
    return round(1000 * values[min(len(values) - 1, int(part * len(values)))], 1) if values else None
