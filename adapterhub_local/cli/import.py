"""`qhub import`: versions from an archive."""
# ruff: noqa: N999 - a verb's file is named after it, and `get_command` imports it by name

from pathlib import Path

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.registry import Registry


@click.command(name="import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, as_json: bool) -> None:
    """Register the versions of the archive PATH, which `qhub export --oci` wrote, after checking every byte.

    A version keeps its number if that was never used here, else it gets the next one.
    """
    from adapterhub_local.registry.archive import read_archive

    received = read_archive(Registry(), path)
    if as_json:
        print_json([{"reference": str(one.version), "was": one.reference, "is_new": one.is_new} for one in received])
        return
    for done in received:
        note = "here already" if not done.is_new else "imported"
        was = f" (was {done.reference})" if str(done.version) != done.reference else ""
        echo(f"{done.version} {note}{was}")
