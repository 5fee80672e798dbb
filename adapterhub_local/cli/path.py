"""`qhub path`: a folder that plain PEFT loads."""

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.registry import Registry


@click.command(name="path")
@click.argument("reference")
def command(reference: str) -> None:
    """Print a folder with the files of the version REFERENCE names, after checking their bytes."""
    echo(Registry().resolve(reference).path)
