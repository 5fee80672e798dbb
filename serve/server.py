"""Run the application: find the base, bind the address, load, announce, and stop cleanly on SIGINT and SIGTERM."""

import asyncio
import dataclasses
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from adapterhub_local import settings
from adapterhub_local.base.bases import choose_base
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.http.app import create_app
from serve.http.connections import ImpatientProtocol, allow_connections
from serve.http.front import JsonLines
from serve.memory import bound_memory
from serve.options import HttpOptions
from serve.threads import in_passing

DRAIN_SECONDS = 10  # how long running answers may go on when the server stops
KEEP_ALIVE_SECONDS = 60  # longer than clients keep idle connections, or they send into one that is being closed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DrainingServer(uvicorn.Server):
    """A uvicorn server that says when it answers, and when it stops gives running answers some time to end.

    Those that take longer end with an error their clients can read, not with a broken connection.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        loop: EngineLoop,
        announce: Callable[[], None],
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        super().__init__(config)
        self._loop = loop
        self._announce = announce
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        await asyncio.to_thread(self._loop.stop)


def run_server(
    base_name: str | None,
    host: str,
    port: int,
    *,
    options: EngineOptions,
    http: HttpOptions,
    announce: Callable[[str], None],
    dtype: str | None = None,
    device: str | None = None,
    access_log: bool = True,
) -> None:
    """Serve until SIGINT or SIGTERM; `announce` gets one line when the server answers.

    Raises NotFound if there is no such base, InputError if the address cannot be used, or if others could
    reach it and there is no API key.
    """
    info = choose_base(base_name, settings.home(), "the server")
    if not is_loopback(host):
        resolve(host, port)  # a name that means nothing is told as such
        http = dataclasses.replace(http, require_keys=True)
        if not any(key.is_valid() for key in Keys(settings.home()).all()):
            raise InputError(
                f"{host} can be reached by others, and there is no API key: make one with `qhub key create`, "
                "or listen on 127.0.0.1"
            )
    log_json(access=access_log)
    bound_memory()
    allow_connections()
    with listen(host, port) as listener:  # before the base is loaded: a wrong port should not cost minutes
        registry = Registry()

        def load() -> FastAPI:
            try:
                base = load_base(info, dtype=DTYPES[dtype] if dtype else None, device=device)
                return create_app(base, registry=registry, options=options, http=http)
            except torch.OutOfMemoryError:
                raise QhubError(
                    f"the GPU has no memory left for base '{info.name}': end what else uses it, or lower --max-length, "
                    "--kv-cache-mb or --base-cache-mb"
                ) from None

        app = in_passing(load)
        url = f"http://{_shown_host(host)}:{listener.getsockname()[1]}/v1"

        def ready() -> None:
            count = len({version.name for version in registry.versions_on_base(info.fingerprint)})
            announce(f"Serving {info.name} with {count} adapter{'' if count == 1 else 's'} on {url}")

        config = http_config(app)
        # uvicorn raises the signals it caught once more when it is done: by then they have done their work
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        gc.collect()
        gc.freeze()  # what was loaded stays: to look through it again and again would hold up the answers
        DrainingServer(config, app.state.service.loop, ready).run(sockets=[listener])


def http_config(app: FastAPI, **settings: Any) -> uvicorn.Config:
    """How the product listens; `settings` are uvicorn's own, such as a port."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_level="warning",
        timeout_graceful_shutdown=2 * DRAIN_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **settings,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name counts by all addresses it has."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
    except (OSError, UnicodeError):
        return False


def log_json(*, access: bool) -> None:
    """What the server logs, as JSON lines on standard error; `access`: one for each request, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("serve", logging.WARNING), ("serve.access", logging.INFO if access else logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, socket.SocketKind, int, tuple[Any, ...]]:
    """Family, kind, protocol and address to bind. Raises InputError if `host` has no address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{host}' has no address ({reason}): give another with --host") from None
    return family, kind, protocol, address


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError if the address cannot be used."""
    family, kind, protocol, address = resolve(host, port)
    try:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host and --port"
        ) from None
    return listener


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
