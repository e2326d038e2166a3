"""Score thresholds of all folds together, and the curves that validation leaves for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import logged, refused

from nnunet_autoreg.detection.evaluate import EvaluationSettings, evaluate
from nnunet_autoreg.detection.evaluation_files import draw_froc, thresholds
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import ScanBoxes, scan_boxes
from nnunet_autoreg.detection.validate import score_thresholds
from nnunet_autoreg.errors import UsageError

A = ObjectClass("a", 1, (1,))
B = ObjectClass("b", 2, (2,))
SETTINGS = EvaluationSettings(num_resamples=0)
BOX = (0, 0, 0, 4, 4, 4)
AWAY = (20, 20, 20, 24, 24, 24)


def scan(
    true: list[int],
    false: list[tuple[int, float]],
    hits: list[tuple[int, float]] = [],  # noqa: B006
) -> ScanBoxes:
    """A scan with an object of every class in ``true`` at one location; (class, score) of what was
    found there and elsewhere.
    """
    found = [(BOX, *hit) for hit in hits] + [(AWAY, *wrong) for wrong in false]
    boxes, labels, scores = ([one[i] for one in found] for i in range(3))
    true_objects = ([BOX] * len(true), true, [False] * len(true))
    return scan_boxes("s", (1, 1, 1), true_objects, (boxes, labels, scores))


def summary(model: Path, fold: int, scans: list[ScanBoxes], is_old: bool = False) -> dict[str, Any]:
    """Write a fold's summary as validation does, or as it did before absent classes had curves."""
    figures = evaluate(scans, (A, B), SETTINGS)
    if is_old:
        # The older version had no curve for a class without true objects.
        for name in figures["absent_classes"]:
            del figures["froc"]["curve"][name]
    file = model / f"fold_{fold}" / "validation_detection" / "summary_detection.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**figures, "model": {"mirrorings": 1}}, allow_nan=False))
    return figures


def found_thresholds(
    model: Path,
    fppi: float,
    folds: tuple[str, ...] = ("0", "1"),
    num_mirrorings: int = 1,
) -> dict[str, float]:
    return score_thresholds(model, folds, ["a", "b"], fppi, num_mirrorings)


def test_a_class_without_objects_has_a_curve_of_false_positives_only(tmp_path: Path) -> None:
    scans = [scan([0], [(1, 0.75), (1, 0.25)], [(0, 0.9)]), scan([], [(1, 0.5)])]

    figures = evaluate(scans, (A, B), SETTINGS)

    # Three false boxes of class b in two scans; sensitivity and the first threshold (infinity) do
    # not exist, and JSON has null for both.
    froc = json.loads(json.dumps(figures, allow_nan=False))["froc"]
    assert froc["curve"]["b"] == {
        "fp_per_scan": [0.0, 0.5, 1.0, 1.5],
        "sensitivity": [None] * 4,
        "threshold": [None, 0.75, 0.5, 0.25],
    }
    assert list(froc["operating_points"]) == ["a"]
    assert froc["sensitivity"]["per_class"].keys() == {"a"}
    assert froc["curve"]["a"] == {
        "fp_per_scan": [0.0, 0.0],
        "sensitivity": [0.0, 1.0],
        "threshold": [None, 0.9],
    }

    draw_froc(tmp_path / "froc.png", figures)

    assert (tmp_path / "froc.png").read_bytes().startswith(b"\x89PNG")
    assert thresholds(figures, (A, B))[1] == 0.0


def test_a_picture_without_any_object_is_drawn_without_a_legend(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    figures = evaluate([scan([], [(1, 0.5)])], (A, B), SETTINGS)

    draw_froc(tmp_path / "froc.png", figures)

    assert (tmp_path / "froc.png").is_file()
    # matplotlib warns of a legend without a curve.
    assert not [w for w in recwarn if "legend" in str(w.message)]


def test_false_positives_of_a_fold_without_objects_of_the_class_count(tmp_path: Path) -> None:
    # Class b: fold 0 has an object in one of its two scans and a false box at 0.3, fold 1 none and
    # false boxes at 0.8, 0.6 and 0.4.
    summary(tmp_path, 0, [scan([1], [(1, 0.3)], [(1, 0.9)]), scan([], [])])
    summary(tmp_path, 1, [scan([0], [(1, 0.8), (1, 0.4)]), scan([], [(1, 0.6)])])

    # Four scans: two false boxes are 0.5 per scan; the third comes in at 0.4. Only fold 0 would
    # say 0.3.
    assert found_thresholds(tmp_path, 0.5)["b"] == 0.6
    # No false box at all, and all four of them.
    assert found_thresholds(tmp_path, 0.2)["b"] == 0.9
    assert found_thresholds(tmp_path, 1.0)["b"] == 0.3


def test_a_class_without_objects_has_a_threshold_by_its_false_positives(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    summary(tmp_path, 0, [scan([0], [(1, 0.8)], [(0, 0.9)])])
    summary(tmp_path, 1, [scan([0], [(1, 0.7)], [(0, 0.9)])])

    assert found_thresholds(tmp_path, 0.5)["b"] == 0.8
    assert not caplog.text
    # Fewer than the one box at 0.8 gives: no score is high enough.
    assert found_thresholds(tmp_path, 0.1)["b"] == 1.0


def test_classes_that_validation_never_found_keep_all_boxes(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    summary(tmp_path, 0, [scan([0], [], [(0, 0.9)])])
    summary(tmp_path, 1, [scan([0], [], [(0, 0.8)])])

    # Class a: the lower of its two scores. Class b was never found, so no score can be too low.
    assert found_thresholds(tmp_path, 1) == {"a": 0.8, "b": 0.0}
    assert logged(caplog, "--fppi", " b,")


def test_summaries_of_earlier_versions_are_used_as_far_as_they_go(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    summary(tmp_path, 0, [scan([0, 1], [(1, 0.3)], [(0, 0.9), (1, 0.9)])])
    summary(tmp_path, 1, [scan([0], [], [(0, 0.9)])], is_old=True)

    # Nothing was found of b in fold 1: half a false box per scan at 0.3.
    assert found_thresholds(tmp_path, 0.5)["b"] == 0.3
    assert not caplog.text

    # Fold 2 has a false box of class b whose score its older summary does not say.
    summary(tmp_path, 2, [scan([0], [(1, 0.8)], [(0, 0.9)])], is_old=True)

    assert found_thresholds(tmp_path, 1, ("0", "2"))["b"] == 0.3
    assert logged(caplog, "fold_2", "--val")


def test_other_mirrorings_are_warned_about_and_missing_scores_refused(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    summary(tmp_path, 0, [scan([0], [], [(0, 0.9)])])
    found_thresholds(tmp_path, 1, ("0",), num_mirrorings=8)

    assert logged(caplog, "fold 0", 1, 8)
    with refused(UsageError, "fppi-no-validation", "fold_1", "--val"):
        found_thresholds(tmp_path, 1)
    with refused(UsageError, "fppi-fold-all", "--min-score"):
        found_thresholds(tmp_path, 1, ("0", "all"))

    file = tmp_path / "fold_0" / "validation_detection" / "summary_detection.json"
    file.write_text('{"model": {}}')

    with refused(UsageError, "fppi-summary", "fold_0", "'scans'"):
        found_thresholds(tmp_path, 1, ("0",))
