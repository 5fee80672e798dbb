"""Deltas of one module side by side: their inner products, their sum's best reduction, and what storing it costs.

Factors stay as narrow as they came. Products are float32 where that is enough, and float64 where digits cancel;
what is made wide is a block of rows at a time, which stays in the processor's cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import Spectrum, canonical_signs, decompose, distance

ROWS = 2048  # of a factor that are widened at a time
SAFE = (1e-20, 1e30)  # squares in this range neither vanish nor overflow in float32
CANCELS = 0.1  # below this share of its terms a float32 sum has lost digits that are reported
SINGULAR = 1e-9  # eigenvalues below this share of the largest cannot be distinguished from rounding in a Gram matrix


@dataclass(frozen=True)
class Grams:
    """`A A^T` and `B^T B`, (R x R) in float64; `is_precise` if their sums were made in float64 too."""

    A: torch.Tensor
    B: torch.Tensor
    is_precise: bool

    @property
    def is_safe(self) -> bool:
        """Whether every row of A and column of B has a square that float32 holds."""
        squares = torch.cat([self.A.diagonal(), self.B.diagonal()])
        return bool(((squares > SAFE[0]) & (squares < SAFE[1])).all())


@dataclass(frozen=True)
class Stack:
    """`sum_j scale_j B[:, j] A[j]`: factors A (R x in), B (out x R) in float32 or float64, `scale` (R) in float64.

    `owner` (R) is the number of the delta that each of the R rows and columns is from.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: torch.Tensor
    owner: torch.Tensor

    @classmethod
    def of(cls, deltas: Sequence[Delta], owners: Sequence[int] | None = None) -> "Stack":
        """The deltas side by side; `owners` numbers them, from 0 if not given."""
        wide = torch.float64 if any(delta.A.dtype == torch.float64 for delta in deltas) else torch.float32
        ranks = torch.tensor([delta.rank for delta in deltas])
        numbers = torch.tensor(list(owners) if owners is not None else list(range(len(deltas))))
        scale = torch.tensor([delta.scaling for delta in deltas], dtype=torch.float64)
        A = torch.cat([delta.A for delta in deltas]).to(wide)
        B = torch.cat([delta.B for delta in deltas], dim=1).to(wide)
        return cls(A, B, scale.repeat_interleave(ranks), numbers.repeat_interleave(ranks))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def weighted(self, weights: Sequence[float]) -> "Stack":
        """Each delta times its weight, `weights` by the owners' numbers."""
        return replace(self, scale=self.scale * torch.tensor(list(weights), dtype=torch.float64)[self.owner])

    def grams(self, *, precise: bool = False) -> Grams:
        """Products of the rows of A, and of the columns of B; in float64 if asked for or float32 cannot hold them."""
        if not precise and self.A.dtype == torch.float32:
            found = Grams((self.A @ self.A.T).double(), (self.B.T @ self.B).double(), False)
            if found.is_safe:
                return found
        across = self.A.T
        return Grams(_cross(across, across), _cross(self.B, self.B), True)

    def products(self, grams: Grams, count: int) -> torch.Tensor:
        """Inner products of the deltas `<D_i, D_j> = s_i s_j tr((B_i^T B_j)(A_j A_i^T))`, (count x count), float64."""
        terms = grams.A * grams.B * torch.outer(self.scale, self.scale)
        rows = torch.zeros(count, self.rank, dtype=torch.float64).index_add_(0, self.owner, terms)
        return torch.zeros(count, count, dtype=torch.float64).index_add_(1, self.owner, rows)

    def square(self, grams: Grams) -> float:
        """The squared Frobenius norm of the sum, with 6 digits at least, however much of it cancels."""
        terms = grams.A * grams.B * torch.outer(self.scale, self.scale)
        square, largest = float(terms.sum()), float(terms.abs().sum())
        if square > (1e-8 if grams.is_precise else CANCELS) * largest or not math.isfinite(largest):
            return square
        if not grams.is_precise:
            return self.square(self.grams(precise=True))
        whole = self.delta()
        return distance(whole, Delta(whole.A[:1] * 0, whole.B[:, :1] * 0, 1.0)) ** 2

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors for the rows of A and the columns of B whose product is `scale`.

        Those of A are the powers of two nearest to its root, so A is multiplied exactly and both stay in range.
        """
        sizes = self.scale.abs()
        left = torch.exp2(torch.where(sizes > 0, sizes, 1.0).log2().div(2).round())
        return torch.where(sizes > 0, left, 0.0), self.scale / left

    def delta(self) -> Delta:
        """The sum as one delta of scaling 1, in float64."""
        left, right = self.split()
        return Delta(self.A.double() * left[:, None], self.B.double() * right, 1.0)

    def store(self, dtype: torch.dtype, grams: Grams) -> tuple[Delta, float]:
        """The sum as one delta of scaling 1 in `dtype`, each entry rounded once, and the squared error of that.

        The error `dB A + B dA` is made of the rounding errors dA and dB, taken entry by entry in float64.
        """
        left, right = self.split()
        # powers of two change no digit: A needs no measuring unless it is narrowed
        if dtype == torch.float32 == self.A.dtype and grams.is_safe and float(left.min()) > 1e-9:
            b = _round(self.B, right, dtype)
            A = self.A * left.float()[:, None]
            lost = b.errors * grams.A * torch.outer(left, left)
        else:
            wide = torch.float32 if grams.is_safe else torch.float64
            a, b = _round(self.A.T, left, dtype, wide), _round(self.B, right, dtype, wide)
            A, own = a.stored.T.contiguous(), grams.B * torch.outer(right, right)
            crossed = b.crossed - torch.finfo(dtype).eps * b.errors
            lost = b.errors * a.squares + 2 * crossed * a.crossed.T + own * a.errors
        return Delta(A, b.stored, 1.0), max(0.0, torch.finfo(dtype).eps ** 2 * float(lost.sum()))

    def decompose(self, grams: Grams, rank: int | None = None) -> Spectrum:
        """The singular value decomposition of the sum, its vectors in float32; see `algebra.decompose`.

        With the eigenvectors of precise Gram matrices, `B = Q_B R_B` and `A^T = Q_A R_A` without Q being made:
        R = diag(sqrt e) E^T. Where a Gram matrix is nearly singular, for factors share a direction, thin QR in
        float64 is used instead, for the squares have lost what is small.
        """
        if not grams.is_precise:
            grams = self.grams(precise=True)
        left, right = self.split()
        a, E_a = torch.linalg.eigh(grams.A * torch.outer(left, left))
        b, E_b = torch.linalg.eigh(grams.B * torch.outer(right, right))
        if float(a[0]) <= SINGULAR * float(a[-1]) or float(b[0]) <= SINGULAR * float(b[-1]):
            return narrow(decompose(self.delta(), rank))
        a, b = a.sqrt(), b.sqrt()
        u, values, vt = torch.linalg.svd(b[:, None] * (E_b.T @ E_a) * a)
        kept = len(values) if rank is None else min(rank, len(values))
        U = _times(self.B, right[:, None] * (E_b @ (u[:, :kept] / b[:, None])))
        V = _times(self.A.T, left[:, None] * (E_a @ (vt[:kept].T / a[:, None])))
        signs = canonical_signs(U)
        return Spectrum(U * signs, values, (V * signs).T.contiguous(), float(values.square().sum()))

    def gap(self, kept: Delta, grams: Grams, total: float) -> float:
        """`|D - D_kept|^2` for the sum D with squared norm `total`, measured by inner products with the factors.

        In float32 if that leaves enough digits, else in float64, which resolves a distance above 3e-8 of |D|.
        """
        is_safe = grams.is_safe and SAFE[0] ** 2 < total < SAFE[1] ** 2 and self.A.dtype == torch.float32
        for product in (_quick, _cross) if is_safe else (_cross,):
            both = self.scale[:, None] * product(self.B, kept.B) * product(self.A.T, kept.A.T)
            own = product(kept.B, kept.B) * product(kept.A.T, kept.A.T)
            square = total - 2 * float(both.sum()) + float(own.sum())
            if square > 1e-3 * total:
                break
        return max(0.0, square)


def narrow(spectrum: Spectrum) -> Spectrum:
    """The same with its vectors in float32."""
    return replace(spectrum, U=spectrum.U.float(), Vt=spectrum.Vt.float())


class _Rounded(NamedTuple):
    """A stored factor (n x r) S and products of its columns: with the errors d `d^T d`, `d^T S`, and `S^T S`.

    d is in units of the dtype's precision, a power of two, so that its squares stay in float32's range.
    """

    stored: torch.Tensor
    errors: torch.Tensor
    crossed: torch.Tensor
    squares: torch.Tensor


def _round(
    factor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, beside: torch.dtype | None = None
) -> _Rounded:
    """The columns of `factor` (n x r) times `scale`, rounded once to `dtype`; products with S in `beside`, or none."""
    stored = torch.empty_like(factor, dtype=dtype)
    errors, crossed, squares = torch.zeros(3, factor.shape[1], factor.shape[1], dtype=torch.float64)
    for start in range(0, len(factor), ROWS):
        exact = factor[start : start + ROWS].double() * scale
        near = stored[start : start + ROWS].copy_(exact).float()
        error = exact.sub_(near).mul_(-1 / torch.finfo(dtype).eps).to(beside or torch.float32)
        errors += error.T @ error
        if beside:
            near = near.to(beside)
            crossed += error.T @ near
            squares += near.T @ near
    return _Rounded(stored, errors, crossed, squares)


def _quick(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left^T right` of (n x r) and (n x q) by float32 products."""
    return (left.T @ right).double()


def _cross(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left^T right` of (n x r) and (n x q) in float64, a block of rows at a time."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for start in range(0, len(left), ROWS):
        one = left[start : start + ROWS].double()
        total += one.T @ (one if right is left else right[start : start + ROWS].double())
    return total


def _times(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`factor matrix` of (n x r) and (r x q), products in float64, the result in float32."""
    made = torch.empty(len(factor), matrix.shape[1])
    for start in range(0, len(factor), ROWS):
        made[start : start + ROWS] = factor[start : start + ROWS].double() @ matrix
    return made
