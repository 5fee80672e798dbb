"""Replica: an engine with its application in a process of Ray Serve. It has no port of its own: only calls reach it."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from starlette.types import ASGIApp

from serve.cluster.asgi import messages, whole
from serve.cluster.call import DRAINING, Call, Message, Whole
from serve.cluster.config import ClusterConfig
from serve.cluster.own_engine import OwnEngine
from serve.cluster.vllm_engine import VllmEngine


class ReplicaEngine(Protocol):
    """What answers in a replica; `app` is there once it has started."""

    app: ASGIApp

    async def start(self) -> None:
        """Load the base, and begin to answer."""
        ...

    async def stop(self) -> None:
        """End."""
        ...

    async def is_alive(self) -> bool:
        """Whether it can answer."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Its adapters, and how many bytes they take."""
        ...


class Replica:
    """One engine with its application. Ray Serve makes it, asks whether it is well, and ends it."""

    def __init__(self, name: str, config: ClusterConfig) -> None:
        self.name = name
        self.engine: ReplicaEngine = VllmEngine(name, config) if config.vllm.model else OwnEngine(name, config)
        self.is_draining = False
        self.num_running = 0

    async def start(self) -> None:
        """Load the base, and begin to answer. Raises what the engine raises at its start."""
        await self.engine.start()

    async def stop(self) -> None:
        """End the engine."""
        await self.engine.stop()

    async def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """The messages of an answer; of one that should be asked for elsewhere DRAINING alone."""
        if self.is_draining:
            yield [{"type": DRAINING, "replica": self.name}]
            return
        self.num_running += 1
        try:
            async for found in messages(self.engine.app, call):
                yield found
        finally:
            self.num_running -= 1

    async def whole(self, call: Call) -> Whole:
        """The whole answer to a call that is put to every replica."""
        return await whole(self.engine.app, call, self.name)

    async def facts(self) -> Mapping[str, Any]:
        """What `qhub cluster status` shows of it."""
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "state": "draining" if self.is_draining else "ready" if await self.engine.is_alive() else "stopped",
            "running": self.num_running,
            **self.engine.facts(),
        }

    def drain(self, name: str) -> bool:
        """Take no more requests, if this is the replica of that name; whether it is."""
        self.is_draining = self.is_draining or name == self.name
        return name == self.name

    async def check(self) -> None:
        """Raises RuntimeError if it is to be replaced: its engine has stopped, or it was drained and has ended."""
        if not await self.engine.is_alive():
            raise RuntimeError("the engine has stopped")
        if self.is_draining and not self.num_running:
            raise RuntimeError("it was drained")
