"""`python -m serve` and `qhub serve`: one command, whose heavy imports wait until it runs."""

import gc
import sys
from pathlib import Path
from typing import Any

import click

from adapterhub_local.errors import QhubError
from adapterhub_local.options import add_options, chosen
from adapterhub_local.settings import wait_briefly
from adapterhub_local.visible import visible
from serve.configuration import Command, Configuration, from_file
from serve.engine.options import EngineOptions
from serve.options import HttpOptions
from serve.redis_limits import has_password
from serve.tls import Tls
from serve.traces import with_collector

EXPOSED = (
    "every user of this machine can read the password in --limits, as part of the command line: "
    "leave it out there and set QHUB_REDIS_PASSWORD"
)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=from_file,
    help="TOML file with options of this command, such as timeout = 60; what the command line gives goes before it. "
    "SIGHUP has it read again.",
)
@click.option(
    "--base",
    "bases",
    metavar="NAME",
    multiple=True,
    help="The base to serve. Repeatable: several share the memory that is given, in equal parts, and each request is "
    "answered by the base that its model belongs to. Default: the only one there is.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option(
    "--uds",
    type=click.Path(path_type=Path),
    help="Listen at this unix socket instead, which only this user can reach.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to load. Default: QHUB_DEVICE, or auto."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What everything but the 4-bit weights is computed in. Default: float32 on the CPU, where bfloat16 is faster "
    "if the processor multiplies it (AVX512-BF16); on a GPU bfloat16, or float16 where it has no bfloat16.",
)
@click.option(
    "--remote",
    metavar="NAME|URL",
    help="Follow this remote: versions come when first asked for, aliases, splits and keys within two seconds.",
)
@click.option("--access-log/--no-access-log", default=True, help="A JSON line on standard error for each request.")
@add_options(Tls)
@add_options(HttpOptions)
@add_options(EngineOptions)
@click.argument("named", nargs=-1, metavar="")
def command(
    named: tuple[str, ...],
    config: Path | None,
    bases: tuple[str, ...],
    host: str,
    port: int,
    uds: Path | None,
    device: str | None,
    dtype: str | None,
    remote: str | None,
    access_log: bool,
    **limits: Any,
) -> None:
    """Serve a base and all its adapters, OpenAI-compatible.

    The field `model` of a request names the adapter: sentiment, sentiment@2, sentiment@prod, or the base's
    own name. Adapters published while the server runs are served at once.

    As soon as there is an API key (`qhub key create`), every request needs one; without any, only this
    machine may ask.
    """
    if named:  # as other servers have it; here a request names the model, and this is what all of them share
        raise click.UsageError(f"the base is named by an option: qhub serve --base {named[0]}")
    tls = Tls.given(limits)
    context = click.get_current_context()
    http, note = with_collector(HttpOptions(**chosen(HttpOptions, limits)))
    if note is not None:
        click.echo(f"note: {note}", err=True)
    wait_briefly()
    context.call_on_close(gc.enable)
    gc.disable()  # until all is loaded: what is imported stays, and looking through it again and again takes its time
    from adapterhub_local.base.load import choose_device
    from serve.server import run_server

    options = EngineOptions.on(choose_device(device), **chosen(EngineOptions, limits))
    if http.limits is not None and has_password(http.limits):
        click.echo(f"note: {EXPOSED}", err=True)
    if http.request_log is not None:
        whose = "all chats" if http.request_log_all else "chats that ask for it (store = true)"
        where = visible(str(http.request_log))
        click.echo(f"note: answers to {whose} are logged in {where}, with their conversations", err=True)
    run_server(
        bases,
        host,
        port,
        options=options,
        http=http,
        announce=click.echo,
        dtype=dtype,
        device=device,
        access_log=access_log,
        uds=uds,
        remote=remote,
        tls=tls,
        configuration=Configuration(context),
    )


if __name__ == "__main__":
    try:
        command()
    except QhubError as error:
        click.echo(visible(f"serve: {error}"), err=True)
        sys.exit(error.exit_code)
