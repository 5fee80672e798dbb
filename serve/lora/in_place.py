"""Adapters in place: laid out in host memory as a CPU's kernels read them, so that a slot has nothing to copy."""

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch.nn.functional import pad

from serve.kernels.arena import Arena
from serve.kernels.part import Part, Parts
from serve.lora.linear import MultiLoraLinear
from serve.lora.product import Factors
from serve.lora.rows import OwnRows, WithRows, rows_of


class FactorsInPlace(WithRows):
    """Factors that are views of `parts`."""

    def __init__(self, factors: Factors, parts: Parts, rows: OwnRows | None) -> None:
        super().__init__(factors, rows)
        self.parts = parts


def lay_out(
    factors: Iterable[tuple[str, tuple[torch.Tensor, ...]]],
    layers: Mapping[str, MultiLoraLinear],
    num_bytes: int,
    rows: OwnRows | None = None,
) -> FactorsInPlace:
    """A copy of each module's factors, of `num_bytes` or so, group behind group as a step reads them.

    `factors` come in the order of `layers`, all wrapped layers by module name: what shares an input, one after the
    other. Each is let go of once it is copied, so that reading an adapter takes little more than its own memory.
    """
    arena = Arena(num_bytes, is_huge=False)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    parts: dict[object, Part] = {}
    for group, some in groupby(factors, lambda each: layers[each[0]].group):
        assert group not in parts, "what shares an input comes one after the other"
        own = dict(some)
        rank = max(each[0].shape[1] for each in own.values())
        a = arena.moved(torch.cat([_padded(each[0].T, rank) for each in own.values()]).T)
        columns = [-1] * len(group.bases)
        bs: list[torch.Tensor | None] = [None] * len(group.bases)
        scales: list[torch.Tensor | None] = [None] * len(group.bases)
        for number, (name, each) in enumerate(own.items()):
            place, begin = layers[name].place, number * rank
            b = arena.moved(_padded(each[1], rank))
            columns[place], bs[place] = begin, b
            scales[place] = each[2].float() if len(each) > 2 else None
            held = each[0].shape[1]
            found[name] = (a[:, begin : begin + held], b[:held], *(own for own in [scales[place]] if own is not None))
        parts[group] = Part(rank, a, tuple(columns), tuple(bs), tuple(scales))
    return FactorsInPlace(found, Parts(parts), rows)


def laid_out(factors: Factors, layers: Mapping[str, MultiLoraLinear]) -> FactorsInPlace:
    """The factors in place; a copy unless they are already."""
    if isinstance(factors, FactorsInPlace):
        return factors
    num_bytes = sum(tensor.nbytes for own in factors.values() for tensor in own[:2])
    names = in_order(factors, layers)
    return lay_out(((name, factors[name]) for name in names), layers, num_bytes, rows_of(factors))


def in_order(modules: Iterable[str], layers: Mapping[str, MultiLoraLinear]) -> tuple[str, ...]:
    """The modules in the order of `layers`."""
    places = {name: place for place, name in enumerate(layers)}
    return tuple(sorted(modules, key=places.__getitem__))


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    """A factor (own rank, n) with zeros up to `rank`: layers that share an input may have different ones."""
    return factor if len(factor) == rank else pad(factor, (0, 0, 0, rank - len(factor)))
