"""ResEnc plans against nnU-Net's own ResEnc planners, on data sets that exist as shapes only."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_autoreg.finetune.plans import Budget, Fit, SegmentationTask
from nnunet_autoreg.finetune.resenc import fit_resenc, stock_planner
from nnunet_autoreg.geometry import volume
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

DATASET = "Dataset051_SarcomaMR"
SARCOMA = SegmentationTask(16, (47.0, 115.0, 121.0), (3.27, 0.98, 0.98), 1, 2)
BRAIN = SegmentationTask(40, (160.0, 190.0, 170.0), (1.0, 1.0, 1.0), 1, 2)
HIPPOCAMPUS = SegmentationTask(40, (36.0, 51.0, 36.0), (1.0, 1.0, 1.0), 1, 2)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nnU-Net's planners read when they are made: a description and a fingerprint; there are
    no images.
    """
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable / DATASET).mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    # nnU-Net's own estimate asks torch for that many threads; ours must do without any.
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "nnUNet_raw" / DATASET / folder).mkdir()
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 16,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "nnUNet_raw" / DATASET / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json").write_text(
        '{"median_relative_size_after_cropping": 1.0}',
    )
    return tmp_path


def planned(name: str) -> EncoderPlan:
    size = ENCODERS[name]
    return EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)


def fit(name: str, task: SegmentationTask, budget: Budget) -> Fit:
    planner = stock_planner(planned(name), DATASET, budget)
    return fit_resenc(
        planner,
        planned(name),
        task,
        budget,
        {},
        dataset_vox=dataset_vox(task),
        max_share=0.05,
    )


def dataset_vox(task: SegmentationTask) -> float:
    return task.num_cases * math.prod(task.median_shape_vox)


@pytest.mark.parametrize(
    ("name", "stock"),
    [("resenc_m", "nnUNetPlannerResEncM"), ("resenc_l", "nnUNetPlannerResEncL")],
)
@pytest.mark.parametrize("task", [SARCOMA, BRAIN], ids=["anisotropic", "isotropic"])
@pytest.mark.usefixtures("dataset")
def test_patch_batch_strides_and_kernels_are_those_of_nnunet(
    name: str,
    stock: str,
    task: SegmentationTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners as stock_planners,
    )

    found = fit(name, task, Budget(8.0, False))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    with torch.device("meta"):
        planner = getattr(stock_planners, stock)(DATASET)
        theirs: dict[str, Any] = planner.get_plans_for_configuration(
            task.spacing_mm,
            task.median_shape_vox,
            "",
            dataset_vox(task),
            {},
        )
    network = theirs["architecture"]["arch_kwargs"]

    assert found.patch_size == tuple(int(p) for p in theirs["patch_size"])
    assert found.batch_size == theirs["batch_size"]
    assert found.arguments is not None
    for key in ("strides", "kernel_sizes"):
        rows = [list(row) for row in network[key]]
        # nnU-Net would go deeper; the encoder has six stages.
        assert found.arguments[key] == rows[:6]
    assert found.arguments["n_stages"] == min(network["n_stages"], 6)
    assert stock in found.reason


@pytest.mark.usefixtures("dataset")
def test_more_memory_gives_a_larger_patch() -> None:
    def patch_vox(name: str, gib: float, explicit: bool) -> int:
        return volume(fit(name, BRAIN, Budget(gib, explicit)).patch_size)

    small = fit("resenc_tiny", BRAIN, Budget(8.0, False))

    # Tiny networks stay quick to train unless memory is asked for by name.
    assert volume(small.patch_size) <= 64**3
    assert 2 <= small.batch_size <= 8
    assert patch_vox("resenc_tiny", 8.0, True) > 64**3
    assert patch_vox("resenc_m", 24.0, True) > patch_vox("resenc_m", 8.0, True)


@pytest.mark.usefixtures("dataset")
def test_small_images_leave_the_deepest_stages_out() -> None:
    found = fit("resenc_l", HIPPOCAMPUS, Budget(8.0, False))
    # 36 and 51 are rounded up to multiples of 8, the total stride of four stages.
    assert found.patch_size == (40, 56, 40)
    assert found.arguments is not None
    assert found.arguments["n_stages"] == 4
    assert "4 stages fit the patch, but the encoder has 6" in found.reason


@pytest.mark.usefixtures("dataset")
def test_no_stage_is_planned_that_the_weights_do_not_have() -> None:
    found = fit("resenc_tiny", SARCOMA, Budget(8.0, False))

    assert found.arguments is not None
    assert found.arguments["n_stages"] == 4
    assert found.arguments["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert found.arguments["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert (found.patch_size, found.batch_size) == ((32, 80, 96), 2)
