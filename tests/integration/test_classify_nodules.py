"""The route of AR-SSL4M: its encoder is imported and fine-tuned for classifying lung nodules."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_folders import plan_and_preprocess, set_folders

pytestmark = pytest.mark.integration

# Two nodules per fold: one benign, one malignant.
NAME, NUMBER, NUM_NODULES, NUM_TESTS = "Dataset962_Nodules", 962, 10, 2
TRAINER = "AutoregClassificationTrainer_1epochs"
# Small nodules are mostly benign and large ones mostly malignant, which the size would show.
DIAMETERS_MM = (8.0, 14.0)


def is_medium(row: dict[str, str]) -> bool:
    """Return whether the size of a nodule does not give away its class."""
    low, high = DIAMETERS_MM
    return low <= float(row["diameter_mm"]) <= high


def copy_nodules(source: Path, target: Path) -> None:
    """Copy benign and malignant nodules with ``classesTr.csv``, and two without a class."""
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (target / folder).mkdir(parents=True)
    with (source / "cases.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    # One nodule of a patient, so that folds are of equal size.
    of_patients = {row["patient"]: row for row in rows if is_medium(row)}
    malignant = [row for row in of_patients.values() if row["malignant"] == "1"]
    benign = [row for row in of_patients.values() if row["malignant"] == "0"]

    lines = ["case,patient,malignancy"]
    for bad, good in list(zip(malignant, benign, strict=False))[: NUM_NODULES // 2]:
        for row, kind in ((bad, "malignant"), (good, "benign")):
            case = row["case"]
            lines.append(f"{case},{row['patient']},{kind}")
            shutil.copy(source / "imagesTr" / f"{case}_0000.nii.gz", target / "imagesTr")
            shutil.copy(source / "labelsTr" / f"{case}.nii.gz", target / "labelsTr")
    for row in malignant[-NUM_TESTS:]:
        shutil.copy(source / "imagesTr" / f"{row['case']}_0000.nii.gz", target / "imagesTs")

    (target / "classesTr.csv").write_text("\n".join(lines) + "\n")
    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": NUM_NODULES}))


@pytest.fixture
def raw(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nnU-Net's raw dataset of nodules; its folders are those of the environment."""
    set_folders(monkeypatch, tmp_path)
    dataset = tmp_path / "nnUNet_raw" / NAME
    copy_nodules(shared_data / "nnUNet_raw" / "Dataset091_LIDCNodules", dataset)
    return dataset


@pytest.fixture
def checkpoint(shared_data: Path, tmp_path: Path) -> Path:
    """A checkpoint in the form of AR-SSL4M: the small one that the original code has made."""
    with np.load(shared_data / "golden" / "ar_ssl4m_small.npz") as file:
        weights = {
            key.removeprefix("weights/"): torch.from_numpy(file[key])
            for key in file.files
            if key.startswith("weights/")
        }
    target = tmp_path / "ar_ssl4m.pth"
    torch.save({"state_dict": weights}, target)
    return target


def test_an_imported_encoder_of_ar_ssl4m_classifies_nodules(
    raw: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_autoreg.cli.classify import main as classify
    from nnunet_autoreg.cli.weights import main as weights

    # The small model has 12 heads, which its file does not state.
    assert weights(["import", str(checkpoint), "--heads", "12", "--name", "ar_ssl4m"]) == 0
    monkeypatch.setenv("autoreg_weights", "ar_ssl4m")
    plan_and_preprocess(NUMBER)
    cpu = torch.device("cpu")
    made = get_trainer_from_args(NAME, "3d_fullres", 0, TRAINER, "AutoregPlans", False, cpu)
    made.run_training()
    made.perform_actual_validation()
    options = ["-f", "0", "-tr", TRAINER, "--device", "cpu"]
    out = tmp_path / "out"
    assert classify(["-d", str(NUMBER), "-i", str(raw / "imagesTs"), "-o", str(out), *options]) == 0

    folder = Path(made.output_folder)
    log = "".join(file.read_text() for file in folder.glob("training_log_*.txt"))
    assert "100.0 % of the encoder's parameters come from the file" in log
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    # 10 cases in five folds.
    assert summary["tasks"]["malignancy"]["cases"] == NUM_NODULES // 5
    assert set(summary["baselines"]) == {"majority", "size", "linear_probe"}
    probed = list(csv.DictReader((folder / "validation" / "baseline_linear_probe.csv").open()))
    validated = list(csv.DictReader((folder / "validation" / "classes.csv").open()))
    assert sorted(row["case"] for row in probed) == [row["case"] for row in validated]
    plans = json.loads((folder.parent / "plans.json").read_text())
    block = plans["configurations"]["3d_fullres"]["autoreg_classification"]
    # A transformer has layer decay.
    assert block["layer_decay"] == 0.75
    with (out / "classes.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == NUM_TESTS
