"""Find the boxes of a fold's validation cases in their original images, and score them.

``score_thresholds`` reads the summaries of all folds, for ``autoreg_detect --fppi``.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_autoreg.detection.evaluate import (
    MAP_NAME,
    EvaluationSettings,
    evaluate,
    quick_scores,
)
from nnunet_autoreg.detection.geometry import (
    Preprocessing,
    StoredArray,
    as_box,
    preprocessing_of,
    stored_array,
)
from nnunet_autoreg.detection.infer import (
    DEFAULT_NMS,
    Candidates,
    MergedBoxes,
    ScanDetector,
    merge,
)
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import ScanBoxes, scan_of_instances
from nnunet_autoreg.detection.metrics import Froc, threshold_at
from nnunet_autoreg.detection.objects import ObjectSource
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.detection.scanfile import Detection, make_scan_file, write_scan_file
from nnunet_autoreg.downstream.model import FOLD_ALL
from nnunet_autoreg.errors import PlanError, UsageError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import atomic_path, read_json, write_json

SUMMARY = Path("validation_detection") / "summary_detection.json"
IOU_KEY = "voter_iou"
"""Key of ``NmsSettings.member_iou`` in files."""
TRIED_IOUS = (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Overlaps tried for the boxes of one ensemble member, as nnDetection does.

The smallest size and score are never tuned: that deletes small lesions.
"""

SLIVER_VOX = 0.01
"""A box with a shorter side is left out: it was clipped away, or its extent would be lost when its
edges are written with four decimals.
"""
NOTHING_FOUND = Froc(np.zeros(1), np.full(1, np.nan), np.full(1, np.inf))
"""The curve of a class without any detection."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidatedCase:
    """Hold a case with its objects and detections, for every overlap tried."""

    by_iou: dict[float, ScanBoxes]

    @property
    def usual(self) -> ScanBoxes:
        """Return the case with the default NMS settings."""
        return self.by_iou[DEFAULT_NMS.member_iou]


def in_original(
    found: MergedBoxes,
    geometry: Preprocessing,
    shape_vox: Size,
    classes: Sequence[ObjectClass],
) -> list[Detection]:
    """Return the boxes in voxel edges of the image as it was read, clipped to it.

    Boxes that lie outside are left out.

    Args:
        found: in voxel edges of the preprocessed image.
        geometry: how the image was preprocessed.
        shape_vox: shape (z, y, x) of the image as it was read.
        classes: classes of the detector.
    """
    boxes = geometry.to_original(found.boxes_N6.numpy().astype(np.float64).reshape(-1, 6))
    limit = np.array([*shape_vox, *shape_vox], dtype=np.float64)
    scores = found.scores_N.tolist()
    labels = found.labels_N.tolist()
    votes = found.votes_N.tolist()

    detections = []
    for n, box in enumerate(np.clip(boxes, 0, limit)):
        if not (box[3:] - box[:3] >= SLIVER_VOX).all():
            continue
        kind = classes[labels[n]]
        detections.append(
            Detection(
                box_zyx=as_box(box),
                label=kind.label,
                name=kind.name,
                score=min(float(scores[n]), 1.0),
                votes=int(votes[n]),
            ),
        )
    return detections


def as_stored(detections: Sequence[Detection], stored: StoredArray) -> list[Detection]:
    """Return detections in the reader's array with the boxes of the stored array, as files do."""
    moved = []
    for found in detections:
        box = as_box(stored.to_stored(found.box_zyx))
        moved.append(replace(found, box_zyx=box))
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
    """Detect in every case, and write its detections and its candidates into ``folder``.

    Args:
        detector: runs the trained network over whole scans.
        stock: nnU-Net's dataset of the preprocessed cases.
        source: source of the true objects.
        plan: the detector's.
        transpose_backward: value of the plans.
        model: description of the model for the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    class_index_of = {kind.name: index for index, kind in enumerate(plan.classes)}
    validated = []
    for case in cases:
        data, _, _, properties = stock.load_case(case)
        image = torch.from_numpy(np.asarray(data[:], dtype=np.float32))  # (C, Z, Y, X)
        # The network runs once; the overlaps are tried on its candidates.
        candidates, _ = detector.candidates(image)
        true = source.read(case)
        geometry = preprocessing_of(properties, as_size(image.shape[1:]), transpose_backward)

        by_iou = {}
        for iou in sorted({DEFAULT_NMS.member_iou, *TRIED_IOUS}):
            nms = replace(detector.nms, member_iou=iou)
            merged = merge(candidates, detector.num_members, nms)
            found = in_original(merged, geometry, true.shape_vox, plan.classes)
            boxes = [d.box_zyx for d in found]
            class_indices = [class_index_of[d.name] for d in found]
            scores = [d.score for d in found]
            by_iou[iou] = scan_of_instances(
                case,
                true.spacing_mm,
                true.instances,
                (boxes, class_indices, scores),
                true.uncounted_ZYX,
            )
            if iou == DEFAULT_NMS.member_iou:
                usual = found

        stored = stored_array(properties, true.shape_vox)
        usual_nms = replace(detector.nms, member_iou=DEFAULT_NMS.member_iou)
        record = make_scan_file(
            case,
            stored.frame,
            as_stored(usual, stored),
            plan.labels,
            model,
            {"thinning": usual_nms.for_file(), "mirrorings": detector.num_members},
        )
        write_scan_file(folder / f"{case}.json", record)
        _write_candidates(folder / f"{case}_candidates.npz", candidates)
        validated.append(ValidatedCase(by_iou))
        log.info("%s: %d objects, %d boxes", case, len(true.instances.objects), len(usual))
    return validated


def _write_candidates(file: Path, candidates: Candidates) -> None:
    """Write the candidates before merging, in the preprocessed image.

    With them, other NMS settings can be tried. They are written in half precision, which is precise
    to a thirtieth of a voxel.
    """
    arrays = {
        "boxes_N6": candidates.boxes_N6,
        "scores_N": candidates.scores_N,
        "labels_N": candidates.labels_N,
        "weights_N": candidates.weights_N,
        "voters_N": candidates.members_N,
    }
    small: dict[str, Any] = {}
    for name, values in arrays.items():
        dtype = np.float16 if values.is_floating_point() else np.int16
        small[name] = values.numpy().astype(dtype)
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **small)


def by_other_folds(file: Path, tried: dict[float, dict[str, float]]) -> dict[str, Any] | None:
    """Return this fold's scores with the overlap that is best on the other folds' cases.

    This is an honest score of a tuned overlap, because it was not tuned on the cases that it is
    scored on.

    Args:
        file: this fold's summary; the others lie beside it in ``fold_*/validation_detection/``.
        tried: this fold's scores by overlap.

    Returns:
        None if no other fold has been validated.
    """
    found: dict[str, dict[float, float]] = {}
    for other in sorted(file.parents[2].glob(f"fold_*/{file.parent.name}/{file.name}")):
        fold = other.parents[1]
        # Fold "all" was trained on these cases.
        if fold == file.parents[1] or fold.name == f"fold_{FOLD_ALL}":
            continue
        try:
            of_fold = read_json(other)["sweep"]["tried"]
            scores = [float(of_fold[f"{iou:g}"][f"map_{MAP_NAME}"]) for iou in tried]
            found[fold.name] = dict(zip(tried, scores, strict=True))
        except (PlanError, KeyError, TypeError, ValueError) as error:
            log.warning(
                "%s is left out of sweep_of_other_folds: it holds no such sweep (%s); validate it "
                "again with --val",
                other,
                error,
            )

    if not found:
        return None

    def quality(iou: float) -> tuple[float, bool]:
        # Of equal sums the default wins.
        total = sum(scores[iou] for scores in found.values())
        return total, iou == DEFAULT_NMS.member_iou

    best = max(tried, key=quality)
    return {"folds": sorted(found), IOU_KEY: best, **tried[best]}


def write_summary(
    file: Path,
    cases: Sequence[ValidatedCase],
    plan: DetectionPlan,
    model: dict[str, Any],
) -> dict[str, float]:
    """Write every figure of the default NMS settings, and return the main figures.

    The file also has the result of tuning the overlap on these same cases.
    """
    figures = evaluate([case.usual for case in cases], plan.classes, EvaluationSettings())

    tried = {}
    for iou in cases[0].by_iou:
        scans = [case.by_iou[iou] for case in cases]
        tried[iou] = quick_scores(scans, len(plan.classes))

    def quality(iou: float) -> tuple[float, bool]:
        return tried[iou][f"map_{MAP_NAME}"], iou == DEFAULT_NMS.member_iou

    best = max(tried, key=quality)
    note = (
        "chosen on the same cases that it is scored on, so too optimistic; the figures above use "
        "voter_iou 0.1"
    )
    sweep = {
        "note": note,
        IOU_KEY: best,
        **tried[best],
        "tried": {f"{iou:g}": scores for iou, scores in tried.items()},
    }
    of_others = by_other_folds(file, tried)
    summary = {**figures, "model": model, "sweep": sweep, "sweep_of_other_folds": of_others}
    write_json(file, summary)

    main = {
        "ap_0.1": figures["ap"]["0.1"]["mean"],
        "ap_0.5": figures["ap"]["0.5"]["mean"],
        f"map_{MAP_NAME}": figures["map"][MAP_NAME]["mean"],
        "cpm": figures["froc"]["cpm"]["mean"],
    }
    known = {}
    for name, value in main.items():
        if value is not None and math.isfinite(value):
            known[name] = float(value)
    return known


def score_thresholds(
    model: Path,
    folds: Sequence[str],
    classes: Sequence[str],
    fp_per_scan: float,
    num_mirrorings: int,
) -> dict[str, float]:
    """Return class -> the lowest score with at most this many false positives per scan.

    The false positives are those of the validation of all folds together. Every fold counts with
    all of its scans, also for classes of which it has no object: every detection of those is false.

    Args:
        model: the trained folder, with ``fold_*`` in it.
        classes: names of the detector's classes.
        num_mirrorings: number of mirrorings of the prediction; validation may have used another
            one.

    Raises:
        UsageError: a fold has no usable validation, or was validated on the cases it was trained
            on.
    """
    if FOLD_ALL in folds:
        raise UsageError(
            "--fppi cannot be used with fold all: it was validated on its training cases, which "
            "says nothing about new ones; give --min-score",
            code="fppi-fold-all",
        )

    of_folds = [_curves_of_fold(model, fold, classes, num_mirrorings) for fold in folds]
    thresholds = {}
    for name in classes:
        known = [curves[name] for curves in of_folds if name in curves]
        # The first point of a curve is that at which nothing is detected.
        if any(len(curve.threshold) > 1 for curve, _ in known):
            thresholds[name] = min(1.0, threshold_at(known, fp_per_scan))
        else:
            log.warning(
                "--fppi: validation found no box of %s, so there is no threshold for it: all of "
                "its boxes are kept",
                name,
            )
            thresholds[name] = 0.0
    return thresholds


def _curves_of_fold(
    model: Path,
    fold: str,
    classes: Sequence[str],
    num_mirrorings: int,
) -> dict[str, tuple[Froc, int]]:
    """Return class -> its curve in the validation of a fold, and the number of scans of the fold.

    Raises:
        UsageError: the fold has no usable validation.
    """
    file = model / f"fold_{fold}" / SUMMARY
    if not file.is_file():
        raise UsageError(
            f"--fppi needs {file}, which validation writes; run nnUNetv2_train with --val, or "
            "give --min-score",
            code="fppi-no-validation",
        )
    summary = read_json(file)
    try:
        validated_with = summary["model"].get("mirrorings", num_mirrorings)
        # A fold weighs as much as it has scans.
        num_scans = int(summary["scans"]["number"])
        curves = _curves_of_classes(file, summary, classes)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--fppi: {file} is not the summary of a validation ({error!r}); write it again "
            "with --val",
            code="fppi-summary",
        ) from error

    if validated_with != num_mirrorings:
        log.warning(
            "--fppi: fold %s was validated with %d mirrorings, this prediction uses %d, so its "
            "scores differ somewhat; choose with --tta and --no-tta",
            fold,
            validated_with,
            num_mirrorings,
        )
    return {name: (curve, num_scans) for name, curve in curves.items()}


def _curves_of_classes(
    file: Path,
    summary: dict[str, Any],
    classes: Sequence[str],
) -> dict[str, Froc]:
    """Return the curves of a summary by class, and warn about classes without a usable one."""
    curves = {}
    for name in classes:
        written = summary["froc"]["curve"].get(name)
        if written is not None:
            # Null is the infinite threshold at which nothing is detected.
            threshold = [np.inf if value is None else value for value in written["threshold"]]
            curves[name] = Froc(
                fp_per_scan=np.array(written["fp_per_scan"], dtype=np.float64),
                sensitivity=np.array(written["sensitivity"], dtype=np.float64),
                threshold=np.array(threshold),
            )
        elif summary["classes"][name]["detections"] == 0:
            curves[name] = NOTHING_FOUND
        else:
            # Earlier versions left out the curves of classes without objects.
            log.warning(
                "--fppi: %s counts false boxes of %s without their scores, because an earlier "
                "version wrote it; it is left out for this class. Validate again with --val",
                file,
                name,
            )
    return curves
