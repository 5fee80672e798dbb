"""`qhub tune-merge`: search a merge on held-out data, and register the best."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.merge_report import print_report, warn
from adapterhub_local.cli.output import echo, print_json, print_table, reporter
from adapterhub_local.errors import InputError
from adapterhub_local.merge.tuning import SEARCHES
from adapterhub_local.registry import Registry


@click.command(name="tune-merge")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--name", help="Register the best merge as the next version of NAME, whatever the plan says.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to a file or folder instead.")
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--evaluations", type=click.IntRange(1), metavar="N", help="Score as much as N whole merges.")
@click.option("--minutes", type=float, metavar="M", help="Begin no merge after M minutes.")
@click.option(
    "--search",
    metavar="|".join(SEARCHES),
    help="pattern (default); gp, tpe, cmaes: Optuna; gradient: learned.",
)
@click.option("--groups", type=click.IntRange(1), metavar="G", help="A weight for each of G groups of layers.")
@click.option("--methods", metavar="M1,M2,...", help="Choose among these methods too, with their density.")
@click.option("--pareto", is_flag=True, default=None, help="Keep every merge that no other beats in all tasks.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), metavar="S", help="Seed of the samplers.")
@click.option("--whole", is_flag=True, help="Score every merge on all examples, also one that is clearly worse.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, every trial included.")
def command(
    plan: Path, name: str | None, output: Path | None, alias: str | None, methods: str | None, whole: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Search the merge in PLAN that does best on the held-out chats of [tune.data].

    \b
    qhub tune-merge plan.toml                                    # weights, by pattern search
    qhub tune-merge plan.toml --search gp --groups 3             # each third of the layers has its own
    qhub tune-merge plan.toml --search tpe --methods weighted_sum,ties,dare_linear --evaluations 60
    qhub tune-merge plan.toml --search gp --pareto               # several tasks: the best trade-offs
    qhub tune-merge plan.toml --search gradient --groups 30      # a weight for each of 30 layers, learned (LoRA Soups)

    Every trial is the whole merge, scored on the base; the search starts at the weights of the plan. A merge that
    is clearly worse on a part of the examples is given up, and counts with that part. What was scored is kept: stopped
    with Ctrl-C, or killed, the same command continues where it stopped. The options are keys of [tune], and take
    precedence over them. If the plan has [evaluate], the best merge must pass its requirements.
    """
    from adapterhub_local.evaluate.gate import check_held
    from adapterhub_local.merge.destination import Destination
    from adapterhub_local.merge.plan_file import load_plan

    asked = Destination(name, alias, output)
    written = load_plan(plan)
    if written.tune is None:
        raise InputError(f"{plan} has no [tune]: write it, with [tune.data] to say what the merge is to do well on")
    there = asked if asked.is_given else Destination(written.name, written.alias, written.path)
    if not there.is_given:
        raise InputError(f"{plan} does not say where the best merge goes: give --name NAME, or [output] in the plan")
    there = there.beside(written.labels)
    changed = {key: value for key, value in given.items() if value is not None}
    if methods is not None:
        changed["methods"] = tuple(method.strip() for method in methods.split(","))
    if whole:
        changed["early_stop"] = False
    tuning = replace(written.tune, **changed)
    if wrong := [message for _, message, _ in tuning.problems(written.weights, written.formula.method)]:
        raise InputError("; ".join(wrong))
    written = replace(written, name=there.name, alias=there.alias, path=there.path, tune=tuning)
    check_held(tuning.scored)  # before anything heavy is loaded

    from adapterhub_local.tune.tuned import tuned_merge

    show = reporter()

    def on_trial(trial: Any, scorer: Any) -> None:
        show.note(f"{_outcome(trial, scorer)} [{_progress(scorer, tuning)}]")

    done = tuned_merge(written, Registry(), reporter=show, on_trial=on_trial, note=lambda text: echo(text, err=True))
    merged, found = done.merged, done.found
    every, best = found.trials, found.best
    report = merged.report.to_json()
    if as_json:
        plans = [str(path) for path in found.plans]
        print_json({**merged.to_json(), **best.candidate.to_json(), **done.lineage, "plans": plans, **report})
        return
    tasks = [f"{task} {metric}" for task in best.scores for metric in ("loss", "exact match")]
    print_table(("merge", *tasks, "scored on"), [_row(trial) for trial in every])
    if found.front:
        named = [(path.name, *_row(trial)) for trial, path in zip(found.front, found.plans[1:], strict=True)]
        print_table(("front", "merge", *tasks, "scored on"), named)
        echo(f"plans of the front, for `qhub merge`: {found.plans[0].parent}")
    echo(f"the plan's own, {every[0].candidate}: {_scores(every[0])}")
    echo(f"the best of {len(every)}, {best.candidate}: {_scores(best)} ({found.seconds / 60:.1f} minutes)")
    print_report(str(merged.version or merged.path), len(best.candidate.weights), report)
    warn(report, list(best.candidate.weights))


def _outcome(trial: Any, scorer: Any) -> str:
    if not trial.is_whole:
        return f"{trial.candidate}: given up after {trial.share:.0%} of the examples, {_scores(trial)}"
    return f"{trial.candidate}: {_scores(trial)}{', the best so far' if trial is scorer.best else ''}"


def _progress(scorer: Any, tuning: Any) -> str:
    """Trials, what is used of the budget, how fast, and how long it will take."""
    rate = scorer.spent / max(scorer.seconds, 1e-9)
    left = (tuning.evaluations - scorer.spent) / rate if rate else 0.0
    if tuning.minutes is not None:
        left = min(left, 60 * tuning.minutes - scorer.seconds)
    left = max(0, round(left))
    return (
        f"{len(scorer.trials)} trials, {scorer.spent:.1f} of {tuning.evaluations} evaluations, "
        f"{60 * rate:.1f} a minute, {left // 60}:{left % 60:02} left"
    )


def _scores(trial: Any) -> str:
    return "; ".join(
        f"{task} loss {score.loss:.4f}, exact match {score.exact_match:.1%}" for task, score in trial.scores.items()
    )


def _row(trial: Any) -> list[str]:
    cells = [cell for score in trial.scores.values() for cell in (f"{score.loss:.4f}", f"{score.exact_match:.1%}")]
    return [str(trial.candidate), *cells, "all" if trial.is_whole else f"{trial.share:.0%}"]
