"""Run the application: find the base, bind the address, load, announce, and stop cleanly on SIGINT and SIGTERM."""

import asyncio
import dataclasses
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from adapterhub_local import settings
from adapterhub_local.base.bases import choose_base
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.kinds import is_router
from adapterhub_local.registry.remotes import remote_at
from serve.adapters.compatibility import check_one_of
from serve.configuration import Configuration
from serve.engine.options import EngineOptions
from serve.follow import Follower
from serve.http.app import create_app
from serve.http.connections import allow_connections
from serve.listen import GRACE_SECONDS, check_reachable, http_config, listen, listen_at, log_json, shown_host
from serve.memory import bound_memory
from serve.options import HttpOptions
from serve.redis_limits import RedisLimits
from serve.services import Services, check_bases
from serve.threads import in_passing
from serve.tls import Tls

LOOK_SECONDS = 0.1  # between looks at whether a second signal says to stop at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DrainingServer(uvicorn.Server):
    """A uvicorn server that says when it answers, and when it stops gives running answers some time to end.

    First, for `HttpOptions.notice`, it only says that it will stop, where balancers look. Answers that take longer than
    `HttpOptions.drain` end with an error their clients can read, not with a broken connection. `reread` is called at
    SIGHUP.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        services: Services,
        announce: Callable[[], None],
        reread: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._services = services
        self._had_terminal = has_terminal()
        self._announce = announce
        self._reread = reread

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            if self._reread is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.is_stopping = True
        notice = self._services.first.http.notice
        end_of_notice = asyncio.get_running_loop().time() + notice
        while asyncio.get_running_loop().time() < end_of_notice and not self.force_exit:
            await asyncio.sleep(min(LOOK_SECONDS, notice))
        end = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._services.first.http.drain)
        for service in self._services:
            await asyncio.to_thread(service.loop.stop)

    def _hang_up(self) -> None:
        """SIGHUP: its terminal was closed, or somebody wants the files to be read again."""
        if self._had_terminal and not has_terminal():
            self.should_exit = True
        elif self._reread is not None:
            self._reread()


def run_server(
    names: Sequence[str | None],
    host: str,
    port: int,
    *,
    options: EngineOptions,
    http: HttpOptions,
    announce: Callable[[str], None],
    dtype: str | None = None,
    device: str | None = None,
    access_log: bool = True,
    uds: Path | None = None,
    remote: str | None = None,
    tls: Tls | None = None,
    configuration: Configuration | None = None,
) -> None:
    """Serve bases of these `names`, or the only one there is, until SIGINT or SIGTERM.

    `announce` gets one line when the server answers. `uds`: a socket's path instead of host and port. `remote`: the
    name or URL of one that is followed. `tls`: serve https. `configuration`: what is read again at SIGHUP, as is the
    certificate.

    Raises NotFound if there is no such base or remote, InputError if the address cannot be used, or if others could
    reach it and there is no API key, and what reading a remote for the first time raises.
    """
    infos = check_bases([choose_base(name, settings.home(), "the server") for name in names or (None,)])
    if not has_terminal():  # until the server answers: the signal would end it
        signal.signal(signal.SIGHUP, lambda *_: None)
    shown = " and ".join(info.name for info in infos)
    if tls is not None:
        tls.check()
    registry = Registry()
    follower = None
    if remote is not None:  # before it is asked for keys, which may be the remote's
        place = remote_at(settings.home(), remote)
        log_json(access=access_log)
        follower = Follower(registry, place, lambda version: check_one_of(version, infos))
        follower.begin()
    if uds is None and check_reachable(host, port, settings.home()):
        http = dataclasses.replace(http, require_keys=True)
    limits = RedisLimits(http.limits) if http.limits is not None else None
    log_json(access=access_log)
    bound_memory()
    allow_connections()
    with (
        listen(host, port) if uds is None else listen_at(uds) as listener
    ):  # before the base is loaded: a wrong port should not cost minutes
        gc.freeze()  # what is imported stays

        def load() -> FastAPI:
            kind = DTYPES[dtype] if dtype else None
            try:
                bases = [load_base(info, dtype=kind, device=device) for info in infos]
                return create_app(
                    bases, registry=registry, options=options, http=http, limits=limits, follower=follower
                )
            except torch.OutOfMemoryError:
                raise QhubError(
                    f"the GPU has no memory left for {shown}: stop what else uses it, or lower --max-length, "
                    "--kv-cache or --base-cache"
                ) from None

        app = in_passing(load)
        scheme = "http" if tls is None else "https"
        where = f"{scheme}://{shown_host(host)}:{listener.getsockname()[1]}/v1" if uds is None else f"the socket {uds}"

        def ready() -> None:
            versions = [version for info in infos for version in registry.versions_on_base(info.fingerprint)]
            count = len({version.name for version in versions if not is_router(version.lineage)})
            announce(f"Serving {shown} with {count} adapter{'' if count == 1 else 's'} on {where}")

        config = http_config(
            app,
            timeout_graceful_shutdown=int(http.drain) + GRACE_SECONDS,
            proxy_headers=bool(http.forwarded),
            forwarded_allow_ips=list(http.forwarded),
            **(tls.uvicorn() if tls is not None else {}),
        )
        config.load()
        if config.ssl is not None:
            Tls.prepare(config.ssl)
        services: Services = app.state.services

        def reread() -> None:
            for line in _reread(services, configuration, tls, config):
                announce(f"SIGHUP: {line}")

        # uvicorn raises the signals it caught once more when it is done: by then they have done their work
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        gc.collect()
        gc.freeze()  # what was loaded stays: to look through it again and again would hold up the answers
        gc.enable()
        try:
            DrainingServer(config, services, ready, reread).run(sockets=[listener])
        finally:
            if uds is not None:
                uds.unlink(missing_ok=True)


def _reread(
    services: Services, configuration: Configuration | None, tls: Tls | None, config: uvicorn.Config
) -> Iterator[str]:
    """Read again what a server was started with, and say what that changes. What cannot be read changes nothing."""
    if configuration is not None:
        try:
            http, changed, later = configuration.reread(services.first.http)
        except InputError as error:
            yield f"no option changed: {error}"
        else:
            services.apply(http)
            yield "; ".join(changed) or "no option changed"
            if later:
                yield f"at the next start alone: {', '.join(later)}"
    if tls is not None and config.ssl is not None:
        try:
            tls.refresh(config.ssl)
            yield f"new connections get the certificate of {tls.certificate} as it is now"
        except InputError as error:
            yield f"the certificate stays: {error}"


def has_terminal() -> bool:
    """Whether this process has a controlling terminal: not as a service, nor once that was closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
