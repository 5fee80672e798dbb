"""The runs of a sweep as tasks of Ray, on whichever machine has room; their versions come home by a remote.

A task trains in the home of its machine, and pushes what it made. Machines have the same files and base; a task that
finds others says which, before it trains. Only called with Ray connected (`serve/cluster/head.py`).
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub_local import settings
from adapterhub_local.data.dataset import Dataset
from adapterhub_local.errors import InputError, NotFound, QhubError, Stopped
from adapterhub_local.plan.auto import settle
from adapterhub_local.recipe import Recipe, load_recipe, load_runs
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.registry.store import open_store
from adapterhub_local.settings import Home, home
from adapterhub_local.train.check import check_run
from adapterhub_local.train.run_folder import Run, differences
from adapterhub_local.train.sweep import find_trained
from adapterhub_local.train.train import train


@dataclass(frozen=True)
class Job:
    """A run of a sweep as a task gets it: where its recipe is, which of its runs, and all that decides the result."""

    path: str
    overrides: tuple[str, ...]
    number: int
    decisive: dict[str, Any]
    remote: Remote | None
    resume: bool
    restart: bool
    allow_code: bool


@dataclass(frozen=True)
class Outcome:
    """What a task made, `NAME@N` at the remote (without one, in its home), or why it failed, with its exit code."""

    machine: str
    reference: str = ""
    reason: str = ""
    exit_code: int = 0


def train_one(job: Job) -> Outcome:
    """Train a run of a sweep in the home of this machine, and push its version."""
    machine = socket.gethostname()
    try:
        if job.allow_code:
            settings.allow_code()
        place = home()
        recipe = load_runs(load_recipe(Path(job.path), job.overrides))[job.number - 1][1]
        version = _trained(job, recipe, place)
        if job.remote is None:
            return Outcome(machine, str(version))
        moved = push(Registry(place), open_store(job.remote), [version])
        return Outcome(machine, next(one.target for one in moved if one.source == str(version)))
    except QhubError as error:
        return Outcome(machine, reason=str(error), exit_code=error.exit_code)


def _trained(job: Job, recipe: Recipe, place: Home) -> Version:
    from adapterhub_local.data.dataset import read_data

    settled = settle(recipe, place)[0]
    info, start = check_run(settled, place)
    dataset = read_data(settled)
    if changes := ", ".join(differences(job.decisive, Run(settled, info, place, dataset, start).decisive)):
        raise InputError(f"it does not train the same: {changes}; give every machine the same files")
    if not job.restart and (known := find_trained(settled, dataset, Registry(place))):
        return known  # it was trained here, and what was to follow failed
    try:
        return train(recipe, place, resume=job.resume, restart=job.restart)
    except NotFound:
        if not job.resume:
            raise
        return train(recipe, place)  # this run had not begun here


@contextmanager
def tasks(remote: Remote | None, allow_code: bool) -> Iterator[Callable[..., Mapping[int, Callable[..., Version]]]]:
    """What begins the runs of a sweep, all at once; those that are left are stopped at the end, and keep their state.

    A task takes a GPU where the cluster has any, else a core. Raises NotFound if the remote is not there.
    """
    import ray

    if remote is not None:
        open_store(remote)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    # a process a task: it gives back the GPU's memory, and what it was allowed
    remote_train = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(train_one)
    begun: list[Any] = []

    def begin(
        recipe: Recipe, waiting: Mapping[int, tuple[Recipe, Dataset]], place: Home, *, resume: bool, restart: bool
    ) -> Mapping[int, Callable[..., Version]]:
        found = {}
        for number, (run, dataset) in waiting.items():
            info, start = check_run(run, place)
            decisive = Run(run, info, place, dataset, start).decisive
            job = Job(
                str(recipe.path.absolute()), recipe.overrides, number, decisive, remote, resume, restart, allow_code
            )
            begun.append(remote_train.remote(job))
            found[number] = partial(_fetch, begun[-1], run, dataset, remote)
        return found

    try:
        yield begin
    finally:
        for task in begun:
            ray.cancel(task)


def _fetch(
    task: Any, settled: Recipe, dataset: Dataset, remote: Remote | None, recipe: Recipe, place: Home, **_: Any
) -> Version:
    """Wait for a task, and bring its version into this home. Raises what the task did."""
    import ray

    try:
        outcome: Outcome = ray.get(task)
    except ray.exceptions.RayError as error:  # its machine is gone
        raise QhubError(f"its task was lost: {str(error).strip().splitlines()[0][:200]}") from None
    if outcome.exit_code == Stopped.exit_code:
        raise Stopped(f"stopped on {outcome.machine}: {outcome.reason}")
    if outcome.exit_code:
        kind = InputError if outcome.exit_code == InputError.exit_code else QhubError
        raise kind(f"on {outcome.machine}: {outcome.reason}")
    registry = Registry(place)
    if remote is not None and find_trained(settled, dataset, registry) is None:
        pull(registry, open_store(remote), Reference.parse(outcome.reference))
    version = find_trained(settled, dataset, registry)
    if version is None:
        raise InputError(
            f"{outcome.reference} was trained in the home of {outcome.machine}, which is not this one: name a remote "
            "that both reach, with --remote"
        )
    return version
