"""Which detection found which object: hit rules, and greedy matching from the highest score down,
as in COCO.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Spacing

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ANY_CLASS = -1
"""The place of an ignored region that excuses detections of every class."""
DUPLICATES = ("false", "ignored")


@dataclass(frozen=True)
class HitRule:
    """When a detection counts as having found an object.

    Attributes:
        kind: ``iou``: the boxes overlap by at least ``value``. ``centre``: its centre lies in the
            object; in the object's box, where no map is known. ``radius``: its centre is at most
            ``value`` mm from that of the object's box, and if ``value`` is 0 at most half the
            object's largest side, which is LUNA16's rule. ``mask``: the IoU of their voxels, not of
            their boxes, is at least ``value``, as RibFrac has it with 0.2.
    """

    kind: str = "iou"
    value: float = 0.1

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}" if self.value else self.kind


def parse_hit_rule(text: str) -> HitRule:
    """``iou:0.1``, ``mask:0.2``, ``centre``, ``radius`` or ``radius:5`` (mm).

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
            "or radius:5 (mm)"
        )
    return HitRule(kind, value)


@dataclass(frozen=True)
class ScanBoxes:
    """What is there and what was found in one scan.

    Attributes:
        spacing_mm: (z, y, x).
        true_boxes_G6, true_places_G, ignored_G: objects, the place of their class, and whether they
            do not count.
        boxes_D6, places_D, scores_D: detections.
        centre_inside_DG: whether the detection's centre is a voxel of the object.
        mask_overlap_DG: IoU of the voxels of each detection and object; None where they are not
            known.
    """

    name: str
    spacing_mm: Spacing
    true_boxes_G6: Floats  # noqa: N815
    true_places_G: Ints  # noqa: N815
    ignored_G: Bools  # noqa: N815
    boxes_D6: Floats  # noqa: N815
    places_D: Ints  # noqa: N815
    scores_D: Floats  # noqa: N815
    centre_inside_DG: Bools  # noqa: N815
    mask_overlap_DG: Floats | None = None  # noqa: N815

    @property
    def is_empty(self) -> bool:
        """Whether it holds no object that counts."""
        return bool(self.ignored_G.all())

    def a_voxel_longer(self) -> "ScanBoxes":
        """With every box, true or found, as nnDetection has it: from the voxel before the first to
        the last, one voxel longer on each axis. Small objects overlap more that way.
        """
        lower = np.array([1.0, 1, 1, 0, 0, 0])
        return replace(
            self, true_boxes_G6=self.true_boxes_G6 - lower, boxes_D6=self.boxes_D6 - lower
        )


@dataclass(frozen=True)
class Matched:
    """The matching of one class in one scan; all arrays but the last by detection, highest score
    first.

    Attributes:
        detections: their numbers in the scan.
        object_of: number, in the scan, of the object found; -1 for none.
        excused: neither a hit nor false: on an ignored object, or a repetition that does not count.
        objects: numbers, in the scan, of the objects that count.
    """

    detections: Ints
    scores: Floats
    object_of: Ints
    excused: Bools
    objects: Ints


def overlaps(a_N6: Floats, b_M6: Floats) -> Floats:
    """(N, M) IoU, float64."""
    return bx.iou(
        torch.from_numpy(np.asarray(a_N6, np.float64)),
        torch.from_numpy(np.asarray(b_M6, np.float64)),
    ).numpy()


def distances_mm(scan: ScanBoxes) -> Floats:
    """(D, G) distances of the boxes' centres."""
    found, true = (
        (b[:, :3] + b[:, 3:]) / 2 * np.array(scan.spacing_mm)
        for b in (scan.boxes_D6, scan.true_boxes_G6)
    )
    return np.asarray(np.linalg.norm(found[:, None] - true[None], axis=-1))


def hits(scan: ScanBoxes, rule: HitRule) -> tuple[Bools, Floats]:
    """(D, G) whether each detection would be a hit of each object, whatever the classes, and how
    good a one (more is better); of a region in which nothing counts, whether its centre lies in it.

    Raises:
        UsageError: the rule asks for voxels, and only boxes are known.
    """
    if rule.kind in ("iou", "mask"):
        quality = (
            overlaps(scan.boxes_D6, scan.true_boxes_G6)
            if rule.kind == "iou"
            else scan.mask_overlap_DG
        )
        if quality is None:
            raise UsageError(
                f"hit rule {rule}: the voxels of {scan.name}'s objects are not known; take iou:T"
            )
        hit = quality >= min(rule.value, 1 - 1e-9)
    else:
        away = distances_mm(scan)
        quality = 1 / (1 + away)
        if rule.kind == "centre":
            hit = scan.centre_inside_DG
        else:
            sides = (scan.true_boxes_G6[:, 3:] - scan.true_boxes_G6[:, :3]) * np.array(
                scan.spacing_mm
            )
            hit = away <= (rule.value or sides.max(1, initial=0.0)[None] / 2)
    hit = hit | (scan.ignored_G[None] & scan.centre_inside_DG)
    # A region is no object: its box may be the whole image, and says nothing.
    return np.where((scan.true_places_G == ANY_CLASS)[None], scan.centre_inside_DG, hit), quality


def match_scan(
    scan: ScanBoxes,
    place: int,
    rule: HitRule,
    *,
    duplicates: str = "false",
    max_detections: int = 100,
    excused_objects: Bools | None = None,
    excused_if_unmatched: Bools | None = None,
) -> Matched:
    """Match the detections of one class with its objects: each takes the best object still free; an
    ignored one takes any number.

    Args:
        duplicates: what a further detection of an object found already is: ``false`` positive or
            ``ignored``.
        max_detections: only the highest scores count.
        excused_objects: (G,) further objects that do not count here, e.g. those of another size.
        excused_if_unmatched: (D,) detections that are no false positives here.
    """
    hit, quality = hits(scan, rule)
    ignored = scan.ignored_G if excused_objects is None else scan.ignored_G | excused_objects
    own = (scan.true_places_G == place) | ((scan.true_places_G == ANY_CLASS) & scan.ignored_G)
    hit = hit & own[None]
    mine = np.flatnonzero(scan.places_D == place)
    order = mine[np.argsort(-scan.scores_D[mine], kind="stable")][:max_detections]
    free = own & ~ignored
    object_of = np.full(len(order), -1, dtype=np.int64)
    excused = np.zeros(len(order), dtype=bool)
    for rank, d in enumerate(order):
        candidates = np.flatnonzero(hit[d] & free)
        if len(candidates):
            best = candidates[quality[d, candidates].argmax()]
            object_of[rank], free[best] = best, False
        else:
            repeated = duplicates == "ignored" and bool((hit[d] & ~ignored).any())
            apart = excused_if_unmatched is not None and bool(excused_if_unmatched[d])
            excused[rank] = bool((hit[d] & ignored).any()) or repeated or apart
    return Matched(order, scan.scores_D[order], object_of, excused, np.flatnonzero(own & ~ignored))
