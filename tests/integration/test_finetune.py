"""From a finished run through nnU-Net's own planning, preprocessing, training, validation and
prediction, on real scans, on a CPU.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import copy_cases
from nnunet_folders import plan_and_preprocess, set_folders
from safetensors.torch import load_file

from nnunet_autoreg.finetune.stock import needs_line

pytestmark = pytest.mark.integration

NAME = "Dataset004_Hippocampus"
NUM_CASES = 10
# Not nnU-Net's default for NIfTI, so that a reader that is ignored would be noticed.
READER = "NibabelIOWithReorient"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def project(
    shared_data: Path,
    write_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """nnU-Net's three folders with ten hippocampi, planned and preprocessed for the tiny encoder of
    the run 'brain'.
    """
    root = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, root)
        copy_cases(shared_data / "nnUNet_raw" / NAME, root / "nnUNet_raw" / NAME, NUM_CASES)
        ask_for_reader(root, READER)
        write_run(root / "nnUNet_results", "brain")
        plan_and_preprocess(4, ("2d", "3d_fullres", "3d_lowres"))
        shorten(root)
        yield root


def ask_for_reader(root: Path, name: str) -> None:
    """Name a reader in dataset.json."""
    file = root / "nnUNet_raw" / NAME / "dataset.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "overwrite_image_reader_writer": name}))


def plans_file(root: Path, name: str = "AutoregPlans") -> Path:
    return root / "nnUNet_preprocessed" / NAME / f"{name}.json"


def read_plans(root: Path) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads(plans_file(root).read_text())
    return plans


def shorten(root: Path, **recipe: Any) -> None:
    """Plan one epoch of two steps; ``recipe`` changes this."""
    plans = read_plans(root)
    short = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    plans["autoreg"]["recipe"].update({**short, **recipe})
    plans_file(root).write_text(json.dumps(plans))


def train(
    trainer: str,
    plans: str = "AutoregPlans",
    configuration: str = "3d_fullres",
    **options: Any,
) -> None:
    from nnunetv2.run.run_training import run_training

    run_training("4", configuration, 0, trainer, plans, device=CPU, **options)


def fold(root: Path, trainer: str) -> Path:
    return root / "nnUNet_results" / NAME / f"{trainer}__AutoregPlans__3d_fullres" / "fold_0"


def checkpoint(root: Path, trainer: str) -> dict[str, Any]:
    file = fold(root, trainer) / "checkpoint_final.pth"
    found: dict[str, Any] = torch.load(file, map_location=CPU, weights_only=False)
    return found


def logs(root: Path, trainer: str) -> str:
    files = sorted(fold(root, trainer).glob("training_log_*.txt"))
    return "\n".join(file.read_text() for file in files)


@contextmanager
def ends_in_one_line(*values: str) -> Iterator[None]:
    """Expect that a command of nnU-Net ends with one error line that names all the values."""
    with pytest.raises(SystemExit) as stopped:
        yield

    line = str(stopped.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    missing = [value for value in values if value not in line]
    assert not missing, f"{missing} are not named in: {line}"


def test_the_plan_fits_the_encoder_and_is_our_own(project: Path) -> None:
    plans = read_plans(project)

    # 2D and low resolution were asked for as well: pretrained encoders are for 3D at full
    # resolution.
    assert list(plans["configurations"]) == ["3d_fullres"]

    full = plans["configurations"]["3d_fullres"]

    assert full["data_identifier"] == "AutoregPlans_3d_fullres"
    assert full["patch_size"] == [40, 56, 40]
    assert full["batch_size"] == 2
    # The reader that dataset.json asks for; trainings and predictions below go by it.
    assert plans["image_reader_writer"] == READER
    assert plans["autoreg"]["weights"]["file"] == "autoreg_pretraining/brain/encoder.safetensors"
    # An image and a label map for each case.
    folder = plans_file(project).parent / "AutoregPlans_3d_fullres"
    assert len(list(folder.glob("*.b2nd"))) == 2 * NUM_CASES


def test_planning_again_keeps_only_the_users_configurations(
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    plans = read_plans(project)
    plans["plans_name"] = "Other"
    # A configuration that nnU-Net's planner would have made, and one that a user has added.
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"]
    plans["configurations"]["bs4"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    plans_file(project, "Other").write_text(json.dumps(plans))

    spacing = (1.5, 1.5, 1.5)
    options = {"overwrite_plans_name": "Other", "overwrite_target_spacing": spacing}
    plan_experiments([4], "AutoregPlanner", 12.0, **options)

    again = json.loads(plans_file(project, "Other").read_text())
    assert list(again["configurations"]) == ["3d_fullres", "bs4"]
    assert again["configurations"]["3d_fullres"]["spacing"] == [1.5, 1.5, 1.5]
    # The default length: the shortened recipe of the fixture is not kept.
    assert again["autoreg"]["recipe"]["num_epochs"] == 150
    printed = capsys.readouterr().out
    assert "weights: brain - the newest finished run that suits" in printed
    assert "2D U-Net" not in printed
    line = f"nnUNetv2_train {NAME} 3d_fullres 0 -tr AutoregPretrainedTrainer -p Other"
    assert f"next: {line}" in printed


def test_a_reader_that_nnunet_does_not_have_is_named(
    project: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    ask_for_reader(project, "MyReader")
    plan_experiments([4], "AutoregPlanner", overwrite_plans_name="Readers")
    # The fixture is shared by the tests of this file.
    ask_for_reader(project, READER)

    plans = json.loads(plans_file(project, "Readers").read_text())
    assert plans["image_reader_writer"] == "SimpleITKIO"
    # The output of nnU-Net's planner, which is logged for debugging, names the reader too.
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    warned = [message for message in warnings if "MyReader" in message]
    assert len(warned) == 1
    assert "SimpleITKIO" in warned[0]


def test_planning_without_suitable_weights_ends_in_one_line(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    # A typing error of "brain".
    monkeypatch.setenv("autoreg_weights", "brian")
    with ends_in_one_line("autoreg_weights=brian", "'brain'"):
        plan_experiments([4], "AutoregPlanner", overwrite_plans_name="Nothing")
    assert not plans_file(project, "Nothing").exists()


def test_a_training_resumes_and_predicts_without_the_weights(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    trainer = "AutoregPretrainedTrainer"
    # The plans decide; a variable that was set later is not used.
    monkeypatch.setenv("autoreg_weights", "other")
    train(trainer, export_validation_probabilities=True)
    assert "autoreg_weights=other is ignored" in logs(project, trainer)
    # The crop of pretraining had 4 x 5 x 4 tokens, the patch of 40 x 56 x 40 has 5 x 7 x 5.
    assert "eva.pos_embed (positions 4x5x4 -> 5x7x5, trilinear)" in logs(project, trainer)
    assert (fold(project, trainer) / "validation" / "summary.json").is_file()
    assert list((fold(project, trainer) / "validation").glob("*.npz"))
    assert needs_line(is_stock=False) in logs(project, trainer)
    first = checkpoint(project, trainer)
    # nnU-Net's own trainer cannot build a transformer.
    assert first["trainer_name"] == trainer
    key = "eva.blocks.0.attn.q_proj.weight"
    brain = project / "nnUNet_results/autoreg_pretraining/brain"
    given = load_file(brain / "encoder.safetensors")[key]
    # Two steps have moved the weights only a little from where they started.
    assert (first["network_weights"][key] - given).abs().max() < 0.01

    shutil.rmtree(brain)
    shorten(project, num_epochs=2)
    train(trainer, continue_training=True)
    second = checkpoint(project, trainer)
    assert (first["current_epoch"], second["current_epoch"]) == (1, 2)
    key = "eva.pos_embed"
    assert not torch.equal(first["network_weights"][key], second["network_weights"][key])
    train(trainer, only_run_validation=True, val_with_best=True)
    # The shape of the first hippocampus.
    assert predict(project, trainer, tmp_path) == (35, 51, 35)


def predict(root: Path, trainer: str, output: Path) -> tuple[int, ...]:
    import SimpleITK as sitk  # noqa: N813
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(fold(root, trainer).parent), (0,))
    image = root / "nnUNet_raw" / NAME / "imagesTr" / "hippocampus_001_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], str(output))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "hippocampus_001.nii.gz")))
    # Its labels are background, anterior and posterior.
    assert set(np.unique(labels)) <= {0, 1, 2}
    return tuple(labels.shape)


def test_the_scratch_twin_trains_without_any_weights(project: Path) -> None:
    # The length in the trainer's name overrides that of the plan.
    shorten(project, num_epochs=7)
    trainer = "AutoregScratchTrainer_1epochs"

    train(trainer)

    saved = checkpoint(project, trainer)
    assert "encoder weights from" not in logs(project, trainer)
    assert saved["current_epoch"] == 1
    assert saved["trainer_name"] == trainer


def test_a_results_folder_of_an_older_trainer_class_still_predicts(
    project: Path,
    tmp_path: Path,
) -> None:
    # Earlier releases had a class statement for each of four lengths, 5 epochs among them.
    shorten(project)
    train("AutoregScratchTrainer")
    older = "AutoregScratchTrainer_5epochs"
    shutil.copytree(fold(project, "AutoregScratchTrainer").parent, fold(project, older).parent)
    saved = {**checkpoint(project, older), "trainer_name": older}
    torch.save(saved, fold(project, older) / "checkpoint_final.pth")

    assert predict(project, older, tmp_path) == (35, 51, 35)


def test_wrong_combinations_end_in_one_line_with_the_right_command(project: Path) -> None:
    with ends_in_one_line("-tr AutoregPretrainedTrainer"):
        train("nnUNetTrainer")

    # Stock plans lack the block of ours.
    plans = read_plans(project)
    del plans["autoreg"]
    content = {**plans, "plans_name": "nnUNetPlans"}
    plans_file(project, "nnUNetPlans").write_text(json.dumps(content))
    with ends_in_one_line("nnUNetPlans.json", "-p AutoregPlans"):
        train("AutoregPretrainedTrainer", plans="nnUNetPlans")

    # A transformer for 3D has no 2D configuration.
    with ends_in_one_line("AutoregPlans.json", "'2d'", "3d_fullres"):
        train("AutoregPretrainedTrainer", configuration="2d")

    # Plans made with autoreg_weights=none.
    plans = read_plans(project)
    plans["autoreg"]["weights"] = None
    plans_file(project, "Scratch").write_text(json.dumps({**plans, "plans_name": "Scratch"}))
    with ends_in_one_line("Scratch.json", "-tr AutoregScratchTrainer_7epochs"):
        train("AutoregPretrainedTrainer_7epochs", plans="Scratch")
