"""`qhub import`: versions from an archive."""
# ruff: noqa: N999 - a verb's file is named after it, and `get_command` imports it by name

from pathlib import Path

import click

from adapterhub_local.registry import Registry


@click.command(name="import")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Register the versions of the archive PATH, which `qhub export --oci` wrote, after checking every byte.

    A version keeps its number if that was never used here, else it gets the next one.
    """
    from adapterhub_local.registry.archive import read_archive

    for done in read_archive(Registry(), path):
        note = "here already" if not done.is_new else "imported"
        was = f" (was {done.reference})" if str(done.version) != done.reference else ""
        click.echo(f"{done.version} {note}{was}")
