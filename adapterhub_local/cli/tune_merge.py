"""`qhub tune-merge`: search the weights of a merge on held-out data, and register the best."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.merge_report import tell, warn
from adapterhub_local.cli.output import print_json, print_table


@click.command(name="tune-merge")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--name", help="Register the best merge as the next version of NAME, whatever the plan says.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to a file or folder instead.")
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--evaluations", type=click.IntRange(1), metavar="N", help="Score N merges at most, not [tune]'s number.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, every trial included.")
def command(
    plan: Path, name: str | None, output: Path | None, alias: str | None, evaluations: int | None, as_json: bool
) -> None:
    """Search the weights of the merge in PLAN that do best on the held-out chats of [tune.data].

    Every trial is the whole merge, scored on the base; the search starts at the weights of the plan. What was
    scored is kept: stopped with Ctrl-C, the same command goes on where it was. If the plan has [evaluate], the
    best merge must pass its requirements.
    """
    from adapterhub_local.durable import check_absent
    from adapterhub_local.errors import InputError, Stopped
    from adapterhub_local.evaluate.gate import Requirement, base_for, check_held, judge, open_bench
    from adapterhub_local.merge.plan_file import load_plan
    from adapterhub_local.refs import check_alias, check_name

    if name is not None and output is not None:
        raise InputError("--name and -o exclude each other: give one")
    if alias is not None and name is None:
        raise InputError("--alias needs --name: only a registered version can have an alias")
    written = load_plan(plan)
    if written.tune is None:
        raise InputError(f"{plan} has no [tune]: write it, with [tune.data] to say what the weights are to do well on")
    if name is None and output is None:
        name, alias, output = written.name, written.alias, written.path
    if name is None and output is None:
        raise InputError(f"{plan} does not say where the best merge goes: give --name NAME, or [output] in the plan")
    for given, check in ((name, check_name), (alias, check_alias)):
        if given is not None:
            check(given)
    if output is not None:
        check_absent(output)
    tuning = written.tune if evaluations is None else replace(written.tune, evaluations=evaluations)
    check_held(tuning.scored)
    scored = written.evaluate
    requirements = [Requirement.parse(text) for text in scored.require] if scored else []
    if scored:
        check_held(scored, requirements)

    from adapterhub_local.base.load import load_base
    from adapterhub_local.cli.merge import opening, reporter
    from adapterhub_local.evaluate.tune import Trial, lineage, tune
    from adapterhub_local.merge.merge import merge_to_path, merge_to_registry
    from adapterhub_local.registry import Registry

    registry, show = Registry(), reporter()
    trials: list[Trial] = []
    with opening(written, registry) as opened:
        base = opened(written.weights).base
        bench = open_bench(load_base(base_for(base, registry.home)), tuning.scored)
        gate = judge(base, scored, requirements, registry.home, show, loaded=bench.base) if scored else None
        try:
            with show.counting("tuning") as progress:

                def told(trial: Trial, best: Trial) -> None:
                    trials.append(trial)
                    mark = ", the best so far" if trial is best else ""
                    show.note(f"{_weights(trial)}: {_scores(trial)}{mark}")
                    progress(len(trials), tuning.evaluations)

                every, best = tune(opened, written.weights, tuning, bench, registry.home, told)
        except KeyboardInterrupt:
            raise Stopped(
                f"stopped after {len(trials)} of {tuning.evaluations} trials, which are kept: the same command goes on"
            ) from None
        merged = opened(best.weights)
        note: dict[str, Any] = {"tuning": lineage(tuning, bench, every, best)}
        if requirements:
            note["required"] = [str(requirement) for requirement in requirements]
        made: dict[str, Any]
        if output is not None:
            report, made = merge_to_path(merged, output, judge=gate), {"output": str(output)}
        else:
            assert name is not None, "there is a name or an output"
            version, report = merge_to_registry(merged, registry, name, alias=alias, judge=gate, note=note)
            made = {"reference": str(version), "content_digest": version.content_digest}
    if as_json:
        print_json({**made, "weights": list(best.weights), **note, **report.to_json()})
        return
    rows = [(_weights(trial), *_cells(trial)) for trial in every]
    tasks = [f"{task} {metric}" for task in best.scores for metric in ("loss", "exact match")]
    print_table(("weights", *tasks), rows)
    click.echo(f"the plan's weights {_weights(every[0])}: {_scores(every[0])}")
    click.echo(f"the best of {len(every)}, {_weights(best)}: {_scores(best)}")
    tell(next(iter(made.values())), len(best.weights), report.to_json())
    warn(report.to_json(), list(best.weights))


def _weights(trial: Any) -> str:
    return ", ".join(f"{weight:g}" for weight in trial.weights)


def _scores(trial: Any) -> str:
    return "; ".join(
        f"{task} loss {score.loss:.4f}, exact match {score.exact_match:.1%}" for task, score in trial.scores.items()
    )


def _cells(trial: Any) -> list[str]:
    return [cell for score in trial.scores.values() for cell in (f"{score.loss:.4f}", f"{score.exact_match:.1%}")]
