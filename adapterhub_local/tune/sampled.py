"""Candidates proposed by a sampler of optuna (https://arxiv.org/abs/1907.10902), which is loaded when it is used.

Nothing of optuna's is stored: its study is made anew from the scores in the log, by asking the same sampler with the
same seed the same questions. So no pickle is read, and a search that was stopped continues as if it had never stopped.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.merge.tuning import Tuning
from adapterhub_local.tune.candidate import DENSITIES, TIED, Candidate, Space
from adapterhub_local.tune.scorer import Score

NEAR = 0.4  # of the range of weights: how far a group's may be searched around the best that all layers had


def by_sampler(space: Space, score: Score, tuning: Tuning) -> None:
    """Score candidates until `score` raises Spent.

    Where groups of layers have weights of their own, equal ones are searched first: few numbers, of which the samplers
    learn much from few scores. What was learnt is where the search of all numbers begins.
    """
    optuna = package(tuning.search)
    with _quiet(optuna):
        study = None
        if space.is_split:
            study = _searched(optuna, space.tied(), space, score, tuning, None, TIED)
        _searched(optuna, space, space, score, tuning, study, None)


def package(search: str) -> Any:
    """optuna, with what the sampler `search` needs. Raises InputError naming what to install."""
    try:
        import optuna

        if search == "cmaes":
            import cmaes  # noqa: F401
        if search == "gp":
            import scipy  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"search '{search}' needs a package that is not installed ({error.name}): pip install "
            "'adapterhub-local[tune]', or search = \"pattern\" for weights"
        ) from None
    return optuna


def _searched(
    optuna: Any, space: Space, whole: Space, score: Score, tuning: Tuning, before: Any, until: float | None
) -> Any:
    """The study of one space, that knows what `before` knew; it ends at a share of the budget, or with Spent."""
    axes = _axes(optuna, space, before)
    directions = ["minimize"] * (len(tuning.scored.data) if tuning.pareto else 1)
    study = optuna.create_study(directions=directions, sampler=_sampler(optuna, space, tuning, before))
    if before is None:
        for method in space.methods:  # the plan's own, and its weights by each other method
            study.enqueue_trial(_named(space, space.first(method)))
    else:
        study.add_trials(_untied(optuna, before, axes))
    while until is None or score.share < until:
        trial = study.ask(axes)
        values = score(_candidate(space, whole, trial.params))
        if values is None:  # reported as the worst so far: of a failure a sampler learns nothing, and proposes it again
            every = [done.values for done in study.get_trials(deepcopy=False) if done.values is not None]
            values = tuple(max(column) for column in zip(*every, strict=True))
        study.tell(trial, list(values))
    return study


def _sampler(optuna: Any, space: Space, tuning: Tuning, before: Any) -> Any:
    """The seed differs between the two parts of a search: they would draw the same numbers."""
    seed = tuning.seed * 2 + (before is not None)
    # trials before there is something to learn from, those of the plan's weights among them
    random = 1 if before is not None else len(space.methods) + min(9, 1 + space.num_weights)
    if tuning.search == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=random, deterministic_objective=True)
    if tuning.search == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=random, multivariate=True)
    sigma = (space.high - space.low) / 6
    if before is None:
        return optuna.samplers.CmaEsSampler(
            seed=seed, x0=dict(zip(_names(space), space.flat(space.start), strict=True)), sigma0=sigma
        )
    best = {name: before.best_trial.params[_adapter(name)] for name in _names(space)}
    return optuna.samplers.CmaEsSampler(seed=seed, x0=best, sigma0=sigma * NEAR)


def _names(space: Space) -> list[str]:
    """Of the weights: adapter, and group where there are several."""
    return [
        f"{adapter}/{group}" if space.groups > 1 else f"{adapter}"
        for adapter in range(len(space.start))
        for group in range(space.groups)
    ]


def _adapter(name: str) -> str:
    """The name of the one weight that an adapter has in all layers; that of another axis is its own."""
    return name.partition("/")[0]


def _axes(optuna: Any, space: Space, before: Any) -> dict[str, Any]:
    """Each number with its bounds: the whole space, or what is near the best that equal weights had."""
    number = optuna.distributions.FloatDistribution
    axes = {name: number(space.low, space.high) for name in _names(space)}
    if before is not None:
        reach = NEAR * (space.high - space.low) / 2
        for name in axes:
            best = [trial.params[_adapter(name)] for trial in before.best_trials]
            axes[name] = number(max(space.low, min(best) - reach), min(space.high, max(best) + reach))
    if len(space.methods) > 1:
        axes["method"] = optuna.distributions.CategoricalDistribution(space.methods)
    if space.has_density:
        axes["density"] = number(*DENSITIES)
    return axes


def _named(space: Space, candidate: Candidate) -> dict[str, Any]:
    named: dict[str, Any] = dict(zip(_names(space), space.flat(candidate.weights), strict=True))
    if len(space.methods) > 1:
        named["method"] = candidate.method
    if space.has_density:
        named["density"] = dict(candidate.given).get("density", 0.5)
    return named


def _candidate(space: Space, whole: Space, named: dict[str, Any]) -> Candidate:
    """With as many groups as the whole search has, so that a merge has one key in both parts of it."""
    numbers = [named[name] for name in _names(space)]
    if space.groups != whole.groups:
        numbers = [number for number in numbers for _ in range(whole.groups)]
    return whole.candidate(numbers, named.get("method"), named.get("density"))


def _untied(optuna: Any, before: Any, axes: dict[str, Any]) -> list[Any]:
    """The trials of one weight for all layers as those of the space where each group has its own, if they are in it."""
    made = []
    for trial in before.trials:
        named = {name: trial.params[_adapter(name)] for name in axes}
        weights = [(axes[name], value) for name, value in named.items() if name not in ("method", "density")]
        if trial.values is not None and all(axis.low <= value <= axis.high for axis, value in weights):
            made.append(optuna.trial.create_trial(params=named, distributions=axes, values=trial.values))
    return made


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without a line for each trial, and without what optuna says of samplers that are new."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)  # x0 and sigma0 of CMA-ES, gone in optuna 6
            yield
    finally:
        optuna.logging.set_verbosity(level)
