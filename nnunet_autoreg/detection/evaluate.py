"""All figures of an evaluation, from what is there and what was found in every scan."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import DUPLICATES, HitRule, Matched, ScanBoxes, match_scan
from nnunet_autoreg.detection.metrics import (
    FP_PER_SCAN,
    Bools,
    Floats,
    Froc,
    Pooled,
    average_precision,
    bootstrap_weights,
    cpm,
    froc,
    interval,
    mean_of_present,
    pool,
    sensitivity_at,
    threshold_at,
)
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.records import to_jsonable

MAP_IOUS = tuple(round(0.1 + 0.05 * i, 2) for i in range(9))
MAP_NAME = "0.1:0.5:0.05"
USUAL_HIT = HitRule()
FEWEST_FOR_STRATA = 9
FORMAT, VERSION = "nnunet_autoreg.detection_evaluation", 1


@dataclass(frozen=True)
class EvaluationSettings:
    """How to count.

    Attributes:
        ious: IoUs of the average precisions; the mean over 0.1 to 0.5 comes with them.
        hit: rule of the FROC curve, the operating points, the sizes and the list of objects.
        duplicates: a further detection of one object is ``false`` or ``ignored``.
        max_detections: per scan and class; the highest scores count.
        fp_per_scan: operating points.
        size_edges_mm: borders between strata of the largest side; thirds of the objects if None, no
            strata if empty.
        num_resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.
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
    """Raise a ``UsageError`` for values that cannot be."""
    if not settings.ious or not all(0 < v <= 1 for v in settings.ious):
        raise UsageError(
            f"IoUs {', '.join(f'{v:g}' for v in settings.ious)}: each must be greater than 0 and "
            "at most 1"
        )
    if settings.duplicates not in DUPLICATES:
        raise UsageError(f"duplicates '{settings.duplicates}': write false or ignored")
    if settings.max_detections < 1 or settings.num_resamples < 0:
        raise UsageError("at least 1 detection per scan, and 0 or more resamples, are needed")
    if not settings.fp_per_scan or not all(0 < v < math.inf for v in settings.fp_per_scan):
        raise UsageError("false positives per scan must be finite and greater than 0")
    edges = settings.size_edges_mm or ()
    if any(e <= 0 for e in edges) or list(edges) != sorted(set(edges)):
        raise UsageError("borders of sizes must be greater than 0 mm and rise")


class _Counting:
    """The matchings of every class, made when they are asked for."""

    def __init__(
        self, scans: Sequence[ScanBoxes], places: Sequence[int], settings: EvaluationSettings
    ):
        self.scans, self.places, self.settings = scans, places, settings
        # One scan drawn again and again is always the same scan: no interval.
        resamples = settings.num_resamples if len(scans) > 1 else 0
        self.resamples: list[Floats] = (
            list(bootstrap_weights(len(scans), resamples, settings.seed)) if resamples else []
        )

    def matched(
        self, place: int, rule: HitRule, excused: Sequence[dict[str, Bools]] = ()
    ) -> list[Matched]:
        """By scan; ``excused`` holds further arguments of each."""
        options: dict[str, Any] = {
            "duplicates": self.settings.duplicates,
            "max_detections": self.settings.max_detections,
        }
        each: list[dict[str, Any]] = [{**options, **more} for more in excused] or [options] * len(
            self.scans
        )
        return [
            match_scan(scan, place, rule, **of_scan)
            for scan, of_scan in zip(self.scans, each, strict=True)
        ]

    def pooled(self, rule: HitRule) -> dict[int, Pooled]:
        return {place: pool(self.matched(place, rule)) for place in self.places}

    def over_classes(
        self, pooled: dict[int, Pooled], measure: Callable[..., float]
    ) -> dict[str, Any]:
        """The measure of every class, over all scans and over every resample of them."""
        return {
            "values": {p: measure(found) for p, found in pooled.items()},
            "resampled": [
                {p: measure(found, w) for p, found in pooled.items()} for w in self.resamples
            ],
        }


def evaluate(
    scans: Sequence[ScanBoxes], classes: Sequence[ObjectClass], settings: EvaluationSettings
) -> dict[str, Any]:
    """Everything that is written as JSON; figures in plain numbers, None where there is nothing to
    measure.

    Raises:
        UsageError: settings that cannot be.
        ObjectsError: no scan.
    """
    check_settings(settings)
    if not scans:
        raise ObjectsError("there is no scan to evaluate")
    number = {
        p: sum(int(((s.true_places_G == p) & ~s.ignored_G).sum()) for s in scans)
        for p in range(len(classes))
    }
    present = [p for p in number if number[p]]
    counting = _Counting(scans, present, settings)
    names = [kind.name for kind in classes]
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": {**to_jsonable(settings), "hit": str(settings.hit)},
        "scans": _scans(scans),
        "classes": {
            kind.name: _of_class(counting, p, kind, number[p]) for p, kind in enumerate(classes)
        },
        "absent_classes": [name for p, name in enumerate(names) if not number[p]],
        **_average_precisions(counting, names),
        "froc": _froc(counting, names),
        "sizes": _sizes(counting, names),
    }


def _scans(scans: Sequence[ScanBoxes]) -> dict[str, Any]:
    empty = sum(scan.is_empty for scan in scans)
    return {
        "number": len(scans),
        "positive": len(scans) - empty,
        "empty": empty,
        "names": [scan.name for scan in scans],
    }


def _of_class(counting: _Counting, place: int, kind: ObjectClass, number: int) -> dict[str, Any]:
    scans = counting.scans
    own = [scan.true_places_G == place for scan in scans]
    matched = counting.matched(place, counting.settings.hit)
    false = sum(int(((m.object_of < 0) & ~m.excused).sum()) for m in matched)
    return {
        "label": kind.label,
        "objects": number,
        "ignored_objects": sum(
            int((o & s.ignored_G).sum()) for o, s in zip(own, scans, strict=True)
        ),
        "scans_with_objects": sum(
            bool((o & ~s.ignored_G).any()) for o, s in zip(own, scans, strict=True)
        ),
        "detections": sum(int((s.places_D == place).sum()) for s in scans),
        "false_per_scan": false / len(scans),
    }


def _average_precisions(counting: _Counting, names: Sequence[str]) -> dict[str, Any]:
    ious = sorted({*counting.settings.ious, *MAP_IOUS})
    found = {
        iou: counting.over_classes(counting.pooled(HitRule("iou", iou)), average_precision)
        for iou in ious
    }
    over = [found[iou] for iou in MAP_IOUS]
    mean = {
        "values": {p: float(np.mean([f["values"][p] for f in over])) for p in counting.places},
        "resampled": [
            {p: float(np.mean([f["resampled"][b][p] for f in over])) for p in counting.places}
            for b in range(len(counting.resamples))
        ],
    }
    return {
        "ap": {f"{iou:g}": _summary(found[iou], names) for iou in ious},
        "map": {MAP_NAME: _summary(mean, names)},
    }


def _summary(figures: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``mean`` over the classes with objects, ``per_class``, and their intervals."""
    values, resampled = figures["values"], figures["resampled"]
    return {
        "mean": _plain(mean_of_present(list(values.values()))),
        "ci95": _range([mean_of_present(list(sample.values())) for sample in resampled]),
        "per_class": {names[p]: _plain(v) for p, v in values.items()},
        "per_class_ci95": {names[p]: _range([sample[p] for sample in resampled]) for p in values},
    }


def _froc(counting: _Counting, names: Sequence[str]) -> dict[str, Any]:
    points = counting.settings.fp_per_scan
    pooled = counting.pooled(counting.settings.hit)
    curves = {p: froc(found) for p, found in pooled.items()}
    at = {p: sensitivity_at(curve, points) for p, curve in curves.items()}
    mean = np.mean(list(at.values()), axis=0).tolist() if at else [None] * len(points)

    def measure(found: Pooled, weights: Floats | None = None) -> float:
        return cpm(found, weights, points)

    return {
        "hit": str(counting.settings.hit),
        "fp_per_scan": list(points),
        "cpm": _summary(counting.over_classes(pooled, measure), names),
        "sensitivity": {
            "mean": mean,
            "per_class": {names[p]: values.tolist() for p, values in at.items()},
        },
        "operating_points": {
            names[p]: [_operating_point(counting, pooled[p], curve, point) for point in points]
            for p, curve in curves.items()
        },
        "curve": {
            name: _curve(
                curves[p] if p in curves else froc(pool(counting.matched(p, counting.settings.hit)))
            )
            for p, name in enumerate(names)
        },
    }


def _curve(curve: Froc) -> dict[str, list[float | None]]:
    """Of a class without objects, too: its sensitivity is null, but its false positives count for
    whoever sets a threshold.
    """
    return {
        name: [_plain(value) for value in getattr(curve, name)]
        for name in ("fp_per_scan", "sensitivity", "threshold")
    }


def _operating_point(
    counting: _Counting, pooled: Pooled, curve: Froc, point: float
) -> dict[str, Any]:
    """What the threshold of so many false positives per scan gives, these apart for scans with and
    without any object.
    """
    threshold = threshold_at([(curve, 1)], point)
    shown = pooled.scores >= threshold
    empty = np.array([scan.is_empty for scan in counting.scans])
    false = np.bincount(pooled.scan[shown & ~pooled.is_hit], minlength=len(empty))
    return {
        "fp_per_scan_at_most": point,
        "threshold": _plain(threshold),
        "sensitivity": float((shown & pooled.is_hit).sum()) / pooled.num_objects,
        "fp_per_scan": float(false.mean()),
        "fp_per_positive_scan": float(false[~empty].mean()) if (~empty).any() else None,
        "fp_per_empty_scan": float(false[empty].mean()) if empty.any() else None,
    }


def largest_sides_mm(boxes_N6: Floats, scan: ScanBoxes) -> Floats:
    """(N,) the largest side of each box."""
    return np.asarray(
        ((boxes_N6[:, 3:] - boxes_N6[:, :3]) * np.array(scan.spacing_mm)).max(1, initial=0.0)
    )


def _sizes(counting: _Counting, names: Sequence[str]) -> dict[str, Any]:
    """AP and sensitivity by the objects' largest side: other objects are ignored, and so are false
    positives of other sizes.
    """
    true = [largest_sides_mm(s.true_boxes_G6, s) for s in counting.scans]
    found = [largest_sides_mm(s.boxes_D6, s) for s in counting.scans]
    counted = np.concatenate(
        [sides[~s.ignored_G] for sides, s in zip(true, counting.scans, strict=True)]
    )
    edges = counting.settings.size_edges_mm
    if edges is None:
        thirds = (
            np.percentile(counted, [100 / 3, 200 / 3]) if len(counted) >= FEWEST_FOR_STRATA else []
        )
        edges = tuple(sorted({round(float(v), 1) for v in thirds} - {0.0}))
    strata = []
    for low, high in zip((0.0, *edges), (*edges, math.inf), strict=True) if edges else ():
        other_objects, other_found = (
            [(sides < low) | (sides >= high) for sides in boxes] for boxes in (true, found)
        )
        strata.append(_stratum(counting, names, (low, high), other_objects, other_found))
    return {"measure": "largest side, mm", "hit": str(counting.settings.hit), "strata": strata}


def _stratum(
    counting: _Counting,
    names: Sequence[str],
    ends: tuple[float, float],
    other_objects: Sequence[Bools],
    other_found: Sequence[Bools],
) -> dict[str, Any]:
    per_class = {}
    for place in counting.places:
        excused = [
            {"excused_objects": g, "excused_if_unmatched": d}
            for g, d in zip(other_objects, other_found, strict=True)
        ]
        pooled = pool(counting.matched(place, counting.settings.hit, excused))
        if pooled.num_objects:
            per_class[names[place]] = {
                "objects": pooled.num_objects,
                "ap": average_precision(pooled),
                "sensitivity": float(pooled.is_hit.sum()) / pooled.num_objects,
            }
    return {
        "from_mm": ends[0],
        "to_mm": _plain(ends[1]),
        "objects": sum(v["objects"] for v in per_class.values()),
        "mean_ap": _plain(mean_of_present([v["ap"] for v in per_class.values()])),
        "per_class": per_class,
    }


def _plain(value: float) -> float | None:
    """A number that JSON knows: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def _range(values: Sequence[float]) -> list[float] | None:
    found = interval(values)
    return list(found) if found else None
