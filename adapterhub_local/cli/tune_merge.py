"""`qhub tune-merge`: search the weights of a merge on held-out data, and register the best."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.merge_report import tell, warn
from adapterhub_local.cli.output import echo, print_json, print_table, reporter
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.command(name="tune-merge")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--name", help="Register the best merge as the next version of NAME, whatever the plan says.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to a file or folder instead.")
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--evaluations", type=click.IntRange(1), metavar="N", help="Score at most N merges, not [tune]'s.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, every trial included.")
def command(
    plan: Path, name: str | None, output: Path | None, alias: str | None, evaluations: int | None, as_json: bool
) -> None:
    """Search the weights of the merge in PLAN that do best on the held-out chats of [tune.data].

    Every trial is the whole merge, scored on the base; the search starts at the weights of the plan. What was
    scored is kept: stopped with Ctrl-C, the same command continues where it stopped. If the plan has [evaluate], the
    best merge must pass its requirements.
    """
    from adapterhub_local.evaluate.gate import check_held
    from adapterhub_local.merge.destination import Destination
    from adapterhub_local.merge.plan_file import load_plan

    asked = Destination(name, alias, output)
    written = load_plan(plan)
    if written.tune is None:
        raise InputError(f"{plan} has no [tune]: write it, with [tune.data] to say what the weights are to do well on")
    there = asked if asked.is_given else Destination(written.name, written.alias, written.path)
    if not there.is_given:
        raise InputError(f"{plan} does not say where the best merge goes: give --name NAME, or [output] in the plan")
    there = there.beside(written.labels)
    tuning = written.tune if evaluations is None else replace(written.tune, evaluations=evaluations)
    written = replace(written, name=there.name, alias=there.alias, path=there.path, tune=tuning)
    check_held(tuning.scored)  # before anything heavy is loaded

    from adapterhub_local.evaluate.tuned import tuned_merge

    show = reporter()

    def told(trial: Any, best: Any) -> None:
        show.note(f"{_weights(trial)}: {_scores(trial)}{', the best so far' if trial is best else ''}")

    done = tuned_merge(written, Registry(), reporter=show, told=told, note=lambda text: echo(text, err=True))
    merged, every, best = done.merged, done.trials, done.best
    report = merged.report.to_json()
    if as_json:
        print_json({**merged.to_json(), "weights": list(best.weights), **done.lineage, **report})
        return
    rows = [(_weights(trial), *_cells(trial)) for trial in every]
    tasks = [f"{task} {metric}" for task in best.scores for metric in ("loss", "exact match")]
    print_table(("weights", *tasks), rows)
    echo(f"the plan's weights {_weights(every[0])}: {_scores(every[0])}")
    echo(f"the best of {len(every)}, {_weights(best)}: {_scores(best)}")
    tell(str(merged.version or merged.path), len(best.weights), report)
    warn(report, list(best.weights))


def _weights(trial: Any) -> str:
    return ", ".join(f"{weight:g}" for weight in trial.weights)


def _scores(trial: Any) -> str:
    return "; ".join(
        f"{task} loss {score.loss:.4f}, exact match {score.exact_match:.1%}" for task, score in trial.scores.items()
    )


def _cells(trial: Any) -> list[str]:
    return [cell for score in trial.scores.values() for cell in (f"{score.loss:.4f}", f"{score.exact_match:.1%}")]
