"""`qhub console`: pages to look at adapters, compare and merge them, and to follow runs."""

import click


@click.command(name="console")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Also answer to this name without keys.")
@click.option("--access-log/--no-access-log", default=False, help="A JSON line on standard error for each request.")
def command(host: str, port: int, hosts: tuple[str, ...], access_log: bool) -> None:
    """Show the registry, its runs and bases as pages in a browser, without loading a model.

    `qhub serve` has the same pages beside its API, and there they can ask the model, too. As soon as there is an API
    key (`qhub key create`), a browser has to show one.
    """
    import gc

    click.get_current_context().call_on_close(gc.enable)
    gc.disable()  # until it answers: what is imported stays, and looking through it again and again takes its time
    from serve.console_server import run_console

    run_console(host, port, hosts, access_log=access_log)
