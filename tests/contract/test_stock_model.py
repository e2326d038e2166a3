"""A fine-tuned CNN is an ordinary nnU-Net model, with which nnU-Net predicts without our plugin.

One small training on real scans; all tests look at what it left, or go on from a copy of it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import copy_cases
from fresh_environment import fresh_environment, link_library
from nnunet_folders import TRAINER_MODULE, plan_and_preprocess, set_folders
from nnunet_project import PRETRAINED, Project, quick_predictor

from nnunet_autoreg.finetune.stock import needs_line

pytestmark = pytest.mark.contract

# Hippocampi are the smallest real scans: some 50 voxels on a side.
DATASET = "Dataset004_Hippocampus"
NUM_CASES = 5
SCRATCH = "AutoregScratchTrainer"
STOCK_NETWORK = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
GUARD = "nnunet_autoreg.finetune.network.PlannedForAutoregTrainers"
CHOICE = ["-d", "4", "-c", "3d_fullres", "-f", "0", "-tr", PRETRAINED, "-p", "AutoregPlans"]

# nnU-Net's own commands, started in an environment that has no nnunet-autoreg.
COMMAND = """
import importlib.util, sys
assert importlib.util.find_spec("nnunet_autoreg") is None
assert not any(hasattr(finder, "is_autoreg_bridge") for finder in sys.meta_path)
if __name__ == "__main__":
    module, function = sys.argv.pop(1).split(":")
    getattr(__import__(module, fromlist=[function]), function)()
"""
PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
INSTALL = "nnunetv2.model_sharing.entry_points:install_from_zip_entry_point"


class StockProject(Project):
    """A project whose models are looked at as stock nnU-Net reads them."""

    def stored_plans(self, trainer: str = PRETRAINED) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.model(trainer) / "plans.json").read_text())
        return found

    def make_older(self, trainer: str) -> None:
        """Write a copy of the pretrained model as earlier releases left it."""
        shutil.copytree(self.model(), self.model(trainer))
        (self.model(trainer) / "plans.json").write_text(json.dumps(self.plans()))
        saved = self.checkpoint(trainer)
        # Earlier releases kept the guard, and the name of the trainer, in the checkpoint.
        saved["init_args"]["plans"] = self.plans()
        saved["trainer_name"] = trainer
        torch.save(saved, self.fold(trainer) / "checkpoint_final.pth")


@pytest.fixture(scope="module")
def project(
    shared_data: Path,
    write_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[StockProject]:
    """A pretrained and a scratch model of one epoch, validated."""
    root = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, root)
        # Validation without mirroring and overlap takes a tenth of the time.
        patch.setattr(f"{TRAINER_MODULE}.nnUNetPredictor", quick_predictor)
        copy_cases(
            shared_data / "nnUNet_raw" / DATASET,
            root / "nnUNet_raw" / DATASET,
            NUM_CASES,
            1,
        )
        write_run(root / "nnUNet_results", "brain", encoder="resenc_tiny")
        plan_and_preprocess(4)
        made = StockProject(root, DATASET)
        made.shorten()
        for trainer in (PRETRAINED, SCRATCH):
            made.train(trainer, export_validation_probabilities=True)
        yield made


def networks(plans: dict[str, Any]) -> set[str]:
    entries = plans["configurations"].values()
    return {entry["architecture"]["network_class_name"] for entry in entries}


def test_the_zip_predicts_the_same_mask_without_our_plugin(
    project: StockProject,
    tmp_path: Path,
) -> None:
    import SimpleITK as sitk  # noqa: N813
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    from nnunetv2.model_sharing.model_export import export_pretrained_model

    images = project.root / "nnUNet_raw" / DATASET / "imagesTs"
    # No mirroring and no overlap of tiles, and one process each for reading and writing.
    options = [
        "-i",
        str(images),
        "-npp",
        "1",
        "-nps",
        "1",
        "-device",
        "cpu",
        "--disable_tta",
        "-step_size",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["predict", "-o", str(tmp_path / "here"), *CHOICE, *options])
        predict_entry_point()
    archive = str(tmp_path / "model.zip")
    export_pretrained_model(4, archive, ("3d_fullres",), PRETRAINED, "AutoregPlans", (0,))

    # An environment that has nnU-Net and lacks our package.
    environment = fresh_environment(tmp_path / "venv", link_library(tmp_path / "library"))
    script = environment.root / "command.py"
    script.write_text(COMMAND)
    folders = {}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        folders[name] = str(tmp_path / name)
    lines = ([INSTALL, archive], [PREDICT, "-o", str(tmp_path / "there"), *CHOICE, *options])
    for line in lines:
        done = environment.run(script, *line, **folders)
        assert done.returncode == 0, done.stderr[-2000:]

    (mask,) = (tmp_path / "here").glob("*.nii.gz")
    here = sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))
    there = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "there" / mask.name)))
    # An empty mask would be equal to another empty one.
    assert len(np.unique(here)) > 1
    assert np.array_equal(here, there)


@pytest.mark.parametrize("trainer", [PRETRAINED, SCRATCH])
def test_only_the_preprocessed_folder_keeps_the_guard(project: StockProject, trainer: str) -> None:
    saved = project.checkpoint(trainer)

    assert networks(project.stored_plans(trainer)) == {STOCK_NETWORK}
    assert networks(saved["init_args"]["plans"]) == {STOCK_NETWORK}
    assert saved["trainer_name"] == "nnUNetTrainer"
    # Stock trainers must not train our plans: there the guard stays.
    assert networks(json.loads(project.plans_file.read_text())) == {GUARD}
    log = next((project.model(trainer) / "fold_0").glob("training_log_*.txt")).read_text()
    assert needs_line(is_stock=True) in log


def test_a_checkpoint_of_the_stock_form_continues_and_validates(project: StockProject) -> None:
    before = project.checkpoint()

    project.shorten(num_epochs=2)
    project.train(continue_training=True)
    after = project.checkpoint()

    assert (before["current_epoch"], after["current_epoch"]) == (1, 2)
    assert after["trainer_name"] == "nnUNetTrainer"
    # Validation with the last and with the best checkpoint.
    for options in ({}, {"val_with_best": True}):
        summary = project.model() / "fold_0" / "validation" / "summary.json"
        summary.unlink()
        project.train(only_run_validation=True, export_validation_probabilities=True, **options)
        assert summary.is_file()


def test_a_model_of_an_earlier_release_predicts_the_same_and_continues(
    project: StockProject,
) -> None:
    # Three epochs, of which the older model has finished one.
    older = f"{PRETRAINED}_3epochs"
    project.make_older(older)

    assert np.array_equal(project.predict(project.model(older)), project.predict())
    project.train(older, continue_training=True)

    saved = project.checkpoint(older)
    assert (saved["current_epoch"], saved["trainer_name"]) == (3, "nnUNetTrainer")
    assert networks(saved["init_args"]["plans"]) == {STOCK_NETWORK}


def test_a_folder_with_folds_of_both_forms_predicts(project: StockProject) -> None:
    older = f"{PRETRAINED}_4epochs"
    project.make_older(older)
    expected = project.predict(project.model(older))
    # A newer fold has written the plans of the whole folder.
    shutil.copy(project.model() / "plans.json", project.model(older))

    assert np.array_equal(project.predict(project.model(older)), expected)


def test_the_best_configuration_and_the_ensemble_are_found(project: StockProject) -> None:
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    models = [
        {"plans": "AutoregPlans", "configuration": "3d_fullres", "trainer": trainer}
        for trainer in (PRETRAINED, SCRATCH)
    ]

    find_best_configuration(4, models, num_processes=1, folds=(0,))

    ensembles = project.root / "nnUNet_results" / DATASET / "ensembles"
    assert len(list(ensembles.glob("ensemble___Autoreg*/summary.json"))) == 1
    information = (ensembles.parent / "inference_information.json").read_text()
    assert PRETRAINED in information
