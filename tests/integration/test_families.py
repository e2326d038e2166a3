"""CNNs and convolutional tokenizers through nnU-Net's own functions on real scans: plan, train,
continue, validate, find best, share.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import copy_cases
from nnunet_folders import TRAINER_MODULE, set_folders

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CPU = torch.device("cpu")
PRETRAINED = "AutoregPretrainedTrainer"
HIPPOCAMPUS, SARCOMA = "Dataset004_Hippocampus", "Dataset051_SarcomaMR"
NUM_CASES = 5
SMALL_PATCH = [16, 40, 48]


@dataclass(frozen=True)
class Project:
    """nnU-Net's three folders below ``root``, with one small dataset and the finished run
    'brain'.
    """

    root: Path
    dataset: str

    @property
    def number(self) -> int:
        return int(self.dataset[len("Dataset") : len("Dataset000")])

    @property
    def plans_file(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset / "AutoregPlans.json"

    def plans(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.plans_file.read_text())
        return found

    def shorten(self, **recipe: Any) -> None:
        plans = self.plans()
        if self.dataset == SARCOMA:
            plans["configurations"]["3d_fullres"]["patch_size"] = SMALL_PATCH
        plans["autoreg"]["recipe"].update(
            {
                "num_epochs": 1,
                "num_iterations_per_epoch": 2,
                "num_val_iterations_per_epoch": 1,
                **recipe,
            }
        )
        self.plans_file.write_text(json.dumps(plans))

    def plan(self, configurations: tuple[str, ...] = ("3d_fullres",), **options: Any) -> None:
        from nnunetv2.experiment_planning.plan_and_preprocess_api import (
            extract_fingerprints,
            plan_experiments,
            preprocess,
        )

        extract_fingerprints([self.number], num_processes=1, show_progress_bar=False)
        identifier = plan_experiments([self.number], "AutoregPlanner", **options)
        preprocess(
            [self.number],
            identifier,
            list(configurations),
            [1] * len(configurations),
            show_progress_bar=False,
        )
        self.shorten()

    def train(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        fold: int | str = 0,
        **options: Any,
    ) -> str:
        """Train as ``nnUNetv2_train`` does; everything its logs say so far."""
        from nnunetv2.run.run_training import run_training

        run_training(
            str(self.number), configuration, fold, trainer, "AutoregPlans", device=CPU, **options
        )
        logs = sorted(self.fold(trainer, configuration, fold).glob("training_log_*.txt"))
        return "\n".join(log.read_text() for log in logs)

    def model(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        results: str = "nnUNet_results",
    ) -> Path:
        return self.root / results / self.dataset / f"{trainer}__AutoregPlans__{configuration}"

    def fold(
        self, trainer: str = PRETRAINED, configuration: str = "3d_fullres", fold: int | str = 0
    ) -> Path:
        return self.model(trainer, configuration) / f"fold_{fold}"

    def checkpoint(
        self, trainer: str = PRETRAINED, configuration: str = "3d_fullres", fold: int | str = 0
    ) -> dict[str, Any]:
        file = self.fold(trainer, configuration, fold) / "checkpoint_final.pth"
        found: dict[str, Any] = torch.load(file, map_location=CPU, weights_only=False)
        return found

    def predict(self, model: Path) -> np.ndarray:
        """Probabilities (classes or regions, Z, Y, X) of the first training image."""
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            device=CPU, use_mirroring=False, tile_step_size=1, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        image = min((self.root / "nnUNet_raw" / self.dataset / "imagesTr").glob("*.nii.gz"))
        ((_, found),) = predictor.predict_from_files_sequential(
            [[str(image)]], None, save_probabilities=True
        )
        return np.asarray(found)


@pytest.fixture
def make_project(
    shared_data: Path,
    write_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Project]]:
    """A function that makes a project of a dataset and an encoder with random weights, pretrained
    at the dataset's spacing.
    """
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(f"{TRAINER_MODULE}.nnUNetPredictor", quick_predictor)

    def make(dataset: str, encoder: str, **card: Any) -> Project:
        copy_cases(
            shared_data / "nnUNet_raw" / dataset, tmp_path / "nnUNet_raw" / dataset, NUM_CASES
        )
        write_run(tmp_path / "nnUNet_results", "brain", encoder=encoder, **card)
        return Project(tmp_path, dataset)

    yield make


def quick_predictor(**options: Any) -> Any:
    """nnU-Net's predictor for validation, without mirroring and with little overlap: a tenth of the
    work.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor(**{**options, "use_mirroring": False, "tile_step_size": 1})


def without_validation(patch: pytest.MonkeyPatch) -> None:
    """For trainings whose validation says nothing new."""
    patch.setattr(f"{TRAINER_MODULE}.nnUNetTrainer.perform_actual_validation", lambda *_: None)


@pytest.mark.parametrize("dataset", [HIPPOCAMPUS, SARCOMA])
@pytest.mark.parametrize("encoder", ["resenc_tiny", "primus_v2_tiny"])
def test_the_chain_of_stock_commands(
    make_project: Callable[..., Project],
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
    (project.root / "nnUNet_results/autoreg_pretraining/brain/encoder.safetensors").unlink()
    project.shorten(num_epochs=2)
    before = project.checkpoint()["network_weights"]
    project.train(continue_training=True)
    after = project.checkpoint()
    assert after["current_epoch"] == 2
    assert any(
        not torch.equal(before[key], value) for key, value in after["network_weights"].items()
    )

    best = [{"plans": "AutoregPlans", "configuration": "3d_fullres", "trainer": PRETRAINED}]
    find_best_configuration(project.number, best, num_processes=1, folds=(0,))
    expected = project.predict(project.model())
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
    assert np.array_equal(found, expected)


def test_anisotropic_scans_get_the_strides_and_kernels_of_nnunet(
    make_project: Callable[..., Project],
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
    assert network["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert network["strides"][:2] == [[1, 1, 1], [1, 2, 2]]
    assert "kernels in stages 0: 3x3x3 -> 1x3x3" in printed
    assert plans["autoreg"]["reasons"]["recipe.decoder_first_fraction"].startswith(
        "on, the stem is adapted: kernel"
    )

    project.shorten(decoder_first_fraction=0.5)
    log = project.train()
    assert "(kernel 3x3x3 -> 1x3x3, summed)" in log

    twin = project.train("AutoregScratchTrainer")
    assert "encoder weights from" not in twin

    weights = (
        project.checkpoint(trainer)["network_weights"]
        for trainer in (PRETRAINED, "AutoregScratchTrainer")
    )
    assert len({tuple((key, tuple(value.shape)) for key, value in w.items()) for w in weights}) == 1


def test_regions_and_an_ignore_label_with_deep_supervision(
    make_project: Callable[..., Project],
) -> None:
    import SimpleITK as sitk  # noqa: N813

    project = make_project(HIPPOCAMPUS, "resenc_tiny")
    raw = project.root / "nnUNet_raw" / project.dataset
    for label in sorted((raw / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(label))
        array = sitk.GetArrayFromImage(image)
        array[:4] = 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        label.unlink()
        sitk.WriteImage(changed, str(label))
    description = json.loads((raw / "dataset.json").read_text())
    description["labels"] = {"background": 0, "hippocampus": [1, 2], "posterior": 2, "ignore": 3}
    description["regions_class_order"] = [1, 2]
    (raw / "dataset.json").write_text(json.dumps(description))
    project.plan()
    log = project.train()
    assert "Mean Validation Dice" in log
    state = project.checkpoint()["network_weights"]
    outputs = [
        value.shape[0]
        for key, value in state.items()
        if key.startswith("decoder.seg_layers") and key.endswith("weight")
    ]
    # One output per region, at each of three resolutions.
    assert outputs == [2, 2, 2]
    assert project.predict(project.model()).shape[0] == 2


def test_a_cascade_of_cnns_starts_its_one_hot_channels_at_zero(
    make_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(HIPPOCAMPUS, "resenc_tiny", spacing_mm=(0.4, 0.4, 0.4))
    project.plan(("3d_lowres", "3d_fullres"), overwrite_target_spacing=(0.3, 0.3, 0.3))
    assert list(project.plans()["configurations"]) == [
        "3d_lowres",
        "3d_fullres",
        "3d_cascade_fullres",
    ]

    project.shorten()
    project.train(configuration="3d_lowres", fold="all")
    without_validation(monkeypatch)
    log = project.train(configuration="3d_cascade_fullres", fold="all")
    assert "2 one-hot channels of the cascade start at 0" in log

    saved = project.checkpoint(configuration="3d_cascade_fullres", fold="all")
    assert saved["network_weights"]["encoder.stem.convs.0.conv.weight"].shape[1] == 3

    # Both stages predict by nnU-Net's own trainer.
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        predictor = nnUNetPredictor(device=CPU)
        folder = project.model(configuration=configuration)
        predictor.initialize_from_trained_model_folder(str(folder), ("all",))
        assert predictor.trainer_name == "nnUNetTrainer"
