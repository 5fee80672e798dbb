"""`qhub alias`: names that move, such as prod."""

import click

from adapterhub_local.cli.output import echo, print_json, print_table
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
    echo(f"{name}@{alias} -> {name}@{version}")


@command.command(name="list")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(name: str, as_json: bool) -> None:
    """List the aliases of NAME."""
    registry = Registry()
    aliases = registry.aliases(name)
    if not aliases:
        registry.resolve(name)
    if as_json:
        print_json(aliases)
    elif not aliases:
        echo(f"No aliases yet. Set one: qhub alias set {name} prod 1")
    else:
        print_table(
            ("alias", "version"), [(f"{name}@{alias}", f"{name}@{number}") for alias, number in aliases.items()]
        )


@command.command()
@click.argument("name")
@click.argument("shares", required=False, metavar="[ALIAS=SHARE,...]")
@click.option("--off", is_flag=True, help="Let the newest version answer alone again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def split(name: str, shares: str | None, off: bool, as_json: bool) -> None:
    """Split the server's traffic of plain NAME between aliases, or show how it is split.

    \b
    qhub alias split sentiment canary=10,prod=90
    Requests with the same `user` get the same side; NAME@ALIAS asks one side, NAME@N a version, as before.
    """
    from adapterhub_local.registry.split import parse_split, set_split, split_of

    registry = Registry()
    if shares is not None and off:
        raise InputError("give shares or --off, not both")
    if shares is not None or off:
        set_split(registry, name, parse_split(shares) if shares is not None else [])
    else:
        registry.resolve(name)
    found = split_of(registry, name)
    total = sum(share for _, share in found)
    if as_json:
        print_json(dict(found))
    elif found:
        rows = [(f"{name}@{alias}", share, f"{share / total:.1%}") for alias, share in found]
        print_table(("alias", "share", "traffic"), rows)
    else:
        echo(f"{name} is answered by its newest version")


@command.command()
@click.argument("name")
@click.argument("alias", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log(name: str, alias: str | None, as_json: bool) -> None:
    """Show every move of the aliases of NAME, or of ALIAS alone, oldest first."""
    from adapterhub_local.registry.marks import alias_log

    registry = Registry()
    moves = alias_log(registry, name, alias)
    if not moves:
        registry.resolve(name)
    if as_json:
        print_json(moves)
    else:
        rows = [
            (move["changed_at"][:19].replace("T", " "), move["alias"], move["action"], move["old_number"] or "nothing",
             move["new_number"] or "nothing")
            for move in moves
        ]  # fmt: skip
        print_table(("when", "alias", "action", "from", "to"), rows)


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N now.")
def rollback(name: str, alias: str, expect: int | None) -> None:
    """Point NAME@ALIAS to where it pointed before its last move; again goes one more step back."""
    from adapterhub_local.registry import marks

    number = marks.rollback(Registry(), name, alias, expect=expect)
    echo(f"{name}@{alias} -> {name}@{number}")


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N now.")
def rm(name: str, alias: str, expect: int | None) -> None:
    """Remove NAME@ALIAS; its log stays."""
    from adapterhub_local.registry.marks import remove_alias

    remove_alias(Registry(), name, alias, expect=expect)
    echo(f"removed {name}@{alias}")
