"""How a merge is searched, as [tune] of a plan and the options of `qhub tune-merge` say it. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.errors import QhubError
from adapterhub_local.merge.layers import Weight, flat, num_groups, weight_text
from adapterhub_local.merge.methods import find_method

SAMPLERS = ("gp", "tpe", "cmaes")  # of optuna
SEARCHES = ("pattern", *SAMPLERS, "gradient")
METRICS = ("loss", "exact_match")
MANY_LAYERS = 1000


@dataclass(frozen=True)
class Scored:
    """Held-out chats by task, JSONL files, and how many are scored, at a time, of how many tokens at most."""

    data: Mapping[str, Path]
    limit: int | None = None
    batch_size: int = 16
    max_length: int = 1024
    require: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """What is made best on which data, between which weights, by which search, in how much scoring.

    `evaluations` are whole candidates; one that is given up early counts with the share of it that was scored.
    """

    scored: Scored
    metric: str = "loss"
    low: float = 0.0
    high: float = 1.5
    evaluations: int = 24
    search: str = "pattern"
    groups: int = 1
    methods: tuple[str, ...] = ()
    pareto: bool = False
    early_stop: bool = True
    seed: int = 0
    minutes: float | None = None

    def problems(self, weights: Sequence[Weight], method: str = "weighted_sum") -> Iterator[tuple[str, str, int]]:
        """(key, what is wrong, number of the adapter) of everything that does not fit together; a weight's key is
        `weight`."""
        if self.metric not in METRICS:
            yield "metric", f"tune.metric is {self.metric!r}: use {' or '.join(METRICS)}", 0
        if self.search not in SEARCHES:
            yield "search", f"tune.search is {self.search!r}: use one of {', '.join(SEARCHES)}", 0
        if self.low >= self.high:
            yield "low", f"tune.low {self.low:g} is not below high {self.high:g}", 0
        for index, weight in enumerate(weights):
            if not all(self.low <= one <= self.high for one in flat([weight])):
                start = f"the search starts at weight {weight_text(weight)}, outside of tune.low {self.low:g} to high"
                yield "weight", f"{start} {self.high:g}", index
        if self.minutes is not None and not 0 < self.minutes < math.inf:  # NaN too
            yield "minutes", f"tune.minutes is {self.minutes:g}: give a number above 0", 0
        if self.groups > MANY_LAYERS:
            yield "groups", f"tune.groups is {self.groups}: no base has more than {MANY_LAYERS} layers", 0
        if (count := num_groups(weights)) not in (1, self.groups) and self.groups > 1:
            yield "groups", f"tune.groups is {self.groups}, but the adapters have {count} weights each", 0
        if self.pareto and len(self.scored.data) < 2:
            yield "pareto", "a Pareto front is of several tasks: [tune.data] has one", 0
        yield from self._unsupported()
        if self.search == "gradient" and (method, *self.methods) != ("weighted_sum",):
            yield "search", "search 'gradient' learns the weights of a sum: method weighted_sum, and no other", 0
        for name in self.methods:
            try:
                find_method(name)
            except QhubError as error:
                yield "methods", str(error), 0
            if name == "slerp" and (len(weights) != 2 or self.low < 0):
                yield "methods", "slerp is between two adapters, with weights from 0", 0
        if len(set(self.methods)) < len(self.methods):
            yield "methods", f"tune.methods names one twice: {', '.join(self.methods)}", 0

    def _unsupported(self) -> Iterator[tuple[str, str, int]]:
        others = 'search = "gp" or "tpe" does'
        if self.pareto and self.search not in ("gp", "tpe"):
            yield "pareto", f"search '{self.search}' makes one number small, not a Pareto front: {others}", 0
        if len(self.methods) > 1 and self.search in ("pattern", "cmaes"):
            yield "methods", f"search '{self.search}' changes weights, it does not choose among methods: {others}", 0
