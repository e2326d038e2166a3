"""Average precision, free-response curves, and their intervals, from matched detections of many
scans.

Every function takes a weight per scan, so that a bootstrap resample costs no new matching: a scan
drawn twice weighs 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.matching import Matched
from nnunet_autoreg.rng import generator

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

RECALLS = np.linspace(0, 1, 101)
FP_PER_SCAN = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The operating points of LUNA16, whose mean sensitivity is the CPM."""
LEVEL = 95.0


@dataclass(frozen=True)
class Pooled:
    """One class over all scans, excused detections left out.

    Attributes:
        scores, is_hit, scan: of each detection, highest score first.
        objects_S: number of objects of each scan.
    """

    scores: Floats
    is_hit: Bools
    scan: Ints
    objects_S: Ints  # noqa: N815

    @property
    def num_objects(self) -> int:
        """In all scans."""
        return int(self.objects_S.sum())


@dataclass(frozen=True)
class Froc:
    """A free-response curve: points at falling score thresholds, first the one at which nothing is
    detected.

    Attributes:
        fp_per_scan, sensitivity, threshold: arrays of one length; the first threshold is infinite.
    """

    fp_per_scan: Floats
    sensitivity: Floats
    threshold: Floats


def pool(matched: Sequence[Matched]) -> Pooled:
    """Put the scans' matchings of one class together."""
    counted = [~m.excused for m in matched]
    scores = np.concatenate(
        [m.scores[c] for m, c in zip(matched, counted, strict=True)] or [np.zeros(0)]
    )
    is_hit = np.concatenate(
        [m.object_of[c] >= 0 for m, c in zip(matched, counted, strict=True)]
        or [np.zeros(0, dtype=bool)]
    )
    scan = np.repeat(np.arange(len(matched)), [int(c.sum()) for c in counted])
    order = np.argsort(-scores, kind="stable")
    return Pooled(
        scores[order],
        is_hit[order],
        scan[order],
        np.array([len(m.objects) for m in matched], dtype=np.int64),
    )


def average_precision(pooled: Pooled, weights_S: Floats | None = None) -> float:
    """Mean, over recalls 0, 0.01 ..

    1, of the best precision at that recall or beyond; 0 without detections, NaN without objects.

    Recalls are compared in float32, as nnDetection and MONAI do: 7 of 10 does not reach 0.70 there.
    """
    weights = np.ones(len(pooled.objects_S)) if weights_S is None else weights_S
    objects = float(weights @ pooled.objects_S)
    if objects == 0:
        return float("nan")
    each = weights[pooled.scan]
    hits, misses = np.cumsum(each * pooled.is_hit), np.cumsum(each * ~pooled.is_hit)
    precision = hits / np.maximum(hits + misses, 1e-12)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    reached = np.searchsorted((hits / objects).astype(np.float32), RECALLS, side="left")
    return float(precision[reached].mean())


def froc(pooled: Pooled, weights_S: Floats | None = None) -> Froc:
    """Sensitivity against false positives per scan, empty scans included; detections of one score
    come in together.
    """
    weights = np.ones(len(pooled.objects_S)) if weights_S is None else weights_S
    each = weights[pooled.scan]
    last = (
        np.flatnonzero(np.append(pooled.scores[1:] != pooled.scores[:-1], True))
        if len(pooled.scores)
        else np.zeros(0, dtype=np.int64)
    )
    objects, scans = float(weights @ pooled.objects_S), float(weights.sum())
    hits = np.cumsum(each * pooled.is_hit)[last]
    misses = np.cumsum(each * ~pooled.is_hit)[last]
    sensitivity = hits / objects if objects else np.full(len(last), np.nan)
    start = 0.0 if objects else np.nan
    return Froc(
        np.append(0.0, misses / scans),
        np.append(start, sensitivity),
        np.append(np.inf, pooled.scores[last]),
    )


def sensitivity_at(curve: Froc, fp_per_scan: Sequence[float]) -> Floats:
    """Sensitivities at given numbers of false positives per scan: linear between the curve's
    points, as in LUNA16's evaluation.

    Beyond the last point the curve stays where it is; no detection at all is 0.
    """
    values = np.unique(curve.fp_per_scan)
    # Several sensitivities at one number of false positives: the last one is the highest.
    best = curve.sensitivity[np.searchsorted(curve.fp_per_scan, values, side="right") - 1]
    return np.interp(fp_per_scan, values, best)


def threshold_at(curves: Sequence[tuple[Froc, int]], fp_per_scan: float) -> float:
    """The lowest score threshold with at most so many false positives per scan; infinite if even
    the highest score has more.

    Args:
        curves: each with its number of scans, taken together as if they were of one set of scans.
    """
    thresholds = np.unique(np.concatenate([curve.threshold for curve, _ in curves]))[::-1]
    false = np.zeros(len(thresholds))
    for curve, scans in curves:
        # Thresholds fall; a curve stays where its last point at or above the threshold is.
        last = np.searchsorted(-curve.threshold, -thresholds, side="right") - 1
        false += curve.fp_per_scan[last] * scans
    allowed = false / sum(scans for _, scans in curves) <= fp_per_scan
    return float(thresholds[allowed][-1])


def cpm(
    pooled: Pooled, weights_S: Floats | None = None, points: Sequence[float] = FP_PER_SCAN
) -> float:
    """Mean sensitivity at the operating points; NaN without objects."""
    return float(sensitivity_at(froc(pooled, weights_S), points).mean())


def mean_of_present(values: Sequence[float]) -> float:
    """Mean of the values that are no NaN; NaN if none is left."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def bootstrap_weights(num_scans: int, num_resamples: int, seed: int) -> Floats:
    """(B, S) how often each scan is drawn, with replacement, into each of B resamples of S
    scans.
    """
    random = generator(seed, "bootstrap over scans")
    drawn = random.integers(0, num_scans, (num_resamples, num_scans))
    return np.stack([np.bincount(scans, minlength=num_scans) for scans in drawn]).astype(np.float64)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; those of resamples without any object are left out.

    None if fewer than two are left.
    """
    known = [v for v in values if not np.isnan(v)]
    if len(known) < 2:
        return None
    low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return (float(low), float(high))
