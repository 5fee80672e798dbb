"""The deployments of Ray Serve: replicas, and gateways before them. Ray imports this on every machine it uses."""

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray.serve as ray_serve
import ray.util
import uvicorn
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from adapterhub_local import settings
from adapterhub_local.base.bases import choose_base
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from serve.cluster.call import Call, Whole
from serve.cluster.config import GATEWAYS, REPLICAS, ClusterConfig
from serve.cluster.counting import ActorLimits
from serve.cluster.ending import at_sigterm
from serve.cluster.engines import RayEngines
from serve.cluster.following import follow
from serve.cluster.gateway import create_gateway
from serve.cluster.replica import Replica
from serve.cluster.wire import Outlet, Ticket
from serve.listen import check_reachable, http_config, listen, log_json, shown_host
from serve.options import HttpOptions

logger = logging.getLogger("serve.cluster")
BIND_TRIES = 50  # tenths of a second: the gateway before this one may not have ended yet
HEALTH_SECONDS = 2.0  # between looks at whether a replica lives
HANGING_SECONDS = 30.0  # after which one that does not say so is replaced


class ReplicaDeployment:
    """One replica. See Replica."""

    async def __init__(self, config: Mapping[str, Any]) -> None:  # type: ignore[misc]
        log_json(access=False)  # the gateway has a line for each request
        self._replica = Replica(ray_serve.get_replica_context().replica_id.unique_id, ClusterConfig.from_json(config))
        self._outlet = Outlet(self._replica.name)
        await self._outlet.start(ray.util.get_node_ip_address())
        await self._replica.start()
        at_sigterm(self._end)

    async def answer(self, call: Call) -> AsyncIterator[Ticket]:
        """A ticket for the messages of an answer, which is as long as they take."""
        async for ticket in self._outlet.offer(self._replica.answer(call)):
            yield ticket

    async def whole(self, call: Call) -> Whole:
        """The whole answer to what every replica is asked."""
        return await self._replica.whole(call)

    async def facts(self) -> Mapping[str, Any]:
        """What `qhub cluster status` shows."""
        return await self._replica.facts()

    async def drain(self, name: str) -> bool:
        """Take no more requests, if this is the replica of that name."""
        return self._replica.drain(name)

    def _end(self) -> None:
        """Who runs the machine ends this process: it finishes what it has begun, and Ray puts another in its place."""
        logger.warning("this replica got SIGTERM: it takes no more requests")
        self._replica.drain(self._replica.name)

    async def check_health(self) -> None:
        """Raises if this replica is to be replaced."""
        await self._replica.check()

    async def __del__(self) -> None:
        await self._outlet.stop()
        await self._replica.stop()


class GatewayDeployment:
    """One gateway, with a server of its own: Ray's proxies are not used."""

    async def __init__(self, config: Mapping[str, Any], replicas: DeploymentHandle) -> None:  # type: ignore[misc,type-arg]
        log_json(access=True)
        settled = ClusterConfig.from_json(config)
        gateway, home = settled.gateway, settings.home()
        info = choose_base(settled.base, home, "the cluster")
        registry = Registry(home)
        # before it is asked for keys, which may be the remote's
        follower = await asyncio.to_thread(follow, settled, registry, info)
        is_reachable = check_reachable(gateway.host, gateway.port, home)
        router = settled.router.name
        http = HttpOptions(
            hosts=gateway.hosts, origins=gateway.origins, require_keys=is_reachable, router=router, otlp=gateway.otlp
        )
        engines = RayEngines(replicas)
        app = create_gateway(info, registry, engines, http, ActorLimits(), follower, gateway.moves)
        listener = await _listen(gateway.host, gateway.port)
        port = listener.getsockname()[1]
        self._url = f"http://{shown_host(gateway.host)}:{port}/v1"
        self._server = _Quiet(http_config(app))
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def url(self) -> str:
        """Where it answers."""
        return self._url

    async def check_health(self) -> None:
        """Raises if its server has ended."""
        if self._serving.done():
            raise RuntimeError("the gateway's server has ended")

    async def __del__(self) -> None:
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            await self._serving


class _Quiet(uvicorn.Server):
    """A uvicorn server that leaves signals alone: they are Ray's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def _listen(host: str, port: int) -> socket.socket:
    for _ in range(BIND_TRIES):
        with contextlib.suppress(InputError):
            return listen(host, port)
        await asyncio.sleep(0.1)
    return listen(host, port)


def build(config: dict[str, Any]) -> ray_serve.Application:
    """The application of a cluster, but for how many replicas it has."""
    settled = ClusterConfig.from_json(config)
    environment = {"env_vars": {"QHUB_HOME": str(settings.home().root)}}
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HANGING_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    wanted = settled.replicas
    replicas = ray_serve.deployment(
        name=REPLICAS,
        max_ongoing_requests=wanted.requests,
        max_queued_requests=settled.gateway.waiting,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "runtime_env": environment},
        request_router_config=RequestRouterConfig(request_router_class="serve.cluster.router:AffinityRouter"),
        graceful_shutdown_timeout_s=wanted.drain,
        **common,
    )(ReplicaDeployment)
    gateways = ray_serve.deployment(
        name=GATEWAYS,
        num_replicas=settled.gateway.replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        graceful_shutdown_timeout_s=10.0,
        **({"max_replicas_per_node": 1} if settled.gateway.replicas > 1 else {}),
        **common,
    )(GatewayDeployment)
    plain = dataclasses.replace(settled, replicas=dataclasses.replace(wanted, min=1, max=None)).to_json()
    return gateways.bind(plain, replicas.bind(plain))  # type: ignore[attr-defined,no-any-return]
