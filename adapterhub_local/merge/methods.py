"""The merge methods: a table of pure functions on deltas, each with its parameters, limits and paper.

A `linear` method turns weights into coefficients c_i, so that the merge is `sum_i c_i D_i` and stays exact.
An `elementwise` one names a function of `entries`, which works on stacked deltas (n, rows, columns), see `space`.
The table loads no torch: the command line, plan files and the documentation are built from it.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterhub_local.errors import InputError

if TYPE_CHECKING:
    import torch

    from adapterhub_local.merge.entries import Elementwise


@dataclass(frozen=True)
class Parameter:
    """A number in (low, high] - or [low, high] where `low_included` - or one of `choices`.

    `help` is a sentence with its full stop, `letter` stands for the value in `qhub merge --help`.
    """

    default: Any
    help: str
    low: float = 0.0
    high: float = math.inf
    low_included: bool = False
    choices: tuple[str, ...] = ()
    whole: bool = False
    letter: str | None = None

    @property
    def kind(self) -> type:
        """str, int or float: what a value is read as."""
        return str if self.choices else int if self.whole else float

    def check(self, name: str, value: Any) -> None:
        """Raises InputError if the parameter `name` cannot be `value`."""
        if self.choices:
            if value not in self.choices:
                raise InputError(f"{name} is {value!r}: use {' or '.join(self.choices)}")
            return
        kind = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise InputError(f"{name} is {value!r}: give a finite {'whole ' if self.whole else ''}number")
        if not (self.low < value <= self.high or (self.low_included and value == self.low)):
            raise InputError(
                f"{name} is {value:g}: give a number {'from' if self.low_included else 'above'} {self.low:g}"
                + (f" up to {self.high:g}" if self.high < math.inf else "")
            )


@dataclass(frozen=True)
class Method:
    """One row: either `linear(weights, gram, parameters)` -> coefficients, or the name of a function of `entries`."""

    paper: str
    linear: Callable[[Sequence[float], "torch.Tensor", Mapping[str, Any]], list[float]] | None = None
    elementwise: str | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    spaces: tuple[str, ...] = ()
    check: Callable[[Sequence[float], Mapping[str, Any]], None] | None = None

    def on_entries(self) -> "Elementwise":
        """The function of `entries` that an elementwise method is."""
        from adapterhub_local.merge import entries

        assert self.elementwise is not None, "a method is linear or elementwise"
        function: Elementwise = getattr(entries, self.elementwise)
        return function


def weighted_sum(weights: Sequence[float], gram: "torch.Tensor", parameters: Mapping[str, Any]) -> list[float]:
    """`sum_i w_i D_i`."""
    return list(weights)


def weighted_average(weights: Sequence[float], gram: "torch.Tensor", parameters: Mapping[str, Any]) -> list[float]:
    """`sum_i w_i D_i / sum_i w_i`."""
    return [weight / sum(weights) for weight in weights]


def task_arithmetic(weights: Sequence[float], gram: "torch.Tensor", parameters: Mapping[str, Any]) -> list[float]:
    """`lambda sum_i w_i D_i`; a negative weight takes a task away."""
    return [parameters["scale"] * weight for weight in weights]


def slerp(weights: Sequence[float], gram: "torch.Tensor", parameters: Mapping[str, Any]) -> list[float]:
    """`sin((1-t) theta)/sin(theta) D_1 + sin(t theta)/sin(theta) D_2` with t = w_2 / (w_1 + w_2).

    theta is the angle between D_1 and D_2. Where they are nearly parallel (|cos| > 0.9995) or one is zero, the
    interpolation is straight.
    """
    t = weights[1] / sum(weights)
    size = math.sqrt(max(0.0, float(gram[0, 0] * gram[1, 1])))
    cosine = float(gram[0, 1]) / size if size else 1.0
    if abs(cosine) > 0.9995:
        return [1 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]


def _sum_is_not_zero(weights: Sequence[float], parameters: Mapping[str, Any]) -> None:
    if abs(sum(weights)) < 1e-9 * sum(abs(weight) for weight in weights):
        raise InputError(
            f"weights {', '.join(f'{weight:g}' for weight in weights)} sum to 0: there is no average of them"
        )


def _two_shares(weights: Sequence[float], parameters: Mapping[str, Any]) -> None:
    if len(weights) != 2:
        raise InputError(f"slerp is between two adapters, not {len(weights)}")
    if min(weights) < 0:
        raise InputError("slerp needs weights that are not negative: the second's share is how far to go")


def _della_fits(weights: Sequence[float], parameters: Mapping[str, Any]) -> None:
    density, epsilon = parameters["density"], parameters["epsilon"]
    if not (density - epsilon / 2 > 0 and density + epsilon / 2 <= 1):
        raise InputError(
            f"density {density:g} with epsilon {epsilon:g} keeps entries with probability {density - epsilon / 2:g} to "
            f"{density + epsilon / 2:g}: choose them so that it stays above 0 and up to 1"
        )


def _breadcrumbs_fit(weights: Sequence[float], parameters: Mapping[str, Any]) -> None:
    if parameters["density"] + parameters["gamma"] > 1:
        raise InputError(
            f"density {parameters['density']:g} and gamma {parameters['gamma']:g} are more than all entries together"
        )


_SCALE = {"scale": Parameter(1.0, "Factor of the merged delta (lambda in the papers).", letter="L")}
_SEED = {
    "seed": Parameter(0, "Seed of what is dropped at random.", low=0, high=2**63 - 1, low_included=True, whole=True)
}
_ELECT = {
    **_SCALE,
    "variant": Parameter("mergekit", "Whose order of election and weighting.", choices=("mergekit", "peft")),
}


_EPSILON = {"epsilon": Parameter(0.2, "Width of the range of probabilities.", high=1.0, letter="E")}
_GAMMA = {
    "gamma": Parameter(0.01, "Share of largest entries that is left out.", high=1.0, low_included=True, letter="G")
}


def _density(default: float) -> dict[str, Parameter]:
    return {"density": Parameter(default, "Share of entries that is kept.", high=1.0, letter="D")}


_BOTH = ("core", "full")
METHODS: dict[str, Method] = {
    "weighted_sum": Method("https://arxiv.org/abs/2410.13025", linear=weighted_sum),
    "weighted_average": Method(
        "https://arxiv.org/abs/2203.05482",
        linear=weighted_average,
        check=_sum_is_not_zero,
    ),
    "task_arithmetic": Method("https://arxiv.org/abs/2212.04089", linear=task_arithmetic, parameters=_SCALE),
    "slerp": Method("https://doi.org/10.1145/325334.325242", linear=slerp, check=_two_shares),
    "ties": Method(
        "https://arxiv.org/abs/2306.01708",
        elementwise="ties",
        parameters={**_density(0.2), **_ELECT},
        spaces=_BOTH,
    ),
    "dare_linear": Method(
        "https://arxiv.org/abs/2311.03099",
        elementwise="dare_linear",
        parameters={**_density(0.5), **_SCALE, **_SEED},
        spaces=_BOTH,
    ),
    "dare_ties": Method(
        "https://arxiv.org/abs/2311.03099",
        elementwise="dare_ties",
        parameters={**_density(0.5), **_ELECT, **_SEED},
        spaces=_BOTH,
    ),
    "della": Method(
        "https://arxiv.org/abs/2406.11617",
        elementwise="della",
        parameters={
            **_density(0.5),
            "epsilon": Parameter(0.2, "Width of the range of probabilities.", high=1.0, letter="E"),
            **_ELECT,
            **_SEED,
        },
        spaces=_BOTH,
        check=_della_fits,
    ),
    "magnitude_prune": Method(
        "https://arxiv.org/abs/1506.02626",
        elementwise="magnitude_prune",
        parameters={**_density(0.5), **_SCALE},
        spaces=_BOTH,
    ),
    "breadcrumbs": Method(
        "https://arxiv.org/abs/2312.06795",
        elementwise="breadcrumbs",
        parameters={**_density(0.9), **_GAMMA, **_SCALE},
        spaces=_BOTH,
        check=_breadcrumbs_fit,
    ),
    "knots": Method(
        "https://arxiv.org/abs/2410.19735",
        elementwise="ties",
        parameters={**_density(0.2), **_ELECT},
        spaces=("aligned",),
    ),
}


def find_method(name: str) -> Method:
    """The row `name`. Raises InputError with the nearest name, or all of them."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, list(METHODS), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise InputError(f"there is no merge method '{name[:60]}': {hint}")
    return METHODS[name]


def parameters() -> dict[str, dict[str, Parameter]]:
    """Every parameter by name, and under it the methods that take it, each with its own default and limits."""
    found: dict[str, dict[str, Parameter]] = {}
    for method, row in METHODS.items():
        for name, parameter in row.parameters.items():
            found.setdefault(name, {})[method] = parameter
    return found
