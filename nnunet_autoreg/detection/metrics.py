"""Compute average precisions and free-response curves from matched detections.

Every function takes a weight per scan, so that a bootstrap resample needs no new matching: a scan
that is drawn twice weighs 2.

Shape suffix: S scans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.matching import Matched

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

RECALLS = np.linspace(0, 1, 101)
FP_PER_SCAN = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The operating points of LUNA16, whose mean sensitivity is the CPM."""


@dataclass(frozen=True)
class Pooled:
    """Hold the detections of one class over all scans, without the ignored ones.

    Attributes:
        scores: one value per detection, highest first.
        is_hit, scan: for each detection, whether it found an object, and the index of its scan.
        objects_S: number of objects of each scan.
    """

    scores: Floats
    is_hit: Bools
    scan: Ints
    objects_S: Ints  # noqa: N815

    @property
    def num_objects(self) -> int:
        """Return the number of objects in all scans."""
        return int(self.objects_S.sum())


@dataclass(frozen=True)
class Froc:
    """Hold a free-response curve: points at falling score thresholds.

    At the first point nothing is detected.

    Attributes:
        fp_per_scan: mean number of false positives per scan at each point.
        sensitivity: share of the objects that are found at each point.
        threshold: score threshold of each point; the first is infinite.
    """

    fp_per_scan: Floats
    sensitivity: Floats
    threshold: Floats


def pool(matched: Sequence[Matched]) -> Pooled:
    """Combine the matchings of one class in all scans."""
    # An empty start, because there may be no scan.
    scores = [np.zeros(0)]
    is_hit = [np.zeros(0, dtype=bool)]
    num_counted = []
    for of_scan in matched:
        counted = ~of_scan.ignored
        scores.append(of_scan.scores[counted])
        is_hit.append(of_scan.object_of[counted] >= 0)
        num_counted.append(int(counted.sum()))

    all_scores = np.concatenate(scores)
    order = np.argsort(-all_scores, kind="stable")
    return Pooled(
        scores=all_scores[order],
        is_hit=np.concatenate(is_hit)[order],
        scan=np.repeat(np.arange(len(matched)), num_counted)[order],
        objects_S=np.array([len(of_scan.objects) for of_scan in matched], dtype=np.int64),
    )


def average_precision(pooled: Pooled, weights_S: Floats | None = None) -> float:
    """Return the mean, over recalls 0, 0.01 .. 1, of the best precision at that recall or beyond.

    It is 0 without detections and NaN without objects. Recalls are compared in float32, as
    nnDetection and MONAI do: 7 of 10 does not reach 0.70 there.
    """
    weights = np.ones(len(pooled.objects_S)) if weights_S is None else weights_S
    num_objects = float(weights @ pooled.objects_S)
    if num_objects == 0:
        return float("nan")

    weight_of_detection = weights[pooled.scan]
    num_hits = np.cumsum(weight_of_detection * pooled.is_hit)
    num_false = np.cumsum(weight_of_detection * ~pooled.is_hit)

    # A resample may leave out the scans of all detections so far, so nothing is counted yet.
    precision = num_hits / np.maximum(num_hits + num_false, 1e-12)
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    # A recall that is never reached has the precision 0.
    best_beyond = np.append(best_beyond, 0.0)

    recall = (num_hits / num_objects).astype(np.float32)
    first_reaching = np.searchsorted(recall, RECALLS, side="left")
    return float(best_beyond[first_reaching].mean())


def froc(pooled: Pooled, weights_S: Floats | None = None) -> Froc:
    """Return the sensitivity against false positives per scan, scans without objects included.

    Detections of equal scores become one point. Without objects, the sensitivity is NaN.
    """
    weights = np.ones(len(pooled.objects_S)) if weights_S is None else weights_S
    weight_of_detection = weights[pooled.scan]
    last_of_score = np.zeros(0, dtype=np.int64)
    if len(pooled.scores):
        is_last = np.append(pooled.scores[1:] != pooled.scores[:-1], True)
        last_of_score = np.flatnonzero(is_last)

    num_objects = float(weights @ pooled.objects_S)
    num_scans = float(weights.sum())
    num_hits = np.cumsum(weight_of_detection * pooled.is_hit)[last_of_score]
    num_false = np.cumsum(weight_of_detection * ~pooled.is_hit)[last_of_score]
    sensitivity = np.full(len(num_hits) + 1, np.nan)
    if num_objects:
        sensitivity = np.append(0.0, num_hits / num_objects)
    return Froc(
        fp_per_scan=np.append(0.0, num_false / num_scans),
        sensitivity=sensitivity,
        threshold=np.append(np.inf, pooled.scores[last_of_score]),
    )


def sensitivity_at(curve: Froc, fp_per_scan: Sequence[float]) -> Floats:
    """Return the sensitivities at given numbers of false positives per scan.

    Between the curve's points they are interpolated linearly, as in LUNA16's evaluation. Beyond the
    last point the curve is constant; without any detection it is 0.
    """
    values = np.unique(curve.fp_per_scan)
    # Several sensitivities at one number of false positives: the last one is the highest.
    last = np.searchsorted(curve.fp_per_scan, values, side="right") - 1
    return np.interp(fp_per_scan, values, curve.sensitivity[last])


def threshold_at(curves: Sequence[tuple[Froc, int]], fp_per_scan: float) -> float:
    """Return the lowest score threshold with at most this many false positives per scan.

    It is infinite if even the highest score has more.

    Args:
        curves: curves of different scans, each with its number of scans. They are combined as if
            they were of one set of scans.
    """
    all_thresholds = np.concatenate([curve.threshold for curve, _ in curves])
    thresholds = np.unique(all_thresholds)[::-1]
    num_false = np.zeros(len(thresholds))
    for curve, num_scans in curves:
        # Thresholds fall. The last point at or above the threshold gives the curve's value.
        last = np.searchsorted(-curve.threshold, -thresholds, side="right") - 1
        num_false += curve.fp_per_scan[last] * num_scans

    num_all_scans = sum(num_scans for _, num_scans in curves)
    is_allowed = num_false / num_all_scans <= fp_per_scan
    return float(thresholds[is_allowed][-1])


def cpm(
    pooled: Pooled,
    weights_S: Floats | None = None,
    points: Sequence[float] = FP_PER_SCAN,
) -> float:
    """Return the mean sensitivity at the operating points; NaN without objects."""
    return float(sensitivity_at(froc(pooled, weights_S), points).mean())


def mean_of_present(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if none is left."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
