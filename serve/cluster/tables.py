"""The tables of cluster.toml: each key with its meaning, default and bounds."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from adapterhub_local.recipe.field import between, key
from serve.engine.options import EngineOptions
from serve.options import otlp_problem

MAX_REPLICAS = 1000
RESERVED = ("--model", "--served-model-name", "--uds", "--host", "--port", "--enable-lora", "--api-key")


@dataclass(frozen=True)
class Replicas:
    """[replicas]"""

    min: int = key("The least number of replicas.", 1, between(1, MAX_REPLICAS))
    max: int | None = key("The largest number of replicas, as the load changes; none: `min`.", None, between(1, 1000))
    cpus: float = key("CPU cores of each replica.", 1.0, between(0.0, 1024.0))
    gpus: float = key("GPUs of each replica.", 0.0, between(0.0, 64.0))
    requests: int = key("Requests at once in a replica, before the next one takes over.", 16, between(1, 10_000))
    drain: float = key("Seconds in which a replica that is removed may finish its answers.", 600.0, between(0.0, 1e5))
    pin: tuple[str, ...] = key("Adapters that every replica keeps in a slot.", ())
    dtype: str | None = key("As `qhub serve --dtype`.", None)


@dataclass(frozen=True)
class Gateway:
    """[gateway]"""

    host: str = key("Address to listen on.", "127.0.0.1")
    port: int = key("Port to listen on; 0 takes a free one.", 8000, between(0, 65535))
    replicas: int = key("Gateways, each on a machine of its own.", 1, between(1, 100))
    waiting: int = key("Requests that may wait for a replica; more are answered with 429.", 256, between(1, 100_000))
    moves: int = key("Times that a begun stream goes on at another replica when its own is lost.", 2, between(0, 10))
    hosts: tuple[str, ...] = key("Host names to answer to without API keys, besides localhost.", ())
    origins: tuple[str, ...] = key("Origins whose web pages may ask (CORS).", ())
    otlp: str | None = key("As `qhub serve --otlp`, of gateways and replicas.", None, otlp_problem)


@dataclass(frozen=True)
class Router:
    """[router]"""

    name: str | None = key(
        "Router that chooses the adapter where a request's model is auto, such as router@prod.", None
    )
    threshold: float | None = key("As `qhub serve --router-threshold`.", None, between(0.0, 1.0))
    allow: tuple[str, ...] = key("As `qhub serve --router-allow`.", ())


@dataclass(frozen=True)
class Vllm:
    """[vllm]: replicas are vLLM, in an environment of its own, and not our engine."""

    model: str | None = key("The 16-bit model that vLLM serves, a folder or a Hub id; `base` was made of it.", None)
    command: tuple[str, ...] = key("What starts vLLM, up to where the model is named.", ("vllm", "serve"))
    options: tuple[str, ...] = key("Options of vLLM, such as '--max-lora-rank', '32'.", ())
    start: float = key("Seconds in which vLLM must have started.", 1800.0, between(1.0, 1e5))


TABLES: Mapping[str, Any] = {
    "replicas": Replicas,
    "gateway": Gateway,
    "router": Router,
    "engine": EngineOptions,
    "vllm": Vllm,
}
OWN_ENGINE = {"replicas": ("pin", "dtype"), "router": ("name", "threshold", "allow")}  # keys that vLLM has no part in


def described() -> str:
    """A cluster.toml to begin with: every key with its meaning and default."""
    lines = [
        'base = "{base}"',
        f"{'# remote =':24} # Where versions, aliases, splits and keys come from: a name or a URL.",
    ]
    for name, table in (("replicas", Replicas), ("gateway", Gateway), ("router", Router)):
        lines += ["", f"[{name}]", *_described(table)]
    lines += ["", "[engine]                 # options of `qhub serve`, such as max_rows = 16"]
    ours = [line if line.startswith("#") else f"# {line}" for line in _described(Vllm)]
    return "\n".join([*lines, "", "# [vllm]                 # vLLM in the place of our engine", *ours, ""])


def _described(table: Any) -> Iterator[str]:
    for item in fields(table):
        default = item.default
        text = json.dumps(default) if isinstance(default, str | tuple) else str(default)
        shown = f"{item.name} = {text}" if default is not None else f"# {item.name} ="
        yield f"{shown:24} # {item.metadata['meaning']}"
