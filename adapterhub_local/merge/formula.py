"""Formula: how deltas become one - the method with its parameters, the rank that is kept, how it is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.merge.methods import METHODS, Method, find_method
from adapterhub_local.merge.rank_rule import RankRule

DTYPES = ("auto", "float32", "float16", "bfloat16")
SPACES = ("core", "full")


@dataclass(frozen=True)
class Formula:
    """What a merge does; `given` are the parameters the user set, by name, as `methods.METHODS` describes them."""

    method: str = "weighted_sum"
    given: Mapping[str, Any] = field(default_factory=dict)
    space: str | None = None
    rule: RankRule = RankRule()
    dtype: str = "auto"
    compact: bool = False

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter of the method, the defaults included."""
        return {name: self.given.get(name, parameter.default) for name, parameter in self.row.parameters.items()}

    def check(self, weights: Sequence[float]) -> None:
        """Raises InputError, naming the option, if the formula cannot be applied to adapters of these weights."""
        row = find_method(self.method)
        for name, value in self.given.items():
            if name not in row.parameters:
                takes = f"it takes {', '.join(row.parameters)}" if row.parameters else "it takes no parameters"
                raise InputError(f"{self.method} has no parameter '{name}': {takes}")
            row.parameters[name].check(name, value)
        if self.space is not None and self.space not in row.spaces:
            allowed = f"use {' or '.join(row.spaces)}" if row.spaces else "it works on the factors themselves"
            raise InputError(f"{self.method} cannot be done in space '{self.space}': {allowed}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is '{self.dtype}': use one of {', '.join(DTYPES)}")
        if row.check is not None:
            row.check(weights, self.parameters)

    def normal(self) -> "Formula":
        """The same with its space named where the method needs one."""
        space = self.space or (self.row.spaces[0] if self.row.spaces else None)
        return Formula(self.method, self.given, space, self.rule, self.dtype, self.compact)

    def to_json(self) -> dict[str, Any]:
        """What the report and the lineage record."""
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        return {
            "method": self.method,
            **({"parameters": parameters} if parameters else {}),
            **({"space": self.space} if self.space else {}),
            **({"kept_by": str(self.rule)} if self.rule.kind != "exact" else {}),
            **({"compact": True} if self.compact else {}),
        }
