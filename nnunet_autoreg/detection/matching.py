"""Match detections with objects, by hit rules.

Matching is greedy, from the highest score down, as in COCO.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.detection.instances import Instances, boxes_of_ids
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Spacing

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ANY_CLASS = -1
"""The class index of a region in which detections of every class are ignored."""
DUPLICATES = ("false", "ignored")


@dataclass(frozen=True)
class HitRule:
    """Define when a detection has found an object.

    Attributes:
        kind: ``iou``: the IoU of the boxes is at least ``value``. ``mask``: the IoU of their voxels
            is at least ``value``; RibFrac uses 0.2. ``centre``: the detection's centre lies in the
            object, or in the object's box if no map is known. ``radius``: the distance between the
            centres of the boxes is at most ``value`` mm; if ``value`` is 0, at most half the
            object's largest side, which is LUNA16's rule.
        value: an IoU, or mm; 0 for ``centre``.
    """

    kind: str = "iou"
    value: float = 0.1

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}" if self.value else self.kind

    def meaning(self) -> str:
        """Return the rule for people: "an object is found from a box IoU of 0.1"."""
        if self.kind == "centre":
            return "an object is found if the centre of a detection lies in it"
        if self.kind == "radius":
            distance = f"{self.value:g} mm" if self.value else "half its size"
            return f"an object is found if the centre of a detection is within {distance}"
        compared = "mask" if self.kind == "mask" else "box"
        return f"an object is found from a {compared} IoU of {self.value:g}"


def parse_hit_rule(text: str) -> HitRule:
    """Return the rule of ``iou:0.1``, ``mask:0.2``, ``centre``, ``radius`` or ``radius:5`` (mm).

    Raises:
        UsageError: it is none of these.
    """
    kind, _, number = text.partition(":")
    try:
        value = float(number) if number else 0.0
    except ValueError:
        value = math.nan

    fits = {
        "iou": 0 < value <= 1,
        "mask": 0 < value <= 1,
        "centre": not number,
        "radius": 0 <= value < math.inf,
    }
    if not fits.get(kind, False):
        raise UsageError(
            f"hit rule '{text}' is not known; write iou:0.1 or mask:0.2 (0 to 1), centre, radius, "
            "or radius:5 (mm)",
            code="hit-rule",
        )
    return HitRule(kind, value)


@dataclass(frozen=True)
class ScanBoxes:
    """Hold the true objects and the detections of one scan.

    Attributes:
        spacing_mm: (z, y, x).
        true_boxes_G6, true_classes_G, ignored_G: objects in voxel edges, their class indices, and
            whether they are ignored.
        boxes_D6, classes_D, scores_D: detections in voxel edges, their class indices and scores.
        centre_inside_DG: whether the detection's centre is a voxel of the object.
        mask_overlap_DG: IoU of the voxels of each detection and object; None if they are not known.
    """

    name: str
    spacing_mm: Spacing
    true_boxes_G6: Floats  # noqa: N815
    true_classes_G: Ints  # noqa: N815
    ignored_G: Bools  # noqa: N815
    boxes_D6: Floats  # noqa: N815
    classes_D: Ints  # noqa: N815
    scores_D: Floats  # noqa: N815
    centre_inside_DG: Bools  # noqa: N815
    mask_overlap_DG: Floats | None = None  # noqa: N815

    @property
    def is_empty(self) -> bool:
        """Return whether the scan has no object that counts."""
        return bool(self.ignored_G.all())

    def a_voxel_longer(self) -> "ScanBoxes":
        """Return the scan with every box as nnDetection has it, one voxel longer on each axis.

        Such a box also holds the voxel before the first one. Boxes of small objects overlap more in
        this convention.
        """
        lower = np.array([1.0, 1, 1, 0, 0, 0])
        return replace(
            self,
            true_boxes_G6=self.true_boxes_G6 - lower,
            boxes_D6=self.boxes_D6 - lower,
        )


@dataclass(frozen=True)
class Matched:
    """Hold the matching of one class in one scan.

    All arrays but the last have one value per detection, highest score first.

    Attributes:
        detections: indices of the detections in the scan.
        scores: their scores.
        object_of: index, in the scan, of the object found; -1 for none.
        ignored: whether a detection is neither a hit nor false. It lies on an ignored object, or it
            is a further detection of an object and those do not count.
        objects: indices, in the scan, of the objects that count.
    """

    detections: Ints
    scores: Floats
    object_of: Ints
    ignored: Bools
    objects: Ints


def scan_boxes(
    name: str,
    spacing_mm: Spacing,
    true: tuple[Any, Any, Any],
    found: tuple[Any, Any, Any],
    ids_ZYX: NDArray[Any] | None = None,
    ids: Sequence[int] = (),
    uncounted_ZYX: NDArray[np.bool_] | None = None,
) -> ScanBoxes:
    """Combine the objects and the detections of a scan.

    Args:
        true: boxes (G, 6), class indices (G,), and whether each object is ignored (G,).
        found: boxes (D, 6), class indices (D,), and scores (D,).
        ids_ZYX: map of the objects, in which they have ``ids``. It decides whether a detection's
            centre lies in an object; if it is None, the boxes of the objects decide.
        uncounted_ZYX: True for voxels in which nothing counts. Each connected part of them becomes
            an ignored object of any class.
    """
    true_boxes = np.asarray(true[0], dtype=np.float64).reshape(-1, 6)
    true_classes = np.asarray(true[1], dtype=np.int64)
    ignored = np.asarray(true[2], dtype=bool)
    boxes = np.asarray(found[0], dtype=np.float64).reshape(-1, 6)

    middle = (boxes[:, :3] + boxes[:, 3:]) / 2  # (D, 3)
    if ids_ZYX is None:
        is_above = middle[:, None] >= true_boxes[None, :, :3]  # (D, G, 3)
        is_below = middle[:, None] < true_boxes[None, :, 3:]
        inside = (is_above & is_below).all(-1)
    else:
        id_at_centre_D = _values_at(ids_ZYX, middle)
        inside = id_at_centre_D[:, None] == np.asarray(ids, dtype=np.int64)[None]  # (D, G)

    if uncounted_ZYX is not None and uncounted_ZYX.any():
        parts = cc3d.connected_components(uncounted_ZYX, connectivity=26)
        regions = boxes_of_ids(parts)
        part_at_centre_D = _values_at(parts, middle)
        in_region = part_at_centre_D[:, None] == np.array(list(regions))[None]  # (D, regions)
        true_boxes = np.concatenate([true_boxes, [box for box, _ in regions.values()]])
        true_classes = np.concatenate([true_classes, np.full(len(regions), ANY_CLASS)])
        ignored = np.concatenate([ignored, np.ones(len(regions), dtype=bool)])
        inside = np.concatenate([inside, in_region], axis=1)

    return ScanBoxes(
        name=name,
        spacing_mm=spacing_mm,
        true_boxes_G6=true_boxes,
        true_classes_G=true_classes,
        ignored_G=ignored,
        boxes_D6=boxes,
        classes_D=np.asarray(found[1], dtype=np.int64),
        scores_D=np.asarray(found[2], dtype=np.float64),
        centre_inside_DG=np.asarray(inside, dtype=bool),
    )


def scan_of_instances(
    name: str,
    spacing_mm: Spacing,
    instances: Instances,
    found: tuple[Any, Any, Any],
    uncounted_ZYX: NDArray[np.bool_] | None = None,
) -> ScanBoxes:
    """Combine the objects of a scan and its detections.

    Args:
        found, uncounted_ZYX: see ``scan_boxes``.
    """
    objects = instances.objects
    true = (
        [item.box_zyx for item in objects],
        [item.class_index for item in objects],
        [item.ignored for item in objects],
    )
    ids = [item.id for item in objects]
    return scan_boxes(name, spacing_mm, true, found, instances.ids_ZYX, ids, uncounted_ZYX)


def _values_at(array_ZYX: NDArray[Any], points_N3: Floats) -> NDArray[Any]:
    """Return the values (N,) of the voxels that hold the points."""
    voxels = np.floor(points_N3).astype(np.int64)
    z, y, x = np.clip(voxels, 0, np.array(array_ZYX.shape) - 1).T
    return np.asarray(array_ZYX[z, y, x])


def mask_overlaps(
    found_ZYX: NDArray[Any],
    found_ids: Sequence[int],
    true_ZYX: NDArray[Any],
    true_ids: Sequence[int],
) -> Floats:
    """Return the IoU (D, G) of the voxels that have each id in two maps of one shape.

    It is 0 for an id without any voxel.
    """
    # Most voxels of an image are 0 in one of the maps. They are left out before anything is sorted
    # or copied as larger numbers.
    in_both_ZYX = (found_ZYX != 0) & (true_ZYX != 0)
    base = int(true_ZYX.max(initial=0)) + 1
    # One number for every pair of ids.
    pair_ids = found_ZYX[in_both_ZYX].astype(np.int64) * base + true_ZYX[in_both_ZYX]
    pairs, counts = np.unique(pair_ids, return_counts=True)
    common_of_pair = dict(zip(pairs.tolist(), counts.tolist(), strict=True))

    found_size = np.bincount(found_ZYX[found_ZYX != 0])
    true_size = np.bincount(true_ZYX[true_ZYX != 0])
    overlap = np.zeros((len(found_ids), len(true_ids)))
    for d, i in enumerate(found_ids):
        for g, j in enumerate(true_ids):
            common = common_of_pair.get(i * base + j, 0)
            if common:
                overlap[d, g] = common / (found_size[i] + true_size[j] - common)
    return overlap


def overlaps(a_N6: Floats, b_M6: Floats) -> Floats:
    """Return the IoU (N, M) of every pair of boxes, in float64."""
    a = torch.from_numpy(np.asarray(a_N6, np.float64))
    b = torch.from_numpy(np.asarray(b_M6, np.float64))
    return bx.iou(a, b).numpy()


def largest_sides_mm(boxes_N6: Floats, spacing_mm: Spacing) -> Floats:
    """Return the largest side of each box in mm, (N,)."""
    sides_mm = (boxes_N6[:, 3:] - boxes_N6[:, :3]) * np.array(spacing_mm)  # (N, 3)
    return np.asarray(sides_mm.max(1, initial=0.0))


def distances_mm(scan: ScanBoxes) -> Floats:
    """Return the distances (D, G) between the centres of detections and objects, in mm."""
    centres_mm = []
    for boxes_N6 in (scan.boxes_D6, scan.true_boxes_G6):
        centres_N3 = (boxes_N6[:, :3] + boxes_N6[:, 3:]) / 2
        centres_mm.append(centres_N3 * np.array(scan.spacing_mm))

    found_D3, true_G3 = centres_mm
    differences = found_D3[:, None] - true_G3[None]  # (D, G, 3)
    return np.asarray(np.linalg.norm(differences, axis=-1))


def hits(scan: ScanBoxes, rule: HitRule) -> tuple[Bools, Floats]:
    """Return whether each detection would hit each object, and how well.

    Classes are not compared. A region in which nothing counts is hit if the detection's centre lies
    in it.

    Returns:
        Whether there is a hit (D, G), and its quality (D, G): a larger value is a better hit.

    Raises:
        UsageError: the rule needs voxels, and only boxes are known.
    """
    if rule.kind in ("iou", "mask"):
        if rule.kind == "iou":
            quality = overlaps(scan.boxes_D6, scan.true_boxes_G6)
        elif scan.mask_overlap_DG is not None:
            quality = scan.mask_overlap_DG
        else:
            raise UsageError(
                f"hit rule {rule}: the voxels of the objects of {scan.name} are not known; use "
                "iou:T",
                code="hit-rule-without-voxels",
            )
        # Equal boxes reach a threshold of 1, even if their IoU is rounded.
        hit = quality >= min(rule.value, 1 - 1e-9)
    else:
        away_mm = distances_mm(scan)
        quality = 1 / (1 + away_mm)
        if rule.kind == "centre":
            hit = scan.centre_inside_DG
        else:
            half_sides_mm = largest_sides_mm(scan.true_boxes_G6, scan.spacing_mm) / 2
            hit = away_mm <= (rule.value or half_sides_mm[None])

    # On an ignored object the centre is enough, regardless of the rule.
    hit = hit | (scan.ignored_G[None] & scan.centre_inside_DG)
    # A region is not an object. Its box means nothing, because it may be the whole image.
    is_region = scan.true_classes_G == ANY_CLASS
    return np.where(is_region[None], scan.centre_inside_DG, hit), quality


def match_scan(
    scan: ScanBoxes,
    class_index: int,
    rule: HitRule,
    *,
    duplicates: str = "false",
    max_detections: int = 100,
    ignored_objects: Bools | None = None,
    ignored_if_unmatched: Bools | None = None,
) -> Matched:
    """Match the detections of one class with its objects.

    Each detection takes the best object that is still free. An ignored object takes any number of
    detections.

    Args:
        duplicates: whether a further detection of an object that was found already is a ``false``
            positive or ``ignored``.
        max_detections: largest number of detections; the highest scores count.
        ignored_objects: (G,) further objects that do not count here, such as those of another size.
        ignored_if_unmatched: (D,) detections that are not false positives if they hit nothing.
    """
    hit, quality = hits(scan, rule)
    ignored = scan.ignored_G if ignored_objects is None else scan.ignored_G | ignored_objects
    is_region = (scan.true_classes_G == ANY_CLASS) & scan.ignored_G
    is_own = (scan.true_classes_G == class_index) | is_region
    hit = hit & is_own[None]

    of_class = np.flatnonzero(scan.classes_D == class_index)
    # The highest score chooses first.
    by_score = np.argsort(-scan.scores_D[of_class], kind="stable")
    order = of_class[by_score][:max_detections]
    is_free = is_own & ~ignored
    object_of = np.full(len(order), -1, dtype=np.int64)
    is_ignored = np.zeros(len(order), dtype=bool)
    for n, d in enumerate(order):
        candidates = np.flatnonzero(hit[d] & is_free)
        if len(candidates):
            best = candidates[quality[d, candidates].argmax()]
            object_of[n] = best
            is_free[best] = False
            continue
        on_ignored = bool((hit[d] & ignored).any())
        is_duplicate = bool((hit[d] & ~ignored).any())
        may_be_unmatched = ignored_if_unmatched is not None and bool(ignored_if_unmatched[d])
        is_ignored[n] = on_ignored or (duplicates == "ignored" and is_duplicate) or may_be_unmatched

    return Matched(
        detections=order,
        scores=scan.scores_D[order],
        object_of=object_of,
        ignored=is_ignored,
        objects=np.flatnonzero(is_own & ~ignored),
    )
