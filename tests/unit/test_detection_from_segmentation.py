"""Detections made of stock segmentations, and the files for nnDetection."""

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory import peak_bytes
from refusals import logged, refused

from nnunet_autoreg.cli.detect import main
from nnunet_autoreg.detection.geometry import frame_of_affine
from nnunet_autoreg.detection.nndetection import write_boxes
from nnunet_autoreg.detection.scanfile import Detection, make_scan_file
from nnunet_autoreg.errors import UsageError

SHAPE = (6, 8, 10)
# Two lesions of 2 x 3 x 4 and 2 x 4 x 3 voxels, and a speck of one voxel.
ONE = (slice(0, 2), slice(0, 3), slice(0, 4))
TWO = (slice(3, 5), slice(4, 8), slice(6, 9))
SPECK = (slice(5, 6), slice(0, 1), slice(0, 1))
CYST = (slice(2, 3), slice(0, 3), slice(0, 4))


@pytest.fixture
def predicted(tmp_path: Path) -> Path:
    """What nnUNetv2_predict --save_probabilities leaves of one case: two lesions, a cyst that
    touches one of them, a speck of one voxel.
    """
    import SimpleITK

    folder = tmp_path / "predicted"
    folder.mkdir()
    labels = np.zeros(SHAPE, np.uint8)
    probabilities = np.zeros((3, *SHAPE), np.float16)
    objects = ((ONE, 1, 0.5), (TWO, 1, 0.75), (SPECK, 1, 1.0), (CYST, 2, 0.625))
    for region, value, score in objects:
        labels[region], probabilities[(value, *region)] = value, score
    # One voxel of TWO is the most probable one. All scores are exact in float16.
    probabilities[1, 4, 5, 7] = 0.875
    image: Any = SimpleITK.GetImageFromArray(labels)
    image.SetSpacing((1.0, 2.0, 3.0))
    SimpleITK.WriteImage(image, str(folder / "case_1.nii.gz"))
    np.savez_compressed(folder / "case_1.npz", probabilities=probabilities)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1, "cyst": 2},
        "file_ending": ".nii.gz",
        "numTraining": 1,
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    plans = {
        "dataset_name": "Dataset999_X",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "configurations": {},
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    return folder


def test_components_are_scored_by_their_highest_probability(
    predicted: Path,
    tmp_path: Path,
) -> None:
    import SimpleITK

    out = tmp_path / "out"
    line = ["--from-seg", str(predicted), "-o", str(out), "--csv", "--nndet"]

    assert main(line) == 0

    text = (out / "case_1.json").read_text()
    found = json.loads(text)

    # The folder is named by a hash, because paths may hold names of patients.
    assert str(predicted) not in text
    assert len(found["model"]["from_seg"]) == 16
    # Sorted by score; the speck is smaller than the smallest object that counts.
    assert [(b["id"], b["name"], b["score"], b["box_zyx"]) for b in found["boxes"]] == [
        (1, "lesion", 0.875, [3, 4, 6, 5, 8, 9]),
        (2, "cyst", 0.625, [2, 0, 0, 3, 3, 4]),
        (3, "lesion", 0.5, [0, 0, 0, 2, 3, 4]),
    ]
    assert found["model"]["dataset"] == "Dataset999"
    assert found["spacing_mm_zyx"] == [3.0, 2.0, 1.0]

    ids = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out / "case_1_instances.nii.gz")))

    assert [int((ids == i).sum()) for i in range(1, 4)] == [2 * 4 * 3, 12, 24]
    assert ids[SPECK].item() == 0

    with (out / "detections.csv").open(newline="") as handle:
        assert [row["probability"] for row in csv.DictReader(handle)] == ["0.875", "0.625", "0.5"]

    for ending in ("_boxes.pkl", "_boxes.nii.gz", ".mrk.json"):
        assert (out / f"case_1{ending}").is_file()

    # A file that is missing is made again; another lowest score leaves the two best boxes.
    (out / "case_1_boxes.pkl").unlink()

    assert main(line) == 0
    assert (out / "case_1_boxes.pkl").is_file()
    assert main([*line[:-1], "--overwrite", "--min-score", "0.6"]) == 0
    boxes = json.loads((out / "case_1.json").read_text())["boxes"]
    assert [b["id"] for b in boxes] == [1, 2]


def test_a_segmentation_scored_against_itself_has_hits_in_voxels(
    predicted: Path,
    tmp_path: Path,
) -> None:
    from nnunet_autoreg.cli.evaluate_detection import main as evaluate

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 0

    truth = tmp_path / "labels"
    truth.mkdir()
    (truth / "case_1.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())
    (truth / "dataset.json").write_bytes((predicted / "dataset.json").read_bytes())
    line = ["-p", str(tmp_path / "out"), "-g", str(truth), "-o", str(tmp_path / "scores.json")]
    # A hit needs masks with an IoU of 1.
    line += ["--hit", "mask:1"]

    assert evaluate(line) == 0

    scores = json.loads((tmp_path / "scores.json").read_text())

    assert scores["froc"]["cpm"]["mean"] == 1.0
    assert scores["ap"]["0.5"]["mean"] == 1.0


def test_missing_inputs_for_a_segmentation_are_refused(predicted: Path, tmp_path: Path) -> None:
    def run(*changes: str) -> None:
        main.__wrapped__(["-o", str(tmp_path / "out"), *changes])

    source = ["--from-seg", str(predicted)]

    with refused(UsageError, "detect-no-input", "-d", "-i"):
        run("-d", "4")
    with refused(UsageError, "from-seg-no-folder", tmp_path / "no"):
        run("--from-seg", str(tmp_path / "no"))

    # Options of a trained detector mean nothing for a segmentation.
    for option, value in (
        ("--fppi", "1"),
        ("--fppi", "0"),
        ("--nms-iou", "0.3"),
        ("-tr", "AutoregDetectionScratchTrainer"),
    ):
        with refused(UsageError, "from-seg-option", option):
            run(*source, option, value)

    with refused(UsageError, "from-seg-output-is-input", predicted):
        run(*source, "-o", str(predicted))
    with refused(UsageError, "detect-min-score", "--min-score 2"):
        run(*source, "--min-score", "2")

    (predicted / "case_2.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())

    with refused(UsageError, "from-seg-no-probabilities", "1 of 2", "case_2.npz"):
        run(*source)

    (predicted / "plans.json").unlink()

    with refused(UsageError, "from-seg-no-description", predicted, "plans.json"):
        run(*source)


def test_one_damaged_file_of_probabilities_stops_nothing(
    predicted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (predicted / "case_2.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())
    np.savez_compressed(predicted / "case_2.npz", probabilities=np.zeros((3, 1, 1, 1)))

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 1

    assert logged(caplog, "case_2", "(unreadable)", "case_2.npz", "(3, 1, 1, 1)")
    assert (tmp_path / "out" / "case_1.json").is_file()


# 40 000 channels of 480 voxels unpack to 38 MB from a few kB, and so does an unknown type of voxel.
@pytest.mark.parametrize(
    ("probabilities", "value"),
    [
        (np.zeros((40_000, *SHAPE), np.float16), "40000"),
        (np.zeros((3, *SHAPE), "V2000"), "V2000"),
    ],
)
def test_probabilities_that_would_fill_the_memory_are_not_unpacked(
    predicted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    probabilities: np.ndarray,
    value: str,
) -> None:
    (predicted / "case_2.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())
    np.savez_compressed(predicted / "case_2.npz", probabilities=probabilities)

    def detect() -> None:
        assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 1

    peak = peak_bytes(detect)

    assert logged(caplog, "case_2", "(unreadable)", value)
    assert (tmp_path / "out" / "case_1.json").is_file()
    assert peak < 2**24


def test_probabilities_whose_writing_was_cut_off_stop_nothing(
    predicted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (predicted / "case_2.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())
    whole = (predicted / "case_1.npz").read_bytes()
    (predicted / "case_2.npz").write_bytes(whole[: len(whole) // 2])

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 1

    assert logged(caplog, "case_2", "(unreadable)")
    assert (tmp_path / "out" / "case_1.json").is_file()


def test_nan_probabilities_stop_nothing(
    predicted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (predicted / "case_2.nii.gz").write_bytes((predicted / "case_1.nii.gz").read_bytes())
    np.savez_compressed(predicted / "case_2.npz", probabilities=np.full((3, *SHAPE), np.nan))

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 1

    assert logged(caplog, "case_2", "(nonfinite)", "lesion")
    assert (tmp_path / "out" / "case_1.json").is_file()


def test_the_same_line_continues_unless_its_input_or_a_rule_has_changed(
    predicted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tmp_path / "out" / "case_1.json"
    line = ["--from-seg", str(predicted), "-o", str(tmp_path / "out")]

    assert main(line) == 0

    first = result.stat().st_mtime_ns

    assert main(line) == 0
    assert result.stat().st_mtime_ns == first
    assert "1 of 1" in capsys.readouterr().out

    # Drawn differently: done again.
    line.append("--filled")

    assert main(line) == 0
    assert result.stat().st_mtime_ns != first

    dataset = json.loads((predicted / "dataset.json").read_text())
    rules = {"autoreg_detection": {"detect_labels": ["lesion"]}}
    (predicted / "dataset.json").write_text(json.dumps({**dataset, **rules}))

    with refused(UsageError, "results-of-another-run", result, "settings.detect_labels: "):
        main.__wrapped__(line)

    (predicted / "dataset.json").write_text(json.dumps(dataset))
    os.utime(predicted / "case_1.npz", (1, 1))

    with refused(UsageError, "results-of-another-run", result, "inputs: "):
        main.__wrapped__(line)


def test_a_region_inside_another_adds_nothing_to_its_probability(
    predicted: Path,
    tmp_path: Path,
) -> None:
    dataset = json.loads((predicted / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    dataset["regions_class_order"] = [1, 2]
    dataset["autoreg_detection"] = {"detect_labels": ["whole"], "min_voxels": 1}
    (predicted / "dataset.json").write_text(json.dumps(dataset))
    # Of regions, the probability of "whole" contains that of "core": 0.5, and not 0.75.
    probabilities = np.zeros((2, *SHAPE), np.float16)
    probabilities[0], probabilities[1] = 0.5, 0.25
    np.savez_compressed(predicted / "case_1.npz", probabilities=probabilities)

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 0

    boxes = json.loads((tmp_path / "out" / "case_1.json").read_text())["boxes"]

    assert {b["score"] for b in boxes} == {0.5}


def test_a_merged_class_adds_the_probabilities_of_its_labels(
    predicted: Path,
    tmp_path: Path,
) -> None:
    dataset = json.loads((predicted / "dataset.json").read_text())
    rules = {"merge": {"any": ["lesion", "cyst"]}, "min_voxels": 1}
    (predicted / "dataset.json").write_text(json.dumps({**dataset, "autoreg_detection": rules}))
    probabilities = np.load(predicted / "case_1.npz")["probabilities"]
    probabilities[2][ONE] = 0.25
    np.savez_compressed(predicted / "case_1.npz", probabilities=probabilities)

    assert main(["--from-seg", str(predicted), "-o", str(tmp_path / "out")]) == 0

    boxes = json.loads((tmp_path / "out" / "case_1.json").read_text())["boxes"]

    # The cyst (0.625) and the lesion it touches (0.5 + 0.25) are one; the speck counts, since one
    # voxel is enough.
    assert [(b["name"], b["score"], b["box_zyx"]) for b in boxes] == [
        ("any", 1.0, [5, 0, 0, 6, 1, 1]),
        ("any", 0.875, [3, 4, 6, 5, 8, 9]),
        ("any", 0.75, [0, 0, 0, 3, 3, 4]),
    ]


def test_nndetections_pickle_has_its_keys_order_and_voxel_more(tmp_path: Path) -> None:
    affine = [[-2.0, 0, 0, 10], [0, 0, 3.0, 20], [0, 1.0, 0, 30], [0, 0, 0, 1]]
    found = [
        Detection((0, 1, 2, 4, 5, 7), 5, "holed", 0.9),
        Detection((1, 1, 1, 2, 2, 2), 2, "solid", 0.5),
    ]
    record = make_scan_file(
        "a",
        frame_of_affine(affine, (8, 8, 8)),
        found,
        {"holed": 5, "solid": 2},
    )

    write_boxes(tmp_path / "a.pkl", record)

    data = pickle.loads((tmp_path / "a.pkl").read_bytes())

    # Voxels z 0 to 3, y 1 to 4, x 2 to 6: z -1, y 0, z 4, y 5, x 1, x 7.
    assert data["pred_boxes"].tolist() == [[-1, 0, 4, 5, 1, 7], [0, 0, 2, 2, 0, 2]]
    # Classes of nnDetection count from 0 in the order of the labels: 2 is class 0, 5 is class 1.
    assert data["pred_labels"].tolist() == [1, 0]
    assert data["pred_scores"].tolist() == [np.float32(0.9), 0.5]
    assert data["restore"] is True
    assert data["original_size_of_raw_data"].tolist() == [8, 8, 8]
    assert data["itk_spacing"] == (2.0, 1.0, 3.0)
    assert data["itk_origin"] == (-10.0, -20.0, 30.0)
    # Column by column, i towards left, j towards superior, k towards anterior, in LPS.
    axes = np.array(data["itk_direction"]).reshape(3, 3).T
    assert axes.tolist() == [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
