"""Control: a cluster is started, looked at, made larger or smaller, drained and ended, from the command line."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from adapterhub_local.base.bases import choose_base
from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry
from adapterhub_local.registry.kinds import check_router
from adapterhub_local.registry.remotes import remote_at
from adapterhub_local.settings import Home
from serve.cluster import head
from serve.cluster.config import APPLICATION, GATEWAYS, REPLICAS, ClusterConfig
from serve.cluster.following import follow
from serve.listen import check_reachable, listen
from serve.traces import HOW, has_packages

LOOK_SECONDS = 0.5
CALM_SECONDS = 10.0  # of load, before there are more replicas
NONE = "no cluster runs here: `qhub cluster up cluster.toml` starts one"


def up(config: ClusterConfig, home: Home, report: Callable[[str], None], timeout: float = 600.0) -> dict[str, Any]:
    """Start a cluster and wait until it answers; its state. `report` gets a line for each stage.

    A cluster that runs already becomes what `config` says, without a restart of what is the same. Raises InputError for
    what cannot be, QhubError if it does not come up.
    """
    head.check_ray()
    if config.gateway.otlp is not None and not has_packages():
        raise InputError(HOW.replace("--otlp", "gateway.otlp"))
    info = choose_base(config.base, home, "the cluster")
    if config.remote is not None:  # here first: what is wrong with it should not cost a minute, and keys may be its
        config = replace(config, followed=remote_at(home, config.remote))
        report(f"reading remote {config.remote}")
        follower = follow(config, Registry(home), info)
        assert follower is not None, config.remote
        if config.router.name is not None:
            follower.bring([Reference.parse(config.router.name).name])
        follower.stop()
    if config.router.name is not None:
        check_router(Registry(home).resolve(config.router.name))
    check_reachable(config.gateway.host, config.gateway.port, home)
    is_ours = not head.connect(home)
    try:
        if is_ours:
            with listen(config.gateway.host, config.gateway.port):  # a wrong port should not cost a minute
                pass
            report("starting Ray on this machine")
            head.start_head(home)
            head.connect(home)
        _check_room(config)
        _apply(config)
        return _wait(config.replicas.min, config.replicas.max or config.replicas.min, report, timeout)
    except BaseException:
        if is_ours:
            head.stop_head(home)
        raise


def scale(
    home: Home, low: int, high: int | None, report: Callable[[str], None], timeout: float = 600.0
) -> dict[str, Any]:
    """Have that many replicas: those there are stay, or finish their answers before they go. Raises as `up`."""
    _connect(home)
    config = _config().scaled(low, high)
    _check_room(config)
    _apply(config)
    return _wait(config.replicas.min, config.replicas.max or config.replicas.min, report, timeout)


def status(home: Home) -> dict[str, Any]:
    """What runs. Raises NotFound if nothing does."""
    _connect(home)
    return _state()


def drain(home: Home, name: str) -> None:
    """Have one replica take no more requests, and be replaced once it has none. Raises NotFound, InputError."""
    _connect(home)
    found = _facts()
    if name not in [each["replica"] for each in found]:
        raise NotFound(f"there is no replica '{name}': `qhub cluster status` shows them")
    if len([each for each in found if each["state"] == "ready"]) < 2:
        raise InputError(f"'{name}' is the only replica that is ready: `qhub cluster scale 2` makes another first")
    _handle().broadcast("drain", name).results(timeout_s=10, return_exceptions=True)


def down(home: Home) -> bool:
    """End the cluster, and the Ray that was started for it; whether there was one."""
    head.check_ray()
    if not head.connect(home):
        return head.stop_head(home)
    import ray
    import ray.serve as ray_serve

    was_there = bool(_details())
    if head.read_head(home) is None:  # a Ray of others: leave nothing of ours in it
        if was_there:
            ray_serve.shutdown()
        _end_counter()
    ray.shutdown()
    return head.stop_head(home) or was_there


def _connect(home: Home) -> None:
    head.check_ray()
    if not head.connect(home) or not _details():
        raise NotFound(NONE)


def _apply(config: ClusterConfig) -> None:
    """Tell Ray Serve what there should be. Only how many replicas there are may change without a restart."""
    import ray.serve as ray_serve
    from ray.serve.schema import ServeDeploySchema

    ray_serve.start(proxy_location="Disabled")
    wanted = config.replicas
    # always the same keys: with others Ray Serve would take it for new code, and restart everything
    number = {
        "min_replicas": wanted.min,
        "max_replicas": wanted.max or wanted.min,
        "target_ongoing_requests": max(1.0, 0.75 * wanted.requests),
        "upscale_delay_s": CALM_SECONDS,
    }
    application = {
        "name": APPLICATION,
        "route_prefix": None,
        "import_path": "serve.cluster.deployments:build",
        "args": replace(config, replicas=replace(wanted, min=1, max=None)).to_json(),
        "deployments": [{"name": REPLICAS, "autoscaling_config": number}],
    }
    _client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))


def _wait(low: int, most: int, report: Callable[[str], None], timeout: float) -> dict[str, Any]:
    """The state once this many replicas are ready. Raises QhubError if that takes too long, or cannot be."""
    deadline, shown = time.monotonic() + timeout, ""
    while True:
        details = _details()
        replicas = _living(details)
        ready = sum(each["state"] == "RUNNING" for each in replicas)
        if details.get("status") == "RUNNING" and low <= ready <= most and ready == len(replicas):
            return _state()
        if details.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise QhubError(f"the cluster does not come up: {_reason(details)}")
        if time.monotonic() > deadline:
            raise QhubError(f"after {timeout:.0f} s {ready} of {low} replicas are ready: {_reason(details)}")
        if (text := f"{ready} of {low} replicas ready") != shown:
            report(shown := text)
        time.sleep(LOOK_SECONDS)


def _reason(details: Mapping[str, Any]) -> str:
    """What Ray Serve says is wrong, in a line: the last of its reasons that says anything."""
    messages = [str(details.get("message") or "")]
    messages += [str(each.get("message") or "") for each in (details.get("deployments") or {}).values()]
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "errors." in line]
    return (errors or lines or ["Ray says nothing"])[-1][:500]


def _check_room(config: ClusterConfig) -> None:
    """Raise InputError if the cluster of Ray lacks the CPUs or GPUs for the least number of replicas."""
    import ray

    there = ray.cluster_resources()
    wanted = config.replicas
    for name, each, key in (("CPU", wanted.cpus, "cpus"), ("GPU", wanted.gpus, "gpus")):
        if each * wanted.min > there.get(name, 0):
            raise InputError(
                f"{wanted.min} replicas of {key} = {each:g} need {each * wanted.min:g} {name}s, and Ray has "
                f"{there.get(name, 0):g}: lower replicas.{key} or replicas.min, or add machines to the Ray cluster"
            )


def _state() -> dict[str, Any]:
    """What runs, as `status` shows it."""
    details = _details()
    facts = {each["replica"]: each for each in _facts()}
    replicas = []
    for each in _living(details):
        name = each["replica_id"]
        # of one that is being started Ray does not know all of this yet
        known = {"replica": name, "node": each.get("node_ip"), "pid": each.get("pid"), "state": each["state"].lower()}
        replicas.append(known | facts.get(name, {}))
    config, number = _config(), _number(details)
    return {
        "base": config.base,
        "remote": config.remote,
        "urls": _handle(GATEWAYS).broadcast("url").results(timeout_s=10, return_exceptions=False),
        "status": details["status"].lower(),
        "min": number["min_replicas"],
        "max": number["max_replicas"],
        "replicas": replicas,
    }


def _facts() -> list[dict[str, Any]]:
    """What each replica says of itself, of those that answer."""
    found = _handle().broadcast("facts").results(timeout_s=10, return_exceptions=True)
    return [dict(each) for each in found if isinstance(each, Mapping)]


def _config() -> ClusterConfig:
    """The configuration that runs."""
    details = _details()
    number = _number(details)
    config = ClusterConfig.from_json(details["deployed_app_config"]["args"])
    return config.scaled(number["min_replicas"], number["max_replicas"])


def _number(details: Mapping[str, Any]) -> dict[str, Any]:
    (deployment,) = details["deployed_app_config"]["deployments"]
    found: dict[str, Any] = deployment["autoscaling_config"]
    return found


def _living(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (details.get("deployments") or {}).get(REPLICAS, {}).get("replicas", [])
    return found


def _details() -> dict[str, Any]:
    """What Ray Serve knows of our application, nothing if there is none: what its REST API would give."""
    client = _client(needed=False)
    found: dict[str, Any] = (
        client.get_serve_details()["applications"].get(APPLICATION, {}) if client is not None else {}
    )
    return found


def _client(*, needed: bool = True) -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=needed)


def _handle(name: str | None = None) -> Any:
    import ray.serve as ray_serve

    return ray_serve.get_deployment_handle(name or REPLICAS, APPLICATION)


def _end_counter() -> None:
    """End who counts the requests of keys."""
    import ray

    from serve.cluster.counting import NAME, NAMESPACE

    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
    except ValueError:
        return
