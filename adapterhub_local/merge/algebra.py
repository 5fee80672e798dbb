"""Low-rank algebra on factored deltas: pure functions, no dense matrix, no files.

A delta is D = s B A with A (r x in), B (out x r), so that sums and inner products cost O((in + out) r^2).
"""

import math
from collections.abc import Sequence

import torch

from adapterhub_local.lora.adapter import Delta


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """`sum_i w_i D_i`, exactly, as factors of rank `sum_i r_i` with scaling 1, in float32 (or float64 if given).

    With c_i = w_i s_i the factors are stacked: A = [sqrt|c_i| A_i], B = [sgn(c_i) sqrt|c_i| B_i], so that
    B A = sum_i c_i B_i A_i without cross terms ("cat" in PEFT; LoRA Soups, https://arxiv.org/abs/2410.13025).
    The root is split evenly so that neither factor overflows. Terms of weight 0 are left out.
    """
    terms = [(delta, weight * delta.scaling) for delta, weight in zip(deltas, weights, strict=True)]
    kept = [(delta, factor) for delta, factor in terms if factor != 0]
    if not kept:  # one zero row and column: the format has no rank 0
        first = deltas[0]
        return Delta(torch.zeros(1, first.A.shape[1]), torch.zeros(first.B.shape[0], 1), 1.0)
    wide = torch.float64 if any(delta.A.dtype == torch.float64 for delta, _ in kept) else torch.float32
    A = torch.cat([math.sqrt(abs(factor)) * delta.A.to(wide) for delta, factor in kept])
    B = torch.cat([math.copysign(math.sqrt(abs(factor)), factor) * delta.B.to(wide) for delta, factor in kept], dim=1)
    return Delta(A, B, 1.0)


def pad_rank(delta: Delta, rank: int) -> Delta:
    """The same delta with rows of zeros in A and columns of zeros in B, up to `rank`."""
    missing = rank - delta.rank
    if missing == 0:
        return delta
    A = torch.nn.functional.pad(delta.A, (0, 0, 0, missing))
    B = torch.nn.functional.pad(delta.B, (0, missing))
    return Delta(A, B, delta.scaling)


def inner(left: Delta, right: Delta) -> float:
    """The Frobenius inner product `<D_1, D_2> = s_1 s_2 tr((B_1^T B_2)(A_2 A_1^T))`, in float64."""
    outer = left.B.double().T @ right.B.double()
    return left.scaling * right.scaling * float((outer * (left.A.double() @ right.A.double().T)).sum())


def norm(delta: Delta) -> float:
    """The Frobenius norm of D."""
    return math.sqrt(max(0.0, inner(delta, delta)))


def distance(left: Delta, right: Delta) -> float:
    """The Frobenius norm of D_1 - D_2, accurate also where they nearly agree.

    `|D_1|^2 - 2 <D_1, D_2> + |D_2|^2` would lose half the digits; instead the difference is written
    B A with B = [s_1 B_1, -s_2 B_2], and |B A| = |R_B R_A^T| by thin QR of B and A^T.
    """
    B = torch.cat([left.scaling * left.B.double(), -right.scaling * right.B.double()], dim=1)
    A = torch.cat([left.A.double(), right.A.double()])
    r_b = torch.linalg.qr(B, mode="r").R
    r_a = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.norm(r_b @ r_a.T))
