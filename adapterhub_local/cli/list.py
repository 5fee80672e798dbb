"""`qhub list`: the adapters and their versions."""

import click

from adapterhub_local.cli.output import print_json, print_table
from adapterhub_local.registry import Registry, Version


@click.command(name="list")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the newest version of every adapter, or all versions of NAME."""
    registry = Registry()
    if name is not None:
        registry.resolve(name.partition("@")[0])  # says so if there is none, with the nearest names
        versions = registry.versions(name.partition("@")[0])
    else:
        versions = list({version.name: version for version in registry.versions()}.values())
    pointed = {version.name: registry.aliases(version.name) for version in versions}
    if as_json:
        print_json([_to_json(version, pointed[version.name], registry.metrics(version)) for version in versions])
        return
    if not versions:
        click.echo("No adapters yet. Train one: qhub train recipe.toml")
        return
    columns = ("adapter", "aliases", "base", "rank", "metrics", "made by", "created")
    print_table(columns, [_row(version, pointed[version.name], registry.metrics(version)) for version in versions])


def _row(version: Version, aliases: dict[str, int], scored: dict) -> tuple:
    lineage = version.lineage
    base = lineage.get("base") or {}
    metrics = [f"{task} {s['adapter']['exact_match']:.1%}" for task, s in scored.items() if "adapter" in s]
    return (
        version,
        ", ".join(f"{alias}={number}" for alias, number in aliases.items()),
        base.get("name") or base.get("hub_id"),
        (lineage.get("adapter") or {}).get("rank"),
        ", ".join(metrics),
        lineage.get("kind"),
        version.created_at[:16].replace("T", " "),
    )


def _to_json(version: Version, aliases: dict[str, int], metrics: dict) -> dict:
    lineage = version.lineage
    return {
        "name": version.name,
        "version": version.number,
        "reference": str(version),
        "aliases": aliases,
        "base": lineage.get("base"),
        "adapter": lineage.get("adapter"),
        "metrics": metrics,
        "kind": lineage.get("kind"),
        "content_digest": version.content_digest,
        "created_at": version.created_at,
    }
