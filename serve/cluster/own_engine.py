"""OwnEngine: the engine of `qhub serve` in a replica, with the server's application."""

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.types import ASGIApp

from adapterhub_local import settings
from adapterhub_local.registry import Registry
from serve.cluster.config import ClusterConfig
from serve.cluster.following import follow, shortly
from serve.limits import Bounds, Lease, Refusal


class Uncounted:
    """Limits that let everything in: the gateway has counted it already."""

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        return Lease(key)

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits."""

    async def close(self) -> None:
        """See Limits."""


class OwnEngine:
    """See ReplicaEngine."""

    app: ASGIApp

    def __init__(self, replica: str, config: ClusterConfig) -> None:
        self._replica = replica
        self._config = config
        self._service: Any = None
        self._lifespan: AbstractAsyncContextManager[Any] | None = None

    async def start(self) -> None:
        """See ReplicaEngine. Raises what `qhub serve` raises at its start."""
        from serve.threads import in_passing

        app = await asyncio.to_thread(in_passing, self._load)
        self.app, self._service = app, app.state.services.first
        self._lifespan = app.router.lifespan_context(app)
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
        replicas = self._config.replicas
        info = choose_base(self._config.base, settings.home(), "the cluster")
        registry = Registry()
        follower = follow(self._config, registry, info)
        base = load_base(info, dtype=DTYPES[replicas.dtype] if replicas.dtype else None)
        options = EngineOptions.on(choose_device(None), **self._config.engine)
        router = self._config.router
        http = HttpOptions(
            pins=replicas.pin,
            stored_responses=0,  # the next request may come to another replica
            replica=self._replica,
            router=router.name,
            router_threshold=router.threshold,
            router_allows=router.allow,
            otlp=self._config.gateway.otlp,
        )
        return create_app(base, registry=registry, options=options, http=http, limits=Uncounted(), follower=follower)

    async def stop(self) -> None:
        """See ReplicaEngine."""
        if self._lifespan is not None:
            await self._lifespan.__aexit__(None, None, None)
            self._lifespan = None

    async def is_alive(self) -> bool:
        """See ReplicaEngine."""
        return bool(self._service.loop.is_alive)

    def facts(self) -> Mapping[str, Any]:
        """See ReplicaEngine."""
        adapters = [status for status in self._service.adapters() if status.num_bytes]
        return {
            "adapters": sorted(status.label.text for status in adapters),
            "adapter_bytes": sum(status.num_bytes for status in adapters),
            **shortly(self._service.follower),
        }
