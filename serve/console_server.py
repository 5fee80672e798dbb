"""`qhub console`: the pages over registry, runs and bases without a model. Loads no torch."""

import gc
from socket import socket

import click
import uvicorn

from adapterhub_local.registry import Registry
from adapterhub_local.settings import home
from serve.http.console import console_app
from serve.listen import check_reachable, http_config, listen, log_json, shown_host
from serve.options import HttpOptions


class AnnouncingServer(uvicorn.Server):
    """A uvicorn server that says where it answers as soon as it does."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self.started:
            gc.freeze()  # what is imported stays
            gc.enable()
            click.echo(f"Console on {self.url}")


def run_console(host: str, port: int, hosts: tuple[str, ...], *, access_log: bool) -> None:
    """Serve until SIGINT or SIGTERM. Raises InputError if the address cannot be used, or others could reach it and
    there is no API key."""
    http = HttpOptions(hosts=hosts, require_keys=check_reachable(host, port, home()))
    log_json(access=access_log)
    with listen(host, port) as listener:
        url = f"http://{shown_host(host)}:{listener.getsockname()[1]}/console"
        config = http_config(console_app(Registry(), http), ws="none")
        AnnouncingServer(config, url).run(sockets=[listener])
