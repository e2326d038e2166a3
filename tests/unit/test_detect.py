"""The command autoreg_detect with a tiny network of random weights: what it reads, refuses,
continues and writes.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory import peak_bytes
from refusals import logged, refused
from tiny_detector import CLASSES, SHAPE, write_checkpoint, write_model, write_scan

from nnunet_autoreg import bridge
from nnunet_autoreg.cli.detect import main, parser
from nnunet_autoreg.detection.detect_scans import (
    DetectRequest,
    earlier_results,
    write_summaries,
)
from nnunet_autoreg.detection.geometry import frame_of_affine
from nnunet_autoreg.detection.infer import ScanDetector
from nnunet_autoreg.detection.net import Output
from nnunet_autoreg.detection.predict import DetectionOptions
from nnunet_autoreg.detection.scanfile import (
    Detection,
    make_scan_file,
    read_scan_file,
    write_scan_file,
)
from nnunet_autoreg.downstream.model import finished_folds
from nnunet_autoreg.errors import PlanError, UsageError, WeightsError

Run = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_results with a model of two folds."""
    bridge.install()
    root = tmp_path_factory.mktemp("results")
    write_model(root, ("0", "1"))
    return root


@pytest.fixture
def results(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder, copied so that a test may change it."""
    shutil.copytree(trained, tmp_path / "results")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / "results"))
    return next((tmp_path / "results" / "Dataset950_Tiny").iterdir())


@pytest.fixture
def run(results: Path, tmp_path: Path) -> Run:
    """Return a function that detects in two scans below ``in``, with fold 0 by default.

    With ``raises``, an error is raised instead of printed.
    """
    for seed, name in enumerate(("a", "b")):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz", seed)

    def detect(*more: str, raises: bool = False) -> int:
        folds = [] if "-f" in more else ["-f", "0"]
        places = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
        line = ["-d", "950", *places, "--device", "cpu", *folds, *more]
        code: int = main.__wrapped__(line) if raises else main(line)
        return code

    return detect


def found(out: Path, name: str = "a") -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return data


def drawn(file: Path) -> Any:
    import SimpleITK

    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def take_nrrd(model: Path) -> None:
    """Have the model's dataset end in .nrrd: of these only the header is checked before nnU-Net
    reads them.
    """
    data = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**data, "file_ending": ".nrrd"}))


def test_the_same_line_continues_and_every_file_is_there(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    assert run("--csv") == 0

    # The result of b is gone; --nndet asks for one more file of each scan, which a's result can
    # give.
    (out / "b.json").unlink()
    before = (out / "a.json").stat().st_mtime_ns
    capsys.readouterr()

    assert run("--csv", "--nndet") == 0

    printed = capsys.readouterr().out

    assert "1 of 2" in printed
    assert "b: " in printed
    assert "a: " not in printed
    assert (out / "a.json").stat().st_mtime_ns == before
    assert (out / "a_boxes.pkl").is_file()

    with (out / "detections.csv").open(newline="") as handle:
        assert {row["seriesuid"] for row in csv.DictReader(handle)} == {"a", "b"}


def test_results_of_another_model_are_not_continued(
    run: Run,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0

    model = found(tmp_path / "out")["model"]

    assert model["checkpoint"] == "checkpoint_final.pth"
    assert list(model["sha256"]) == ["0"]

    # The same weights under another name are another model too.
    fold = results / "fold_0"
    shutil.copy(fold / "checkpoint_final.pth", fold / "checkpoint_best.pth")
    change = "model.checkpoint: 'checkpoint_final.pth' -> 'checkpoint_best.pth'"

    with refused(UsageError, "results-of-another-run", "a.json", change):
        run("--checkpoint", "checkpoint_best.pth", raises=True)
    assert run("--checkpoint", "checkpoint_best.pth") == 2
    assert change in capsys.readouterr().err

    # Retrained, under the old name.
    write_checkpoint(results, "0", seed=7)

    with refused(UsageError, "results-of-another-run", "a.json", "model.sha256.0: "):
        run(raises=True)
    assert run("--overwrite") == 0
    assert found(tmp_path / "out")["model"]["sha256"] != model["sha256"]


def test_results_of_another_input_of_the_same_name_are_not_continued(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0

    write_scan(tmp_path / "other" / "a_0000.nii.gz", seed=5)

    with refused(UsageError, "results-of-another-run", "a.json", "(inputs: ", "--overwrite"):
        run("-i", str(tmp_path / "other"), raises=True)

    # The file of b has another time, so it may be another scan.
    os.utime(tmp_path / "in" / "b_0000.nii.gz", (1, 1))

    with refused(UsageError, "results-of-another-run", "b.json", "(inputs: "):
        run(raises=True)

    (tmp_path / "out" / "b.json").unlink()
    capsys.readouterr()

    assert run() == 0
    assert "1 of 2" in capsys.readouterr().out


def test_results_drawn_in_another_way_are_made_again(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    assert run("--no-instances", "--max-boxes", "3") == 0

    frames = drawn(out / "a_boxes.nii.gz")
    boxes = found(out)["boxes"]

    assert not (out / "a_instances.nii.gz").exists()
    assert run("--max-boxes", "3") == 0
    assert (out / "a_instances.nii.gz").is_file()
    assert run("--max-boxes", "3", "--filled") == 0
    assert found(out)["boxes"] == boxes

    filled = drawn(out / "a_boxes.nii.gz")

    assert (filled > 0).sum() > (frames > 0).sum()

    # The middle of the best box is empty in frames.
    best = boxes[0]["box_zyx"]
    middle = tuple(int((low + high) / 2) for low, high in zip(best[:3], best[3:], strict=True))

    assert filled[middle] == 1
    assert frames[middle] != 1

    capsys.readouterr()

    # A segmentation more than was asked for does no harm.
    assert run("--max-boxes", "3", "--filled", "--no-instances") == 0
    assert "2 of 2" in capsys.readouterr().out


def test_a_run_that_is_cut_off_leaves_no_files_of_the_run_before(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    assert run("--nndet") == 0

    # Everything but the JSON is written, then the power fails.
    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_autoreg.detection.predict.write_scan_file", cut_off)

    assert run("--overwrite", "--no-instances") == 130
    # The instances and the pickle of the first run would not belong to the new boxes.
    left = {f.name for f in out.iterdir() if f.name.startswith("a")}
    assert left == {"a_boxes.nii.gz", "a.mrk.json"}


def test_folds_have_one_order(tmp_path: Path) -> None:
    for fold in ("0", "2", "10"):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / "checkpoint_final.pth").touch()

    asked = finished_folds(tmp_path, ["10", "0", "2", "0"], "checkpoint_final.pth")

    assert asked == ("0", "2", "10")


def test_folds_and_mirrorings_are_members_of_the_ensemble(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = {"one": ["-f", "0"], "two": ["-f", "0", "1"], "tta": ["-f", "0", "--tta"]}
    votes = {}
    for name, line in lines.items():
        assert run(*line, "--overwrite") == 0

        record = found(out)
        votes[name] = [box["votes"] for box in record["boxes"]]
        assert record["model"]["folds"] == (["0", "1"] if name == "two" else ["0"])
        # Mirroring along three axes: 2^3 images.
        assert record["settings"]["mirrorings"] == (8 if name == "tta" else 1)
        assert len(record["boxes"]) == len(votes[name]) > 10

    # Boxes of one member overlap by an IoU of at most 0.1, so that hardly two of them are merged.
    assert set(votes["one"]) == {1}
    assert 2 in votes["two"]
    assert max(votes["tta"]) >= 4


def test_two_folds_of_the_same_weights_find_what_one_of_them_finds(
    run: Run,
    results: Path,
    tmp_path: Path,
) -> None:
    name = "checkpoint_final.pth"
    shutil.copy(results / "fold_0" / name, results / "fold_1" / name)

    assert run("-f", "0", "--max-boxes", "5") == 0

    one = found(tmp_path / "out")

    assert run("-f", "0", "1", "--max-boxes", "5", "--overwrite") == 0

    two = found(tmp_path / "out")

    assert [b["votes"] for b in two["boxes"]] == [2] * 5

    # The mean of two equal numbers, except for rounding.
    for a, b in zip(one["boxes"], two["boxes"], strict=True):
        assert b["score"] == pytest.approx(a["score"], abs=1e-5)
        assert b["box_zyx"] == pytest.approx(a["box_zyx"], abs=1e-3)

    # Two equal networks have one segmentation.
    assert (drawn(tmp_path / "out" / "a_instances.nii.gz") > 0).any()


def test_fold_all_has_to_be_asked_for_and_knows_no_false_positives(
    run: Run,
    results: Path,
    tmp_path: Path,
) -> None:
    write_checkpoint(results, "all", seed=3)
    line = ["-d", "950", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]

    # Without -f the folds with a number are used.
    assert main(line) == 0
    assert found(tmp_path / "out")["model"]["folds"] == ["0", "1"]
    assert run("-f", "all", "--overwrite") == 0
    assert found(tmp_path / "out")["model"]["folds"] == ["all"]
    # The fold "all" has no validation scans on which false positives were counted.
    with refused(UsageError, "fppi-fold-all", "--min-score"):
        run("-f", "all", "--fppi", "1", "--overwrite", raises=True)

    for fold in ("0", "1"):
        shutil.rmtree(results / f"fold_{fold}")

    with refused(UsageError, "model-fold-all-only", results, "-f all"):
        main.__wrapped__(line)


def test_false_positives_per_scan_become_scores(
    run: Run,
    results: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # One false positive per scan was counted at the score 0.55.
    curve = {"fp_per_scan": [0.0, 1.0], "sensitivity": [None, None], "threshold": [None, 0.55]}
    summary = {
        "froc": {"curve": {kind.name: curve for kind in CLASSES}},
        "scans": {"number": 1},
        "model": {"mirrorings": 1},
    }
    folder = results / "fold_0" / "validation_detection"
    folder.mkdir()
    (folder / "summary_detection.json").write_text(json.dumps(summary))

    assert run("--fppi", "1") == 0
    assert not caplog.text

    record = found(tmp_path / "out")

    assert record["settings"]["min_score"] == {"solid": 0.55, "holed": 0.55}
    assert min(b["score"] for b in record["boxes"]) >= 0.55

    # The curve was measured with other settings of the suppression.
    assert run("--fppi", "1", "--nms-iou", "0.3", "--overwrite") == 0
    assert logged(caplog, "--fppi", "--nms-iou 0.1", "--max-boxes 100")


def test_the_number_of_boxes_can_be_chosen(run: Run, tmp_path: Path) -> None:
    assert run() == 0

    every = found(tmp_path / "out")["boxes"]

    assert run("--max-boxes", "7", "--overwrite") == 0

    fewer = found(tmp_path / "out")["boxes"]

    assert len(every) > 7 == len(fewer)
    assert {str(b["box_zyx"]) for b in fewer} <= {str(b["box_zyx"]) for b in every}

    # A wider overlap leaves more than 100, and one tile may give them all.
    assert run("--max-boxes", "1000", "--nms-iou", "0.55", "--overwrite") == 0
    assert len(found(tmp_path / "out")["boxes"]) > 100

    for number in ("0", "1001"):
        with refused(UsageError, "detect-max-boxes", f"--max-boxes {number}", 1000):
            run("--max-boxes", number, raises=True)


def test_a_configuration_may_inherit_its_detector(run: Run, results: Path, tmp_path: Path) -> None:
    plans = json.loads((results / "plans.json").read_text())
    configurations = plans["configurations"]
    configurations["large"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    configurations["other"] = {**configurations["3d_fullres"], "autoreg_detection": None}
    (results / "plans.json").write_text(json.dumps(plans))

    for name in ("large", "other", "unknown"):
        # nnU-Net finds a model by the name of its folder.
        renamed = results.with_name(f"AutoregDetectionTrainer__AutoregPlans__{name}")
        results = results.rename(renamed)
        if name == "large":
            assert run("-c", name) == 0
        else:
            with refused(PlanError, "model-of-other-task", results):
                run("-c", name, raises=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_with_nan_or_infinite_voxels_is_left_out(
    value: float,
    run: Run,
    results: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The check of the header lets it pass, so nnU-Net's reader gets it.
    take_nrrd(results)
    write_scan(tmp_path / "in" / "a_0000.nrrd")
    write_scan(tmp_path / "in" / "b_0000.nrrd", voxel=value)

    assert run() == 1

    # Normalising by mean and spread makes every voxel NaN.
    number = np.prod(SHAPE)

    assert logged(caplog, "b is", "(nonfinite)", f"1 of {number}", f" {number} of")
    assert not (tmp_path / "out" / "b.json").exists()
    assert found(tmp_path / "out")["boxes"]


def test_a_network_with_nan_scores_stops_the_run(
    run: Run,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_checkpoint(results, "0", seed=0, damaged=True)

    with refused(WeightsError, "detection-not-finite", "checkpoint_best.pth"):
        run(raises=True)
    assert run() == 1
    assert capsys.readouterr().err
    assert not (tmp_path / "out" / "a.json").exists()


class Diverged(torch.nn.Module):
    """Finite scores, and infinite boxes."""

    def forward(self, image: torch.Tensor) -> Output:
        segmentation = torch.cat([image, image], 1)
        scores = torch.zeros(1, 8, 1)
        return Output(segmentation, scores, torch.full((1, 8, 6), torch.inf), ((2, 2, 2),))


def test_infinite_boxes_stop_the_run_too() -> None:
    from tiny_detector import ANCHORS

    network: Any = Diverged()
    detector = ScanDetector(network, ANCHORS, (8, 8, 8), torch.device("cpu"))

    with refused(WeightsError, "detection-not-finite"):
        detector.candidates(torch.zeros(1, 8, 8, 8))


def test_unreadable_scans_are_left_out_and_the_rest_continues(
    run: Run,
    results: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    take_nrrd(results)
    scans = tmp_path / "in"
    shapes = {"a": SHAPE, "time": (3, *SHAPE), "once": (1, *SHAPE), "flat": SHAPE[1:]}
    for name, shape in shapes.items():
        write_scan(scans / f"{name}_0000.nrrd", shape=shape)
    write_scan(scans / "thin_0000.nrrd", spacing=(1e-3, 1.0, 1.0))
    whole = (scans / "a_0000.nrrd").read_bytes()
    (scans / "cut_0000.nrrd").write_bytes(whole[: len(whole) // 2])

    assert run() == 1

    for values in (
        ("cut is", "(unreadable)", "cut_0000.nrrd"),
        ("flat is", "(not3d)", 2),
        ("time is", "(channels)", 3, 1),
        ("once is", "(not3d)", 4),
        ("thin is", "(spacing)", "16 x 20 x 24", "1, 1, 0.001 mm"),
    ):
        assert logged(caplog, *values)

    results_written = (tmp_path / "out").glob("*.json")
    assert [f.name for f in results_written if ".mrk" not in f.name] == ["a.json"]


def test_no_line_about_a_scan_names_its_folder(
    results: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    take_nrrd(results)
    # Folders are often named after patients.
    folder = tmp_path / "Doe^Jane"
    write_scan(folder / "a_0000.nrrd")
    whole = (folder / "a_0000.nrrd").read_bytes()
    (folder / "b_0000.nrrd").write_bytes(whole[: len(whole) // 2])
    line = ["-d", "950", "-f", "0", "-i", str(folder), "-o", str(tmp_path / "out")]

    assert main([*line, "--device", "cpu"]) == 1

    assert logged(caplog, "b is", "b_0000.nrrd")
    assert "Doe" not in caplog.text
    assert "Doe" not in (tmp_path / "out" / "a.json").read_text()


def test_channels_that_do_not_fit_each_other_are_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    bridge.install()
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    write_model(tmp_path, num_channels=2)
    for name, second in (("a", SHAPE), ("b", (4, 4, 4))):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz")
        write_scan(tmp_path / "in" / f"{name}_0001.nii.gz", shape=second)
    line = ["-d", "950", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]

    assert main([*line, "--device", "cpu"]) == 1

    # The reason is nnU-Net's own.
    assert logged(caplog, "b is", "(unreadable)", "Not all input images have the same shape!")
    assert found(tmp_path / "out")["boxes"]


def test_wrong_options_are_refused_with_a_remedy(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "empty").mkdir()
    taken = tmp_path / "taken" / "x"

    for more, code, values in (
        (["-o", str(taken)], "results-output-folder", [taken]),
        (["-d", "951"], "model-dataset-unknown", ["-d 951", "Dataset950_Tiny"]),
        (["-i", str(tmp_path / "empty")], "scans-none", [tmp_path / "empty", "_0000.nii.gz"]),
    ):
        with refused(UsageError, code, *values):
            run(*more, raises=True)
        # One line, which names the same values.
        assert run(*more) == 2
        assert str(values[0]) in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_gpu_computes_in_the_precision_that_training_had(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_autoreg.downstream.model import half_precision

    # Turing computes in float16 only; Ampere and Hopper have bfloat16.
    kinds = {(7, 5): torch.float16, (8, 0): torch.bfloat16, (9, 0): torch.bfloat16}
    for capability, kind in kinds.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert half_precision(torch.device("cuda")) is kind


def test_the_smallest_allowed_box_survives_being_written_and_read(tmp_path: Path) -> None:
    frame = frame_of_affine(np.eye(4), (8, 8, 8))
    # Sides of 0.01 voxels at 400 places: rounding in the file must not make any of them 0.
    boxes = []
    for low in np.linspace(0, 7.98, 400).tolist():
        high = low + 0.01
        boxes.append(Detection((low, low, low, high, high, high), 1, "solid", 0.5))
    record = make_scan_file("s", frame, boxes, {"solid": 1})
    write_scan_file(tmp_path / "s.json", record)

    assert len(read_scan_file(tmp_path / "s.json").boxes) == 400


def test_continuing_and_the_table_hold_one_scan_at_a_time(tmp_path: Path) -> None:
    frame = frame_of_affine(np.eye(4), (8, 8, 8))
    settings = {"filled": False, "instances": True}
    boxes = [Detection((0, 0, 0, 4, 4, 4), 1, "solid", 0.9)] * 50
    record = make_scan_file("s", frame, boxes, {"solid": 1}, {}, settings)
    write_scan_file(tmp_path / "s.json", record)
    typed = parser().parse_args(["-i", "in", "-o", str(tmp_path), "--csv"])
    request = DetectRequest(**vars(typed))

    def peak_of(number: int) -> int:
        names = [f"s{i}" for i in range(number)]
        for name in names:
            write_scan_file(tmp_path / f"{name}.json", replace(record, scan=name))

        def continue_run() -> None:
            inputs = dict.fromkeys(names, ())
            assert earlier_results(request, inputs, {}, settings) == (set(names), 0)
            write_summaries(tmp_path, tmp_path / "detections.csv", DetectionOptions(), names)

        return peak_bytes(continue_run)

    kept: list[Any] = []
    bytes_of_a_scan = peak_bytes(lambda: kept.append(read_scan_file(tmp_path / "s.json")))
    growth = peak_of(60) - peak_of(3)

    # The last table is that of three scans with 50 boxes each.
    assert (tmp_path / "detections.csv").read_text().count("solid") == 3 * 50
    # 57 more scans take less than four of them would if they were held.
    assert bytes_of_a_scan > 10_000
    assert growth < 4 * bytes_of_a_scan
