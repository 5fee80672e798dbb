"""Where entries are merged: the core of the parents' common subspaces, their aligned directions, or whole matrices.

All three depend on the deltas only, not on how they are factored: a basis is the singular vectors of the
stacked deltas, never of the stacked factors. Numbers are float64 but for whole matrices, which are float32.
"""

from collections.abc import Callable, Sequence

import torch

from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import Spectrum, canonical_signs, widen

Merge = Callable[[torch.Tensor], torch.Tensor]  # (n, rows, columns) -> (rows, columns)
SHARED = 1e-10  # directions below this share of the largest are there because parents share a subspace
OVERSAMPLE, ITERATIONS = 8, 4


def merge_in_core(deltas: Sequence[Delta], merge: Merge) -> Delta:
    """`U merge(U^T D_i V) V^T` with U, V the singular vectors of [D_1 ... D_n] and of [D_1; ...; D_n].

    The core matrices (R x R, R <= sum r_i) hold the deltas without loss, and the result has rank R at most
    (Core Space, https://arxiv.org/abs/2509.17786, with a basis that does not change when a factorisation is
    rotated). No matrix of the size of a delta is made: O((in + out) R^2).
    """
    wide = [widen(delta) for delta in deltas]
    U = _directions([delta.B for delta in wide], [delta.A.T for delta in wide], [delta.scaling for delta in wide])
    V = _directions([delta.A.T for delta in wide], [delta.B for delta in wide], [delta.scaling for delta in wide])
    cores = torch.stack([delta.scaling * ((U.T @ delta.B) @ (delta.A @ V)) for delta in wide])
    u, values, vt = torch.linalg.svd(merge(cores), full_matrices=False)
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
    matrix = merge(torch.stack([delta.dense().float() for delta in deltas]))
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
    factors: Sequence[torch.Tensor], others: Sequence[torch.Tensor], scalings: Sequence[float]
) -> torch.Tensor:
    """The left singular vectors of [D_1 ... D_n], D_i = s_i F_i O_i^T, those of value zero left out.

    O_i = Q R gives D_i D_i^T = (s_i F_i R^T)(s_i F_i R^T)^T, so the vectors are those of the stacked s_i F_i R^T.
    """
    beside = [
        scaling * factor @ torch.linalg.qr(other, mode="r").R.T
        for factor, other, scaling in zip(factors, others, scalings, strict=True)
    ]
    q, r = torch.linalg.qr(torch.cat(beside, dim=1))
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    directions = q @ u[:, : _num_directions(values)]
    return directions * canonical_signs(directions)


def _num_directions(values: torch.Tensor) -> int:
    return max(1, int((values > SHARED * values[0]).sum()))


def _balanced(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> Delta:
    root = values.sqrt()
    return Delta(root[:, None] * right, left * root, 1.0)
