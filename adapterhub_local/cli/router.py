"""`qhub router`: learn which adapter a prompt is for, look at how well that goes, and try it."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table, reporter
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry, Version


@click.group(name="router")
def command() -> None:
    """Routers choose the adapter for a request whose model is `auto`.

    \b
    qhub router train --name router sentiment@prod origin@prod --look-in recipes/data --require 'accuracy>=0.97'
    qhub router show router
    qhub router ask router "Is the sentiment of this text positive or negative? ..."
    qhub serve --router router@prod
    """


@command.command()
@click.argument("adapters", nargs=-1, required=True)
@click.option("--name", required=True, help="Register it as the next version of NAME.")
@click.option("--alias", help="Alias to point to the new version.")
@click.option("--data", multiple=True, metavar="ADAPTER=FILE", help="Prompts of an adapter, repeatable: a data file.")
@click.option("--base-data", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts that the base is to answer, repeatable.")  # fmt: skip
@click.option("--look-in", type=click.Path(path_type=Path), default=Path(), metavar="FOLDER",
              help="Where the data files lie that lineages name. Default: here.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=2000, show_default=True, help="Most prompts of each file.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="The least probability with which an adapter is chosen; below it the base answers.")  # fmt: skip
@click.option("--coverage", type=click.FloatRange(0.5, 1, max_open=True), default=0.99, show_default=True,
              help="Share of held-out prompts that count as known; the base answers what is further away.")  # fmt: skip
@click.option("--require", multiple=True, metavar="METRIC>=X",
              help="Register it only if it holds: 'accuracy>=0.97', 'sentiment.accuracy>=0.95'.")  # fmt: skip
@click.option("--description", help="One line about it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train(
    adapters: tuple[str, ...],
    name: str,
    alias: str | None,
    data: tuple[str, ...],
    base_data: tuple[Path, ...],
    look_in: Path,
    limit: int,
    threshold: float,
    coverage: float,
    require: tuple[str, ...],
    description: str | None,
    as_json: bool,
) -> None:
    """Learn from the prompts of ADAPTERS which of them, if any, a prompt is for; measure on others.

    The prompts are those of the files that the adapters were trained and scored on, found by name and digest in
    --look-in, or those of --data. Of each conversation the user's first message counts.
    """
    given: dict[str, list[Path]] = {}
    for text in data:
        adapter, equals, file = text.partition("=")
        if not adapter or not equals or not file:
            raise InputError(f"--data is {text[:80]!r}: write an adapter and its file, such as sentiment=prompts.jsonl")
        given.setdefault(adapter.partition("@")[0], []).append(Path(file))
    from adapterhub_local.router.train import train_router

    done = train_router(
        Registry(), name, adapters, data=given, base_data=base_data, look_in=look_in, limit=limit, threshold=threshold,
        coverage=coverage, requirements=require, alias=alias, description=description, reporter=reporter(),
    )  # fmt: skip
    if as_json:
        print_json({**_report(done.version), "milliseconds": round(done.milliseconds, 3), "notes": list(done.notes)})
        return
    _print(done.version)
    echo(f"{done.version} chooses in {done.milliseconds:.2f} ms (median of a request)")
    for note in done.notes:
        echo(f"note: {note}", err=True)


@command.command()
@click.argument("reference")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(reference: str, as_json: bool) -> None:
    """Show what the router REFERENCE chooses among, and how well."""
    from adapterhub_local.registry.kinds import check_router

    version = check_router(Registry().resolve(reference))
    if as_json:
        print_json(_report(version))
    else:
        _print(version)


@command.command()
@click.argument("reference")
@click.argument("texts", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ask(reference: str, texts: tuple[str, ...], as_json: bool) -> None:
    """Which adapter the router REFERENCE chooses for each of TEXTS, and how sure it is."""
    from adapterhub_local.registry.kinds import check_router

    registry = Registry()
    version = check_router(registry.resolve(reference))
    from adapterhub_local.base.bases import base_of
    from adapterhub_local.router.features import embeddings_of
    from adapterhub_local.router.files import read_router
    from adapterhub_local.router.router import Router

    router = Router(read_router(version.path, version), embeddings_of(base_of(version, registry.home)))
    chosen = [(text, router.choose([text])) for text in texts]
    if as_json:
        print_json([
            {"text": text, "adapter": str(one.reference) if one.reference else None,
             "confidence": round(one.confidence, 6), "reason": one.reason}
            for text, one in chosen
        ])  # fmt: skip
        return
    rows = [(one.reference or "base", f"{one.confidence:.3f}", one.reason, text[:60]) for text, one in chosen]
    print_table(("adapter", "confidence", "why", "text"), rows)


def _report(version: Version) -> dict[str, Any]:
    settings, metrics = version.lineage.get("router"), version.lineage.get("metrics") or {}
    scores = next((task.get("adapter") for task in metrics.values()), None)
    return {"reference": str(version), "content_digest": version.content_digest, "scores": scores, "router": settings}


def _print(version: Version) -> None:
    """The scores, and whose prompts went where."""
    report = _report(version)
    settings, scores = report["router"] or {}, report["scores"] or {}
    columns, confusion = settings.get("columns") or [], settings.get("confusion") or []
    rows = []
    for task, row in zip(settings.get("tasks") or [], confusion, strict=False):
        unseen = f"{task['unseen']:.1%}" if "unseen" in task else None
        precision = f"{task['precision']:.1%}" if task["precision"] is not None else None
        rows.append((task["route"], task["rows"], f"{task['accuracy']:.1%}", precision, unseen, *row))
    heads = (f"{version}", "prompts", "right", "precision", "to the base, unseen", *(f"-> {name}" for name in columns))
    print_table(heads, rows)
    if scores:
        low, high = scores["intervals"]["accuracy"]
        echo(f"right {scores['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {scores['rows']} held-out prompts, "
             f"calibration error {scores['calibration_error']:.4f}, threshold {settings['threshold']:g}")  # fmt: skip
