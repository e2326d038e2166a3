"""The whole chain as a user types it: our command, then nnU-Net's own, on real scans, without the
pretraining run at the end.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from few_cases import copy_cases
from nnunet_folders import environment_below, make_folders

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CHOICE = "-tr AutoregPretrainedTrainer -p AutoregPlans"
PREDICT = "-f 0 --save_probabilities -npp 1 -nps 1 -device cpu"
NAME = "Dataset004_Hippocampus"
MODEL = "AutoregPretrainedTrainer__AutoregPlans__3d_fullres"
NUM_CASES = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared_data):
    """A small raw dataset of real scans and empty nnU-Net folders."""
    home = tmp_path_factory.mktemp("chain")
    make_folders(home)
    (home / "elsewhere").mkdir()
    copy_cases(
        shared_data / "nnUNet_raw" / NAME,
        home / "nnUNet_raw" / NAME,
        NUM_CASES,
        num_tests=2,
    )
    return home


def typed(home, line, *paths, results="nnUNet_results"):
    """Run one command of this environment; its output, both streams together.

    Args:
        line: words separated by blanks.
        paths: words that may hold blanks.
    """
    program, *arguments = [*line.split(), *map(str, paths)]
    # The planner does not choose an encoder that has learnt nothing in two steps.
    changes = {"autoreg_weights": "brain", "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        env=environment_below(home, **changes, nnUNet_results=home / results),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def pretrain_and_plan(home):
    """Pretrain, and plan a fine-tuning of one short epoch."""
    # Two steps of a whole run: planning, preprocessing, training, export.
    typed(home, "autoreg_pretrain -d 4 --name brain --steps 2 --batch 2 --device cpu")
    printed = typed(home, "nnUNetv2_plan_and_preprocess -d 4 -pl AutoregPlanner -npfp 1 -np 1")
    assert "brain" in printed

    file = home / "nnUNet_preprocessed" / NAME / "AutoregPlans.json"
    plans = json.loads(file.read_text())
    assert "2d" not in plans["configurations"]
    assert plans["autoreg"]["weights"]["name"] == "brain"
    # One epoch of two steps.
    plans["autoreg"]["recipe"].update(
        num_epochs=1,
        num_iterations_per_epoch=2,
        num_val_iterations_per_epoch=1,
    )
    file.write_text(json.dumps(plans))


def share(home):
    """Export the model, and install it for other results."""
    file = home / "model.zip"
    typed(home, f"nnUNetv2_export_model_to_zip -d 4 -c 3d_fullres -f 0 {CHOICE} -o", file)
    typed(home, "nnUNetv2_install_pretrained_model_from_zip", file, results="elsewhere")


def probabilities_of(folder):
    """The probabilities of both test scans, by file name."""
    assert len(list(folder.glob("*.nii.gz"))) == 2
    return {file.name: np.load(file)["probabilities"] for file in sorted(folder.glob("*.npz"))}


def test_the_chain_from_unlabelled_scans_to_an_exported_model(home):
    pretrain_and_plan(home)

    train = "nnUNetv2_train 4 3d_fullres 0 -device cpu"
    trained = typed(home, f"{train} {CHOICE} --npz")
    assert "100.0 % of the encoder's parameters come from the file" in trained

    # From here on nothing needs the pretraining run.
    shutil.rmtree(home / "nnUNet_results/autoreg_pretraining")
    # The prediction must come from the trained model only.
    typed(home, f"{train} {CHOICE} --val")
    typed(home, f"nnUNetv2_find_best_configuration 4 -c 3d_fullres -f 0 -np 1 {CHOICE}")
    scans = home / "nnUNet_raw" / NAME / "imagesTs"
    line = f"nnUNetv2_predict -d 4 -c 3d_fullres {CHOICE} {PREDICT}"
    typed(home, line, "-i", scans, "-o", home / "predicted")

    # The model goes through a zip to other folders, as to another clinic.
    share(home)
    line = f"nnUNetv2_predict_from_modelfolder {PREDICT}"
    model = home / "elsewhere" / NAME / MODEL
    typed(home, line, "-m", model, "-i", scans, "-o", home / "again", results="elsewhere")

    before = probabilities_of(home / "predicted")
    after = probabilities_of(home / "again")
    assert before.keys() == after.keys()
    assert len(before) == 2
    for name, predicted in before.items():
        # A constant map would be equal to another constant one.
        assert predicted.std() > 0
        assert np.array_equal(predicted, after[name])

    scratch = typed(home, f"{train} -tr AutoregScratchTrainer -p AutoregPlans")
    assert "Mean Validation Dice" in scratch
    assert "encoder weights from" not in scratch
