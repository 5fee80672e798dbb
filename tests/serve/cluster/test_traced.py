"""A trace goes through the gateway: the caller's span, below it the gateway's, below that the replica's."""

import secrets

import pytest

from adapterhub_local.registry import Registry
from tests.serve.cluster.conftest import Gateway
from tests.serve.collector import Collector, attributes

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no OTLP exporter: pip install -e '.[otel]'")


def test_a_trace_through_the_gateway(built_base, shared_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels, and the replica's has the adapter and the stages."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with Collector() as collector:
        gateway = Gateway(built_base, shared_registry, 1, otlp=collector.url)
        try:
            trace, above = secrets.token_hex(16), secrets.token_hex(8)
            headers = {"traceparent": f"00-{trace}-{above}-01"}
            body = {"model": "alpha", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
            assert gateway.http.post("/v1/completions", json=body, headers=headers).status_code == 200
            spans = collector.wait(trace, 6)
        finally:
            gateway.stop()
        by_parent = {each.parent_span_id.hex(): each for each in spans if each.name.startswith("POST")}
        outer = by_parent[above]
        inner = by_parent[outer.span_id.hex()]
        assert "qhub.adapter" not in attributes(outer)
        assert attributes(inner)["qhub.adapter"] == "alpha@1"
        assert attributes(inner)["qhub.request_id"] == attributes(outer)["qhub.request_id"]
        stages = [each.name for each in spans if each.parent_span_id == inner.span_id]
        assert sorted(stages) == ["decode", "prefill", "prepare", "queue"]
