"""`qhub alias`: names that move, such as prod."""

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.gates import Protection


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
    """List the aliases of NAME, and what protects them."""
    from adapterhub_local.registry.protecting import protections_of

    registry = Registry()
    aliases = registry.aliases(name)
    if not aliases:
        registry.resolve(name)
    if as_json:
        print_json(aliases)
    elif not aliases:
        echo(f"No aliases yet. Set one: qhub alias set {name} prod 1")
    else:
        protected = {alias: _asks(protection) for alias, protection in protections_of(registry, name).items()}
        rows = [(f"{name}@{alias}", f"{name}@{number}", protected.get(alias)) for alias, number in aliases.items()]
        print_table(("alias", "version", "protected"), rows)


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, alias: str, as_json: bool) -> None:
    """Show where NAME@ALIAS points, what protects it, and which versions are approved for it."""
    from adapterhub_local.registry.protecting import approvals_of, protections_of

    registry = Registry()
    number = registry.aliases(name).get(alias)
    protection = protections_of(registry, name).get(alias)
    if number is None and protection is None:
        registry.resolve(f"{name}@{alias}")  # which says what there is
    given = [
        {"reference": str(version), "actor": one.actor, "at": one.at}
        for version in registry.versions(name) for one in approvals_of(registry, version) if one.alias == alias
    ]  # fmt: skip
    if as_json:
        shown = protection.to_json() if protection is not None else None
        print_json({"name": name, "alias": alias, "version": number, "protection": shown, "approvals": given})
        return
    echo(f"{name}@{alias} -> {f'{name}@{number}' if number is not None else 'nothing yet'}")
    if protection is not None:
        echo(f"protected by {protection.actor}: {_asks(protection)}")
    for one in given:
        echo(f"{one['reference']} was approved by {one['actor']}, {one['at'][:19].replace('T', ' ')}")


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--require", multiple=True, metavar="SCORE>=BOUND", help="What a version must have; may be given again.")
@click.option("--approvals", type=int, default=0, metavar="N", help="How many others must approve it.")
def protect(name: str, alias: str, require: tuple[str, ...], approvals: int) -> None:
    """Let NAME@ALIAS move only to versions that meet these requirements, however it is moved.

    \b
    qhub alias protect sentiment prod --require 'sentiment.exact_match>=0.8' --approvals 1
    A score is TASK.METRIC, or METRIC alone for every task that has it. This replaces any earlier protection.
    """
    from adapterhub_local.registry.catalog import metrics_of
    from adapterhub_local.registry.protecting import protect as protect_alias

    registry = Registry()
    protection = protect_alias(registry, name, alias, require, approvals)
    scores = {
        (task, metric): 0.0
        for metrics in metrics_of(registry, registry.versions(name)).values()
        for task, found in metrics.items() if isinstance(found, dict) and isinstance(found.get("adapter"), dict)
        for metric in found["adapter"]
    }  # fmt: skip
    for one in protection.require:
        if not one.values(scores):
            echo(f"note: no version of {name} has a score {one.score} yet", err=True)
    echo(f"{name}@{alias} is protected: {_asks(protection)}")


@command.command()
@click.argument("name")
@click.argument("alias")
def unprotect(name: str, alias: str) -> None:
    """Let NAME@ALIAS move anywhere again; the history keeps who lifted the protection."""
    from adapterhub_local.registry.protecting import unprotect as unprotect_alias

    unprotect_alias(Registry(), name, alias)
    echo(f"{name}@{alias} is not protected any more")


@command.command()
@click.argument("name")
@click.argument("shares", required=False, metavar="[ALIAS=SHARE,...]")
@click.option("--off", is_flag=True, help="Let the newest version answer alone again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def split(name: str, shares: str | None, off: bool, as_json: bool) -> None:
    """Split the server's traffic of plain NAME between aliases, or show how it is split.

    \b
    qhub alias split sentiment canary=10,prod=90
    Requests with the same `user` get the same side; NAME@ALIAS still asks one side, NAME@N one version.
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
             move["new_number"] or "nothing", move["actor"])
            for move in moves
        ]  # fmt: skip
        print_table(("when", "alias", "action", "from", "to", "who"), rows)


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N now.")
def rollback(name: str, alias: str, expect: int | None) -> None:
    """Point NAME@ALIAS to where it pointed before its last move; run it again to go one step further back."""
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


def _asks(protection: Protection) -> str:
    """What a protection asks, in a line."""
    approvals = protection.approvals
    counted = [f"{approvals} approval{'' if approvals == 1 else 's'}"] if approvals else []
    return ", ".join([*map(str, protection.require), *counted])
