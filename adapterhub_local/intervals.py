"""95 % confidence intervals: Wilson's for shares, the bootstrap for means and for differences on the same examples."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2000
CHUNK = 1 << 22  # indices drawn at once
Interval = tuple[float, float]


def wilson(successes: float, total: int) -> Interval:
    """The interval of a share (Wilson 1927), sound near 0 and 1 and for few examples, unlike the normal one."""
    share, shrink = successes / total, 1 + Z * Z / total
    centre = share + Z * Z / (2 * total)
    half = Z * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


def bootstrap(values: Sequence[float], weights: Sequence[float], others: Sequence[float] | None = None) -> Interval:
    """The interval of `sum(values) / sum(weights)` over examples, less that of `others` if they are given.

    Examples are drawn again with replacement, with both their values, so that what makes an example hard for both
    cancels out (Koehn 2004). The draws are the same in every call.
    """
    differences = np.asarray(values, dtype=float) - (np.asarray(others, dtype=float) if others is not None else 0.0)
    sizes = np.asarray(weights, dtype=float)
    count = len(differences)
    generator = np.random.default_rng(0)
    means = []
    rows = max(1, CHUNK // count)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, count, (min(rows, RESAMPLES - start), count))
        means.append(differences[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
