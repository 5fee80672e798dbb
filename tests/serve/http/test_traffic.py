"""A few seconds of the mixed traffic that benchmarks/serve_traffic.py sends for ten minutes."""

import asyncio

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from benchmarks.serve_traffic import BAD_BODIES, Traffic
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server


def test_mixed_traffic(built_base, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Good requests are answered, each always alike, bad ones refused without a 500, and no row or adapter is kept."""
    registry = Registry(tmp_path / "home")
    base = read_record(built_base)
    for seed, name in enumerate(("alpha", "beta", "gamma"), 1):
        publish(registry, name, base, seed=seed, rank=4 * seed, alias="prod")
    server = Server(load_base(base, device="cpu"), registry)
    traffic = Traffic(server.url, registry, base, seed=1)
    try:
        asyncio.run(traffic.run(5.0))
        assert traffic.problems == []
        assert traffic.counts["good 200"] > 2
        for path, body in BAD_BODIES:
            response = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert 400 <= response.status_code < 500, (path, body, response.text)
            assert response.json()["error"]["message"]
        server.wait_until_idle()
        assert all(not users for users in server.service.engine.pool.users().values())
        snapshot = server.service.engine.snapshot()
        assert snapshot.running_adapters == snapshot.waiting_adapters == ()
        assert not server.service._live
        assert not server.service.loop._listeners
        assert not [record for record in caplog.records if record.levelname == "ERROR" and record.name[:6] == "serve."]
    finally:
        server.stop()
