"""`qhub train`: a recipe becomes a registered version."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_local import settings
from adapterhub_local.cli.output import echo, print_json, print_table, reporter, score_text
from adapterhub_local.counts import counted
from adapterhub_local.settings import home, process

if TYPE_CHECKING:
    from adapterhub_local.recipe import Recipe
    from adapterhub_local.train.sweep import SweepRun


@click.command(name="train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Change a key of the recipe, such as train.seed=1.",
)
@click.option("--resume", is_flag=True, help="Continue the stopped run of this recipe.")
@click.option("--restart", is_flag=True, help="Discard the stopped run of this recipe and start over.")
@click.option("--nproc", type=click.IntRange(1), default=1, help="Processes to train in, one GPU each.")
@click.option(
    "--shard-base", is_flag=True, help="Hold a part of the base in each process: for bases larger than a GPU."
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Train the runs of [sweep] at once, as tasks of the Ray of `qhub cluster` or RAY_ADDRESS.",
)
@click.option(
    "--remote", metavar="NAME", help="With --ray: the remote by which versions come from the machines' homes."
)
@click.option("--nnodes", type=click.IntRange(1), default=1, help="Machines to train on, --nproc processes on each.")
@click.option("--node-rank", type=int, help="Which of the machines this is, from 0.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where all of them reach machine 0.")
@click.option(
    "--only-run", type=click.IntRange(1), help="Train one run of [sweep], by its number in `qhub recipe show`."
)
@click.option("--allow-code", is_flag=True, help="Run the Python code of reward.python, which is not run otherwise.")
@click.option("--dry-run", is_flag=True, help="Load, tokenise and try one step; nothing is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    restart: bool,
    nproc: int,
    shard_base: bool,
    on_ray: bool,
    remote: str | None,
    nnodes: int,
    node_rank: int | None,
    rendezvous: str | None,
    only_run: int | None,
    allow_code: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the adapter that RECIPE describes, evaluate it beside its base, and register it.

    Ctrl-C stops after the current step and keeps the state; --resume continues from there. A recipe with [sweep] is
    trained once for each of its runs; those that are registered already are not trained again (but with --restart).
    """
    from adapterhub_local.errors import InputError
    from adapterhub_local.recipe import load_recipe, load_runs
    from adapterhub_local.train.check import check_code, check_processes, check_runs
    from adapterhub_local.train.launch import launch, read_nodes

    if resume and restart:
        raise InputError("--resume and --restart exclude each other: give one")
    if allow_code:
        settings.allow_code()
    nodes = read_nodes(nnodes, node_rank, rendezvous)
    loaded = load_recipe(recipe, overrides)
    runs = load_runs(loaded)
    check_code(loaded)
    check_runs(runs, home())  # before anything heavy is loaded
    if only_run is not None:
        if loaded.sweep is None or only_run > len(runs):
            there = f"has {len(runs)} runs" if loaded.sweep else "has no [sweep]"
            raise InputError(f"--only-run {only_run}: {recipe} {there}")
        loaded = runs[only_run - 1][1]
    if remote is not None and not on_ray:
        raise InputError("--remote is for --ray: `qhub sync push` sends what is trained here")
    if on_ray:
        if loaded.sweep is None:
            raise InputError(f"--ray trains the runs of a sweep, and {recipe} is one run: leave it out")
        given = {"--nproc": nproc > 1, "--nnodes": nnodes > 1, "--shard-base": shard_base, "--dry-run": dry_run}
        if others := [name for name, is_given in given.items() if is_given]:
            raise InputError(f"--ray trains each run in one process: leave out {', '.join(others)}")
    if loaded.sweep and (dry_run or nnodes > 1 or process().world_size > 1):
        option = "--dry-run" if dry_run else "--nnodes" if nnodes > 1 else "torchrun"
        raise InputError(f"{option} is for one run, and {recipe} has [sweep]: choose one with --only-run 1")
    if nproc * nnodes > 1 or shard_base:
        check_processes(loaded, nproc * nnodes * process().world_size, shard_base=shard_base)
    if nproc * nnodes > 1 and not (dry_run or loaded.sweep):
        given = {"--resume": resume, "--restart": restart, "--json": as_json, "--shard-base": shard_base}
        flags = [name for name, is_given in given.items() if is_given]
        changes = [part for override in overrides for part in ("--set", override)]
        chosen = ["--only-run", str(only_run)] if only_run else []
        sys.exit(launch(["train", str(recipe), *changes, *chosen, *flags], nproc, nodes))
    from adapterhub_local.train.train import follow, train, try_out

    show = reporter()
    if dry_run:
        tried = try_out(loaded, home(), show, shard_base=shard_base).to_json()
        if as_json:
            print_json(tried)
        else:
            for key, value in tried.items():
                echo(f"{key:16} {value}")
        return
    if loaded.sweep:
        from adapterhub_local.train.sweep import sweep

        with _on_ray(remote, allow_code) if on_ray else nullcontext() as begin:
            done, best = sweep(
                loaded,
                home(),
                resume=resume,
                restart=restart,
                reporter=show,
                num_processes=nproc,
                shard_base=shard_base,
                begin=begin,
            )
        _print_sweep(loaded, done, best, as_json)
        return
    if not process().is_leader:
        follow(loaded, home(), resume=resume, restart=restart, shard_base=shard_base)
        return
    version = train(loaded, home(), resume=resume, restart=restart, reporter=show, shard_base=shard_base)
    if as_json:
        from adapterhub_local.registry.as_json import whole

        print_json(whole(version))
        return
    from adapterhub_local.registry.catalog import SHARES

    training = version.lineage["training"]
    echo(
        f"{version}: {counted(training['steps'], 'step')} in {training['seconds']:.0f} s, "
        f"{training['tokens_per_second']:.0f} tokens/s, loss {training['loss']:.4f}"
    )
    if changed := training.get("examples_cut", 0) + training.get("examples_left_out", 0):
        echo(
            f"longer than data.max_length: {counted(changed, 'example')}, of which {training['examples_cut']:,} cut "
            f"and {training['examples_left_out']:,} left out"
        )
    for task, scores in version.lineage.get("metrics", {}).items():
        base, adapter = scores["base"], scores["adapter"]
        changes = [
            f"{name.replace('_', ' ')} {score_text(name, base[name])} -> {score_text(name, adapter[name])}"
            for name in ("reward", *SHARES, "margin", "loss")
            if name in base and name in adapter
        ]
        echo(f"{task} on {adapter['rows']} held-out examples: {', '.join(changes)}")


@contextmanager
def _on_ray(remote: str | None, allow_code: bool) -> Iterator[Callable[..., Any]]:
    """What begins the runs of a sweep on Ray. Raises InputError where there is no Ray."""
    from adapterhub_local.errors import InputError
    from adapterhub_local.registry.remotes import find_remote
    from serve.cluster.head import check_ray, connect

    found = find_remote(home(), remote) if remote is not None else None
    check_ray()
    if not connect(home()):
        raise InputError("there is no Ray to train on: start one with `qhub cluster up`, or set RAY_ADDRESS")
    from adapterhub_local.train.sweep_tasks import tasks

    with tasks(found, allow_code or settings.allows_code()) as begin:
        yield begin


def _print_sweep(recipe: Recipe, runs: list[SweepRun], best: SweepRun, as_json: bool) -> None:
    assert recipe.sweep is not None, "the recipe has a sweep"
    task = recipe.task
    if as_json:
        print_json(
            {
                "task": task,
                "metric": recipe.sweep.metric,
                "best": str(best.version),
                "alias": recipe.sweep.alias,
                "runs": [
                    {
                        "version": str(run.version) if run.version else None,
                        "changes": list(run.overrides),
                        "scores": run.scores(task),
                        "error": run.error or None,
                        "was_there": run.was_there,
                    }
                    for run in runs
                ],
            }
        )
        return
    keys = [change.partition("=")[0] for change in runs[0].overrides]
    rows, share = [], None
    for run in runs:
        scores = run.scores(task)
        values = [change.partition("=")[2].strip('"') for change in run.overrides]
        share = next((name for name in ("exact_match", "accuracy") if name in scores), share)
        right = score_text(share, scores[share]) if share in scores else ""
        outcome = (f"{scores['loss']:.4f}", right) if scores else ("", "failed")
        how = "best" if run is best else "was there" if run.was_there else ""
        rows.append((run.version or run.error.partition(":")[0], *values, *outcome, how))
    print_table((task, *keys, "loss", (share or "exact_match").replace("_", " "), ""), rows)
    assert best.version is not None, "the best has finished"
    echo(f"{best.version} is the best by {recipe.sweep.metric}: {best.version.name}@{recipe.sweep.alias}")
