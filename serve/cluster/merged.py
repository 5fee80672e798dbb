"""Merged: what each replica says of itself becomes one answer."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from serve.cluster.call import Whole
from serve.labelled import labelled

OWN = ("qhub_http_", "qhub_gateway_")  # what the gateway counts: a replica would count each request once more


def merged_metrics(own: CollectorRegistry, answers: Sequence[Whole]) -> bytes:
    """The gateway's own metrics and those of replicas, labelled by replica, in Prometheus' text format."""
    sound = [answer for answer in answers if answer.status == 200]
    texts = ((answer.replica, answer.body.decode()) for answer in sound)
    replicas = labelled(texts, "replica", lambda family: not family.startswith(OWN))
    return generate_latest(_Own(own, len(sound))) + replicas.encode()  # type: ignore[arg-type]


class _Own:
    """What prometheus_client collects of the gateway."""

    def __init__(self, own: CollectorRegistry, num_replicas: int) -> None:
        self._own = own
        self._num_replicas = num_replicas

    def collect(self) -> Iterator[Metric]:
        """Each family that the gateway counts, and how many replicas there are."""
        yield from (family for family in self._own.collect() if family.name.startswith(OWN))
        yield GaugeMetricFamily("qhub_replicas", "Replicas that answered", value=self._num_replicas)


def merged_adapters(answers: Sequence[Whole]) -> list[dict[str, Any]]:
    """One entry for each digest: what is counted added up, and in `replicas` what each replica says of it."""
    found: dict[str, dict[str, Any]] = {}
    for answer in answers:
        for entry in json.loads(answer.body)["data"]:
            merged = found.get(entry["digest"])
            if merged is None:
                merged = found[entry["digest"]] = {**entry, "replicas": {}}
            else:
                for name in ("bytes", "requests_now", "requests"):
                    merged[name] += entry[name]
                for name in ("in_slot", "is_held", "is_pinned"):
                    merged[name] = merged[name] or entry[name]
                merged["last_used"] = max(filter(None, (merged["last_used"], entry["last_used"])), default=None)
                if entry["state"] == "ready":
                    merged["state"] = "ready"
            merged["replicas"][answer.replica] = entry["state"]
    return list(found.values())


def merged_models(answers: Sequence[Whole]) -> list[dict[str, Any]]:
    """The models in memory anywhere, each once, as Ollama lists them."""
    found: dict[str, dict[str, Any]] = {}
    for answer in answers:
        for entry in json.loads(answer.body)["models"]:
            found.setdefault(entry["name"], entry)
    return list(found.values())
