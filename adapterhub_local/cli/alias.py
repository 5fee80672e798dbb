"""`qhub alias`: names that move, such as prod."""

import click

from adapterhub_local.cli.output import print_json, print_table
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.group(name="alias")
def command() -> None:
    """Names that point to versions and can be moved: sentiment@prod."""


@command.command(name="set")
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=click.IntRange(1))
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N now.")
def set_(name: str, alias: str, version: int, expect: int | None) -> None:
    """Point NAME@ALIAS to VERSION."""
    if "@" in name:
        raise InputError(
            f"write the name and the version apart: qhub alias set {name.partition('@')[0]} {alias} {version}"
        )
    Registry().set_alias(name, alias, version, expect=expect)
    click.echo(f"{name}@{alias} -> {name}@{version}")


@command.command(name="list")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(name: str, as_json: bool) -> None:
    """List the aliases of NAME."""
    registry = Registry()
    registry.resolve(name)
    aliases = registry.aliases(name)
    if as_json:
        print_json(aliases)
    else:
        print_table(
            ("alias", "version"), [(f"{name}@{alias}", f"{name}@{number}") for alias, number in aliases.items()]
        )
