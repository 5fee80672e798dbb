"""Prometheus metrics: what the HTTP side counts, and what the engine is asked for at each scrape."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

MAX_ADAPTER_LABELS = 200  # names beyond these are counted together: a label a name could be millions
OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# name -> (key of the engine's snapshot, kind, what it is)
ENGINE: dict[str, tuple[str, type, str]] = {
    "qhub_requests_running": ("running", GaugeMetricFamily, "Requests in the batch"),
    "qhub_requests_waiting": ("waiting", GaugeMetricFamily, "Requests in the queue"),
    "qhub_kv_usage_ratio": ("kv_usage", GaugeMetricFamily, "Share of the KV cache's pages in use"),
    "qhub_preemptions": ("num_preemptions", CounterMetricFamily, "Requests put back into the queue for lack of pages"),
    "qhub_kv_bytes": ("kv_bytes", GaugeMetricFamily, "Memory of the KV cache"),
    "qhub_adapters_loaded": ("adapters_loaded", GaugeMetricFamily, "Adapters in memory"),
    "qhub_adapter_bytes": ("adapter_bytes", GaugeMetricFamily, "Memory of the adapters"),
    "qhub_adapter_slots_used": ("slots_used", GaugeMetricFamily, "Adapters that a batch can use without copying"),
    "qhub_adapter_slots_total": ("slots_total", GaugeMetricFamily, "Adapters that may be in one batch"),
    "qhub_adapter_slot_bytes": ("slot_bytes", GaugeMetricFamily, "Memory of the slots"),
    "qhub_adapter_loads": ("adapter_loads", CounterMetricFamily, "Adapters read from the registry"),
    "qhub_adapter_evictions": ("adapter_evictions", CounterMetricFamily, "Adapters dropped to make room"),
    "qhub_engine_steps": ("num_steps", CounterMetricFamily, "Forward passes"),
    "qhub_engine_tokens": ("num_tokens", CounterMetricFamily, "Tokens computed, prompts included"),
    "qhub_engine_failed_steps": ("num_failed_steps", CounterMetricFamily, "Forward passes that failed"),
    # the names that the Kubernetes gateway's model server protocol asks for
    "vllm:num_requests_running": ("running", GaugeMetricFamily, "Requests in the batch"),
    "vllm:num_requests_waiting": ("waiting", GaugeMetricFamily, "Requests in the queue"),
    "vllm:kv_cache_usage_perc": ("kv_usage", GaugeMetricFamily, "Share of the KV cache's pages in use"),
}


@dataclass(frozen=True)
class Activity:
    """The engine's snapshot, and the names of adapters whose requests run and wait."""

    snapshot: dict[str, Any]
    running: tuple[str, ...]
    waiting: tuple[str, ...]


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, activity: Callable[[], Activity]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._activity = activity
        self._adapters: set[str] = set()
        self._requests = self._counter("qhub_http_requests", "HTTP requests", "method", "route", "status")
        self._tokens = self._counter("qhub_tokens", "Tokens of prompts and answers", "adapter", "kind")
        self._answers = self._counter("qhub_answers", "Answers by how they ended", "finish_reason")
        self._seconds = self._histogram(
            "qhub_http_request_seconds", "Time from request to the end of its answer", "route"
        )
        self._first = self._histogram("qhub_time_to_first_token_seconds", "Time from request to the first token")
        self._each = self._histogram("qhub_time_per_output_token_seconds", "Time between the tokens of an answer")
        self._loads = self._histogram("qhub_adapter_load_seconds", "Time to read and check an adapter")
        self.registry.register(self)  # type: ignore[arg-type]

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request ended; status 0: the client left before there was one."""
        self._requests.labels(method if method in ("GET", "POST") else OTHER, route, str(status or 499)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_answer(self, adapter: str, num_prompt: int, num_completion: int, reasons: list[str]) -> None:
        """An answer by `adapter`, or the base, ended, whole or not."""
        if adapter not in self._adapters:
            if len(self._adapters) < MAX_ADAPTER_LABELS:
                self._adapters.add(adapter)
            else:
                adapter = OTHER
        self._tokens.labels(adapter, "prompt").inc(num_prompt)
        self._tokens.labels(adapter, "completion").inc(num_completion)
        for reason in reasons:
            self._answers.labels(reason).inc()

    def note_times(self, first: float, last: float, num_tokens: int) -> None:
        """Seconds from the request to its first and last token, of which there were `num_tokens`."""
        self._first.observe(first)
        if num_tokens > 1:
            self._each.observe((last - first) / (num_tokens - 1))

    def note_load(self, seconds: float) -> None:
        """An adapter was read."""
        self._loads.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What the engine says now; prometheus_client calls this at each scrape."""
        activity = self._activity()
        for name, (key, family, text) in ENGINE.items():
            yield family(name, text, value=activity.snapshot[key])
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = (",".join(activity.running), ",".join(activity.waiting))
        lora.add_metric((str(activity.snapshot["slots_total"]), *names), time.time())
        yield lora

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=SECONDS)
