"""Other people's weights through the commands on real scans: import, plan, train, predict when the
weights are gone.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.slow]


DATASET = "Dataset004_Hippocampus"


@pytest.fixture(scope="module")
def clinic(unpretrained, shared_data):
    """Labelled scans, and an AR-SSL4M checkpoint: the small one whose numbers the original model
    has computed.
    """
    with np.load(shared_data / "golden" / "ar_ssl4m_small.npz") as file:
        weights = {}
        for key in file.files:
            if key.startswith("weights/"):
                weights[key.removeprefix("weights/")] = torch.from_numpy(file[key])
    torch.save({"state_dict": weights}, unpretrained.root / "ar_ssl4m.pth")
    return unpretrained


def weights_command(clinic, *arguments):
    return clinic.typed([sys.executable, "-m", "nnunet_autoreg.cli.weights", *arguments])


def plan(clinic):
    """Plan for the imported weights, check what is planned, and shorten it to one step."""
    words = "nnUNetv2_plan_and_preprocess -d 4 -pl AutoregPlanner -c 3d_fullres -npfp 1 -np 1"
    program, *arguments = words.split()
    done = clinic.typed([clinic.program(program), *arguments], autoreg_weights="theirs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "licences of the weights: AR-SSL4M: none stated" in done.stdout

    file = clinic.root / "nnUNet_preprocessed" / DATASET / "AutoregPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    # Its intensities and its tokens of 16 voxels are those of the pretraining.
    assert configuration["normalization_schemes"] == ["AutoregPercentileNormalization"]
    assert all(side % 16 == 0 for side in configuration["patch_size"])

    one_step = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}
    plans["autoreg"]["recipe"].update(one_step)
    file.write_text(json.dumps(plans))


def test_ar_ssl4m_is_fine_tuned_by_the_commands_of_nnunet(clinic):
    checkpoint = str(clinic.root / "ar_ssl4m.pth")
    done = weights_command(clinic, "import", checkpoint, "--heads", "12", "--name", "theirs")
    assert done.returncode == 0, done.stderr

    plan(clinic)

    done = clinic.train()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "100.0 % of the encoder's parameters come from the file" in done.stdout
    # All tensors of the encoder, and none of the head that predicts voxels.
    assert "loaded     44 tensors      728,544 parameters" in done.stdout

    # Prediction needs the trained model only.
    shutil.rmtree(clinic.folder("theirs"))
    scans = clinic.root / "scans"
    scans.mkdir()
    image = min((clinic.root / "nnUNet_raw" / DATASET / "imagesTr").iterdir())
    shutil.copy(image, scans)
    words = (
        "nnUNetv2_predict -d 4 -c 3d_fullres -f 0 -tr AutoregPretrainedTrainer -p AutoregPlans "
        "-device cpu -npp 1 -nps 1 --disable_tta"
    )
    program, *arguments = words.split()
    folders = ["-i", str(scans), "-o", str(clinic.root / "out")]
    done = clinic.typed([clinic.program(program), *arguments, *folders])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (clinic.root / "out" / Path(image.name.replace("_0000", ""))).is_file()
