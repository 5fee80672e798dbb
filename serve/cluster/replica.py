"""Replica: the server's own application in a process of Ray Serve. It has no port of its own: only calls reach it."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from adapterhub_local import settings
from adapterhub_local.registry import Registry
from serve.cluster.asgi import messages, whole
from serve.cluster.call import Call, Message, Whole
from serve.cluster.config import ClusterConfig
from serve.cluster.following import follow, shortly
from serve.limits import Bounds, Lease, Refusal

DRAINING = "qhub.draining"  # a message instead of an answer: ask another replica


class Uncounted:
    """Limits that let everything in: the gateway has counted it already."""

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        return Lease(key)

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits."""

    async def close(self) -> None:
        """See Limits."""


class Replica:
    """One engine with its application. Ray Serve makes it, asks whether it is well, and ends it."""

    def __init__(self, name: str, config: ClusterConfig) -> None:
        self.name = name
        self.config = config
        self.is_draining = False
        self.num_running = 0
        self._lifespan: AbstractAsyncContextManager[Any] | None = None

    async def start(self) -> None:
        """Load the base, and begin to step. Raises what `qhub serve` raises at its start."""
        from serve.threads import in_passing

        self.app = await asyncio.to_thread(in_passing, self._load)
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()

    def _load(self) -> Any:
        """The application, its adapters where the cluster's remote has them."""
        from adapterhub_local.base.bases import choose_base
        from adapterhub_local.base.load import choose_device, load_base
        from serve.engine.options import EngineOptions
        from serve.http.app import create_app
        from serve.memory import bound_memory
        from serve.options import HttpOptions
        from serve.server import DTYPES

        bound_memory()
        replicas = self.config.replicas
        info = choose_base(self.config.base, settings.home(), "the cluster")
        registry = Registry()
        follower = follow(self.config, registry, info)
        base = load_base(info, dtype=DTYPES[replicas.dtype] if replicas.dtype else None)
        options = EngineOptions.on(choose_device(None), **self.config.engine)
        router = self.config.router
        http = HttpOptions(
            pins=replicas.pin,
            replica=self.name,
            router=router.name,
            router_threshold=router.threshold,
            router_allows=router.allow,
        )
        return create_app(base, registry=registry, options=options, http=http, limits=Uncounted(), follower=follower)

    async def stop(self) -> None:
        """End the engine."""
        if self._lifespan is not None:
            await self._lifespan.__aexit__(None, None, None)
            self._lifespan = None

    async def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """The messages of an answer; of one that should be asked for elsewhere DRAINING alone."""
        if self.is_draining:
            yield [{"type": DRAINING, "replica": self.name}]
            return
        self.num_running += 1
        try:
            async for found in messages(self.app, call):
                yield found
        finally:
            self.num_running -= 1

    async def whole(self, call: Call) -> Whole:
        """The whole answer to a call that is put to every replica."""
        return await whole(self.app, call, self.name)

    def facts(self) -> Mapping[str, Any]:
        """What `qhub cluster status` shows of it."""
        service = self.app.state.service
        adapters = [status for status in service.adapters() if status.num_bytes]
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "state": "draining" if self.is_draining else "ready" if service.loop.is_alive else "stopped",
            "running": self.num_running,
            "adapters": sorted(status.label.text for status in adapters),
            "adapter_bytes": sum(status.num_bytes for status in adapters),
            **shortly(service.follower),
        }

    def drain(self, name: str) -> bool:
        """Take no more requests, if this is the replica of that name; whether it is."""
        self.is_draining = self.is_draining or name == self.name
        return name == self.name

    def check(self) -> None:
        """Raises RuntimeError if it is to be replaced: its engine has stopped, or it was drained and has ended."""
        if not self.app.state.service.loop.is_alive:
            raise RuntimeError("the engine has stopped")
        if self.is_draining and not self.num_running:
            raise RuntimeError("it was drained")
