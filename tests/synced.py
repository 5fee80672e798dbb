"""Stores to push versions to and to pull them from: a folder, and a server that speaks S3."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, files, merged


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    from moto import backends
    from moto.server import ThreadedMotoServer

    services = list(backends.list_of_moto_modules())
    backends.list_of_moto_modules = lambda: services  # which it else looks up on the disk for each request
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A new remote called `team`."""
    if request.param == "folder":
        return open_store(add_remote(home, "team", str(tmp_path / "remote")))
    endpoint = request.getfixturevalue("s3_server")
    for key, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    bucket = f"bucket-{os.urandom(6).hex()}"
    opened = open_store(add_remote(home, "team", f"s3://{bucket}/some/where/", {"endpoint_url": endpoint}))
    opened.fs.mkdir(bucket)
    return opened


@pytest.fixture
def folder_store(home: Home, tmp_path: Path) -> Store:
    """A remote called `team` that is a folder."""
    return open_store(add_remote(home, "team", str(tmp_path / "remote")))


@pytest.fixture
def merge() -> Version:
    """A merge whose two parents are here."""
    registry = Registry()
    first, second = (registry.publish(name, files(seed), LINEAGE) for seed, name in ((1, "a"), (2, "team/b")))
    return merged(registry, "top", (first, 0.5), (second, 0.5))


def named(text: str) -> Reference:
    return Reference.parse(text)
