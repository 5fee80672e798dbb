"""On a GPU: at each number of tokens the fastest of three ways to multiply the base's weights. The same function.

`own` is what the layers do themselves (bitsandbytes), `kernel` ours over the 4-bit weights, `copy` the library's
product with a copy of what these stand for. All are raced at the same numbers of tokens; a copy has to pay for its
memory.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve.kernels.choose import Kernels
from serve.lora import crossover
from serve.lora.linear import LinearGroup, Product
from serve.lora.weights import dense_bytes, dense_product, four_bit_product, is_four_bit, plain_absmax

logger = logging.getLogger(__name__)

OWN, KERNEL, COPY = "own", "kernel", "copy"
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # beyond the last one its winner stays the winner
WORTH = 0.1  # of the time of all probes is what a copy must save to be worth its memory
Times = Mapping[str, tuple[float, ...]]  # seconds of each way at each probe


@dataclass(frozen=True)
class Ways:
    """A product that goes the way of the number of tokens: `steps` are (up to so many tokens, name, way)."""

    steps: tuple[tuple[int, str, Product], ...]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        tokens = x.numel() // x.shape[-1]
        way = next((way for most, _, way in self.steps if tokens <= most), self.steps[-1][2])
        return way(x)

    def __str__(self) -> str:
        ends = [f"up to {most} tokens" for most, _, _ in self.steps[:-1]] + ["beyond" if self.steps[1:] else "always"]
        return ", ".join(f"{name} {end}" for (_, name, _), end in zip(self.steps, ends, strict=True))


def use_fastest(groups: Sequence[LinearGroup], dtype: torch.dtype, max_bytes: int, kernels: Kernels | None) -> int:
    """Have every group of 4-bit layers multiply by the fastest way at each number of tokens; the bytes of the copies.

    Copies go to those groups first that gain most a byte, within `max_bytes`. What was chosen for each shape is logged.
    """
    raced: dict[tuple[int, ...], Times] = {}
    ranked = []
    for group in groups:
        if not all(is_four_bit(base.weight) for base in group.bases):
            continue
        key = (group.in_features, *group.sizes)
        if key not in raced:
            raced[key] = _race(group, dtype, kernels)
        ranked.append((_gain(raced[key]), group))
    taken, seen = 0, set()
    for gain, group in sorted(ranked, key=lambda each: -each[0] / dense_bytes(each[1], dtype)):
        times = raced[group.in_features, *group.sizes]
        size = dense_bytes(group, dtype)
        has_copy = gain > 0 and taken + size <= max_bytes
        taken += size * has_copy
        names = [name for name in times if has_copy or name != COPY]
        group.dense = _ways(group, dtype, {name: times[name] for name in names}, kernels)
        line = f"{group.in_features} -> {' + '.join(map(str, group.sizes))}: {group.dense or f'{OWN} always'}"
        if line not in seen:
            logger.info("base products, measured: %s", line)
            seen.add(line)
    return taken


def chosen(groups: Sequence[LinearGroup]) -> dict[str, int]:
    """How many groups multiply in which ways, in words."""
    found: dict[str, int] = {}
    for group in groups:
        if isinstance(group.dense, Ways):
            found[str(group.dense)] = found.get(str(group.dense), 0) + 1
    return found


def _race(group: LinearGroup, dtype: torch.dtype, kernels: Kernels | None) -> Times:
    """The seconds of every way that there is at every probe."""
    assert group.dense is None, "what is measured here is the layers' own way"
    works: dict[str, Product] = {OWN: group.base_products}
    if kernels is not None and kernels.has("multiply"):
        works[KERNEL] = joined_product(group.bases, kernels)
    try:
        works[COPY] = dense_product(group.bases, dtype)
    except torch.OutOfMemoryError:
        logger.info("no copy of the base is tried: there is no memory for one of a layer")
    rows = [crossover.race(list(works.values()), crossover.drawn_input(group, count, dtype)) for count in PROBES]
    times = dict(zip(works, zip(*rows, strict=True), strict=True))
    if kernels is None or not kernels.has("multiply"):  # it failed meanwhile, and what was measured is plain torch
        times.pop(KERNEL, None)
    return times


def _gain(times: Times) -> float:
    """The seconds that a copy saves over all probes where it is the fastest way; 0 if they are not worth its memory."""
    if COPY not in times:
        return 0.0
    others = [min(each) for each in zip(*(times[name] for name in times if name != COPY), strict=True)]
    saved = sum(max(0.0, other - own) for other, own in zip(others, times[COPY], strict=True))
    return saved if saved >= WORTH * sum(others) else 0.0


def _ways(group: LinearGroup, dtype: torch.dtype, times: Times, kernels: Kernels | None) -> Ways | None:
    """The winner at each probe, up to where another begins; None where the layers' own way always wins."""
    winners = [min(times, key=lambda name: times[name][place]) for place in range(len(PROBES))]
    if set(winners) == {OWN}:
        return None
    made: dict[str, Product] = {OWN: lambda x: [base(x) for base in group.bases]}
    if COPY in winners:
        made[COPY] = dense_product(group.bases, dtype)
    if KERNEL in winners:
        assert kernels is not None
        made[KERNEL] = joined_product(group.bases, kernels)
    steps: list[tuple[int, str, Product]] = []
    for most, name in zip(PROBES, winners, strict=True):
        if steps and steps[-1][1] == name:
            steps.pop()
        steps.append((most, name, made[name]))
    return Ways(tuple(steps))


def joined_product(bases: Sequence[nn.Linear], kernels: Kernels) -> Product:
    """x -> W x + bias of each of `bases`, whose 4-bit weights are put behind each other, by one call of the kernel.

    The layers keep views of the same memory, so nothing is held twice but their scales, which are no longer quantised.
    """
    states: list[Any] = [getattr(base.weight, "quant_state") for base in bases]  # noqa: B009 (no attribute for mypy)
    code, absmax = states[0].code.float(), torch.cat([plain_absmax(state) for state in states])
    if not all(torch.equal(state.code.float(), code) for state in states):
        return four_bit_product(bases, kernels)  # their 4 bits stand for different values
    packed = _joined([base.weight for base in bases])
    sizes = [base.out_features for base in bases]
    biases = [base.bias for base in bases]

    def product(x: torch.Tensor) -> list[torch.Tensor]:
        out = kernels.multiply(x.reshape(-1, x.shape[-1]), packed, absmax, code, sum(sizes)).view(*x.shape[:-1], -1)
        outs = out.split(sizes, dim=-1)
        return [out if bias is None else out + bias for out, bias in zip(outs, biases, strict=True)]

    return product


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes (n,) of all weights behind each other, of which these are views from now on."""
    parts = [weight.data.flatten() for weight in weights]
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat(parts)
    for weight, part in zip(weights, whole.split([len(part) for part in parts]), strict=True):
        weight.data = part.view(weight.shape)
    return whole
