"""Scores while training: what was found in patches and scans beside what is there."""

from collections.abc import Sequence
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.evaluate import MAP_IOUS, MAP_NAME
from nnunet_autoreg.detection.instances import Instances, boxes_of_ids
from nnunet_autoreg.detection.matching import ANY_CLASS, HitRule, ScanBoxes, match_scan
from nnunet_autoreg.detection.metrics import average_precision, mean_of_present, pool
from nnunet_autoreg.geometry import Spacing

Floats = NDArray[np.float64]


def scan_boxes(
    name: str,
    spacing_mm: Spacing,
    true: tuple[Any, Any, Any],
    found: tuple[Any, Any, Any],
    ids_ZYX: NDArray[Any] | None = None,
    ids: Sequence[int] = (),
    uncounted_ZYX: NDArray[np.bool_] | None = None,
) -> ScanBoxes:
    """Objects (boxes, places, ignored) beside detections (boxes, places, scores).

    Args:
        ids_ZYX: map of the objects, in which they have ``ids``: decides whether a detection's
            centre lies in an object. Their boxes do, where it is None.
        uncounted_ZYX: where it is True nothing counts: each connected part becomes an ignored
            object of any class.
    """
    true_boxes, boxes = (
        np.asarray(b, dtype=np.float64).reshape(-1, 6) for b in (true[0], found[0])
    )
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    if ids_ZYX is None:
        inside = (
            (middle[:, None] >= true_boxes[None, :, :3])
            & (middle[:, None] < true_boxes[None, :, 3:])
        ).all(-1)
    else:
        inside = _values_at(ids_ZYX, middle)[:, None] == np.asarray(ids, dtype=np.int64)[None]
    places, ignored = np.asarray(true[1], dtype=np.int64), np.asarray(true[2], dtype=bool)
    if uncounted_ZYX is not None and uncounted_ZYX.any():
        parts = cc3d.connected_components(uncounted_ZYX, connectivity=26)
        regions = boxes_of_ids(parts)
        true_boxes = np.concatenate([true_boxes, [box for box, _ in regions.values()]])
        places = np.concatenate([places, np.full(len(regions), ANY_CLASS)])
        ignored = np.concatenate([ignored, np.ones(len(regions), dtype=bool)])
        inside = np.concatenate(
            [inside, _values_at(parts, middle)[:, None] == np.array(list(regions))[None]], axis=1
        )
    return ScanBoxes(
        name,
        spacing_mm,
        true_boxes,
        places,
        ignored,
        boxes,
        np.asarray(found[1], dtype=np.int64),
        np.asarray(found[2], dtype=np.float64),
        np.asarray(inside, dtype=bool),
    )


def _values_at(array_ZYX: NDArray[Any], points_N3: Floats) -> NDArray[Any]:
    """(N,) values of the voxels that hold the points."""
    z, y, x = np.clip(np.floor(points_N3).astype(np.int64), 0, np.array(array_ZYX.shape) - 1).T
    return np.asarray(array_ZYX[z, y, x])


def scan_of_instances(
    name: str,
    spacing_mm: Spacing,
    instances: Instances,
    found: tuple[Any, Any, Any],
    uncounted_ZYX: NDArray[np.bool_] | None = None,
) -> ScanBoxes:
    """The objects of a scan beside its detections."""
    objects = instances.objects
    true = ([o.box_zyx for o in objects], [o.place for o in objects], [o.ignored for o in objects])
    return scan_boxes(
        name, spacing_mm, true, found, instances.ids_ZYX, [o.id for o in objects], uncounted_ZYX
    )


def mask_overlaps(
    found_ZYX: NDArray[Any],
    found_ids: Sequence[int],
    true_ZYX: NDArray[Any],
    true_ids: Sequence[int],
) -> Floats:
    """(D, G) IoU of the voxels that have each id in two maps of one shape; 0 for an id without
    any.
    """
    # What is 0 in either map is most of an image: it is not sorted, nor copied as larger numbers.
    base, both_ZYX = int(true_ZYX.max(initial=0)) + 1, (found_ZYX != 0) & (true_ZYX != 0)
    pairs, counts = np.unique(
        found_ZYX[both_ZYX].astype(np.int64) * base + true_ZYX[both_ZYX], return_counts=True
    )
    common = dict(zip(pairs.tolist(), counts.tolist(), strict=True))
    found_size, true_size = (np.bincount(array[array != 0]) for array in (found_ZYX, true_ZYX))
    overlap = np.zeros((len(found_ids), len(true_ids)))
    for d, i in enumerate(found_ids):
        for g, j in enumerate(true_ids):
            both = common.get(i * base + j, 0)
            if both:
                overlap[d, g] = both / (found_size[i] + true_size[j] - both)
    return overlap


def quick_scores(scans: Sequence[ScanBoxes], num_classes: int) -> dict[str, float]:
    """AP at IoU 0.1 and 0.5 and the mean AP from 0.1 to 0.5, over the classes that occur; 0 where
    none does.
    """
    places = [
        p
        for p in range(num_classes)
        if any(((s.true_places_G == p) & ~s.ignored_G).any() for s in scans)
    ]
    by_iou = {iou: mean_of_present([_ap(scans, p, iou) for p in places]) for iou in MAP_IOUS}
    found = {
        "ap_0.1": by_iou[0.1],
        "ap_0.5": by_iou[0.5],
        f"map_{MAP_NAME}": float(np.mean(list(by_iou.values()))),
    }
    return {name: float(np.nan_to_num(value)) for name, value in found.items()}


def _ap(scans: Sequence[ScanBoxes], place: int, iou: float) -> float:
    return average_precision(pool([match_scan(scan, place, HitRule("iou", iou)) for scan in scans]))
