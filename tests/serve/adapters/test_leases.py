"""What a server has loaded is not collected while it runs."""

import logging
import time

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.settings import Home
from serve.adapters.leases import Leases
from serve.adapters.pool import AdapterPool
from serve.adapters.reader import AdapterReader
from serve.adapters.record import Label
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server
from tests.stores import LINEAGE, files


def rows(registry: Registry) -> list[tuple]:
    """Digest and end of every lease."""
    return [tuple(row) for row in registry.database.rows("SELECT content_digest, expires_at FROM leases")]


def pool_with(leases: Leases) -> AdapterPool:
    """A pool that reads nothing."""
    reader = AdapterReader(BaseInfo.__new__(BaseInfo), {}, {}.__getitem__, torch.float32)
    return AdapterPool(reader, max_bytes=1000, max_pins=1, leases=leases)


@pytest.fixture
def version() -> Version:
    """A published version."""
    return Registry().publish("a", files(1), LINEAGE)


def test_a_server_keeps_what_it_loaded(server: Server, tiny_base: BaseInfo) -> None:
    """A version that answered a request and was then removed stays on disk, though gc is told to spare nothing."""
    registry = server.registry
    leased = publish(registry, "leased", tiny_base, seed=7)
    spare = publish(registry, "spare", tiny_base, seed=8)
    assert server.complete(model="leased", prompt="hello").status_code == 200
    for version in (leased, spare):
        remove(registry, version, force=True)
    collect(registry, apply=True, grace=-1)
    weights = {file.path: registry.blobs.path(file.digest).is_file() for file in leased.files}
    assert all(weights.values())
    assert not all(registry.blobs.path(file.digest).is_file() for file in spare.files)


def test_leases_are_renewed_and_given_back(version: Version) -> None:
    """While the server runs its leases move on; when it stops there are none."""
    registry = Registry()
    leases = Leases(registry, seconds=0.15)
    pool = pool_with(leases)
    leases.start(pool.leased)
    pool.lease(version)
    ((digest, first),) = rows(registry)
    assert digest == version.content_digest
    deadline = time.monotonic() + PATIENCE
    while rows(registry)[0][1] <= first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pool.lease(version)
    leases.stop()
    leases.stop()
    assert rows(registry) == []


def test_leases_of_a_server_that_crashed_end(version: Version) -> None:
    """What nobody gave back is forgotten after its time by the next server."""
    registry = Registry()
    Leases(registry, seconds=-1).take(version)
    assert len(rows(registry)) == 1
    other = registry.publish("b", files(2), LINEAGE)
    Leases(registry).take(other)
    assert [digest for digest, _ in rows(registry)] == [other.content_digest]


def test_leases_end_for_what_is_used_no_more(version: Version) -> None:
    """What is in memory stays leased; what left it and was not asked for since is given up while the server runs."""
    registry = Registry()
    other = registry.publish("b", files(2), LINEAGE)
    leases = Leases(registry, seconds=0.3)
    pool = pool_with(leases)
    pool.lease(version)
    pool.lease(other)
    pool.insert(version.content_digest, {"q": (torch.ones(4, 2), torch.ones(2, 4))}, Label("a@1"))
    leases.start(pool.leased)
    assert {digest for digest, _ in rows(registry)} == {version.content_digest, other.content_digest}
    deadline = time.monotonic() + PATIENCE
    while len(rows(registry)) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert rows(registry)[0][0] == version.content_digest
    pool.lease(other)
    assert len(rows(registry)) == 2
    leases.stop()


def test_a_registry_that_cannot_be_written_is_served(
    version: Version, home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a right to write there is no lease, and a warning, and the server goes on."""
    registry = Registry()
    registry.database.close()
    monkeypatch.setattr("adapterhub_local.registry.connection.may_write", lambda path: False)
    leases = Leases(registry)
    with caplog.at_level(logging.WARNING):
        pool_with(leases).lease(version)
        leases.stop()
    registry.database.close()
    assert "served without a lease" in caplog.text
    assert rows(Registry()) == []
