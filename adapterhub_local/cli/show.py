"""`qhub show`: one version with its lineage and metrics."""

from collections.abc import Mapping
from typing import Any

import click

from adapterhub_local.cli.output import print_json, print_table, score_text, size_text
from adapterhub_local.client import chosen_server
from adapterhub_local.counts import counted
from adapterhub_local.registry import Registry
from adapterhub_local.registry.as_json import whole
from adapterhub_local.registry.kinds import is_router
from adapterhub_local.registry.marks import description_of, tags_of


@click.command(name="show")
@click.argument("reference")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the whole lineage included.")
def command(reference: str, as_json: bool) -> None:
    """Show the version REFERENCE names: name, name@3, name@prod or name@sha256:..."""
    server = chosen_server()
    fields = _here(reference) if server is None else server.get(f"/registry/versions/{reference}", report=True)
    if as_json:
        print_json(fields)
        return
    lineage, aliases = fields["lineage"], fields["aliases"]
    base, adapter = lineage.get("base") or {}, lineage.get("adapter") or {}
    rows: list[tuple[str, Any]] = [("version", f"{fields['reference']}{' = ' + ', '.join(aliases) if aliases else ''}")]
    if fields["description"]:
        rows.append(("description", fields["description"]))
    if fields["tags"]:
        rows.append(("tags", " ".join(fields["tags"])))
    rows.append(("made by", lineage.get("kind", "unknown")))
    rows.append(
        ("base", f"{base.get('name') or base.get('hub_id') or 'unknown'} {(base.get('fingerprint') or '')[:19]}")
    )
    if isinstance(lineage.get("compatibility"), dict):
        rows.append(("fits its base", compatibility_text(lineage["compatibility"])))
    if adapter.keys() >= {"rank", "alpha", "num_parameters"}:  # a version made by another program may say less
        own = f", rows of {counted(adapter['tokens'], 'token')}" if adapter.get("tokens") else ""
        size = f"{adapter['num_parameters']:,} parameters{own}"
        rows.append(("adapter", f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, {size}"))
    rows += [
        (entry["role"], f"{entry['file']} ({counted(entry['rows'], 'row')}, {entry['digest'][:19]})")
        for entry in lineage.get("data", ())
    ]
    if is_router(lineage):
        rows += [("chooses", route) for route in (lineage.get("router") or {}).get("routes") or ()]
    else:
        rows += [("parent", f"{parent['reference']} x {_weight(parent)}") for parent in lineage.get("parents", ())]
    for task, scores in fields["metrics"].items():
        rows += [(f"{task}, {who}", _scores(score)) for who, score in scores.items() if _is_score(score)]
    rows.append(("size", size_text(sum(file["size"] for file in fields["files"]))))
    rows.append(("content", fields["content_digest"]))
    rows.append(("manifest", fields["manifest_digest"]))
    rows.append(("created", fields["created_at"]))
    print_table(("router" if is_router(lineage) else "adapter", fields["name"]), rows)


def _here(reference: str) -> dict[str, Any]:
    """All that this home knows of a version."""
    registry = Registry()
    version = registry.resolve(reference)
    aliases = [alias for alias, number in registry.aliases(version.name).items() if number == version.number]
    marks = {"tags": tags_of(registry, version), "description": description_of(registry, version)}
    return {**whole(version), "aliases": aliases, **marks, "metrics": registry.metrics(version)}


def _weight(parent: Mapping[str, Any]) -> str:
    weights = parent.get("weights")  # of groups of layers
    return "/".join(f"{one:g}" for one in weights) if weights else f"{parent['weight']:g}"


def _is_score(part: Any) -> bool:
    """Whether a part of an evaluation is a score, not how it was made."""
    return isinstance(part, dict) and any(isinstance(value, float) for value in part.values())


def _scores(score: dict[str, Any]) -> str:
    """The metrics of one score: `exact match 89.5% [84.5, 93.0], loss 0.1312 on 200 rows`."""
    intervals = score.get("intervals") or {}
    metrics = sorted(
        (name for name, value in score.items() if isinstance(value, float)), key=lambda name: name == "loss"
    )
    scores = [f"{name.replace('_', ' ')} {score_text(name, score[name], intervals.get(name))}" for name in metrics]
    rows = f" on {counted(score['rows'], 'row')}" if "rows" in score else ""
    return ", ".join(scores) + rows


def compatibility_text(compatibility: dict[str, Any]) -> str:
    """How sure it is that an adapter made elsewhere belongs to its base."""
    if compatibility.get("level") == "exact":
        return "exact base, by fingerprint"
    named = compatibility.get("base_fingerprint") or compatibility.get("base_model")
    if compatibility.get("level") == "named":
        return f"its base by name, {str(named)[:60]}"
    if compatibility.get("confirmed"):
        return (
            f"shapes, confirmed by --base; it says it was made for {str(named)[:60]}"
            if named
            else "shapes, confirmed by --base"
        )
    return f"same shapes, it says it was made for {str(named)[:60]}" if named else "same shapes, it names no base"
