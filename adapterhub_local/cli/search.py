"""`qhub search`: versions by the words in their names, descriptions, tags and recipes."""

import click

from adapterhub_local.cli.list import print_versions
from adapterhub_local.registry import Registry


@click.command(name="search")
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Show the best so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Find versions with all WORDS in name, description, tags or recipe, the best first."""
    from adapterhub_local.registry.catalog import search

    registry = Registry()
    versions = search(registry, " ".join(words), limit=limit)
    print_versions(registry, versions, as_json, nothing=f"Nothing has all of these words: {' '.join(words)}")
