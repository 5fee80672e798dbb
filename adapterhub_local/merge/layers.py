"""Weights that differ by layer: an adapter's weight is one number, or one for each group of consecutive layers."""

import math
import re
from collections.abc import Iterable, Sequence

from adapterhub_local.errors import BadReference, InputError

Weight = float | tuple[float, ...]
MANY = 6  # weights of an adapter that are shown one by one
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,6})(?:\.|$)")


def layer(module: str) -> int | None:
    """The number of the layer that a module is in: 7 of `model.layers.7.mlp.up_proj`; None outside of the layers."""
    found = _LAYER.search(module)
    return int(found[1]) if found else None


def groups(modules: Iterable[str], count: int) -> dict[str, int]:
    """The group, from 0 to `count` - 1, of each module: layer l of L is in group floor(l count / L).

    L is the largest number of a layer + 1. What is in no layer, such as `lm_head`, comes last. Raises InputError if
    there are fewer layers than groups.
    """
    numbers = {module: layer(module) for module in modules}
    num_layers = max((number + 1 for number in numbers.values() if number is not None), default=0)
    if count > max(num_layers, 1):
        raise InputError(f"weights for {count} groups of layers, but the adapters have {num_layers} layers")
    return {module: count - 1 if number is None else number * count // num_layers for module, number in numbers.items()}


def num_groups(weights: Sequence[Weight]) -> int:
    """How many groups of layers the weights are for: 1 if each is one number. Raises InputError if lists differ."""
    lengths = {len(weight) for weight in weights if isinstance(weight, tuple)}
    if not lengths:
        return 1
    if len(lengths) > 1 or 0 in lengths:
        counts = " and ".join(str(length) for length in sorted(lengths))
        raise InputError(f"lists of {counts} weights: give every adapter as many, one for each group of layers")
    return lengths.pop()


def in_group(weights: Sequence[Weight], group: int) -> list[float]:
    """Every adapter's weight in a group."""
    return [weight[group] if isinstance(weight, tuple) else weight for weight in weights]


def flat(weights: Sequence[Weight]) -> list[float]:
    """All numbers that there are."""
    return [one for weight in weights for one in (weight if isinstance(weight, tuple) else (weight,))]


def mean(weight: Weight) -> float:
    """The number that stands for a weight where there is room for one only."""
    return math.fsum(weight) / len(weight) if isinstance(weight, tuple) else weight


def weight_text(weight: Weight) -> str:
    """As people read it: `0.7`, or `0.7/0.5/0.3` from the first layers to the last."""
    if not isinstance(weight, tuple):
        return f"{weight:g}"
    if len(weight) > MANY:
        return f"{min(weight):g} to {max(weight):g} in {len(weight)} groups"
    return "/".join(f"{one:g}" for one in weight)


def check_weights(weights: Sequence[Weight]) -> None:
    """Raises BadReference if one is not finite, InputError if all are zero or lists differ in length."""
    if not all(math.isfinite(one) for one in flat(weights)):
        raise BadReference(
            f"weights must be finite numbers, not {', '.join(weight_text(weight) for weight in weights)}"
        )
    if all(one == 0 for one in flat(weights)):
        raise InputError("all weights are zero: the merge would be the base itself")
    num_groups(weights)
