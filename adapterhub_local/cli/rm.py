"""`qhub rm`: remove versions."""

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.registry import Registry


@click.command(name="rm")
@click.argument("references", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Remove them although aliases point to them or merges came from them.")
def command(references: tuple[str, ...], force: bool) -> None:
    """Remove the versions REFERENCES name. Their numbers are not used again; `qhub gc` gives the space back."""
    from adapterhub_local.errors import InputError
    from adapterhub_local.registry.gc import remove

    registry = Registry()
    for text in references:
        if "@" not in text:
            raise InputError(f"say which version of '{text}' to remove, such as {text}@1")
    for version in [registry.resolve(text) for text in references]:
        remove(registry, version, force=force)
        echo(f"removed {version}")
