"""Usage: who asked which adapter how much, how long its answers took, and what failed; bounded, whoever asks."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

Sees = Callable[[str], bool]  # whether an adapter's label, or a key's id, may be seen
OTHER = "other"  # what is beyond a bound is counted together
NOBODY = "none"  # in the place of a key where none is needed
UNFOUND = "-"  # in the place of an adapter where a request came to none; no name begins so
MAX_KEYS = 100
MAX_USED = 500  # pairs of key and adapter
MAX_TIMED = 30  # adapters with times of their own: each has a line for every bucket
MAX_FAILED = 300  # pairs of adapter and status
FIRST_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
ANSWER_SECONDS = (0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 180.0, 600.0)


class Labels:
    """What adapters are counted under: at most so many labels, and one for all others."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: dict[str, tuple[str, ...]] = {}

    def of(self, text: str, names: tuple[str, ...]) -> str:
        """The label of an adapter that is shown as `text`, in which these names stand."""
        if text in self._names:
            return text
        if text == OTHER or len(self._names) >= self._limit:  # an adapter of that name may be seen by more than all
            return OTHER
        self._names[text] = names
        return text

    def names(self, label: str) -> tuple[str, ...]:
        """The names that a label stands for; of those that are counted together, one that only a key for all is for."""
        return () if label == UNFOUND else self._names.get(label, ("/",))


class Used(NamedTuple):
    """Whose requests to which adapter: labels, both."""

    key: str
    adapter: str


@dataclass
class Tally:
    """Requests that ran, and their tokens."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0


@dataclass
class Times:
    """How many times were at most as long as each bound, and longer than the one before; the last has none."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: how many were at most as long as each bound."""
        sums = [sum(self.counts[: place + 1]) for place in range(len(self.counts))]
        return list(zip([*map(str, self.bounds), "+Inf"], map(float, sums), strict=True))


class Usage:
    """All of it, by labels that `Labels` gave. Written by one thread; another may collect."""

    def __init__(self) -> None:
        self._keys: set[str] = {NOBODY}
        self._used: dict[Used, Tally] = {}
        self._times: dict[str, tuple[Times, Times]] = {}  # adapter -> to the first token, to the end
        self._failed: dict[tuple[str, str], int] = {}

    def note_answer(self, key: str | None, adapter: str, num_prompt: int, num_completion: int) -> None:
        """An answer for the key of this id ended, whole or not."""
        who = key or NOBODY
        if who not in self._keys and len(self._keys) > MAX_KEYS:
            who = OTHER
        self._keys.add(who)
        used = Used(who, adapter)
        if used not in self._used and len(self._used) >= MAX_USED:
            used = Used(who, OTHER)
        tally = self._used.setdefault(used, Tally())
        tally.requests += 1
        tally.prompt += num_prompt
        tally.completion += num_completion

    def note_times(self, adapter: str, first: float, end: float | None) -> None:
        """Seconds from a request to its first token, and to the end of its answer if that was whole."""
        if adapter not in self._times and len(self._times) >= MAX_TIMED:
            adapter = OTHER
        times = self._times.setdefault(adapter, (Times(FIRST_SECONDS), Times(ANSWER_SECONDS)))
        times[0].note(first)
        if end is not None:
            times[1].note(end)

    def note_error(self, adapter: str, status: int) -> None:
        """A request for an answer ended with this status, before its answer had begun or after."""
        failed = (adapter, str(status))
        if failed not in self._failed and len(self._failed) >= MAX_FAILED:
            failed = (OTHER, str(status))
        self._failed[failed] = self._failed.get(failed, 0) + 1

    def rows(self, shows: Sees, sees_key: Sees) -> list[dict[str, str | int]]:
        """Who asked which adapter how much, the most requests first, of adapters and keys that may be seen."""
        found: list[dict[str, str | int]] = [
            {"key": used.key, "adapter": used.adapter, "requests": tally.requests, "prompt_tokens": tally.prompt,
             "completion_tokens": tally.completion}
            for used, tally in list(self._used.items()) if sees_key(used.key) and shows(used.adapter)
        ]  # fmt: skip
        return sorted(found, key=lambda row: -int(row["requests"]))

    def collect(self, shows: Sees, sees_key: Sees) -> Iterator[Metric]:
        """As families of Prometheus, without adapters and keys that are not to be seen."""
        requests = CounterMetricFamily("qhub_usage_requests", "Requests that ran", labels=("key", "adapter"))
        tokens = CounterMetricFamily("qhub_usage_tokens", "Tokens by who asked", labels=("key", "adapter", "kind"))
        for used, tally in list(self._used.items()):
            if sees_key(used.key) and shows(used.adapter):
                requests.add_metric(used, tally.requests)
                tokens.add_metric((*used, "prompt"), tally.prompt)
                tokens.add_metric((*used, "completion"), tally.completion)
        first = HistogramMetricFamily(
            "qhub_adapter_first_token_seconds", "Time from request to the first token", labels=("adapter",)
        )
        whole = HistogramMetricFamily(
            "qhub_adapter_answer_seconds", "Time from request to the end of a whole answer", labels=("adapter",)
        )
        for adapter, times in list(self._times.items()):
            if shows(adapter):
                for family, each in zip((first, whole), times, strict=True):
                    family.add_metric((adapter,), each.buckets(), each.total)
        errors = CounterMetricFamily(
            "qhub_errors", "Requests for answers that ended with an error", labels=("adapter", "status")
        )
        for (adapter, status), count in list(self._failed.items()):
            if shows(adapter):
                errors.add_metric((adapter, status), count)
        yield from (requests, tokens, first, whole, errors)
