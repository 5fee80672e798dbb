"""`qhub tag`: words for versions, to find them by."""

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.client import chosen_server
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

    if remove and not tags:
        raise InputError(f"name the tags to remove: qhub tag {reference} --remove TAG")
    if (server := chosen_server()) is not None:
        if tags:
            found = server.put(f"/registry/tags/{reference}", {"remove" if remove else "add": tags})
        else:
            found = server.get(f"/registry/versions/{reference}")
    else:
        registry = Registry()
        version = registry.resolve(reference)
        if tags:
            (remove_tags if remove else add_tags)(registry, version, tags)
        found = {"reference": str(version), "tags": tags_of(registry, version)}
    if as_json:
        print_json({key: found[key] for key in ("reference", "tags")})
        return
    echo(f"{found['reference']}: {' '.join(found['tags']) or 'no tags'}")
