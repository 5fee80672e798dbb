"""`qhub outdated`: pulled adapters that are newer on the Hub."""

from dataclasses import asdict

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.registry import Registry


@click.command(name="outdated")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, those that are up to date included.")
def command(name: str | None, as_json: bool) -> None:
    """Show which pulled adapters, or those of NAME, have other weights at the head of their repository now."""
    from adapterhub_local.hub import outdated

    registry = Registry()
    if name is not None:
        name = registry.resolve(name.partition("@")[0]).name
    looked = list(outdated(registry, name))
    if as_json:
        print_json([asdict(one) for one in looked])
        return
    for one in looked:
        if one.problem:
            echo(f"note: {one.reference}: {one.problem}", err=True)
    newer = [one for one in looked if one.newer]
    if newer:
        columns = ("adapter", "repository", "pulled at", "there now", "get it")
        rows = [
            (one.reference, one.repo_id, one.pulled_commit[:12], (one.head or "")[:12],
             f"qhub pull {one.repo_id} --name {one.reference.partition('@')[0]}")
            for one in newer
        ]  # fmt: skip
        print_table(columns, rows)
    else:
        echo(f"{len(looked)} pulled adapter{'' if len(looked) == 1 else 's'}, none newer on the Hub")
