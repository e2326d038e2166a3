from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from nnunet_autoreg import machine
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.finetune.families import rate_reason
from nnunet_autoreg.finetune.plans import (
    Budget,
    Fit,
    SegmentationTask,
    check_plans_name,
    fit_configuration,
    kept_configurations,
    make_block,
    with_ct_window,
    with_fits,
)
from nnunet_autoreg.finetune.resolve import Choice
from nnunet_autoreg.geometry import Size, volume
from nnunet_autoreg.model.card import DECODER_PREFIXES, EncoderCard, read_card
from nnunet_autoreg.model.memory import GIB, TrainingMemory
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan, IntensityWindow

Write = Callable[..., Path]
BRAIN = SegmentationTask(
    num_cases=20,
    median_shape_vox=(180.0, 200.0, 160.0),
    spacing_mm=(1.0, 1.0, 1.0),
    num_channels=1,
    num_classes=3,
)
MANY_VOX = 1e12
TINY = ENCODERS["primus_tiny"]


def planned(name: str) -> EncoderPlan:
    size = ENCODERS[name]
    return EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)


def bytes_per_voxel(number: float) -> Callable[[Size], TrainingMemory]:
    return lambda patch: TrainingMemory(fixed_bytes=GIB, sample_bytes=int(volume(patch) * number))


def test_the_batch_fills_the_memory_up_to_five_percent_of_the_data() -> None:
    small = SegmentationTask(20, (64.0, 64.0, 64.0), (1.0, 1.0, 1.0), 1, 3)
    # A patch of 64^3 takes 1 GiB, and 1 GiB is needed in any case: 7 fit into 8 GiB.
    memory = bytes_per_voxel(GIB / 64**3)
    roomy = fit_configuration(
        planned("primus_s"),
        small,
        Budget(8, False),
        memory,
        dataset_vox=MANY_VOX,
        max_share=0.05,
    )
    assert (roomy.patch_size, roomy.batch_size) == ((64, 64, 64), 7)

    # Five percent of 80 patches are 4; five percent of 20 are 1, but a batch has at least 2.
    few = fit_configuration(
        planned("primus_s"),
        small,
        Budget(8, False),
        memory,
        dataset_vox=20 * 4 * 64**3,
        max_share=0.05,
    )
    assert few.batch_size == 4

    fewest = fit_configuration(
        planned("primus_s"),
        small,
        Budget(8, False),
        memory,
        dataset_vox=20 * 64**3,
        max_share=0.05,
    )
    assert fewest.batch_size == 2


def test_the_patch_shrinks_until_a_batch_of_two_fits() -> None:
    fit = fit_configuration(
        planned("primus_m"),
        BRAIN,
        Budget(8, False),
        bytes_per_voxel(GIB / 64**3),
        dataset_vox=MANY_VOX,
        max_share=0.05,
    )

    # (8 - 1) / 2 = 3.5 GiB for each of two patches; the next larger patch would need more.
    assert fit.batch_size == 2
    assert 3.0 * 64**3 < volume(fit.patch_size) <= 3.5 * 64**3
    assert all(side % 8 == 0 for side in fit.patch_size)


def test_a_memory_target_that_nothing_fits_is_shown() -> None:
    # Half of the 1 GiB that is needed in any case.
    fit = fit_configuration(
        planned("primus_m"),
        BRAIN,
        Budget(0.5, True),
        bytes_per_voxel(1),
        dataset_vox=MANY_VOX,
        max_share=0.05,
    )

    assert fit.patch_size == (8, 8, 8)
    assert "MORE than the target" in fit.reason


def test_tiny_encoders_stay_small_unless_memory_is_given() -> None:
    # A byte per voxel: memory limits nothing.
    memory = bytes_per_voxel(1)
    small = fit_configuration(
        planned("primus_tiny"),
        BRAIN,
        Budget(8, False),
        memory,
        dataset_vox=MANY_VOX,
        max_share=0.05,
    )

    assert volume(small.patch_size) <= 64**3
    assert small.batch_size == 8

    large = fit_configuration(
        planned("primus_tiny"),
        BRAIN,
        Budget(8, True),
        memory,
        dataset_vox=MANY_VOX,
        max_share=0.05,
    )

    assert volume(large.patch_size) > 64**3
    assert large.batch_size > 8


def test_a_block_has_the_encoder_and_the_file_of_the_weights(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain")
    choice = Choice(read_card(folder), (folder / "encoder.safetensors").resolve(), "because")
    block = make_block(choice, BRAIN, Budget(8, False), tmp_path)

    assert block.encoder.name == "primus_tiny"
    assert block.weights is not None
    assert block.weights.file == "autoreg_pretraining/brain/encoder.safetensors"
    assert (block.recipe.num_epochs, block.recipe.pretrained_rate) == (150, 1e-3)

    elsewhere = make_block(choice, BRAIN, Budget(8, False), tmp_path / "other")

    # Results of another folder have no path relative to this one.
    assert elsewhere.weights is not None
    assert elsewhere.weights.file == str((folder / "encoder.safetensors").resolve())


def test_many_labels_train_longer_and_scratch_has_an_encoder() -> None:
    # One case more than the 50 that still count as few.
    many = SegmentationTask(51, BRAIN.median_shape_vox, BRAIN.spacing_mm, 1, 3)
    block = make_block(
        Choice(None, None, "autoreg_weights=none"),
        many,
        Budget(8, False),
        Path("results"),
    )

    assert block.recipe.num_epochs == 300
    assert block.weights is None
    assert block.encoder.name == "resenc_m"


def test_only_ct_channels_get_the_window_of_pretraining(tmp_path: Path, write_run: Write) -> None:
    window = IntensityWindow(
        mean=40.0,
        std=100.0,
        median=35.0,
        min=-1000.0,
        max=2000.0,
        percentile_00_5=-900.0,
        percentile_99_5=800.0,
    )
    card = read_card(write_run(tmp_path, "chest", modalities=("CT",), ct_window=window))
    given = {"0": {"mean": 1.0}, "1": {"mean": 2.0}}

    found = with_ct_window(given, ["CT", "PET"], card)

    assert found["0"] == {
        "mean": 40.0,
        "std": 100.0,
        "median": 35.0,
        "min": -1000.0,
        "max": 2000.0,
        "percentile_00_5": -900.0,
        "percentile_99_5": 800.0,
    }
    assert found["1"] == {"mean": 2.0}
    assert with_ct_window(given, ["CT", "PET"], None) == given


def test_only_valid_configurations_of_the_user_are_kept() -> None:
    full = {
        "patch_size": [64, 64, 64],
        "batch_size": 2,
        "spacing": [1, 1, 1],
        "data_identifier": "AutoregPlans_3d_fullres",
        "architecture": {"arch_kwargs": {"class_path": TINY.class_path, **TINY.arguments}},
    }
    old = {
        "configurations": {
            # Configurations of nnU-Net's own names are always planned again.
            "2d": {},
            "3d_lowres": full,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres"},
            # These two can be kept.
            "bs4": {"inherits_from": "3d_fullres", "batch_size": 4},
            "on_bs4": {"inherits_from": "bs4"},
            # 60 is not a multiple of the token size 8; the others need 3d_lowres, which the new
            # plans do not have.
            "odd": {"inherits_from": "3d_fullres", "patch_size": [60, 64, 64]},
            "orphan": {"inherits_from": "3d_lowres"},
            "on_orphan": {"inherits_from": "orphan"},
            "staged": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }
    kept, dropped = kept_configurations(
        old,
        {"configurations": {"3d_fullres": full}},
        TINY.class_path,
    )

    assert list(kept) == ["bs4", "on_bs4"]
    assert len(dropped) == 4
    assert any("'odd'" in line and "use 56 or 64" in line for line in dropped)
    orphan = next(line for line in dropped if "'orphan'" in line)
    assert "'3d_lowres', which no longer exists" in orphan


def test_configurations_of_a_cnn_are_checked_with_their_strides() -> None:
    cnn = ENCODERS["resenc_tiny"]
    # Total strides: 1 * 1 * 2 * 2 = 4 along z, so 12 is possible there, and 8 along y and x.
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    full = {
        "patch_size": [32, 64, 64],
        "batch_size": 2,
        "spacing": [3, 1, 1],
        "data_identifier": "AutoregPlans_3d_fullres",
        "architecture": {
            "arch_kwargs": {"class_path": cnn.class_path, **cnn.arguments, "strides": strides},
        },
    }
    old = {
        "configurations": {
            "flat": {"inherits_from": "3d_fullres", "patch_size": [12, 64, 64]},
            "odd": {"inherits_from": "3d_fullres", "patch_size": [32, 60, 64]},
            "primus": {
                **full,
                "architecture": {"arch_kwargs": {"class_path": TINY.class_path, **TINY.arguments}},
            },
        },
    }

    kept, dropped = kept_configurations(
        old,
        {"configurations": {"3d_fullres": full}},
        cnn.class_path,
    )

    assert list(kept) == ["flat"]
    odd = next(line for line in dropped if "'odd'" in line)
    assert "axis y is not a multiple of the token size 8" in odd
    assert any("'primus'" in line and "network" in line for line in dropped)


def test_the_decoder_is_trained_first_if_the_stem_differs(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain", encoder="resenc_tiny")
    card = read_card(folder)
    # More cases than are few, so that only the stem decides.
    many = SegmentationTask(40, (47.0, 115.0, 121.0), (3.27, 0.98, 0.98), 1, 2)
    block = make_block(
        Choice(card, folder / "encoder.safetensors", "because"),
        many,
        Budget(8, False),
        tmp_path,
    )
    recipe = block.recipe
    assert recipe.optimizer == "sgd"
    assert (recipe.pretrained_rate, recipe.scratch_rate) == (1e-2, 1e-2)
    assert block.reasons["recipe.pretrained_rate"] == rate_reason(block.encoder)
    deeper = [[3, 3, 3], [3, 3, 3], [3, 3, 3]]
    same = {**card.arguments, "kernel_sizes": [[3, 3, 3], *deeper]}
    flat = {**card.arguments, "kernel_sizes": [[1, 3, 3], *deeper]}

    def planned_with(arguments: dict[str, Any], names: list[str]) -> AutoregBlock:
        return with_fits(
            block,
            {"3d_fullres": Fit((32, 80, 96), 2, "fits", arguments)},
            card,
            many.num_cases,
            names,
        )

    plain = planned_with(same, ["MRI"])
    kernels = planned_with(flat, ["MRI"])
    channels = planned_with(same, ["T1", "T2"])
    reason = "recipe.decoder_first_fraction"
    adapted = "on, the stem is adapted:"

    assert [b.recipe.decoder_first_fraction for b in (plain, kernels, channels)] == [0.0, 0.1, 0.1]
    assert kernels.reasons[reason] == f"{adapted} kernel [3, 3, 3] -> [1, 3, 3]"
    assert channels.reasons[reason] == f"{adapted} 1 -> 2 channels, repeated / 2"
    assert plain.reasons["3d_fullres"] == "fits"


def test_a_pretrained_decoder_is_planned_random_and_a_trained_one_loaded(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", encoder="resenc_tiny")
    card = read_card(folder)
    adaptation = replace(card.adaptation, keys_to_decoder=DECODER_PREFIXES)
    # No steps of pretraining: an imported model, whose decoder was trained with labels.
    pretrained = replace(card, adaptation=adaptation, num_steps=100)
    trained = replace(pretrained, num_steps=0)
    without = replace(card, adaptation=replace(card.adaptation, keys_to_decoder=()))

    def block_from(card: EncoderCard) -> AutoregBlock:
        choice = Choice(card, folder / "encoder.safetensors", "because")
        return make_block(choice, BRAIN, Budget(8, False), tmp_path)

    blocks = [block_from(card) for card in (pretrained, trained, without)]

    assert [block.transfers_decoder for block in blocks] == [False, True, False]
    known = ["recipe.transfer_decoder" in block.reasons for block in blocks]
    assert known == [True, True, False]


def test_plans_names_that_would_break_or_overwrite_are_refused() -> None:
    check_plans_name("AutoregPlans", {"autoreg": {}})

    with refused(PlanError, "plan-name", "'My__Plans'", "'__'"):
        check_plans_name("My__Plans", None)
    with refused(PlanError, "plan-name-taken", "nnUNetPlans.json", "ExperimentPlanner"):
        check_plans_name("nnUNetPlans", {"experiment_planner_used": "ExperimentPlanner"})


@pytest.mark.parametrize(
    ("device", "option"),
    [("cuda", ""), ("cpu", " -device cpu"), ("mps", " -device mps")],
)
def test_nnunets_commands_get_a_device_if_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    option: str,
) -> None:
    monkeypatch.setattr(machine, "default_device", lambda: device)

    assert machine.device_option() == option
