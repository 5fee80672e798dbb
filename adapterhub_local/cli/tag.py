"""`qhub tag`: words for versions, to find them by."""

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.command(name="tag")
@click.argument("reference")
@click.argument("tags", nargs=-1)
@click.option("--remove", is_flag=True, help="Remove the tags.")
@click.option("--json", "as_json", is_flag=True, help="Print the version's tags as JSON.")
def command(reference: str, tags: tuple[str, ...], remove: bool, as_json: bool) -> None:
    """Give the version REFERENCE names these TAGS, or show those it has."""
    from adapterhub_local.registry.marks import add_tags, remove_tags, tags_of

    registry = Registry()
    version = registry.resolve(reference)
    if remove and not tags:
        raise InputError(f"name the tags to remove: qhub tag {reference} --remove TAG")
    if tags:
        (remove_tags if remove else add_tags)(registry, version, tags)
    if as_json:
        print_json({"reference": str(version), "tags": tags_of(registry, version)})
        return
    echo(f"{version}: {' '.join(tags_of(registry, version)) or 'no tags'}")
