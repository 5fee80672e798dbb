"""`qhub alias`: names that move, such as prod."""

from collections.abc import Mapping
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.client import chosen_server
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
    if (server := chosen_server()) is not None:
        server.put(f"/registry/aliases/{name}", {"alias": alias, "version": version, **_expected(expect)})
    else:
        Registry().set_alias(name, alias, version, expect=expect)
    echo(f"{name}@{alias} -> {name}@{version}")


@command.command(name="list")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(name: str, as_json: bool) -> None:
    """List the aliases of NAME, and what protects them."""
    known = _known(name)
    aliases = known["aliases"]
    if as_json:
        print_json(aliases)
    elif not aliases:
        echo(f"No aliases yet. Set one: qhub alias set {name} prod 1")
    else:
        protected = {one["alias"]: _asks(one) for one in known["protections"]}
        rows = [(f"{name}@{alias}", f"{name}@{number}", protected.get(alias)) for alias, number in aliases.items()]
        print_table(("alias", "version", "protected"), rows)


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, alias: str, as_json: bool) -> None:
    """Show where NAME@ALIAS points, what protects it, and which versions are approved for it."""
    known = _known(name)
    number = known["aliases"].get(alias)
    protection = next((one for one in known["protections"] if one["alias"] == alias), None)
    given = [
        {key: one[key] for key in ("reference", "actor", "at")} for one in known["approvals"] if one["alias"] == alias
    ]
    if number is None and protection is None:
        _resolve(f"{name}@{alias}")  # which says what there is
    if as_json:
        print_json({"name": name, "alias": alias, "version": number, "protection": protection, "approvals": given})
        return
    echo(f"{name}@{alias} -> {f'{name}@{number}' if number is not None else 'nothing yet'}")
    if protection is not None:
        echo(f"protected by {protection['actor'] or 'unknown'}: {_asks(protection)}")
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
    if (server := chosen_server()) is not None:
        body = {"alias": alias, "require": require, "approvals": approvals}
        found = server.put(f"/registry/protections/{name}", body)
        protection, without = found["protection"], found["scores_without_values"]
    else:
        from adapterhub_local.registry.protecting import protect as protect_alias
        from adapterhub_local.registry.protecting import scores_without_values

        registry = Registry()
        made = protect_alias(registry, name, alias, require, approvals)
        protection, without = made.to_json(), scores_without_values(registry, made)
    for score in without:
        echo(f"note: no version of {name} has a score {score} yet", err=True)
    echo(f"{name}@{alias} is protected: {_asks(protection)}")


@command.command()
@click.argument("name")
@click.argument("alias")
def unprotect(name: str, alias: str) -> None:
    """Let NAME@ALIAS move anywhere again; the history keeps who lifted the protection."""
    if (server := chosen_server()) is not None:
        server.delete(f"/registry/protections/{name}", alias=alias)
    else:
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
    if shares is not None and off:
        raise InputError("give shares or --off, not both")
    if shares is not None or off:
        from adapterhub_local.registry.split import parse_split, set_split

        wanted = parse_split(shares) if shares is not None else []
        if (server := chosen_server()) is not None:
            sides = [{"alias": alias, "share": share} for alias, share in wanted]
            server.put(f"/registry/splits/{name}", {"split": sides})
        else:
            set_split(Registry(), name, wanted)
    found = [(side["alias"], side["share"]) for side in _known(name)["split"]]
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
    moves = [move for move in _known(name)["alias_log"] if alias in (None, move["alias"])]
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
    if (server := chosen_server()) is not None:
        body = {"alias": alias, **_expected(expect)}
        number = server.post(f"/registry/aliases/{name}", body)["aliases"][alias]
    else:
        from adapterhub_local.registry import marks

        number = marks.rollback(Registry(), name, alias, expect=expect)
    echo(f"{name}@{alias} -> {name}@{number}")


@command.command()
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N now.")
def rm(name: str, alias: str, expect: int | None) -> None:
    """Remove NAME@ALIAS; its log stays."""
    if (server := chosen_server()) is not None:
        server.delete(f"/registry/aliases/{name}", alias=alias, expect=expect)
    else:
        from adapterhub_local.registry.marks import remove_alias

        remove_alias(Registry(), name, alias, expect=expect)
    echo(f"removed {name}@{alias}")


def _known(name: str) -> dict[str, Any]:
    """Aliases, protections, approvals, split and moves of a name, here or at the chosen server. Raises NotFound."""
    if (server := chosen_server()) is not None:
        found: dict[str, Any] = server.get(f"/registry/adapters/{name}", limit=1)
        return found
    from adapterhub_local.registry.pointers import pointers_of

    return pointers_of(Registry(), name)


def _resolve(reference: str) -> None:
    """Raise NotFound, which names what there is, if the reference does not exist."""
    if (server := chosen_server()) is not None:
        server.get(f"/registry/versions/{reference}")
    else:
        Registry().resolve(reference)


def _expected(expect: int | None) -> dict[str, int | None]:
    """The field of a request that moves an alias: 0 is for one that points to nothing yet."""
    return {} if expect is None else {"expect": expect or None}


def _asks(protection: Mapping[str, Any]) -> str:
    """What a protection asks, in a line."""
    approvals = protection["approvals"]
    counted = [f"{approvals} approval{'' if approvals == 1 else 's'}"] if approvals else []
    return ", ".join([*protection["require"], *counted])
