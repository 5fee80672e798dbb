"""`qhub describe`: one line about a version."""

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.client import chosen_server
from adapterhub_local.registry import Registry


@click.command(name="describe")
@click.argument("reference")
@click.argument("text")
def command(reference: str, text: str) -> None:
    """Describe the version that REFERENCE names in one line of TEXT, which replaces an earlier description."""
    from adapterhub_local.registry.marks import describe

    if (server := chosen_server()) is not None:
        found = server.put(f"/registry/descriptions/{reference}", {"text": text})
        echo(f"{found['reference']}: {found['description']}")
        return
    registry = Registry()
    version = registry.resolve(reference)
    describe(registry, version, text)
    echo(f"{version}: {text}")
