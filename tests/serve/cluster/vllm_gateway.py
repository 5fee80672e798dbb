"""A gateway in this process before one replica whose answers are a vLLM's."""

import asyncio
import threading
import time

import httpx
import uvicorn

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from serve.cluster.config import ClusterConfig
from serve.cluster.gateway import create_gateway
from serve.cluster.replica import Replica
from serve.cluster.tables import Vllm
from serve.listen import http_config
from serve.options import HttpOptions
from tests.patience import PATIENCE
from tests.serve.cluster.conftest import LocalEngines


class VllmGateway:
    """Starts vLLM by `vllm`, and answers on the loopback. Raises what the start raises."""

    def __init__(self, base: BaseInfo, registry: Registry, vllm: Vllm) -> None:
        self.registry = registry
        self.replica = Replica("r0", ClusterConfig(base.name, vllm=vllm))
        self.engines = LocalEngines()
        self._server = uvicorn.Server(http_config(create_gateway(base, registry, self.engines, HttpOptions()), port=0))
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
            if not self._thread.is_alive():
                raise self._problem or RuntimeError("the gateway has ended")
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    async def _run(self) -> None:
        try:
            await self.replica.start()
            self.engines.apps["r0"] = self.replica.engine.app
            await self._server.serve()
        except BaseException as problem:
            self._problem = problem
        finally:
            self._facts = await self.replica.facts() if self.engines.apps else {}
            await self.replica.stop()

    def ask(self, model: str, **body) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": model, "prompt": "Hi", **body})

    def stop(self) -> dict:
        """End both; what the replica said of itself before."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._facts
