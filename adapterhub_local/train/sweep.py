"""Run every recipe of a sweep, each a version, and point an alias to the best.

What is registered already is not trained again, so a sweep that was stopped continues when it is started again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapterhub_local.base.bases import find_base
from adapterhub_local.data.dataset import Dataset
from adapterhub_local.errors import InputError, NotFound, QhubError, Stopped
from adapterhub_local.plan.auto import settle
from adapterhub_local.progress import Reporter
from adapterhub_local.recipe import Recipe, load_runs
from adapterhub_local.recipe.recipe import as_called_now
from adapterhub_local.recipe.sweep import METRICS
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home
from adapterhub_local.train.check import check_code, check_comparable, check_run, check_runs, data_of, read_all
from adapterhub_local.train.launch import launch
from adapterhub_local.train.past_runs import read_record
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.train import train


@dataclass(frozen=True)
class SweepRun:
    """One run: what it changes, and its version, or why it failed. `was_there`: it was trained before."""

    overrides: tuple[str, ...]
    version: Version | None
    error: str = ""
    was_there: bool = False

    def scores(self, task: str) -> dict[str, Any]:
        """The metrics of its adapter on held-out examples; {} for a failed run."""
        return dict(self.version.lineage["metrics"][task]["adapter"]) if self.version else {}


def sweep(
    recipe: Recipe,
    home: Home,
    *,
    resume: bool,
    restart: bool,
    reporter: Reporter,
    num_processes: int = 1,
    shard_base: bool = False,
    begin: Callable[..., Mapping[int, Callable[..., Version]]] | None = None,
) -> tuple[list[SweepRun], SweepRun]:
    """Train all runs of a recipe's sweep in turn; returns them, and the best, to which the aliases point now.

    Each run is `num_processes` processes, which divide the base between them if `shard_base`. With `begin`
    (`train/sweep_tasks.py`) all runs begin at once, elsewhere. One that fails (its loss diverges, say) is reported and
    the others continue.
    Raises InputError before the first if there is nothing held out to choose by, or not the same for all; QhubError
    if every run failed.
    """
    assert recipe.sweep is not None, "only a recipe with a sweep has runs"
    runs = load_runs(recipe)
    check_code(recipe)
    check_runs(runs, home)
    datasets = read_all(runs)
    check_comparable(recipe, datasets.values())
    registry = Registry(home)
    begun: Mapping[int, Callable[..., Version]] = {}
    shards = num_processes if shard_base else 1

    def look(number: int) -> tuple[Recipe, Dataset, Version | None]:
        settled, dataset = settle(runs[number - 1][1], home, shards)[0], datasets[data_of(runs[number - 1][1])]
        return settled, dataset, None if restart else find_trained(settled, dataset, registry)

    if begin is not None:
        looked = {number: look(number) for number in range(1, len(runs) + 1)}
        waiting = {number: (one, dataset) for number, (one, dataset, known) in looked.items() if known is None}
        begun = begin(recipe, waiting, home, resume=resume, restart=restart)
    done = []
    for number, (changes, run) in enumerate(runs, 1):
        reporter.note(f"run {number} of {len(runs)}: {' '.join(changes)}")
        one = begun.get(number)
        if one is None:
            _, dataset, known = look(number)
            if known is not None:
                done.append(SweepRun(changes, known, was_there=True))
                continue
            one = partial(train, shard_base=shard_base)
            if num_processes > 1:
                one = partial(_launch, number, num_processes, shard_base, dataset)
        done.append(_train(changes, run, home, resume, restart, reporter, one))
    metric = recipe.sweep.metric
    better = METRICS[metric]
    finished = [run for run in done if run.version is not None]
    if not finished:
        raise QhubError(f"every run of the sweep failed; the first: {done[0].error}")
    best = better(finished, key=lambda run: run.scores(recipe.task)[metric])
    assert best.version is not None, "only finished runs were compared"
    for alias in dict.fromkeys(alias for alias in (recipe.sweep.alias, recipe.output.alias) if alias):
        registry.set_alias(best.version.name, alias, best.version.number)
    return done, best


def find_trained(recipe: Recipe, dataset: Dataset, registry: Registry) -> Version | None:
    """A version that this very recipe, data and base have given before, the newest."""
    fingerprint = find_base(recipe.base.name, registry.home).fingerprint
    wanted = recipe.to_json()
    for version in reversed(registry.versions(recipe.output.name)):
        lineage = version.lineage
        resolved = (lineage.get("recipe") or {}).get("resolved")
        same_recipe = resolved is not None and as_called_now(resolved) == wanted
        if same_recipe and lineage.get("data") == dataset.records and version.base_fingerprint == fingerprint:
            return version
    return None


def _launch(
    number: int,
    num_processes: int,
    shard_base: bool,
    dataset: Dataset,
    recipe: Recipe,
    home: Home,
    *,
    resume: bool = False,
    restart: bool = False,
    reporter: Reporter,
) -> Version:
    """Run `number` of a sweep in several processes. Raises what `train` does."""
    recipe, _ = settle(recipe, home, num_processes if shard_base else 1)
    info, start = check_run(recipe, home)
    run = Run(recipe, info, home, dataset, start)
    run.find_checkpoint(resume=resume, restart=restart)  # raised here, where it can be acted on
    given = {"--resume": resume, "--restart": restart, "--shard-base": shard_base}
    flags = [name for name, is_given in given.items() if is_given]
    changes = [part for override in recipe.overrides for part in ("--set", override)]
    command = ["train", str(recipe.path), *changes, "--only-run", str(number), *flags]
    code = launch(command, num_processes, is_quiet=True)
    if code == Stopped.exit_code:
        raise Stopped(f"stopped in run {number} of the sweep. To continue, run the same command with --resume")
    version = find_trained(recipe, dataset, Registry(home)) if code == 0 else None
    if version is None:
        reason = read_record(run.folder).get("reason") or f"exit code {code}"
        raise InputError(reason) if code == InputError.exit_code else QhubError(reason)
    return version


def _train(
    changes: tuple[str, ...],
    recipe: Recipe,
    home: Home,
    resume: bool,
    restart: bool,
    reporter: Reporter,
    train_one: Callable[..., Version],
) -> SweepRun:
    try:
        try:
            version = train_one(recipe, home, resume=resume, restart=restart, reporter=reporter)
        except NotFound:
            if not resume:
                raise
            version = train_one(recipe, home, reporter=reporter)  # this run of the sweep had not begun
    except (InputError, Stopped):
        raise
    except QhubError as error:
        reporter.note(f"failed: {error}")
        return SweepRun(changes, None, str(error))
    return SweepRun(changes, version)
