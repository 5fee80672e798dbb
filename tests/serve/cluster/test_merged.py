"""What replicas say, put together, reads as each of them said it, and whose it is."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.cluster.call import Whole
from serve.cluster.merged import merged_metrics

HARD = ["plain", 'with "quotes" and \\ and {braces}', "two\nlines", '}{,="', ""]


def said(number: int) -> bytes:
    """A replica's metrics: of each kind, with and without labels, with labels that are hard to read."""
    registry = CollectorRegistry()
    Gauge("qhub_free", "Free # pages\nof all", registry=registry).set(number)
    asked = Counter("qhub_asked", "Asked", ["name", "replica_of"], registry=registry)
    for count, value in enumerate(HARD):
        asked.labels(value, "x").inc(count + number)
    Histogram("qhub_seconds", "Seconds", buckets=(0.1, 1.0), registry=registry).observe(number)
    Counter("qhub_http_requests", "The gateway counts these", registry=registry).inc(99)
    Gauge("qhub_never", "Nobody had a value", ["name"], registry=registry)
    return generate_latest(registry)


def read(text: str) -> dict[str, tuple]:
    """Each family once: its kind, what it is about, and its samples."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        family.name: (
            family.type,
            family.documentation,
            {(each.name, *sorted(each.labels.items())): each.value for each in family.samples},
        )
        for family in families
    }


@pytest.mark.parametrize("names", [["r1"], ["r1", 'r"2\\', "r3"]])
def test_metrics_are_each_replicas_own(names: list[str]) -> None:
    """Every sample of every replica is there with its name as a label, and nothing else but the gateway's own."""
    own = CollectorRegistry()
    Counter("qhub_http_requests", "Requests", registry=own).inc(3)
    answers = [Whole(name, 200, (), said(number)) for number, name in enumerate(names)]
    found = read(merged_metrics(own, [*answers, Whole("ill", 503, (), b"not metrics at all")]).decode())

    assert found.pop("qhub_replicas")[2] == {("qhub_replicas",): len(names)}
    assert found.pop("qhub_http_requests")[2][("qhub_http_requests_total",)] == 3
    wanted: dict[str, tuple] = {}
    for answer in answers:
        for name, (kind, about, samples) in read(answer.body.decode()).items():
            if not name.startswith("qhub_http_"):
                samples = {(key, *sorted([*labels, ("replica", answer.replica)])): value
                           for (key, *labels), value in samples.items()}  # fmt: skip
                wanted.setdefault(name, (kind, about, {}))[2].update(samples)
    assert {name: each for name, each in found.items() if not name.startswith("qhub_http_")} == wanted
    assert set(wanted) >= {"qhub_free", "qhub_asked", "qhub_seconds", "qhub_never"}
