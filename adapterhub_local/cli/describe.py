"""`qhub describe`: one line about a version."""

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.registry import Registry


@click.command(name="describe")
@click.argument("reference")
@click.argument("text")
def command(reference: str, text: str) -> None:
    """Say in one line of TEXT what the version REFERENCE names is; it replaces what was said before."""
    from adapterhub_local.registry.marks import describe

    registry = Registry()
    version = registry.resolve(reference)
    describe(registry, version, text)
    echo(f"{version}: {text}")
