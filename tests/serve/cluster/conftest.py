"""Replicas in this process: the server's real application several times, and a gateway before them. No Ray."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.registry.remotes import Remote
from serve.cluster.asgi import messages, whole
from serve.cluster.call import DRAINING, Call, Lost, Message, Whole
from serve.cluster.config import ClusterConfig
from serve.cluster.following import follow
from serve.cluster.gateway import create_gateway
from serve.cluster.own_engine import Uncounted
from serve.cluster.placement import tiers
from serve.cluster.wire import Outlet, fetch
from serve.engine.options import EngineOptions
from serve.http.app import create_app
from serve.listen import http_config
from serve.options import HttpOptions
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish

OPTIONS = EngineOptions(max_rows=8, tokens_per_step=64, queue_limit=32)


@dataclass
class LocalEngines:
    """Engines without Ray, whose answers come over the wire all the same.

    `breaks`: how many messages of the next answers come before their replica is lost.
    """

    apps: dict = field(default_factory=dict)
    breaks: list = field(default_factory=list)
    draining: set = field(default_factory=set)
    asked: list = field(default_factory=list)
    outlet: Outlet | None = None

    async def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """See Engines."""
        name = tiers(call.affinity, self.apps, call.avoid)[0][0]
        self.asked.append((name, call))
        if name in self.draining:
            yield [{"type": DRAINING, "replica": name}]
            return
        left = self.breaks.pop(0) if self.breaks else None
        if self.outlet is None:
            self.outlet = Outlet()
            await self.outlet.start("127.0.0.1")
        async for ticket in self.outlet.offer(messages(self.apps[name], call)):
            async with contextlib.aclosing(fetch(ticket)) as batches:
                async for message in (message async for batch in batches for message in batch):
                    if left == 0:
                        raise Lost("killed", name)
                    yield [message]
                    left = None if left is None else left - 1
        if left == 0:
            raise Lost("killed", name)

    async def answers(self, call: Call) -> list[Whole]:
        """See Engines."""
        return list(await asyncio.gather(*(whole(app, call, name) for name, app in self.apps.items())))


class Gateway:
    """A gateway on the loopback before replicas, and what clients need.

    With `remote` all follow it, each replica in a home of its own, as on a machine of its own.
    """

    def __init__(
        self,
        base_folder,
        registry: Registry,
        num: int,
        remote: Remote | None = None,
        router: str | None = None,
        otlp: str | None = None,
    ) -> None:
        self.registry = registry
        self.base = read_record(base_folder)
        self.engines = LocalEngines()
        config = ClusterConfig(self.base.name, followed=remote)
        for number in range(num):
            name = f"r{number}"
            own = registry if remote is None else Registry(registry.home.root.parent / name)
            self.engines.apps[name] = create_app(
                load_base(self.base, device="cpu"), registry=own, options=OPTIONS,
                http=HttpOptions(replica=name, router=router, otlp=otlp), limits=Uncounted(),
                follower=follow(config, own, self.base),
            )  # fmt: skip
        app = create_gateway(
            self.base,
            registry,
            self.engines,
            HttpOptions(router=router, otlp=otlp),
            follower=follow(config, registry, self.base),
        )
        self.app = app
        self.url = self._serve(app, list(self.engines.apps.values()))
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def _serve(self, app, inner) -> str:
        server = uvicorn.Server(http_config(app, port=0))

        async def run() -> None:
            async with _all([each.router.lifespan_context(each) for each in inner]):
                await server.serve()

        self._server = server
        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        while not server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


class _all:
    """Several contexts as one."""

    def __init__(self, contexts) -> None:
        self.contexts = contexts

    async def __aenter__(self) -> None:
        for each in self.contexts:
            await each.__aenter__()

    async def __aexit__(self, *problem) -> None:
        for each in self.contexts:
            await each.__aexit__(*problem)


@pytest.fixture(scope="session")
def shared_registry(built_base, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with four adapters, which replicas share."""
    registry = Registry(tmp_path_factory.mktemp("cluster"))
    base = read_record(built_base)
    for seed, name in enumerate(("alpha", "beta", "gamma", "delta"), 1):
        publish(registry, name, base, seed=seed, rank=4, alias="prod")
    return registry


@pytest.fixture(scope="session")
def gateway(built_base, shared_registry: Registry) -> Iterator[Gateway]:
    """A gateway before two replicas; tests that make keys use another."""
    running = Gateway(built_base, shared_registry, 2)
    yield running
    running.stop()
