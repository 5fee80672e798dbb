"""Low-rank algebra on factored deltas: pure functions, no dense matrix, no files.

A delta is D = s B A with A (r x in), B (out x r), so that sums and inner products cost O((in + out) r^2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterhub_local.lora.adapter import Delta


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """`sum_i w_i D_i`, exactly, as factors of rank `sum_i r_i` with scaling 1, in float32 (or float64 if given).

    With c_i = w_i s_i the factors are stacked: A = [2^k_i A_i], B = [c_i 2^-k_i B_i], so that
    B A = sum_i c_i B_i A_i without cross terms ("cat" in PEFT; LoRA Soups, https://arxiv.org/abs/2410.13025).
    2^k_i is the power of two nearest to sqrt|c_i|: it changes no digit of A_i, and keeps both factors in range.
    Terms of weight 0 are left out.
    """
    terms = [(delta, weight * delta.scaling) for delta, weight in zip(deltas, weights, strict=True)]
    kept = [(delta, factor) for delta, factor in terms if factor != 0]
    if not kept:  # one zero row and column: the format has no rank 0
        first = deltas[0]
        return Delta(torch.zeros(1, first.A.shape[1]), torch.zeros(first.B.shape[0], 1), 1.0)
    wide = torch.float64 if any(delta.A.dtype == torch.float64 for delta, _ in kept) else torch.float32
    powers = [math.ldexp(1.0, round(math.log2(abs(factor)) / 2)) for _, factor in kept]
    A = torch.cat([power * delta.A.to(wide) for power, (delta, _) in zip(powers, kept, strict=True)])
    B = torch.cat([factor / power * delta.B.to(wide) for power, (delta, factor) in zip(powers, kept, strict=True)], 1)
    return Delta(A, B, 1.0)


def widen(delta: Delta) -> Delta:
    """The same delta with factors in float64."""
    return Delta(delta.A.double(), delta.B.double(), delta.scaling)


def is_finite(delta: Delta, limit: float = math.inf) -> bool:
    """Whether every entry of both factors is a number smaller in size than `limit`."""
    ends = [end for factor in (delta.A, delta.B) for end in torch.aminmax(factor)]
    return all(abs(float(end)) < limit for end in ends)  # NaN is smaller than nothing


def pad_rank(delta: Delta, rank: int) -> Delta:
    """The same delta with rows of zeros in A and columns of zeros in B, up to `rank`."""
    missing = rank - delta.rank
    if missing == 0:
        return delta
    A = torch.nn.functional.pad(delta.A, (0, 0, 0, missing))
    B = torch.nn.functional.pad(delta.B, (0, missing))
    return Delta(A, B, delta.scaling)


@dataclass(frozen=True)
class Spectrum:
    """A delta as U diag(values) V^T: U (out x r) and V^T (r x in) orthonormal, values falling.

    `total` is the delta's squared Frobenius norm, which is more than `values` have where some were not computed.
    """

    U: torch.Tensor
    values: torch.Tensor
    Vt: torch.Tensor
    total: float

    def truncate(self, rank: int) -> Delta:
        """The nearest delta of `rank`, in Frobenius and spectral norm (Eckart-Young), its root split evenly."""
        root = self.values[:rank].sqrt().to(self.U.dtype)
        return Delta(root[:, None] * self.Vt[:rank], self.U[:, :rank] * root, 1.0)

    def lost(self, rank: int) -> float:
        """|D - D_rank|^2, known before anything is written."""
        squares = self.values.double().square()
        tail = float(squares[rank:].sum())
        return max(0.0, self.total - float(squares.sum())) + tail


def decompose(delta: Delta, rank: int | None = None) -> Spectrum:
    """The singular value decomposition of `s B A` without a dense matrix, in the wider of its dtype and float32.

    Thin QR of both factors, B = Q_B R_B and A^T = Q_A R_A, then the SVD of the r x r matrix s R_B R_A^T:
    O((in + out) r^2 + r^3). With `rank`, only so many vectors are made; `values` always holds all.
    Signs are canonical: the entry of largest size in each column of U is positive. (The route over A^T A
    would square the condition number and lose what is below 3e-4 of the largest value in float32.)
    """
    wide = torch.promote_types(delta.A.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(delta.B.to(wide))
    q_a, r_a = torch.linalg.qr(delta.A.to(wide).T)
    u, values, vt = torch.linalg.svd(delta.scaling * (r_b @ r_a.T))
    kept = len(values) if rank is None else min(rank, len(values))
    U, Vt = q_b @ u[:, :kept], vt[:kept] @ q_a.T
    signs = canonical_signs(U)
    return Spectrum(U * signs, values, Vt * signs[:, None], float(values.double().square().sum()))


def canonical_signs(U: torch.Tensor) -> torch.Tensor:
    """For each column +1 or -1, so that U * signs has its entry of largest size positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)


def inner(left: Delta, right: Delta) -> float:
    """The Frobenius inner product `<D_1, D_2> = s_1 s_2 tr((B_1^T B_2)(A_2 A_1^T))`, in float64."""
    outer = left.B.double().T @ right.B.double()
    return left.scaling * right.scaling * float((outer * (left.A.double() @ right.A.double().T)).sum())


def norm(delta: Delta) -> float:
    """The Frobenius norm of D."""
    return math.sqrt(max(0.0, inner(delta, delta)))


def distance(left: Delta, right: Delta) -> float:
    """The Frobenius norm of D_1 - D_2, accurate also where they nearly agree.

    `|D_1|^2 - 2 <D_1, D_2> + |D_2|^2` is used where the difference is large enough for its digits to
    survive; else the difference is written B A with B = [s_1 B_1, -s_2 B_2], and |B A| = |R_B R_A^T| by
    thin QR of B and A^T.
    """
    squares = inner(left, left), inner(right, right)
    quick = sum(squares) - 2 * inner(left, right)
    if quick > 1e-8 * sum(squares):
        return math.sqrt(quick)
    B = torch.cat([left.scaling * left.B.double(), -right.scaling * right.B.double()], dim=1)
    A = torch.cat([left.A.double(), right.A.double()])
    r_b = torch.linalg.qr(B, mode="r").R
    r_a = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.norm(r_b @ r_a.T))


def rounding(stored: Delta, exact: Delta) -> float:
    """|D_stored - D_exact| where `stored` is `exact` with each entry rounded; both of scaling 1.

    The difference is dB A + B dA with the small dB and dA taken entry by entry in float64, so no digits are
    lost and float32 is wide enough for the products.
    """
    A, B = stored.A.float(), exact.B.float()
    tiny = torch.finfo(stored.A.dtype).eps  # a power of two: keeps the squares of the differences in range
    dA, dB = ((now - true).div_(tiny).float() for now, true in ((stored.A, exact.A), (stored.B, exact.B)))
    squares = (dB.T @ dB) * (A @ A.T) + 2 * (dB.T @ B) * (A @ dA.T) + (B.T @ B) * (dA @ dA.T)
    return tiny * math.sqrt(max(0.0, float(squares.double().sum())))
