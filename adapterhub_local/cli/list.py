"""`qhub list`: the adapters and their versions."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.client import Server, chosen_server
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.as_json import entry

ADAPTERS = "/registry/adapters"  # of a server
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
    filtered = base or tags or metrics or task
    if limit is None:
        limit = 0 if name or filtered or as_json else MAX_ROWS
    nothing = "No version fits" if filtered else "No adapters yet. Train one: qhub train recipe.toml"
    if (server := chosen_server()) is not None:
        asked = {"base": base, "tag": tags, "metric": metrics, "task": task, "sort": sort}
        entries = _there(server, name, asked, limit or None)
    else:
        registry = Registry()
        if name is not None:
            name = registry.resolve(name.partition("@")[0]).name  # says so if there is none, with the nearest names
        asked = {"name": name, "base": base, "tags": tags, "task": task, "sort": sort}
        entries = entries_of(registry, _here(registry, metrics, asked, limit or None))
    print_entries(entries, as_json, nothing=nothing)
    if not (name or filtered or as_json) and len(entries) == limit:
        total = len(registry.names()) if server is None else server.total(ADAPTERS)
        if total > limit:
            echo(f"{limit} of {total:,} adapters: --limit 0 shows all, `qhub search WORDS` finds some", err=True)


def _here(registry: Registry, metrics: Sequence[str], asked: dict[str, Any], limit: int | None) -> list[Version]:
    from adapterhub_local.registry.catalog import Condition, find

    return find(registry, **asked, conditions=[Condition.parse(text) for text in metrics], limit=limit)


def entries_of(registry: Registry, versions: list[Version]) -> list[dict[str, Any]]:
    """What a list shows of versions of this home."""
    from adapterhub_local.registry.catalog import aliases_of, metrics_of

    pointed, scored = aliases_of(registry, versions), metrics_of(registry, versions)
    return [entry(one, pointed[one.name], scored[one.name, one.number]) for one in versions]


def print_entries(entries: Sequence[Mapping[str, Any]], as_json: bool, *, nothing: str) -> None:
    """What `registry.as_json.entry` says of versions, as a table or JSON."""
    if as_json:
        print_json(entries)
    elif not entries:
        echo(nothing)
    else:
        columns = ("adapter", "aliases", "base", "rank", "metrics", "made by", "created")
        print_table(columns, [_row(each) for each in entries])


def entries_there(server: Server, limit: int | None, **asked: Any) -> list[dict[str, Any]]:
    """The first `limit` of a server's list, in the form and order of one here; no more pages than that are read.

    Of equal scores the newest version is first.
    """
    # the server has versions of one name, or of one time, in another order: of these all are read
    alike = {"name": "name", "created": "created_at"}.get(asked.get("sort", "name"))
    entries: list[dict[str, Any]] = []
    for found in server.pages(ADAPTERS, **asked):
        is_full = limit is not None and len(entries) >= limit
        if is_full and (alike is None or found[alike] != entries[-1][alike]):
            break
        entries.append(_entry(found))
    if alike is not None:
        entries.sort(key=lambda one: (one["name"], one["version"]))
    if alike == "created_at":
        entries.sort(key=lambda one: str(one["created_at"]), reverse=True)
    return entries[:limit]


def _entry(found: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a server's list as `registry.as_json.entry` has it."""
    return {
        **{key: found[key] for key in ("name", "version", "reference", "aliases", "base")},
        "adapter": {key: found[key] for key in ("rank", "alpha") if found[key] is not None} or None,
        **{key: found[key] for key in ("metrics", "kind", "content_digest", "created_at")},
    }


def _there(server: Server, name: str | None, asked: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    if name is not None:  # says so if there is none, with the nearest names
        name = server.get(f"/registry/versions/{name.partition('@')[0]}")["name"]
    every = name or any(value for key, value in asked.items() if key != "sort")
    return entries_there(server, limit, **asked, name=name, versions="all" if every else "newest")


def _row(found: Mapping[str, Any]) -> tuple[Any, ...]:
    base = found["base"] or {}
    shares = {task: _share(scores.get("adapter", {})) for task, scores in found["metrics"].items()}
    metrics = [f"{task} {share:.1%}" for task, share in shares.items() if isinstance(share, int | float)]
    return (
        found["reference"],
        ", ".join(f"{alias}={number}" for alias, number in found["aliases"].items()),
        base.get("name") or base.get("hub_id"),
        (found["adapter"] or {}).get("rank"),
        ", ".join(metrics),
        found["kind"],
        found["created_at"][:16].replace("T", " "),
    )


def _share(scores: dict[str, Any]) -> Any:
    """What is shown of a task's scores: exact match, and of a router how often it chooses rightly."""
    return scores.get("exact_match", scores.get("accuracy") if "calibration_error" in scores else None)
