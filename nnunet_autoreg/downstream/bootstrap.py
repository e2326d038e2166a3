"""Compute bootstrap intervals over scans or patients.

Shape suffixes: B resamples, S scans (or patients).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.rng import generator

LEVEL = 95
"""Percent of the resampled values that lie inside an interval."""


def bootstrap_weights(num_scans: int, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each scan is drawn into each of B resamples of S scans, (B, S).

    Scans are drawn with replacement.
    """
    random = generator(seed, "bootstrap over scans")
    drawn = random.integers(0, num_scans, (num_resamples, num_scans))
    counts = [np.bincount(scans, minlength=num_scans) for scans in drawn]
    return np.stack(counts).astype(np.float64)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the middle 95 % of resampled values; None if fewer than two are left.

    NaN, from resamples without anything to measure, are left out.
    """
    known = [v for v in values if not np.isnan(v)]
    if len(known) < 2:
        return None
    low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return (float(low), float(high))
