"""Merging entry by entry: trim, drop, elect and sum over stacked matrices (n, rows, columns). Pure functions.

They know nothing of factors: the stack may be whole deltas, their core matrices or aligned directions.
`draws` holds a random generator for each of the n, so that a draw depends on its adapter and module only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Draws = Sequence[torch.Generator]
Elementwise = Callable[[torch.Tensor, Sequence[float], Mapping[str, Any], Draws], torch.Tensor]


def trim(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The `int(density * numel)` entries of largest size (one at least), the others zero; of equal ones the first."""
    return matrix * _largest(matrix, max(1, int(density * matrix.numel())))


def drop(matrix: torch.Tensor, keep: float | torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Each entry kept with probability `keep` and divided by it, so that the mean stays (DARE, MAGPRUNE)."""
    kept = torch.rand(matrix.shape, generator=draw, dtype=torch.float32) < keep
    return torch.where(kept, matrix / keep, torch.zeros((), dtype=matrix.dtype))


def elect(stack: torch.Tensor, weights: Sequence[float], variant: str) -> torch.Tensor:
    """Elect the sign of each entry and average those that agree with it (TIES, steps 2 and 3).

    mergekit: the sign of `sum_i w_i D_i` is elected; the sum of agreeing `w_i D_i` is divided by the sum of
    their weights. peft: the sign of `sum_i D_i` is elected; the sum is divided by how many agree. With weights
    of 1 both are the paper's mean. A sum of 0 elects plus.
    """
    column = torch.tensor(list(weights), dtype=stack.dtype).view(-1, *[1] * (stack.dim() - 1))
    weighted = stack * column
    voters = weighted if variant == "mergekit" else stack
    elected = torch.where(voters.sum(dim=0) >= 0, 1.0, -1.0).to(stack.dtype)
    agree = voters.sign() == elected
    total = (weighted * agree).sum(dim=0)
    share = (column * agree).sum(dim=0) if variant == "mergekit" else agree.sum(dim=0).to(stack.dtype)
    return total / torch.where(share.abs() < 1e-8, torch.ones((), dtype=stack.dtype), share)


def ties(stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws) -> torch.Tensor:
    """TIES: `lambda elect(trim(D_i))`."""
    trimmed = torch.stack([trim(matrix, parameters["density"]) for matrix in stack])
    return float(parameters["scale"]) * elect(trimmed, weights, parameters["variant"])


def magnitude_prune(
    stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws
) -> torch.Tensor:
    """`lambda sum_i w_i trim(D_i)`."""
    trimmed = [trim(matrix, parameters["density"]) for matrix in stack]
    return float(parameters["scale"]) * _sum(trimmed, weights)


def dare_linear(
    stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws
) -> torch.Tensor:
    """DARE: `lambda sum_i w_i drop(D_i)`."""
    dropped = [drop(matrix, parameters["density"], draw) for matrix, draw in zip(stack, draws, strict=True)]
    return float(parameters["scale"]) * _sum(dropped, weights)


def dare_ties(
    stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws
) -> torch.Tensor:
    """DARE, then the election of TIES: `lambda elect(drop(D_i))`."""
    dropped = [drop(matrix, parameters["density"], draw) for matrix, draw in zip(stack, draws, strict=True)]
    return float(parameters["scale"]) * elect(torch.stack(dropped), weights, parameters["variant"])


def della(stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws) -> torch.Tensor:
    """DELLA: drop with a probability that falls with the entry's rank by size in its row, elect, average.

    The keeping probability goes from density - epsilon/2 (smallest) to density + epsilon/2 (largest).
    """
    low, epsilon = parameters["density"] - parameters["epsilon"] / 2, parameters["epsilon"]
    dropped = []
    for matrix, draw in zip(stack, draws, strict=True):
        order = matrix.abs().argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 is the smallest of its row
        keep = low + epsilon * order.to(matrix.dtype) / max(1, matrix.shape[-1] - 1)
        dropped.append(drop(matrix, keep, draw))
    return float(parameters["scale"]) * elect(torch.stack(dropped), weights, parameters["variant"])


def breadcrumbs(
    stack: torch.Tensor, weights: Sequence[float], parameters: Mapping[str, Any], draws: Draws
) -> torch.Tensor:
    """Breadcrumbs: without the share `gamma` of largest entries, the next `density` is kept; `lambda sum_i w_i D_i`."""
    masked = []
    for matrix in stack:
        outliers = int(parameters["gamma"] * matrix.numel())
        within = _largest(matrix, min(matrix.numel(), outliers + max(1, int(parameters["density"] * matrix.numel()))))
        masked.append(matrix * (within & ~_largest(matrix, outliers)))
    return float(parameters["scale"]) * _sum(masked, weights)


def _largest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries are the `count` largest in size; of equal ones the first, so that the choice is defined."""
    sizes = matrix.abs().flatten()
    if count <= 0:
        return torch.zeros_like(matrix, dtype=torch.bool)
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    above, equal = sizes > threshold, sizes == threshold
    first = equal & (equal.cumsum(0) <= count - above.sum())
    return (above | first).view(matrix.shape)


def _sum(matrices: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total += weight * matrix
    return total
