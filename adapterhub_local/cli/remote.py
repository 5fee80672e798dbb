"""`qhub remote`: places outside this home that keep versions."""

import json
from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.errors import InputError
from adapterhub_local.settings import home


@click.group(name="remote")
def command() -> None:
    """Places that keep versions for several homes: a folder, S3, or what fsspec opens.

    \b
    qhub remote add team s3://bucket/adapters      or /mnt/shared/adapters
    qhub sync push team sentiment
    qhub sync pull team sentiment@3                in another home
    """


@command.command()
@click.argument("name")
@click.argument("url")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE",
              help="A setting of the store's client, such as endpoint_url=https://...; repeatable.")  # fmt: skip
def add(name: str, url: str, options: tuple[str, ...]) -> None:
    """Call the place at URL, or a folder, NAME.

    A folder is made if there is none, and kept with its absolute path. Secrets are not kept: they come from where
    the store's tools look.
    """
    from adapterhub_local.registry.remotes import add_remote

    is_there = Path(url.removeprefix("file://")).expanduser().exists()
    remote = add_remote(home(), name, url, dict(_setting(text) for text in options))
    is_new = remote.folder is not None and not is_there
    echo(f"{remote.name}: {remote.url}{' (a new folder)' if is_new else ''}")


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the remotes of this home."""
    from adapterhub_local.registry.remotes import list_remotes

    remotes = list_remotes(home())
    if as_json:
        print_json([vars(remote) for remote in remotes])
    elif not remotes:
        echo("No remotes yet. Add one: qhub remote add team s3://bucket/adapters")
    else:
        print_table(
            ("remote", "where", "options"),
            [(one.name, one.url, " ".join(f"{k}={v}" for k, v in one.options.items())) for one in remotes],
        )


@command.command()
@click.argument("remote")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(remote: str, name: str | None, as_json: bool) -> None:
    """List what REMOTE has, of NAME or of all names."""
    from adapterhub_local.errors import NotFound
    from adapterhub_local.refs import check_name
    from adapterhub_local.registry.remote_layout import all_numbers, check_format, numbers_of
    from adapterhub_local.registry.remotes import find_remote
    from adapterhub_local.registry.store import open_store

    store = open_store(find_remote(home(), remote))
    check_format(store)
    found = all_numbers(store) if name is None else {check_name(name): numbers_of(store, name)}
    if name is not None and not found[name]:
        raise NotFound(f"{remote} has no '{name}': `qhub remote show {remote}` lists what it has")
    if as_json:
        print_json([{"name": one, "versions": numbers} for one, numbers in found.items()])
    elif not found:
        echo(f"Nothing there yet. Send it: qhub sync push {remote} NAME")
    else:
        print_table(("adapter", "versions"), [(one, " ".join(map(str, numbers))) for one, numbers in found.items()])


@command.command()
@click.argument("name")
def rm(name: str) -> None:
    """Forget the remote NAME; what is stored there stays."""
    from adapterhub_local.registry.remotes import remove_remote

    remote = remove_remote(home(), name)
    echo(f"removed {remote.name}; what is at {remote.url} stays")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"'{text}' is not an option: write KEY=VALUE, such as endpoint_url=https://...")
    try:
        return key.strip(), json.loads(value)  # numbers, true, false
    except ValueError:
        return key.strip(), value
