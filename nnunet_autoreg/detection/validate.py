"""The boxes of a fold's validation cases, in their original images, and the scores they reach."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_autoreg.detection.evaluate import MAP_NAME, EvaluationSettings, evaluate
from nnunet_autoreg.detection.geometry import (
    Preprocessing,
    StoredArray,
    preprocessing_of,
    stored_array,
)
from nnunet_autoreg.detection.infer import USUAL, Candidates, Found, ScanDetector, merge
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import ScanBoxes
from nnunet_autoreg.detection.objects import ObjectSource
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.detection.scanfile import Detection, make_scan_file, write_scan_file
from nnunet_autoreg.detection.score import quick_scores, scan_of_instances
from nnunet_autoreg.detection.thresholds import FOLD_ALL
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import atomic_path, read_json, write_json

SWEPT_IOUS = (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Overlaps tried for the boxes of one voter, as nnDetection does.

Smallest size and score are never tuned: that deletes small lesions.
"""

SLIVER_VOX = 0.01
"""A box with a shorter side is nothing: clipped away, or lost when its edges are written with four
decimals.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidatedCase:
    """A case with what was found in it, for every overlap tried; the first is the usual one."""

    by_iou: dict[float, ScanBoxes]

    @property
    def usual(self) -> ScanBoxes:
        """With the usual thinning."""
        return self.by_iou[USUAL.voter_iou]


def in_original(
    found: Found, geometry: Preprocessing, shape_vox: Size, classes: Sequence[ObjectClass]
) -> list[Detection]:
    """What was found, in voxel edges of the image as it was read, clipped to it; nothing is left of
    what lies outside.
    """
    boxes = geometry.to_original(found.boxes_N6.numpy().astype(np.float64).reshape(-1, 6))
    limit = np.array([*shape_vox, *shape_vox], dtype=np.float64)
    detections = []
    for box, score, place, votes in zip(
        np.clip(boxes, 0, limit),
        found.scores_N.tolist(),
        found.labels_N.tolist(),
        found.votes_N.tolist(),
        strict=True,
    ):
        if (box[3:] - box[:3] >= SLIVER_VOX).all():
            kind = classes[place]
            z0, y0, x0, z1, y1, x1 = (float(v) for v in box)
            detections.append(
                Detection(
                    (z0, y0, x0, z1, y1, x1),
                    kind.label,
                    kind.name,
                    min(float(score), 1.0),
                    int(votes),
                )
            )
    return detections


def as_stored(detections: Sequence[Detection], stored: StoredArray) -> list[Detection]:
    """Return detections in the reader's array with the boxes of the stored array, in which files
    count.
    """
    moved = []
    for found in detections:
        z0, y0, x0, z1, y1, x1 = (float(v) for v in stored.to_stored(found.box_zyx))
        moved.append(replace(found, box_zyx=(z0, y0, x0, z1, y1, x1)))
    return moved


def validate_cases(
    detector: ScanDetector,
    stock: Any,
    cases: Sequence[str],
    source: ObjectSource,
    plan: DetectionPlan,
    transpose_backward: Sequence[int],
    folder: Path,
    model: dict[str, Any],
) -> list[ValidatedCase]:
    """Detect in every case, and write its file of detections and its candidates into ``folder``.

    Args:
        stock: nnU-Net's dataset of the preprocessed cases.
        source: of the true objects.
        model: what the files say of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    validated = []
    for case in cases:
        data, _, _, properties = stock.load_case(case)
        image = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
        candidates, _ = detector.candidates(image)
        true = source.read(case)
        geometry = preprocessing_of(properties, as_size(image.shape[1:]), transpose_backward)
        by_iou = {}
        for iou in sorted({USUAL.voter_iou, *SWEPT_IOUS}):
            thinning = replace(detector.thinning, voter_iou=iou)
            found = in_original(
                merge(candidates, detector.num_voters, thinning),
                geometry,
                true.shape_vox,
                plan.classes,
            )
            by_iou[iou] = scan_of_instances(
                case, true.spacing_mm, true.instances, _arrays(found, plan), true.uncounted_ZYX
            )
            if iou == USUAL.voter_iou:
                stored = stored_array(properties, true.shape_vox)
                settings = {"thinning": vars(thinning), "mirrorings": detector.num_voters}
                record = make_scan_file(
                    case, stored.frame, as_stored(found, stored), plan.labels, model, settings
                )
                write_scan_file(folder / f"{case}.json", record)
        _write_candidates(folder / f"{case}_candidates.npz", candidates)
        validated.append(ValidatedCase(by_iou))
        log.info(
            "%s: %d objects, %d boxes",
            case,
            len(true.instances.objects),
            len(by_iou[USUAL.voter_iou].boxes_D6),
        )
    return validated


def _arrays(found: Sequence[Detection], plan: DetectionPlan) -> tuple[Any, Any, Any]:
    place_of = {kind.name: place for place, kind in enumerate(plan.classes)}
    return [d.box_zyx for d in found], [place_of[d.name] for d in found], [d.score for d in found]


def _write_candidates(file: Path, candidates: Candidates) -> None:
    """Before merging and in the preprocessed image, so that thinning can be tried anew; half
    precision is a thirtieth of a voxel.
    """
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            **{
                name: value.numpy().astype(np.float16 if value.is_floating_point() else np.int16)
                for name, value in vars(candidates).items()
            },
        )


def by_other_folds(file: Path, tried: dict[float, dict[str, float]]) -> dict[str, Any] | None:
    """What the overlap that is best on the other folds' cases gives on this fold's: an honest score
    for a tuned overlap.

    Args:
        file: this fold's summary; the others lie beside it as ``fold_*/validation_detection/`` has
            them.
        tried: this fold's scores by overlap.

    Returns:
        None where no other fold has been validated.
    """
    found: dict[str, dict[float, float]] = {}
    for other in sorted(file.parents[2].glob(f"fold_*/{file.parent.name}/{file.name}")):
        fold = other.parents[1]
        if (
            fold == file.parents[1] or fold.name == f"fold_{FOLD_ALL}"
        ):  # which has trained on these cases
            continue
        try:
            of_fold = read_json(other)["sweep"]["tried"]
            found[fold.name] = {iou: float(of_fold[f"{iou:g}"][f"map_{MAP_NAME}"]) for iou in tried}
        except (PlanError, KeyError, TypeError, ValueError) as error:
            log.warning(
                "%s is left out of sweep_of_other_folds: it holds no such sweep (%s); validate it "
                "anew with --val",
                other,
                error,
            )
    if not found:
        return None
    best = max(
        tried,
        key=lambda iou: (sum(scores[iou] for scores in found.values()), iou == USUAL.voter_iou),
    )
    return {"folds": sorted(found), "voter_iou": best, **tried[best]}


def write_summary(
    file: Path, cases: Sequence[ValidatedCase], plan: DetectionPlan, model: dict[str, Any]
) -> dict[str, float]:
    """Every figure of the usual thinning, and what tuning its overlap on these very cases would
    give; the main figures come back.
    """
    figures = evaluate([case.usual for case in cases], plan.classes, EvaluationSettings())
    tried = {
        iou: quick_scores([case.by_iou[iou] for case in cases], len(plan.classes))
        for iou in cases[0].by_iou
    }
    best = max(tried, key=lambda iou: (tried[iou][f"map_{MAP_NAME}"], iou == USUAL.voter_iou))
    note = "chosen on the cases it is scored on, so too good; the figures above use voter_iou 0.1"
    sweep = {
        "note": note,
        "voter_iou": best,
        **tried[best],
        "tried": {f"{iou:g}": scores for iou, scores in tried.items()},
    }
    write_json(
        file,
        {
            **figures,
            "model": model,
            "sweep": sweep,
            "sweep_of_other_folds": by_other_folds(file, tried),
        },
    )
    ap = figures["ap"]
    main = {
        "ap_0.1": ap["0.1"]["mean"],
        "ap_0.5": ap["0.5"]["mean"],
        f"map_{MAP_NAME}": figures["map"][MAP_NAME]["mean"],
        "cpm": figures["froc"]["cpm"]["mean"],
    }
    return {
        name: float(value)
        for name, value in main.items()
        if value is not None and math.isfinite(value)
    }
