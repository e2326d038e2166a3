"""CNNs and convolutional tokenizers through nnU-Net's own functions on real scans: plan, train,
continue, validate, find best, share.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import copy_cases
from nnunet_folders import TRAINER_MODULE, plan_and_preprocess, set_folders
from nnunet_project import CPU, PRETRAINED, Project, quick_predictor

pytestmark = [pytest.mark.integration, pytest.mark.slow]

HIPPOCAMPUS, SARCOMA = "Dataset004_Hippocampus", "Dataset051_SarcomaMR"
NUM_CASES = 5
# Multiples of the strides of the tiny CNN in thick slices.
SMALL_PATCH = [16, 40, 48]


class PlannedProject(Project):
    """A project with the finished run 'brain', which is planned for its weights."""

    def plan(self, configurations: tuple[str, ...] = ("3d_fullres",), **options: Any) -> None:
        """Plan, preprocess and shorten, in one process."""
        plan_and_preprocess(self.number, configurations, **options)
        self.shorten(SMALL_PATCH if self.dataset == SARCOMA else None)


@pytest.fixture
def make_project(
    shared_data: Path,
    write_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., PlannedProject]]:
    """A function that makes a project of a dataset and an encoder with random weights.

    The card says that it was pretrained at the dataset's spacing.
    """
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(f"{TRAINER_MODULE}.nnUNetPredictor", quick_predictor)

    def make(dataset: str, encoder: str, **card: Any) -> PlannedProject:
        copy_cases(
            shared_data / "nnUNet_raw" / dataset,
            tmp_path / "nnUNet_raw" / dataset,
            NUM_CASES,
        )
        write_run(tmp_path / "nnUNet_results", "brain", encoder=encoder, **card)
        return PlannedProject(tmp_path, dataset)

    yield make


def without_validation(patch: pytest.MonkeyPatch) -> None:
    """For trainings whose validation says nothing new."""
    patch.setattr(f"{TRAINER_MODULE}.nnUNetTrainer.perform_actual_validation", lambda *_: None)


@pytest.mark.parametrize("dataset", [HIPPOCAMPUS, SARCOMA])
@pytest.mark.parametrize("encoder", ["resenc_tiny", "primus_v2_tiny"])
def test_the_chain_of_stock_commands(
    make_project: Callable[..., PlannedProject],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: str,
    dataset: str,
) -> None:
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration
    from nnunetv2.model_sharing.model_export import export_pretrained_model
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file

    spacing = (1.0, 1.0, 1.0) if dataset == HIPPOCAMPUS else (3.27, 0.98, 0.98)

    project = make_project(dataset, encoder, spacing_mm=spacing)
    project.plan()
    first = project.train()
    assert "100.0 % of the encoder's parameters come from the file" in first
    # The training continues from its checkpoint, without the weights of the pretraining.
    (project.root / "nnUNet_results/autoreg_pretraining/brain/encoder.safetensors").unlink()
    project.shorten(num_epochs=2)
    before = project.checkpoint()["network_weights"]
    project.train(continue_training=True)
    after = project.checkpoint()
    assert after["current_epoch"] == 2
    # The second epoch has changed the weights.
    pairs = [(before[key], value) for key, value in after["network_weights"].items()]
    assert any(not torch.equal(old, new) for old, new in pairs)

    best = [{"plans": "AutoregPlans", "configuration": "3d_fullres", "trainer": PRETRAINED}]
    find_best_configuration(project.number, best, num_processes=1, folds=(0,))
    expected = project.predict(project.model())
    # A constant map would be equal to another constant one.
    assert expected.std() > 0
    export_pretrained_model(
        project.number,
        str(tmp_path / "model.zip"),
        ("3d_fullres",),
        PRETRAINED,
        "AutoregPlans",
        (0,),
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    install_model_from_zip_file(str(tmp_path / "model.zip"))
    found = project.predict(project.model(results="elsewhere"))
    # From the installed copy of the zip, bit for bit.
    assert np.array_equal(found, expected)


def test_anisotropic_scans_get_the_strides_and_kernels_of_nnunet(
    make_project: Callable[..., PlannedProject],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_validation(monkeypatch)
    project = make_project(SARCOMA, "resenc_tiny", spacing_mm=(3.27, 0.98, 0.98))
    project.plan()
    printed = capsys.readouterr().out
    assert "3d_fullres: patch 32 x 80 x 96, batch 2" in printed

    plans = project.plans()
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    # Slices of 3.27 mm and pixels of 0.98 mm: the first stage looks at single slices.
    assert network["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert network["strides"][:2] == [[1, 1, 1], [1, 2, 2]]
    assert "kernels in stages 0: 3x3x3 -> 1x3x3" in printed
    reason = plans["autoreg"]["reasons"]["recipe.decoder_first_fraction"]
    assert reason.startswith("on, the stem is adapted: kernel")

    project.shorten(decoder_first_fraction=0.5)
    log = project.train()
    # A kernel of three slices becomes one of a single slice by adding up its slices.
    assert "(kernel 3x3x3 -> 1x3x3, summed)" in log

    twin = project.train("AutoregScratchTrainer")
    assert "encoder weights from" not in twin

    # The twin from scratch is the same network.
    shapes = []
    for trainer in (PRETRAINED, "AutoregScratchTrainer"):
        weights = project.checkpoint(trainer)["network_weights"]
        shapes.append([(key, tuple(value.shape)) for key, value in weights.items()])
    assert shapes[0] == shapes[1]


def test_regions_and_an_ignore_label_with_deep_supervision(
    make_project: Callable[..., PlannedProject],
) -> None:
    import SimpleITK as sitk  # noqa: N813

    project = make_project(HIPPOCAMPUS, "resenc_tiny")
    raw = project.root / "nnUNet_raw" / project.dataset
    for label in sorted((raw / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(label))
        array = sitk.GetArrayFromImage(image)
        # The first four slices are not labelled: value 3 is to be ignored.
        array[:4] = 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        label.unlink()
        sitk.WriteImage(changed, str(label))
    description = json.loads((raw / "dataset.json").read_text())
    # The regions overlap: voxels of value 2 belong to both.
    description["labels"] = {"background": 0, "hippocampus": [1, 2], "posterior": 2, "ignore": 3}
    description["regions_class_order"] = [1, 2]
    (raw / "dataset.json").write_text(json.dumps(description))
    project.plan()
    log = project.train()
    assert "Mean Validation Dice" in log
    state = project.checkpoint()["network_weights"]
    outputs = []
    for key, value in state.items():
        if key.startswith("decoder.seg_layers") and key.endswith("weight"):
            outputs.append(value.shape[0])
    # One output per region, at each of three resolutions.
    assert outputs == [2, 2, 2]
    assert project.predict(project.model()).shape[0] == 2


def test_a_cascade_of_cnns_starts_its_one_hot_channels_at_zero(
    make_project: Callable[..., PlannedProject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Scans at 0.3 mm are so large that nnU-Net plans a low resolution before the full one.
    project = make_project(HIPPOCAMPUS, "resenc_tiny", spacing_mm=(0.4, 0.4, 0.4))
    project.plan(("3d_lowres", "3d_fullres"), overwrite_target_spacing=(0.3, 0.3, 0.3))
    configurations = list(project.plans()["configurations"])
    assert configurations == ["3d_lowres", "3d_fullres", "3d_cascade_fullres"]

    project.shorten()
    project.train(configuration="3d_lowres", fold="all")
    without_validation(monkeypatch)
    log = project.train(configuration="3d_cascade_fullres", fold="all")
    assert "2 one-hot channels of the cascade start at 0" in log

    saved = project.checkpoint(configuration="3d_cascade_fullres", fold="all")
    # One channel of the image and two of the segmentation that the first stage has predicted.
    assert saved["network_weights"]["encoder.stem.convs.0.conv.weight"].shape[1] == 3

    # Both stages predict by nnU-Net's own trainer.
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        predictor = nnUNetPredictor(device=CPU)
        folder = project.model(configuration=configuration)
        predictor.initialize_from_trained_model_folder(str(folder), ("all",))
        assert predictor.trainer_name == "nnUNetTrainer"
