"""Score thresholds from the validation of a model's folds: what ``--fppi`` asks for."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.detection.metrics import Froc, threshold_at
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import read_json

SUMMARY = Path("validation_detection") / "summary_detection.json"
FOLD_ALL = "all"
EMPTY = Froc(np.zeros(1), np.full(1, np.nan), np.full(1, np.inf))
"""Of a class of which nothing was found."""

log = logging.getLogger(__name__)


def score_thresholds(
    model: Path,
    folds: Sequence[str],
    classes: Sequence[str],
    fp_per_scan: float,
    num_mirrorings: int,
) -> dict[str, float]:
    """Class -> the lowest score that gave at most so many false positives per scan in the
    validation of all folds together.

    Every fold counts with all of its scans, for classes of which it has no object too: what is
    found of those is false.

    Args:
        model: the trained folder, with ``fold_*`` in it.
        num_mirrorings: with which the scores are to be used; validation may have had others.

    Raises:
        UsageError: a fold has no validation to tell, or one on the cases it was trained on.
    """
    if FOLD_ALL in folds:
        raise UsageError(
            "--fppi: fold all is validated on the cases it was trained on, which says nothing of "
            "new ones; give --min-score"
        )
    curves: dict[str, list[tuple[Froc, int]]] = {name: [] for name in classes}
    for fold in folds:
        file = model / f"fold_{fold}" / SUMMARY
        if not file.is_file():
            raise UsageError(
                f"--fppi needs {file}, which validation writes; run nnUNetv2_train with --val, or "
                "give --min-score"
            )
        summary = read_json(file)
        try:
            _check_mirrorings(summary, fold, num_mirrorings)
            scans = int(summary["scans"]["number"])
            for name in classes:
                curve = _curve(summary, name)
                if curve is None:
                    log.warning(
                        "--fppi: %s has false boxes of %s and no score of them: it was written by "
                        "an earlier version, and is left "
                        "out for this class; validate anew with --val",
                        file,
                        name,
                    )
                else:
                    curves[name].append((curve, scans))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"--fppi: {file} is no summary of a validation ({error!r}); write it anew with "
                "--val"
            ) from error
    return {name: _threshold(name, known, fp_per_scan) for name, known in curves.items()}


def _check_mirrorings(summary: dict[str, Any], fold: str, num_mirrorings: int) -> None:
    validated = summary["model"].get("mirrorings", num_mirrorings)
    if validated != num_mirrorings:
        log.warning(
            "--fppi: fold %s was validated with %d mirrorings, here there are %d: its scores "
            "differ somewhat; --tta and --no-tta "
            "choose",
            fold,
            validated,
            num_mirrorings,
        )


def _curve(summary: dict[str, Any], name: str) -> Froc | None:
    """The curve of a class; None where an older summary, which leaves out absent classes, does not
    say what was found of it.
    """
    curve = summary["froc"]["curve"].get(name)
    if curve is None:
        return EMPTY if summary["classes"][name]["detections"] == 0 else None
    fp_per_scan, sensitivity = (
        np.array(curve[key], dtype=np.float64) for key in ("fp_per_scan", "sensitivity")
    )
    # Null is the infinite threshold at which nothing is detected.
    return Froc(
        fp_per_scan,
        sensitivity,
        np.array([np.inf if value is None else value for value in curve["threshold"]]),
    )


def _threshold(name: str, known: Sequence[tuple[Froc, int]], fp_per_scan: float) -> float:
    if not any(len(curve.threshold) > 1 for curve, _ in known):
        log.warning(
            "--fppi: validation found nothing of %s, so there is no threshold for it: all of its "
            "boxes are kept",
            name,
        )
        return 0.0
    return min(1.0, threshold_at(known, fp_per_scan))
