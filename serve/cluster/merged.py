"""Merged: what each replica says of itself becomes one answer."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from serve.cluster.call import Whole

OWN = ("qhub_http_", "qhub_gateway_")  # what the gateway counts: a replica would count each request once more


def merged_metrics(own: CollectorRegistry, answers: Sequence[Whole]) -> bytes:
    """The gateway's own metrics and those of replicas, labelled by replica, in Prometheus' text format.

    A replica's lines are handed on as they are, but for the label: to read and write those of a thousand takes seconds.
    """
    sound = [answer for answer in answers if answer.status == 200]
    families: dict[str, tuple[dict[str, str], list[str]]] = {}  # name -> its HELP and TYPE, and samples
    for answer in sound:
        label = f'replica="{_escaped(answer.replica)}"'
        about, samples = families.setdefault("", ({}, []))
        for text in answer.body.decode().split("\n"):
            if text.startswith(("# HELP ", "# TYPE ")):
                about, samples = families.setdefault(text.split(" ", 3)[2], ({}, []))
                about.setdefault(text[:6], text)
            elif text and text[0] != "#":
                samples.append(_labelled(text, label))
    lines = [
        f"{text}\n"
        for name, (about, samples) in families.items()
        if not name.startswith(OWN)
        for text in (*about.values(), *samples)
    ]
    return generate_latest(_Own(own, len(sound))) + "".join(lines).encode()  # type: ignore[arg-type]


def _labelled(sample: str, label: str) -> str:
    """A line with one more label, before those that it has."""
    place = sample.find("{")
    if place < 0:
        name, _, rest = sample.partition(" ")
        return f"{name}{{{label}}} {rest}"
    return f"{sample[: place + 1]}{label}{'' if sample[place + 1] == '}' else ','}{sample[place + 1 :]}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


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
