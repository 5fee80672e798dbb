"""What a search may change of a merge: weights, all or by groups of layers, the method, its density. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight, mean, num_groups, weight_text
from adapterhub_local.merge.methods import METHODS
from adapterhub_local.merge.plan_file import WrittenPlan

DENSITIES = (0.15, 0.9)  # della's and breadcrumbs' own defaults of epsilon and gamma fit between these
DIGITS = 4  # of a number that is searched
TIED = 0.4  # of the budget is for one weight in all layers, before each group has its own


@dataclass(frozen=True)
class Candidate:
    """One merge of those that are searched; adapters and the rest of the formula are the plan's."""

    weights: tuple[Weight, ...]
    method: str
    given: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Identifies it in the log of scores."""
        return json.dumps(self.to_json(), sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        weights = [list(weight) if isinstance(weight, tuple) else weight for weight in self.weights]
        return {"weights": weights, "method": self.method, "parameters": dict(self.given)}

    def formula(self, written: Formula) -> Formula:
        """The written formula with this method and its parameters; its space where the method has that."""
        space = written.space if written.space in METHODS[self.method].spaces else None
        return replace(written, method=self.method, given=dict(self.given), space=space)

    def __str__(self) -> str:
        weights = ", ".join(weight_text(weight) for weight in self.weights)
        if self.method == "weighted_sum":
            return weights
        return (
            f"{weights} {self.method}{''.join(f' {name} {value:g}' for name, value in self.given if name == 'density')}"
        )


@dataclass(frozen=True)
class Space:
    """All candidates: a weight from `low` to `high` for each adapter and group of layers, and one of the methods."""

    start: tuple[Weight, ...]
    formula: Formula
    low: float
    high: float
    groups: int = 1
    methods: tuple[str, ...] = ()

    @classmethod
    def of(cls, written: WrittenPlan) -> "Space":
        """What [tune] of a plan asks for."""
        tuning = written.tune
        assert tuning is not None, "the plan says how it is tuned"
        methods = tuning.methods or (written.formula.method,)
        groups = max(tuning.groups, num_groups(written.weights))
        return cls(written.weights, written.formula, tuning.low, tuning.high, groups, methods)

    def tied(self) -> "Space":
        """The same with one weight for all layers."""
        return replace(self, start=tuple(mean(weight) for weight in self.start), groups=1)

    @property
    def is_split(self) -> bool:
        """Whether groups have weights of their own, and start with equal ones."""
        return self.groups > 1 and not any(isinstance(weight, tuple) for weight in self.start)

    @property
    def has_density(self) -> bool:
        """Whether a density is searched too: where methods are chosen among, and one of them has one."""
        return len(self.methods) > 1 and any("density" in METHODS[method].parameters for method in self.methods)

    @property
    def num_weights(self) -> int:
        return len(self.start) * self.groups

    def first(self, method: str | None = None) -> Candidate:
        """The merge as it is written, where the search begins; or its weights by another method."""
        method = method or self.methods[0]
        return self.candidate(self.flat(self.start), method, self._density(method))

    def flat(self, weights: Sequence[Weight]) -> list[float]:
        """The numbers of an adapter beside each other, as many as there are groups."""
        rows = [weight if isinstance(weight, tuple) else (weight,) * self.groups for weight in weights]
        return [one for row in rows for one in row]

    def candidate(self, numbers: Sequence[float], method: str | None = None, density: float | None = None) -> Candidate:
        """The merge of weights as `flat` has them, in the bounds; `density` counts where the method has one."""
        bounded = [round(min(self.high, max(self.low, number)), DIGITS) for number in numbers]
        rows = [tuple(bounded[at : at + self.groups]) for at in range(0, len(bounded), self.groups)]
        weights: tuple[Weight, ...] = tuple(row if self.groups > 1 else row[0] for row in rows)
        method = method or self.methods[0]
        takes = METHODS[method].parameters
        given: Mapping[str, Any] = {name: value for name, value in self.formula.given.items() if name in takes}
        if self.has_density and density is not None and "density" in takes:
            given = {**given, "density": round(density, DIGITS)}
        return Candidate(weights, method, tuple(sorted(given.items())))

    def _density(self, method: str) -> float:
        """What is written, or the method's own, in the bounds of the search."""
        row = METHODS[method].parameters.get("density")
        written = self.formula.given.get("density", row.default if row is not None else 0.5)
        return min(DENSITIES[1], max(DENSITIES[0], float(written)))
