"""`qhub list`: the adapters and their versions."""

from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.as_json import entry

MAX_ROWS = 100  # shown where nothing was asked for


@click.command(name="list")
@click.argument("name", required=False)
@click.option("--base", help="Those made for this base: its name, Hub id or fingerprint.")
@click.option("--tag", "tags", multiple=True, help="Those with this tag; may be given again.")
@click.option("--metric", "metrics", multiple=True, metavar="COND", help="With such scores: 'exact_match>0.8'.")
@click.option("--task", help="Those trained or scored on this task; --metric is then of this task.")
@click.option("--sort", default="name", show_default=True, help="name, created, or a metric, the best first.")
@click.option("--limit", type=click.IntRange(0), help="Show at most this many, 0 for all. Default: 100 adapters, "
              "or all that a name, an option or --json asks for.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    name: str | None,
    base: str | None,
    tags: tuple[str, ...],
    metrics: tuple[str, ...],
    task: str | None,
    sort: str,
    limit: int | None,
    as_json: bool,
) -> None:
    """List the newest version of every adapter, all versions of NAME, or all that fit the options."""
    from adapterhub_local.registry.catalog import Condition, find

    registry = Registry()
    if name is not None:
        name = registry.resolve(name.partition("@")[0]).name  # says so if there is none, with the nearest names
    conditions = [Condition.parse(text) for text in metrics]
    filtered = base or tags or metrics or task
    if limit is None:
        limit = 0 if name or filtered or as_json else MAX_ROWS
    versions = find(
        registry, name=name, base=base, tags=tags, conditions=conditions, task=task, sort=sort, limit=limit or None
    )
    nothing = "No version fits" if filtered else "No adapters yet. Train one: qhub train recipe.toml"
    print_versions(registry, versions, as_json, nothing=nothing)
    if not (name or filtered or as_json) and len(versions) == limit and (total := len(registry.names())) > limit:
        echo(f"{limit} of {total:,} adapters: --limit 0 shows all, `qhub search WORDS` finds some", err=True)


def print_versions(registry: Registry, versions: list[Version], as_json: bool, *, nothing: str) -> None:
    """A table of versions, or JSON; `nothing` is printed if there are none."""
    from adapterhub_local.registry.catalog import aliases_of, metrics_of

    pointed, scored = aliases_of(registry, versions), metrics_of(registry, versions)
    if as_json:
        print_json([entry(one, pointed[one.name], scored[one.name, one.number]) for one in versions])
        return
    if not versions:
        echo(nothing)
        return
    columns = ("adapter", "aliases", "base", "rank", "metrics", "made by", "created")
    print_table(columns, [_row(one, pointed[one.name], scored[one.name, one.number]) for one in versions])


def _row(version: Version, aliases: dict[str, int], scored: dict[str, Any]) -> tuple[Any, ...]:
    lineage = version.lineage
    base = lineage.get("base") or {}
    shares = {task: _share(scores.get("adapter", {})) for task, scores in scored.items()}
    metrics = [f"{task} {share:.1%}" for task, share in shares.items() if isinstance(share, int | float)]
    return (
        version,
        ", ".join(f"{alias}={number}" for alias, number in aliases.items()),
        base.get("name") or base.get("hub_id"),
        (lineage.get("adapter") or {}).get("rank"),
        ", ".join(metrics),
        lineage.get("kind"),
        version.created_at[:16].replace("T", " "),
    )


def _share(scores: dict[str, Any]) -> Any:
    """What is shown of a task's scores: exact match, and of a router how often it chooses rightly."""
    return scores.get("exact_match", scores.get("accuracy") if "calibration_error" in scores else None)
