"""Prometheus metrics: what the HTTP side counts, and what the engine is asked for at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily as Count
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric

from serve.course import Course
from serve.usage import OTHER, UNFOUND, Labels, Usage

if TYPE_CHECKING:  # they load torch, which the console does without
    from serve.adapters.record import AdapterStatus
    from serve.engine.stats import Snapshot

Allows = Callable[[str], bool]  # whether a name may be seen
MAX_ADAPTER_LABELS = 200  # names beyond these are counted together: a label a name could be millions
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# name -> (value of the engine's snapshot, kind, what it is)
ENGINE: dict[str, tuple[Callable[[Snapshot], float], type, str]] = {
    "qhub_requests_running": (lambda now: now.running, Gauge, "Requests in the batch"),
    "qhub_requests_waiting": (lambda now: now.waiting, Gauge, "Requests in the queue"),
    "qhub_kv_usage_ratio": (lambda now: now.kv_usage, Gauge, "Share of the KV cache's pages in use"),
    "qhub_drafted_tokens": (lambda now: now.stats.num_drafted, Count, "Tokens that were guessed and checked"),
    "qhub_accepted_tokens": (lambda now: now.stats.num_accepted, Count, "Guessed tokens that were right"),
    "qhub_preemptions": (
        lambda now: now.stats.num_preemptions,
        Count,
        "Requests put back into the queue for lack of pages",
    ),
    "qhub_kv_bytes": (lambda now: now.kv_bytes, Gauge, "Memory of the KV cache"),
    "qhub_adapters_loaded": (lambda now: now.adapters_loaded, Gauge, "Adapters in memory"),
    "qhub_adapter_bytes": (lambda now: now.adapter_bytes, Gauge, "Memory of the adapters"),
    "qhub_adapter_slots_used": (
        lambda now: now.slots_used,
        Gauge,
        "Adapters that a batch can use without copying",
    ),
    "qhub_adapter_slots_total": (lambda now: now.slots_total, Gauge, "Adapters that may be in one batch"),
    "qhub_adapter_slot_bytes": (lambda now: now.slot_bytes, Gauge, "Memory of the slots beside that of the adapters"),
    "qhub_adapter_loads": (lambda now: now.adapter_loads, Count, "Adapters read from the registry"),
    "qhub_adapter_evictions": (lambda now: now.adapter_evictions, Count, "Adapters dropped to make room"),
    "qhub_engine_steps": (lambda now: now.stats.num_steps, Count, "Forward passes"),
    "qhub_engine_tokens": (lambda now: now.stats.num_tokens, Count, "Tokens computed, prompts included"),
    "qhub_engine_failed_steps": (
        lambda now: now.stats.num_failed_steps,
        Count,
        "Forward passes that failed",
    ),
    # the names that the Kubernetes gateway's model server protocol asks for
    "vllm:num_requests_running": (lambda now: now.running, Gauge, "Requests in the batch"),
    "vllm:num_requests_waiting": (lambda now: now.waiting, Gauge, "Requests in the queue"),
    "vllm:kv_cache_usage_perc": (lambda now: now.kv_usage, Gauge, "Share of the KV cache's pages in use"),
}


def _anything(_: str) -> bool:
    return True


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        residents: Callable[[], Iterable[tuple[str, AdapterStatus]]] = tuple,
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._snapshot = snapshot
        self._residents = residents  # adapters in memory, under each name that stands for them
        self.is_ready: Callable[[], bool] = lambda: True  # whoever knows puts it here
        self._labels = Labels(MAX_ADAPTER_LABELS)
        self._usage = Usage()
        self._requests = self._counter("qhub_http_requests", "HTTP requests", "method", "route", "status")
        self._tokens = self._counter("qhub_tokens", "Tokens of prompts and answers", "adapter", "kind")
        self._answers = self._counter("qhub_answers", "Answers by how they ended", "finish_reason")
        self._routed = self._counter("qhub_routed", "Requests for auto by what was chosen and why", "adapter", "reason")
        self._logged = self._counter("qhub_request_log_records", "Records of the request log that were written", "kind")
        self._lost = self._counter("qhub_request_log_lost", "Records that could not be written to it", "kind")
        self._seconds = self._histogram(
            "qhub_http_request_seconds", "Time from request to the end of its answer", "route"
        )
        self._first = self._histogram("qhub_time_to_first_token_seconds", "Time from request to the first token")
        self._each = self._histogram("qhub_time_per_output_token_seconds", "Time between the tokens of an answer")
        self._queued = self._histogram("qhub_queue_seconds", "Time that requests waited in the queue")
        self._loads = self._histogram("qhub_adapter_load_seconds", "Time to read and check an adapter")

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request ended; status 0: the client left before there was one."""
        self._requests.labels(method if method in ("GET", "POST") else OTHER, route, str(status or 499)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_error(self, course: Course, status: int) -> None:
        """A request for an answer failed with this status; 0: the client left before there was one."""
        label = self._labels.of(course.label, course.names) if course.label is not None else UNFOUND
        self._usage.note_error(label, status or 499)

    def note_answer(self, course: Course, key: str | None, started: float, ended: float) -> None:
        """An answer that was admitted ended, whole or not, for the key of this id; times of time.monotonic()."""
        assert course.label is not None, "what was admitted was found"
        adapter = self._labels.of(course.label, course.names)
        self._tokens.labels(adapter, "prompt").inc(course.num_prompt)
        self._tokens.labels(adapter, "completion").inc(course.num_completion)
        for reason in course.reasons:
            self._answers.labels(reason).inc()
        self._usage.note_answer(key, adapter, course.num_prompt, course.num_completion)
        if course.ready is not None and course.begun is not None:
            self._queued.observe(course.begun - course.ready)
        if course.first is None or course.last is None:
            return
        self._first.observe(course.first - started)
        num_tokens = course.num_completion // max(1, len(course.reasons))
        if num_tokens > 1:
            self._each.observe((course.last - course.first) / (num_tokens - 1))
        is_whole = "abort" not in course.reasons
        self._usage.note_times(adapter, course.first - started, ended - started if is_whole else None)

    def note_route(self, adapter: str, reason: str) -> None:
        """A router chose the adapter of this name, or the base."""
        self._routed.labels(self._labels.of(adapter, (adapter,)), reason).inc()

    def note_logged(self, kind: str, is_written: bool) -> None:
        """A record of the request log, an answer or feedback, was written or lost."""
        (self._logged if is_written else self._lost).labels(kind).inc()

    def note_load(self, seconds: float) -> None:
        """An adapter was read."""
        self._loads.observe(seconds)

    def collect(self, allows: Allows = _anything, sees_key: Allows = _anything) -> Iterator[Metric]:
        """What the engine does now and who used it, with the adapters of which all names are allowed."""
        yield Gauge("qhub_ready", "Whether new requests are taken, as /ready reports it", value=self.is_ready())
        yield from self._usage.collect(lambda label: self.shows(label, allows), sees_key)
        now = self._snapshot()
        for name, (value, family, text) in ENGINE.items():
            yield family(name, text, value=value(now))
        lora = Gauge(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        shown = [
            ",".join(label.text for label in labels if all(map(allows, label.names)))
            for labels in (now.running_adapters, now.waiting_adapters)
        ]
        lora.add_metric((str(now.slots_total), *shown), time.time())
        yield lora
        resident = Gauge(
            "vllm:lora_adapter_loaded",
            "Adapters in memory, under every name by which requests may ask for them",
            labels=("adapter_name", "level", "pinned"),
        )
        for name, status in self._residents():
            if all(map(allows, status.label.names)):
                pinned = "true" if status.is_pinned else "false"
                resident.add_metric((name, "slot" if status.in_slot else "host", pinned), 1)
        yield resident

    def used(self, allows: Allows = _anything, sees_key: Allows = _anything) -> list[dict[str, str | int]]:
        """Who asked which adapter how much, as a table."""
        return self._usage.rows(lambda label: self.shows(label, allows), sees_key)

    def text(self, allows: Allows = _anything, sees_key: Allows = _anything) -> bytes:
        """Everything in Prometheus' text format, but of adapters those alone of which all names are allowed, and of
        keys those whose id may be seen."""
        return generate_latest(_Allowed(self, allows, sees_key))  # type: ignore[arg-type]

    def shows(self, label: str, allows: Allows) -> bool:
        """Whether an adapter's label may be seen by whom these names are allowed."""
        # what many adapters are counted as together nobody can separate: it is for those who may ask all
        return all(map(allows, self._labels.names(label)))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=SECONDS)


class _Allowed:
    """What a scrape with one key gets to see."""

    def __init__(self, metrics: Metrics, allows: Allows, sees_key: Allows) -> None:
        self._metrics = metrics
        self._allows = allows
        self._sees_key = sees_key

    def collect(self) -> Iterator[Metric]:
        """The metrics without the samples of adapters that the key is not for; prometheus_client calls this."""
        for metric in self._metrics.registry.collect():
            if any("adapter" in sample.labels for sample in metric.samples):
                metric.samples = [
                    each for each in metric.samples if self._metrics.shows(each.labels["adapter"], self._allows)
                ]
            yield metric
        yield from self._metrics.collect(self._allows, self._sees_key)
