"""`qhub tag`: words for versions, to find them by."""

import click

from adapterhub_local.registry import Registry


@click.command(name="tag")
@click.argument("reference")
@click.argument("tags", nargs=-1)
@click.option("--remove", is_flag=True, help="Take the tags off.")
def command(reference: str, tags: tuple[str, ...], remove: bool) -> None:
    """Give the version REFERENCE names these TAGS, or show those it has."""
    from adapterhub_local.registry.marks import add_tags, remove_tags, tags_of

    registry = Registry()
    version = registry.resolve(reference)
    if tags:
        (remove_tags if remove else add_tags)(registry, version, tags)
    click.echo(f"{version}: {' '.join(tags_of(registry, version)) or 'no tags'}")
