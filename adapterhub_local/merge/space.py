"""Where entries are merged: the core of the parents' common subspaces, their aligned directions, or whole matrices.

All three depend on the deltas only, not on how they are factored: a basis is the singular vectors of the
stacked deltas, never of the stacked factors. Numbers are float64 but for whole matrices, which are float32.
"""

from collections.abc import Callable, Sequence

import torch

from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import Spectrum, canonical_signs, widen
from adapterhub_local.merge.stack import SINGULAR, Stack

Merge = Callable[[torch.Tensor], torch.Tensor]  # (n, rows, columns) -> (rows, columns)
SHARED = 1e-10  # directions below this share of the largest are there because parents share a subspace
TINY = 1e-300  # keeps zero from dividing zero
OVERSAMPLE, ITERATIONS = 8, 4


def merge_in_core(deltas: Sequence[Delta], merge: Merge) -> Delta:
    """`U merge(U^T D_i V) V^T` with U, V the singular vectors of [D_1 ... D_n] and of [D_1; ...; D_n].

    The core matrices (R x R, R <= sum r_i) hold the deltas without loss, and the result has rank R at most
    (Core Space, https://arxiv.org/abs/2509.17786, with a basis that does not change when a factorisation is
    rotated). No matrix of the size of a delta is made: O((in + out) R^2).
    """
    stack = Stack.of(deltas)
    grams = stack.grams(precise=True)
    scaling = [delta.scaling for delta in deltas]
    U = _directions(stack.B, grams.B, [delta.A.T for delta in deltas], scaling, grams.A)
    V = _directions(stack.A.T, grams.A, [delta.B for delta in deltas], scaling, grams.B)
    left, right = (U.T @ stack.B.double()) * stack.scale, stack.A.double() @ V
    ranks = [delta.rank for delta in deltas]
    cores = [one @ other for one, other in zip(left.split(ranks, dim=1), right.split(ranks), strict=True)]
    u, values, vt = torch.linalg.svd(merge(torch.stack(cores)), full_matrices=False)
    return _balanced(U @ u, values, vt @ V.T)


def merge_aligned(deltas: Sequence[Delta], merge: Merge) -> Delta:
    """`U S merge(V_i)` with `U S [V_1 ... V_n]` the singular value decomposition of [D_1 ... D_n] (KnOTS)."""
    wide = [widen(delta) for delta in deltas]
    q, r = torch.linalg.qr(torch.cat([delta.B for delta in wide], dim=1))
    parts = r.split([delta.rank for delta in wide], dim=1)
    beside = torch.cat([delta.scaling * (part @ delta.A) for part, delta in zip(parts, wide, strict=True)], dim=1)
    left, triangle = torch.linalg.qr(beside.T)
    v, values, ut = torch.linalg.svd(triangle, full_matrices=False)
    kept = _num_directions(values)
    U = q @ ut[:kept].T
    signs = canonical_signs(U)
    aligned = ((left @ v[:, :kept]) * signs).T
    merged = merge(torch.stack(aligned.chunk(len(wide), dim=1)))
    return _balanced(U * signs, values[:kept], merged)


def merge_whole(deltas: Sequence[Delta], merge: Merge, rank: int, draw: torch.Generator) -> Spectrum:
    """Merge whole matrices and keep the leading `rank` singular values; what the others hold is in `total`.

    Small matrices are decomposed exactly. Of large ones the range is found by random projection with power
    iterations (https://arxiv.org/abs/0909.4061), seeded: nearly the best rank-k, and its loss is exact.
    """
    return leading(merge(torch.stack([delta.dense().float() for delta in deltas])), rank, draw)


def leading(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> Spectrum:
    """The leading `rank` singular values and vectors of a whole matrix in float32, `total` its squared norm.

    Small matrices by their SVD, others by randomised subspace iteration (https://arxiv.org/abs/0909.4061); what is
    lost is known exactly either way.
    """
    total = float(matrix.double().square().sum())
    limit = min(matrix.shape)
    if limit <= 256 or rank + OVERSAMPLE >= limit // 2:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=draw)
        for _ in range(ITERATIONS):
            q = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ q).Q).Q
        q = torch.linalg.qr(matrix @ q).Q
        small, values, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ small
    u, values, vt = u[:, :rank], values[:rank], vt[:rank]
    signs = canonical_signs(u)
    return Spectrum(u * signs, values, vt * signs[:, None], total)


def _directions(
    factor: torch.Tensor,
    gram: torch.Tensor,
    others: Sequence[torch.Tensor],
    scalings: Sequence[float],
    across: torch.Tensor,
) -> torch.Tensor:
    """The left singular vectors (n x R) of [D_1 ... D_n], D_i = s_i F_i O_i^T, those of value zero left out.

    `factor` are the F_i side by side, `gram` their products, `across` those of the O_i. With O_i^T O_i = C C^T,
    [D_1 ... D_n] [D_1 ... D_n]^T = (F C)(F C)^T, so the vectors are those of F C = [s_i F_i C_i]: F C W diag(e)^-1/2
    with the eigenvectors W of C^T F^T F C. Where those cannot be distinguished from rounding, thin QR makes them.
    """
    ranks, n = [other.shape[1] for other in others], factor.shape[0]
    ends = torch.tensor(ranks).cumsum(0).tolist()
    mix = torch.zeros_like(gram)
    parts = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    smallest = 1.0
    for part, scaling in zip(parts, scalings, strict=True):
        values, vectors = torch.linalg.eigh(across[part, part])
        smallest = min(smallest, float(values[0]) / max(float(values[-1]), TINY))
        mix[part, part] = scaling * vectors * values.clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(mix.T @ gram @ mix)
    smallest = min(smallest, float(values[0]) / max(float(values[-1]), TINY))
    if smallest > SINGULAR and n >= len(gram):
        values, vectors = values.flip(0), vectors.flip(1)
        directions = factor.double() @ (mix @ vectors / values.sqrt())
    else:
        for part, other, scaling in zip(parts, others, scalings, strict=True):
            mix[part] = 0
            triangle = torch.linalg.qr(other.double(), mode="r").R.T
            mix[part, part.start : part.start + triangle.shape[1]] = scaling * triangle
        q, r = torch.linalg.qr(factor.double() @ mix)
        u, values, _ = torch.linalg.svd(r, full_matrices=False)
        directions = q @ u[:, : _num_directions(values)]
    signed: torch.Tensor = directions * canonical_signs(directions)
    return signed


def _num_directions(values: torch.Tensor) -> int:
    return max(1, int((values > SHARED * values[0]).sum()))


def _balanced(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> Delta:
    root = values.sqrt()
    return Delta(root[:, None] * right, left * root, 1.0)
