"""Boxes of whole cases, and what the summary of a fold says of the others'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import logged

from nnunet_autoreg.detection.evaluate import MAP_NAME
from nnunet_autoreg.detection.geometry import Preprocessing, frame_of_affine
from nnunet_autoreg.detection.infer import MergedBoxes
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.scanfile import make_scan_file
from nnunet_autoreg.detection.validate import by_other_folds, in_original

MEASURE = f"map_{MAP_NAME}"


def summary_of(model: Path, fold: int | str, tried: dict[float, float] | None) -> Path:
    """Write the summary of a fold with the scores of several overlaps; None writes no file."""
    file = model / f"fold_{fold}" / "validation_detection" / "summary_detection.json"
    file.parent.mkdir(parents=True)
    if tried is not None:
        figures = {f"{iou:g}": {MEASURE: score} for iou, score in tried.items()}
        file.write_text(json.dumps({"sweep": {"tried": figures}}))
    return file


def test_the_overlap_is_chosen_on_other_folds_and_scored_on_this_one(tmp_path: Path) -> None:
    summary_of(tmp_path, 0, {1e-5: 0.2, 0.1: 0.3, 0.5: 0.6})
    summary_of(tmp_path, 1, {1e-5: 0.2, 0.1: 0.7, 0.5: 0.6})
    # The network of fold "all" has seen the scans of this fold.
    summary_of(tmp_path, "all", {1e-5: 0, 0.1: 9, 0.5: 0})
    mine = {1e-5: {MEASURE: 0.9}, 0.1: {MEASURE: 0.8}, 0.5: {MEASURE: 0.1}}

    # On folds 0 and 1 the sums are 0.4, 1.0 and 1.2; here 0.5 is the worst.
    assert by_other_folds(summary_of(tmp_path, 2, {0.5: 0}), mine) == {
        "folds": ["fold_0", "fold_1"],
        "voter_iou": 0.5,
        MEASURE: 0.1,
    }


def test_without_other_folds_there_is_no_choice_by_them(tmp_path: Path) -> None:
    assert by_other_folds(summary_of(tmp_path, 0, {0.1: 1.0}), {0.1: {MEASURE: 0.5}}) is None


def test_a_fold_whose_summary_cannot_be_used_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A damaged summary, and one that tried another overlap.
    summary_of(tmp_path, 1, None).write_text("{")
    summary_of(tmp_path, 3, {0.2: 0.5})

    assert by_other_folds(summary_of(tmp_path, 0, None), {0.1: {MEASURE: 0.5}}) is None
    assert logged(caplog, "fold_1")
    assert logged(caplog, "fold_3")


def test_a_box_cut_at_the_end_of_the_image_is_a_box_or_nothing() -> None:
    # Edges are written with four decimals: a side below that would be none.
    boxes = torch.tensor([[-5, 2, 2, 1e-6, 8, 8], [2, 2, 2, 6, 8, 8], [9, 2, 2, 12, 8, 8]])
    labels = torch.zeros(3, dtype=torch.long)
    votes = torch.ones(3, dtype=torch.long)
    found = MergedBoxes(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, votes)
    unchanged = Preprocessing((10, 10, 10), (10, 10, 10), (0, 0, 0))

    left = in_original(found, unchanged, (10, 10, 10), [ObjectClass("x", 1, (1,))])

    # The third is cut at 10.
    assert [d.box_zyx for d in left] == [(2, 2, 2, 6, 8, 8), (9, 2, 2, 10, 8, 8)]
    record = make_scan_file("a", frame_of_affine(np.eye(4), (10, 10, 10)), left, {"x": 1})
    assert len(record.boxes) == 2
