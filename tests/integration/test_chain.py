"""The whole chain as a user types it: our command, then nnU-Net's own, on real scans, without the
pretraining run at the end.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from few_cases import copy_cases

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CHOICE = ["-tr", "AutoregPretrainedTrainer", "-p", "AutoregPlans"]
NAME = "Dataset004_Hippocampus"
NUM_CASES = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared_data):
    """A small raw dataset of real scans and empty nnU-Net folders."""
    home = tmp_path_factory.mktemp("chain")
    copy_cases(
        shared_data / "nnUNet_raw" / NAME, home / "nnUNet_raw" / NAME, NUM_CASES, num_tests=2
    )
    for folder in ("nnUNet_preprocessed", "nnUNet_results", "elsewhere"):
        (home / folder).mkdir()
    return home


def environment(home, results="nnUNet_results"):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("autoreg_")}
    settings = {
        "GOMP_SPINCOUNT": "1000",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        # The planner does not choose an encoder that has learnt nothing in two steps.
        "autoreg_weights": "brain",
    }
    folders = {
        "nnUNet_raw": "nnUNet_raw",
        "nnUNet_preprocessed": "nnUNet_preprocessed",
        "nnUNet_results": results,
    }
    return {**clean, **settings, **{name: str(home / folder) for name, folder in folders.items()}}


def typed(home, *line, results="nnUNet_results", expect=0):
    """Run one command of this environment; its output, both streams together."""
    program = Path(sys.executable).with_name(line[0])
    done = subprocess.run(
        [program, *map(str, line[1:])],
        env=environment(home, results),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


def test_the_chain_from_unlabelled_scans_to_an_exported_model(home):
    raw = home / "nnUNet_raw/Dataset004_Hippocampus"
    typed(
        home,
        "autoreg_pretrain",
        "-d",
        "4",
        "--name",
        "brain",
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
    )
    plan = typed(
        home,
        "nnUNetv2_plan_and_preprocess",
        "-d",
        "4",
        "-pl",
        "AutoregPlanner",
        "-npfp",
        "1",
        "-np",
        "1",
    )
    assert "brain" in plan
    plans_file = home / "nnUNet_preprocessed/Dataset004_Hippocampus/AutoregPlans.json"
    plans = json.loads(plans_file.read_text())
    assert "2d" not in plans["configurations"]
    assert plans["autoreg"]["weights"]["name"] == "brain"
    plans["autoreg"]["recipe"].update(
        num_epochs=1, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1
    )
    plans_file.write_text(json.dumps(plans))

    trained = typed(
        home, "nnUNetv2_train", "4", "3d_fullres", "0", *CHOICE, "--npz", "-device", "cpu"
    )
    assert "100.0 % of the encoder's parameters come from the file" in trained
    shutil.rmtree(home / "nnUNet_results/autoreg_pretraining")
    typed(home, "nnUNetv2_train", "4", "3d_fullres", "0", *CHOICE, "--val", "-device", "cpu")
    typed(
        home,
        "nnUNetv2_find_best_configuration",
        "4",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-np",
        "1",
        *CHOICE,
    )
    predict = [
        "-i",
        raw / "imagesTs",
        "-f",
        "0",
        "--save_probabilities",
        "-npp",
        "1",
        "-nps",
        "1",
        "-device",
        "cpu",
    ]
    typed(
        home,
        "nnUNetv2_predict",
        "-d",
        "4",
        "-o",
        home / "predicted",
        "-c",
        "3d_fullres",
        *predict,
        *CHOICE,
    )
    typed(
        home,
        "nnUNetv2_export_model_to_zip",
        "-d",
        "4",
        "-o",
        home / "model.zip",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        *CHOICE,
    )
    typed(
        home, "nnUNetv2_install_pretrained_model_from_zip", home / "model.zip", results="elsewhere"
    )
    folder = (
        home / "elsewhere/Dataset004_Hippocampus/AutoregPretrainedTrainer__AutoregPlans__3d_fullres"
    )
    typed(
        home,
        "nnUNetv2_predict_from_modelfolder",
        "-o",
        home / "again",
        "-m",
        folder,
        *predict,
        results="elsewhere",
    )
    names = sorted(p.name for p in (home / "predicted").glob("*.npz"))
    assert len(names) == len(list((home / "predicted").glob("*.nii.gz"))) == 2
    for name in names:
        before, after = (
            np.load(home / folder / name)["probabilities"] for folder in ("predicted", "again")
        )
        assert before.std() > 0
        assert np.array_equal(before, after)

    scratch = typed(
        home,
        "nnUNetv2_train",
        "4",
        "3d_fullres",
        "0",
        "-tr",
        "AutoregScratchTrainer",
        "-p",
        "AutoregPlans",
        "-device",
        "cpu",
    )
    assert "Mean Validation Dice" in scratch
    assert "encoder weights from" not in scratch
