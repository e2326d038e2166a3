"""Compute all figures of an evaluation from the true objects and the detections of every scan."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import (
    DUPLICATES,
    HitRule,
    Matched,
    ScanBoxes,
    largest_sides_mm,
    match_scan,
)
from nnunet_autoreg.detection.metrics import (
    FP_PER_SCAN,
    Bools,
    Floats,
    Froc,
    Pooled,
    average_precision,
    cpm,
    froc,
    mean_of_present,
    pool,
    sensitivity_at,
    threshold_at,
)
from nnunet_autoreg.downstream.bootstrap import bootstrap_weights, interval
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.records import to_jsonable

MAP_IOUS = tuple(round(0.1 + 0.05 * i, 2) for i in range(9))
MAP_NAME = "0.1:0.5:0.05"
USUAL_HIT = HitRule()
FEWEST_FOR_STRATA = 9
FORMAT, VERSION = "nnunet_autoreg.detection_evaluation", 1


@dataclass(frozen=True)
class EvaluationSettings:
    """Hold the rules of an evaluation.

    Attributes:
        ious: IoUs of the average precisions; the mean over 0.1 to 0.5 is always added.
        hit: rule of the FROC curve, the operating points, the sizes and the list of objects.
        duplicates: a further detection of one object is ``false`` or ``ignored``.
        max_detections: largest number per scan and class; the highest scores count.
        fp_per_scan: false positives per scan of the operating points.
        size_edges_mm: borders between strata by the largest side. Each stratum has a third of the
            objects if None; there are no strata if empty.
        num_resamples: number of resamples of the bootstrap; 0 for no intervals.
        seed: random seed of the bootstrap.
    """

    ious: tuple[float, ...] = (0.1, 0.5)
    hit: HitRule = USUAL_HIT
    duplicates: str = "false"
    max_detections: int = 100
    fp_per_scan: tuple[float, ...] = FP_PER_SCAN
    size_edges_mm: tuple[float, ...] | None = None
    num_resamples: int = 1000
    seed: int = 0


def check_settings(settings: EvaluationSettings) -> None:
    """Raise a ``UsageError`` for impossible values."""
    if not settings.ious or not all(0 < v <= 1 for v in settings.ious):
        listed = ", ".join(f"{v:g}" for v in settings.ious)
        raise UsageError(
            f"IoUs {listed}: each must be greater than 0 and at most 1",
            code="evaluation-iou",
        )
    if settings.duplicates not in DUPLICATES:
        raise UsageError(
            f"duplicates '{settings.duplicates}': write false or ignored",
            code="evaluation-duplicates",
        )
    if settings.max_detections < 1:
        raise UsageError(
            f"{settings.max_detections} detections per scan: at least 1 is needed",
            code="evaluation-max-detections",
        )
    if settings.num_resamples < 0:
        raise UsageError(
            f"{settings.num_resamples} resamples: 0 or more are needed",
            code="evaluation-resamples",
        )
    if not settings.fp_per_scan or not all(0 < v < math.inf for v in settings.fp_per_scan):
        listed = ", ".join(f"{v:g}" for v in settings.fp_per_scan)
        raise UsageError(
            f"false positives per scan {listed}: each must be finite and greater than 0",
            code="evaluation-fp-per-scan",
        )

    edges = settings.size_edges_mm or ()
    if any(e <= 0 for e in edges) or list(edges) != sorted(set(edges)):
        listed = ", ".join(f"{e:g}" for e in edges)
        raise UsageError(
            f"borders of sizes {listed} mm: each must be greater than 0 and than the previous one",
            code="evaluation-sizes",
        )


@dataclass(frozen=True)
class _Measured:
    """Hold a measure of every class with objects: class index -> value.

    Attributes:
        values: over all scans.
        resampled: the same for every bootstrap resample of the scans.
    """

    values: dict[int, float]
    resampled: list[dict[int, float]]


class _Matchings:
    """Match the detections of every class by one hit rule after the other."""

    def __init__(
        self,
        scans: Sequence[ScanBoxes],
        present: Sequence[int],
        settings: EvaluationSettings,
    ):
        self.scans = scans
        self.settings = settings
        # Indices of the classes with objects.
        self.present = present
        # A single scan has no interval, because every resample would be that scan.
        self.resamples: list[Floats] = []  # each (S,)
        if settings.num_resamples and len(scans) > 1:
            weights_BS = bootstrap_weights(len(scans), settings.num_resamples, settings.seed)
            self.resamples = list(weights_BS)

    def matched(
        self,
        class_index: int,
        rule: HitRule,
        ignored: Sequence[dict[str, Bools]] = (),
    ) -> list[Matched]:
        """Return the matching of every scan; ``ignored`` holds further arguments for each."""
        found = []
        for number, scan in enumerate(self.scans):
            more: dict[str, Any] = dict(ignored[number]) if ignored else {}
            found.append(
                match_scan(
                    scan,
                    class_index,
                    rule,
                    duplicates=self.settings.duplicates,
                    max_detections=self.settings.max_detections,
                    **more,
                ),
            )
        return found

    def pooled(self, rule: HitRule) -> dict[int, Pooled]:
        """Return the pooled detections of every class with objects."""
        return {index: pool(self.matched(index, rule)) for index in self.present}

    def over_classes(
        self,
        pooled: dict[int, Pooled],
        measure: Callable[..., float],
    ) -> _Measured:
        """Return a measure of every class, over all scans and over every resample of them.

        Args:
            measure: takes the pooled detections, and the weights (S,) of the scans in a resample.
        """
        resampled = []
        for weights_S in self.resamples:
            resampled.append({index: measure(found, weights_S) for index, found in pooled.items()})
        values = {index: measure(found) for index, found in pooled.items()}
        return _Measured(values, resampled)


def evaluate(
    scans: Sequence[ScanBoxes],
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Return all figures, as they are written as JSON.

    None in place of a number means that there is nothing to measure.

    Raises:
        UsageError: the settings are impossible.
        ObjectsError: there is no scan.
    """
    check_settings(settings)
    if not scans:
        raise ObjectsError("there is no scan to evaluate", code="evaluation-no-scan")

    present = _present(scans, len(classes))
    matchings = _Matchings(scans, present, settings)
    names = [kind.name for kind in classes]
    num_empty = sum(scan.is_empty for scan in scans)
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": {**to_jsonable(settings), "hit": str(settings.hit)},
        "scans": {
            "number": len(scans),
            "positive": len(scans) - num_empty,
            "empty": num_empty,
            "names": [scan.name for scan in scans],
        },
        "classes": _numbers(matchings, classes),
        "absent_classes": [name for index, name in enumerate(names) if index not in present],
        **_average_precisions(matchings, names),
        "froc": _froc(matchings, names),
        "sizes": _sizes(matchings, names),
    }


def _present(scans: Sequence[ScanBoxes], num_classes: int) -> list[int]:
    """Return the indices of the classes with objects that count."""
    found: set[int] = set()
    for scan in scans:
        found.update(scan.true_classes_G[~scan.ignored_G].tolist())
    return [index for index in range(num_classes) if index in found]


def _numbers(matchings: _Matchings, classes: Sequence[ObjectClass]) -> dict[str, Any]:
    """Return the numbers of objects and detections of every class."""
    numbers = {}
    for index, kind in enumerate(classes):
        num_objects = 0
        num_ignored = 0
        num_with_objects = 0
        num_detections = 0
        for scan in matchings.scans:
            is_own = scan.true_classes_G == index
            is_counted = is_own & ~scan.ignored_G
            num_objects += int(is_counted.sum())
            num_ignored += int((is_own & scan.ignored_G).sum())
            num_with_objects += bool(is_counted.any())
            num_detections += int((scan.classes_D == index).sum())

        num_false = 0
        for matched in matchings.matched(index, matchings.settings.hit):
            is_false = (matched.object_of < 0) & ~matched.ignored
            num_false += int(is_false.sum())
        numbers[kind.name] = {
            "label": kind.label,
            "objects": num_objects,
            "ignored_objects": num_ignored,
            "scans_with_objects": num_with_objects,
            "detections": num_detections,
            "false_per_scan": num_false / len(matchings.scans),
        }
    return numbers


def _average_precisions(matchings: _Matchings, names: Sequence[str]) -> dict[str, Any]:
    """Return the average precision at every IoU, and the mean over the IoUs from 0.1 to 0.5."""
    ious = sorted({*matchings.settings.ious, *MAP_IOUS})
    found = {}
    for iou in ious:
        pooled = matchings.pooled(HitRule("iou", iou))
        found[iou] = matchings.over_classes(pooled, average_precision)

    # The mean over the IoUs, of every class and in every resample.
    averaged = [found[iou] for iou in MAP_IOUS]
    mean = _Measured({}, [])
    for index in matchings.present:
        of_ious = [of_iou.values[index] for of_iou in averaged]
        mean.values[index] = float(np.mean(of_ious))
    for b in range(len(matchings.resamples)):
        sample = {}
        for index in matchings.present:
            of_ious = [of_iou.resampled[b][index] for of_iou in averaged]
            sample[index] = float(np.mean(of_ious))
        mean.resampled.append(sample)

    return {
        "ap": {f"{iou:g}": _summary(found[iou], names) for iou in ious},
        "map": {MAP_NAME: _summary(mean, names)},
    }


def _summary(measured: _Measured, names: Sequence[str]) -> dict[str, Any]:
    """Return ``mean`` over the classes with objects, ``per_class``, and their intervals."""
    # A class without objects in a resample is left out of its mean.
    means = [mean_of_present(list(sample.values())) for sample in measured.resampled]
    per_class = {}
    per_class_ci = {}
    for index, value in measured.values.items():
        of_resamples = [sample[index] for sample in measured.resampled]
        per_class[names[index]] = _finite_or_none(value)
        per_class_ci[names[index]] = _interval_list(of_resamples)

    mean = mean_of_present(list(measured.values.values()))
    return {
        "mean": _finite_or_none(mean),
        "ci95": _interval_list(means),
        "per_class": per_class,
        "per_class_ci95": per_class_ci,
    }


def _froc(matchings: _Matchings, names: Sequence[str]) -> dict[str, Any]:
    """Return the free-response curves, and the sensitivities at the operating points."""
    points = matchings.settings.fp_per_scan
    hit = matchings.settings.hit
    pooled = matchings.pooled(hit)
    curves = {index: froc(found) for index, found in pooled.items()}
    sensitivity = {index: sensitivity_at(curve, points) for index, curve in curves.items()}
    mean: list[Any] = [None] * len(points)
    if sensitivity:
        mean = np.mean(list(sensitivity.values()), axis=0).tolist()

    def measure(found: Pooled, weights: Floats | None = None) -> float:
        return cpm(found, weights, points)

    operating_points = {}
    plain_curves = {}
    for index, name in enumerate(names):
        if index in curves:
            curve = curves[index]
            of_class = [_operating_point(matchings, pooled[index], curve, p) for p in points]
            operating_points[name] = of_class
        else:
            # A class without objects has a curve too: its sensitivity is null, but a threshold
            # depends on its false positives.
            curve = froc(pool(matchings.matched(index, hit)))
        plain_curves[name] = {
            "fp_per_scan": [_finite_or_none(value) for value in curve.fp_per_scan],
            "sensitivity": [_finite_or_none(value) for value in curve.sensitivity],
            "threshold": [_finite_or_none(value) for value in curve.threshold],
        }

    return {
        "hit": str(hit),
        "fp_per_scan": list(points),
        "cpm": _summary(matchings.over_classes(pooled, measure), names),
        "sensitivity": {
            "mean": mean,
            "per_class": {names[index]: values.tolist() for index, values in sensitivity.items()},
        },
        "operating_points": operating_points,
        "curve": plain_curves,
    }


def _operating_point(
    matchings: _Matchings,
    pooled: Pooled,
    curve: Froc,
    point: float,
) -> dict[str, Any]:
    """Return the results of a class at the threshold for a number of false positives per scan.

    False positives are listed separately for scans with and without any object.
    """
    threshold = threshold_at([(curve, 1)], point)
    is_shown = pooled.scores >= threshold
    num_hits = int((is_shown & pooled.is_hit).sum())
    false_scans = pooled.scan[is_shown & ~pooled.is_hit]
    is_empty = np.array([scan.is_empty for scan in matchings.scans])
    num_false = np.bincount(false_scans, minlength=len(is_empty))  # (S,)
    in_positive = float(num_false[~is_empty].mean()) if (~is_empty).any() else None
    in_empty = float(num_false[is_empty].mean()) if is_empty.any() else None
    return {
        "fp_per_scan_at_most": point,
        "threshold": _finite_or_none(threshold),
        "sensitivity": num_hits / pooled.num_objects,
        "fp_per_scan": float(num_false.mean()),
        "fp_per_positive_scan": in_positive,
        "fp_per_empty_scan": in_empty,
    }


def _sizes(matchings: _Matchings, names: Sequence[str]) -> dict[str, Any]:
    """Return AP and sensitivity by the largest side of the objects.

    Objects of other sizes are ignored, and so are false positives of other sizes.
    """
    true_sides = []
    found_sides = []
    counted = []
    for scan in matchings.scans:
        sides = largest_sides_mm(scan.true_boxes_G6, scan.spacing_mm)
        true_sides.append(sides)
        counted.append(sides[~scan.ignored_G])
        found_sides.append(largest_sides_mm(scan.boxes_D6, scan.spacing_mm))

    all_counted = np.concatenate(counted)

    edges = matchings.settings.size_edges_mm
    if edges is None:
        thirds: Any = []
        if len(all_counted) >= FEWEST_FOR_STRATA:
            thirds = np.percentile(all_counted, [100 / 3, 200 / 3])
        # Readable borders; equal ones become one, and none lies at 0.
        rounded = {round(float(value), 1) for value in thirds}
        edges = tuple(sorted(rounded - {0.0}))

    strata = []
    hit = matchings.settings.hit
    borders = pairwise((0.0, *edges, math.inf)) if edges else ()
    for low, high in borders:
        ignored = []
        for of_true, of_found in zip(true_sides, found_sides, strict=True):
            ignored.append(
                {
                    "ignored_objects": (of_true < low) | (of_true >= high),
                    "ignored_if_unmatched": (of_found < low) | (of_found >= high),
                },
            )

        per_class = {}
        for index in matchings.present:
            # Only objects of this stratum count now.
            pooled = pool(matchings.matched(index, hit, ignored))
            if pooled.num_objects:
                per_class[names[index]] = {
                    "objects": pooled.num_objects,
                    "ap": average_precision(pooled),
                    "sensitivity": float(pooled.is_hit.sum()) / pooled.num_objects,
                }
        precisions = [of_class["ap"] for of_class in per_class.values()]
        strata.append(
            {
                "from_mm": low,
                "to_mm": _finite_or_none(high),
                "objects": sum(of_class["objects"] for of_class in per_class.values()),
                "mean_ap": _finite_or_none(mean_of_present(precisions)),
                "per_class": per_class,
            },
        )
    return {"measure": "largest side, mm", "hit": str(hit), "strata": strata}


def _finite_or_none(value: float) -> float | None:
    """Return a number that JSON knows: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def _interval_list(values: Sequence[float]) -> list[float] | None:
    found = interval(values)
    return list(found) if found else None


def quick_scores(scans: Sequence[ScanBoxes], num_classes: int) -> dict[str, float]:
    """Return AP at IoU 0.1 and 0.5 and the mean AP from 0.1 to 0.5, as training needs them.

    They are means over the classes that have objects, and 0 if none has any.
    """
    present = _present(scans, num_classes)
    by_iou = {}
    for iou in MAP_IOUS:
        rule = HitRule("iou", iou)
        of_classes = []
        for index in present:
            matched = [match_scan(scan, index, rule) for scan in scans]
            of_classes.append(average_precision(pool(matched)))
        by_iou[iou] = mean_of_present(of_classes)

    found = {
        "ap_0.1": by_iou[0.1],
        "ap_0.5": by_iou[0.5],
        f"map_{MAP_NAME}": float(np.mean(list(by_iou.values()))),
    }
    return {name: float(np.nan_to_num(value)) for name, value in found.items()}
