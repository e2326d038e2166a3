"""The planning rules by hand-computed numbers, and whole plans against golden files.

A golden file is the plan of one made-up pool. After a deliberate change of a rule, write them again
and read the difference: ``AUTOREG_REGENERATE_GOLDEN=1 pytest tests/unit/test_planning.py`` and
``git diff tests/golden``.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused

from nnunet_autoreg.corpus.fingerprint import fingerprint
from nnunet_autoreg.corpus.index import Index
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, Spacing, volume
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size, suited_to
from nnunet_autoreg.plan import Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.encoder import choose_encoder, choose_order, limit_by_pool
from nnunet_autoreg.planning.layout import choose_layout, plan_crop, with_variety
from nnunet_autoreg.planning.length import choose_length, with_hours
from nnunet_autoreg.planning.make import choose_batch, choose_micro_batch, choose_rate, make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool, pool_of
from nnunet_autoreg.pretrain.dry_run import step_memory
from nnunet_autoreg.records import differences, from_jsonable, read_json, to_jsonable, write_json

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
REGENERATE = "AUTOREG_REGENERATE_GOLDEN"
POOL = Pool(192, (1.0, 1.0, 1.0), (35, 50, 36), 12_000_000, None)
CPU, GPU = Hardware("cpu", 24.0), Hardware("cuda", 24.0)
LARGE_GPU = Hardware("cuda", 80)
GIB = 2.0**30


def flat_memory(encoder: Any, crop: Any, recompute: bool) -> tuple[float, float]:
    """1 GiB, and 1 GiB for each million voxels of a crop, or half as much."""
    return GIB, GIB * volume(crop) / (2e6 if recompute else 1e6)


def plan_for(
    pool: Pool = POOL,
    hardware: Hardware = CPU,
    memory: Any = flat_memory,
    **overrides: Any,
) -> Plan:
    asked = Overrides(**{"encoder": "primus_tiny", **overrides})
    return make_plan("run", pool, hardware, asked, 0, {}, memory)


def test_a_crop_fits_the_median_scan_in_whole_tokens() -> None:
    assert plan_crop((35, 50, 36), (1, 1, 1), (8, 8, 8), 64**3) == (40, 56, 40)


def test_a_crop_of_large_scans_shrinks_the_longest_axis_until_it_fits() -> None:
    assert plan_crop((512, 512, 512), (1, 1, 1), (8, 8, 8), 64**3) == (64, 64, 64)

    crop = plan_crop((300, 512, 512), (1, 1, 1), (8, 8, 8), 64**3)

    assert volume(crop) <= 64**3
    assert all(c % 8 == 0 for c in crop)


def test_a_crop_of_thick_slices_is_flat() -> None:
    # All ten slices, in two tokens, if there is room; one token along z if there is not.
    assert plan_crop((10, 216, 256), (10, 1.5, 1.5), (8, 8, 8), 128**3) == (16, 216, 256)

    crop = plan_crop((10, 216, 256), (10, 1.5, 1.5), (8, 8, 8), 64**3)

    assert crop[0] == 8
    assert crop[1] > 100
    assert crop[2] > 100


def test_without_a_gpu_the_tiny_encoder_is_chosen_by_default() -> None:
    eight_blocks = replace(POOL, median_shape_vox=(12, 13, 16))
    four_blocks = replace(POOL, median_shape_vox=(11, 13, 16))

    assert choose_encoder("auto", CPU, POOL)[0] == "resenc_tiny"
    # Blocks of 8^3: two along each axis make eight; 11 / 8 rounds down to one.
    assert choose_encoder("auto", CPU, eight_blocks)[0] == "resenc_tiny"
    assert choose_encoder("auto", CPU, four_blocks)[0] == "primus_tiny"
    assert choose_encoder("auto", GPU, four_blocks)[0] == "primus_tiny"
    assert choose_encoder("primus_s", CPU, POOL) == ("primus_s", "set by the user")

    with refused(PlanError, "plan-unknown-encoder", "'primus_tiny'"):
        choose_encoder("primus_tin", CPU, POOL)


@pytest.mark.parametrize(
    ("gib", "cnn", "transformer"),
    [
        (6.0, "resenc_tiny", "primus_s"),
        (7.6, "resenc_m", "primus_s"),
        (15.8, "resenc_m", "primus_b"),
        (22.0, "resenc_l", "primus_m"),
        (79.2, "resenc_l", "primus_m"),
    ],
)
def test_a_gpu_takes_the_network_that_nnunet_plans_for_its_memory(
    gib: float,
    cnn: str,
    transformer: str,
) -> None:
    large = replace(POOL, median_shape_vox=(128, 256, 256))
    hardware = Hardware("cuda", gib)

    assert choose_encoder("auto", hardware, large)[0] == cnn
    assert choose_encoder("auto", hardware, large, single_tokens=True)[0] == transformer


def test_the_reason_of_a_gpus_default_names_the_stock_rival() -> None:
    large = replace(POOL, median_shape_vox=(128, 256, 256))
    for gib, planner in ((24, "nnUNetPlannerResEncL"), (12, "nnUNetPlannerResEncM")):
        assert planner in choose_encoder("auto", Hardware("cuda", gib), large)[1]

    # Of blocks of 32 slices, more than three quarters would be padding.
    flat = replace(POOL, median_shape_vox=(7, 200, 240))
    assert choose_encoder("auto", GPU, flat)[0] == "primus_m"


@pytest.mark.parametrize(
    ("spacing", "shape", "token"),
    [
        ((5.0, 0.78, 0.78), (90, 420, 512), (2, 8, 8)),
        ((10.0, 1.5, 1.5), (10, 216, 256), (2, 8, 8)),
        ((6.0, 0.6, 0.6), (12, 320, 320), (1, 8, 8)),
    ],
)
def test_blocks_of_a_cnn_are_flat_for_thick_slices(
    spacing: Spacing,
    shape: Size,
    token: Size,
) -> None:
    pool = replace(POOL, spacing_mm=spacing, median_shape_vox=shape)
    plan = check(plan_for(pool, encoder="auto"))

    # A token is about as thick in mm as it is wide: 2 * 5 mm and 8 * 0.78 mm, for example.
    assert (plan.encoder.name, plan.encoder.token_size_vox) == ("resenc_tiny", token)
    assert plan.sequence.block_tokens == (1, 1, 1)


def test_each_kind_of_encoder_has_its_own_predictor() -> None:
    assert choose_order(encoder_size("primus_v2_m"))[:2] == ("random", "query")
    assert choose_order(encoder_size("resenc_l"))[:2] == ("random", "network")


def test_a_predictor_of_the_other_kind_of_encoder_is_refused() -> None:
    for encoder, predictor in (("resenc_tiny", "query"), ("primus_tiny", "network")):
        with refused(PlanError, "plan-predictor", encoder, predictor):
            check(override(plan_for(encoder=encoder), [f"sequence.predictor={predictor}"]))


def test_a_block_by_block_run_of_a_cnn_names_its_version() -> None:
    old = override(plan_for(encoder="resenc_tiny"), ['objective.trunk={"width":192,"depth":2}'])
    with refused(PlanError, "plan-old-trunk", "0.1", "--name"):
        check(old)


def test_a_cnn_predicts_one_value_per_voxel_in_random_order() -> None:
    plan = plan_for(encoder="resenc_tiny")

    assert check(plan).objective.target == "voxels"

    settings = (
        "objective.target=normalised_with_statistics",
        "sequence.order=raster",
        'sequence.weights={"strided":1}',
    )

    for setting in settings:
        with pytest.raises(PlanError):
            check(override(plan, [setting]))


def test_a_cnn_of_stride_32_has_blocks_of_32_voxels() -> None:
    assert layout_of("resenc_l", 170, 220, 170) == ((96, 160, 128), (1, 1, 1))
    assert layout_of("resenc_l", 80, 80, 80) == ((64, 64, 64), (1, 1, 1))


@pytest.mark.parametrize(
    ("tokens", "encoder"),
    [(249_999, "primus_s"), (250_000, "primus_b"), (1_500_000, "primus_m")],
)
def test_a_small_pool_takes_a_smaller_encoder_than_the_memory_allows(
    tokens: int,
    encoder: str,
) -> None:
    assert limit_by_pool("primus_m", "24 GiB", replace(POOL, total_vox=512 * tokens))[0] == encoder
    assert limit_by_pool("primus_tiny", "", replace(POOL, total_vox=512))[0] == "primus_tiny"


def test_the_user_may_have_a_large_encoder_on_a_small_pool() -> None:
    assert plan_for(hardware=GPU, encoder="primus_m").encoder.name == "primus_m"


def test_the_batch_is_the_same_on_every_gpu_in_equal_parts_that_fit() -> None:
    sizes = [choose_batch(hardware)[0] for hardware in (CPU, Hardware("cuda", 8), LARGE_GPU)]
    assert sizes == [8, 32, 32]
    # 80 % of 24 GiB less 1 GiB fixed leaves room for 18 crops of 1 GiB: 32 come as 16 + 16. Of
    # 12 GiB there is room for 8, and 80 GiB hold all.
    assert choose_micro_batch(32, GPU, GIB, GIB)[0] == 16
    assert choose_micro_batch(32, LARGE_GPU, GIB, GIB)[0] == 32
    assert choose_micro_batch(32, Hardware("cuda", 12), GIB, GIB)[0] == 8
    assert choose_micro_batch(8, CPU, GIB, 4 * GIB)[0] == 2

    micro, reason = choose_micro_batch(32, Hardware("cuda", 1), GIB, GIB)

    assert micro == 1
    assert "even one crop does not fit" in reason


def test_a_crop_shrinks_until_one_fits_into_the_memory() -> None:
    pool = replace(POOL, median_shape_vox=(400, 400, 400))
    encoder = encoder_size("primus_b")

    assert choose_layout(encoder, GPU, pool, flat_memory).crop == (128, 128, 128)

    layout = choose_layout(encoder, Hardware("cuda", 2.0), pool, flat_memory)

    # Within the 80 % of 2 GiB that may be used, and not more than a tenth below it.
    needed = sum(flat_memory(encoder, layout.crop, True))
    assert needed <= 0.8 * 2 * GIB < 1.1 * needed
    assert "as large as 2 GiB allow" in layout.why_crop


def test_activations_are_checkpointed_before_the_crop_shrinks() -> None:
    # A crop of 128^3 takes 1 + 2.1 GiB, or 1 + 1.05 checkpointed; 80 % of 4 and of 3 GiB may be
    # used.
    pool = replace(POOL, median_shape_vox=(400, 400, 400))
    roomy, tight = (plan_for(pool, Hardware("cuda", gib), encoder="primus_b") for gib in (4.0, 3.0))

    assert roomy.sequence.crop_size_vox == tight.sequence.crop_size_vox == (128, 128, 128)
    assert not roomy.optim.checkpoint_activations
    assert "optim.checkpoint_activations" not in roomy.reasons
    assert tight.optim.checkpoint_activations
    assert "2.0 GiB with it and 3.1 without" in tight.reasons["optim.checkpoint_activations"]


def layout_of(
    encoder: str,
    *median: int,
    hardware: Hardware = GPU,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> tuple[Size, Size]:
    pool = replace(POOL, median_shape_vox=(median[0], median[1], median[2]), spacing_mm=spacing)
    layout = choose_layout(encoder_size(encoder), hardware, pool, lambda *_: (0.0, 0.0))
    return layout.crop, layout.block_tokens


def test_a_linear_tokenizer_has_blocks_of_one_token() -> None:
    assert layout_of("primus_m", 170, 220, 170) == ((112, 152, 120), (1, 1, 1))
    assert layout_of("vit_b16", 35, 50, 36) == ((32, 32, 32), (1, 1, 1))


def test_convolutions_take_blocks_of_32_voxels_or_16_for_small_images() -> None:
    assert layout_of("primus_v2_m", 170, 220, 170) == ((96, 160, 128), (4, 4, 4))
    # Hippocampus: blocks of 32 would make one or two, blocks of 16 make 2 x 3 x 2, and 2 x 2 x 2
    # leave a part of the scan out.
    for encoder in ("primus_v2_tiny", "primus_v3_tiny"):
        assert layout_of(encoder, 35, 50, 36, hardware=CPU) == ((32, 32, 32), (2, 2, 2))
    # Ten thick slices: 16 along z, 32 within the slice, where 5 of 7 and 6 of 8 blocks are at most
    # 0.8 of the scan.
    assert layout_of("primus_v2_m", 10, 216, 256, spacing=(10.0, 1.5, 1.5)) == (
        (16, 160, 192),
        (2, 4, 4),
    )


def test_a_crop_that_would_hold_the_whole_scan_is_shortened() -> None:
    # 24 / 35, 40 / 50 and 24 / 36 are the largest whole tokens of at most 0.8 of each axis.
    assert with_variety((40, 56, 40), (8, 8, 8), (35, 50, 36)) == (24, 40, 24)
    # A crop that leaves a fifth of one axis out differs from another one already.
    assert with_variety((32, 40, 32), (8, 8, 8), (35, 50, 36)) == (32, 40, 32)
    # One block less would be 0.46 of the first axis and 0.44 of the last one, so these keep their
    # length.
    assert with_variety((32, 48, 32), (16, 16, 16), (35, 50, 36)) == (32, 32, 32)
    # Eight blocks are left in any case: 2 x 2 x 2 stay, and of 3 x 2 x 2 only one layer goes.
    assert with_variety((64, 64, 64), (32, 32, 32), (64, 64, 64)) == (64, 64, 64)
    assert with_variety((96, 64, 64), (32, 32, 32), (100, 64, 64)) == (64, 64, 64)
    assert with_variety((48, 32, 32), (16, 32, 32), (48, 32, 32)) == (48, 32, 32)


def test_new_runs_rotate_and_zoom_and_older_plans_do_not() -> None:
    plan = plan_for()
    older = to_jsonable(plan)
    for key in ("spatial_share", "max_rotation_deg", "zoom", "max_source"):
        del older["sequence"][key]
    del older["objective"]["corruption"]

    read = from_jsonable(Plan, older, "plan.json")

    new, old = plan.sequence, read.sequence
    assert (new.spatial_share, new.max_rotation_deg, new.zoom) == (0.2, 30.0, (0.7, 1.4))
    # A run that was begun without the values is trained to the end without them.
    assert (old.spatial_share, old.max_rotation_deg, old.zoom) == (0.0, 0.0, (1.0, 1.0))
    assert plan.objective.corruption == 0.0
    assert read.objective.corruption == 0.0


@pytest.mark.parametrize(
    "setting",
    [
        "sequence.spatial_share=1.1",
        "sequence.spatial_share=-0.1",
        "sequence.max_rotation_deg=181",
        "sequence.zoom=1.4,0.7",
        "sequence.zoom=0,1",
        "sequence.max_source=0.9",
        "objective.corruption=2",
    ],
)
def test_impossible_augmentation_is_refused_by_its_key(setting: str) -> None:
    with pytest.raises(PlanError) as refused:
        check(override(plan_for(), [setting]))

    assert setting.split("=", maxsplit=1)[0] in str(refused.value)


def test_strides_and_kernels_of_a_cnn_follow_the_spacing_as_in_nnunet() -> None:
    """Slices of 5 mm, voxels of 0.78 mm within: halved twice within the slice to 3.1 mm, then along
    all axes.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (
        get_pool_and_conv_props,
    )

    large = encoder_size("resenc_l")
    for spacing, token in (
        ((5.0, 0.78, 0.78), (8, 32, 32)),
        ((10.0, 1.5, 1.5), (8, 32, 32)),
        ((1.0, 1.0, 1.0), (32, 32, 32)),
    ):
        suited = suited_to(large, spacing)
        # Sizes that nnU-Net halves until six stages are made, but not along the slices before it
        # has to.
        shape = [4 * t for t in token]
        _, strides, kernels, _, _ = get_pool_and_conv_props(list(spacing), shape, 4, 99)
        assert suited.arguments["strides"] == [list(map(int, s)) for s in strides]
        assert suited.arguments["kernel_sizes"] == [list(map(int, k)) for k in kernels]
        assert suited.token_size == token

    # A transformer reads patches of any spacing.
    transformer = encoder_size("primus_v2_m")
    assert suited_to(transformer, (5.0, 0.78, 0.78)) is transformer


def test_thick_slices_make_flat_tokens_and_blocks_of_a_cnn() -> None:
    thick = replace(POOL, spacing_mm=(5.0, 0.78, 0.78), median_shape_vox=(90, 420, 512))
    plan = plan_for(thick, GPU, encoder="resenc_m")

    assert check(plan).encoder.token_size_vox == (8, 32, 32)
    assert plan.sequence.block_tokens == (1, 1, 1)
    assert plan.sequence.crop_size_vox[0] % 8 == 0
    assert plan.sequence.crop_size_vox[1] % 32 == 0


def test_images_too_small_for_a_cnn_are_refused_with_the_figures() -> None:
    def plan(*median: int) -> Plan:
        pool = replace(POOL, median_shape_vox=(median[0], median[1], median[2]))
        return plan_for(pool, GPU, encoder="resenc_l")

    # Blocks of 32 voxels: three of them make a short sequence, and one makes none.
    assert "FEWER than the 8" in plan(32, 32, 100).reasons["sequence.block_tokens"]
    with refused(PlanError, "plan-one-block", "resenc_tiny"):
        check(plan(30, 30, 30))


def test_norms_over_several_blocks_are_refused() -> None:
    # Statistics over a batch would let a hidden block leak into the features of another.
    setting = "encoder.arguments.norm_op=torch.nn.BatchNorm3d"
    with refused(PlanError, "plan-norm", "torch.nn.BatchNorm3d", "InstanceNorm3d"):
        check(override(plan_for(encoder="resenc_tiny"), [setting]))


def test_even_kernels_are_refused() -> None:
    setting = "encoder.arguments.kernel_sizes=[[3,3,3],[3,2,3],[3,3,3],[3,3,3]]"
    with refused(PlanError, "plan-kernels", "[3, 2, 3]"):
        check(override(plan_for(encoder="resenc_tiny"), [setting]))


def test_blocks_too_small_for_the_norms_of_convolutions_are_refused() -> None:
    plan = plan_for(encoder="primus_v2_tiny")
    with refused(PlanError, "plan-small-blocks", "[16, 16, 16]", "[2, 2, 2]"):
        check(override(plan, ["sequence.block_tokens=1,2,2"]))


def test_the_rate_grows_with_the_root_of_the_batch() -> None:
    tiny = encoder_size("primus_tiny")
    base = encoder_size("primus_b")

    # From 8 crops on: four times as many double the rate, a quarter halves it. The larger encoder
    # has its rate for 32 crops.
    assert [choose_rate(tiny, n)[0] for n in (8, 32, 2)] == [1e-3, 2e-3, 5e-4]
    assert [choose_rate(base, n)[0] for n in (32, 8)] == [3e-4, 1.5e-4]


def test_the_length_counts_epochs_over_real_voxels() -> None:
    # 12e6 voxels in steps of 8 crops of 35 x 50 x 36 real voxels: 23.8 steps an epoch.
    step = 8 * 35 * 50 * 36

    # 300 epochs, ten, and a part of one; at least 1000 steps and at most 100,000 if nothing is
    # asked for.
    assert choose_length(POOL, step)[0] == 7143
    assert choose_length(POOL, step, 10)[0] == 238
    assert choose_length(POOL, step, 0.001)[0] == 1
    assert choose_length(replace(POOL, total_vox=1000), step)[0] == 1000
    assert choose_length(replace(POOL, total_vox=10**12), step)[0] == 100_000

    # The plan's crops of 24 x 40 x 24 lie inside the scan: 65.1 steps an epoch.
    usual = {"token_size_vox": (8, 8, 8)}

    assert plan_for(**usual).optim.num_steps == 19531
    assert plan_for(num_epochs=10, **usual).optim.num_steps == 651


def test_hours_become_steps_once_and_warm_up_and_validation_follow() -> None:
    plan = with_hours(plan_for(), 2.0, 0.9, "cpu")

    # 7200 s / 0.9 s are 8000 steps. 5 % are kept for all else: 7600, of which 5 % warm up.
    assert plan.optim.num_steps == 7600
    assert plan.optim.warmup_steps == 380
    assert plan.run.validate_every == 380
    assert plan.run.seconds_per_step == 0.9
    assert "0.9 s a step measured on cpu" in plan.reasons["optim.num_steps"]
    assert "until a step has been timed" in plan_for(num_hours=2.0).reasons["optim.num_steps"]
    assert with_hours(plan, 1e-9, 0.9, "cpu").optim.num_steps == 1


def test_hours_do_not_change_what_the_user_set() -> None:
    settings = ["optim.warmup_steps=7", "run.validate_every=9"]

    plan = with_hours(override(plan_for(), settings), 2.0, 0.9, "cpu")

    assert plan.optim.warmup_steps == 7
    assert plan.run.validate_every == 9
    assert plan.run.checkpoint_every == 380
    assert plan.reasons["optim.warmup_steps"] == "set by the user"


def test_every_planned_value_that_can_surprise_has_a_reason() -> None:
    assert {
        "data.spacing_mm",
        "encoder.name",
        "sequence.crop_size_vox",
        "optim.batch_size",
        "optim.micro_batch_size",
        "optim.num_steps",
        "optim.lr",
        "optim.warmup_steps",
    } <= set(plan_for().reasons)


# Golden files: (modality, scans, spacing (z, y, x), median shape (z, y, x)), with sizes and
# spacings spread by a few percent.

Kind = tuple[str, int, tuple[float, float, float], tuple[int, int, int]]

POOLS: dict[str, tuple[Hardware, list[Kind]]] = {
    "brain_mr_isotropic": (GPU, [("MR", 500, (1.0, 1.0, 1.0), (170, 220, 170))]),
    "thick_slice_ct": (GPU, [("CT", 300, (5.0, 0.78, 0.78), (90, 420, 512))]),
    "cine_mr": (Hardware("cuda", 12.0), [("MR", 100, (10.0, 1.5, 1.5), (10, 216, 256))]),
    "hippocampus_crops_cpu": (CPU, [("MR", 192, (1.0, 1.0, 1.0), (35, 50, 36))]),
    "hippocampus_crops_gpu": (GPU, [("MR", 192, (1.0, 1.0, 1.0), (35, 50, 36))]),
    "mixed_ct_mr": (
        GPU,
        [
            ("CT", 60, (3.27, 0.98, 0.98), (60, 150, 150)),
            ("MR", 80, (5.5, 0.86, 0.86), (40, 170, 170)),
        ],
    ),
    "whole_body_pet": (Hardware("cuda", 48.0), [("PT", 150, (3.27, 4.07, 4.07), (300, 168, 168))]),
    "brain_and_cine_mr": (
        GPU,
        [
            ("MR", 120, (1.0, 1.0, 1.0), (170, 220, 170)),
            ("MR", 100, (10.0, 1.5, 1.5), (10, 216, 256)),
        ],
    ),
    "giant": (Hardware("cuda", 8.0), [("CT", 20, (0.3, 0.3, 0.3), (1200, 1500, 1500))]),
    "tiny": (GPU, [("MR", 5, (0.8, 0.8, 0.8), (16, 20, 18))]),
    "brain_mr_resenc_l": (GPU, [("MR", 500, (1.0, 1.0, 1.0), (170, 220, 170))]),
    "thick_slice_ct_resenc_m": (
        Hardware("cuda", 12.0),
        [("CT", 300, (5.0, 0.78, 0.78), (90, 420, 512))],
    ),
    "hippocampus_crops_primus_tiny": (CPU, [("MR", 192, (1.0, 1.0, 1.0), (35, 50, 36))]),
    "cine_mr_primus_v2_m": (GPU, [("MR", 100, (10.0, 1.5, 1.5), (10, 216, 256))]),
    "brain_mr_vit_b16": (GPU, [("MR", 500, (1.0, 1.0, 1.0), (170, 220, 170))]),
    "pacs": (
        Hardware("cuda", 80.0),
        [
            ("CT", 400, (1.25, 0.75, 0.75), (260, 440, 500)),
            ("CT", 200, (5.0, 0.8, 0.8), (70, 430, 500)),
            ("MR", 300, (5.0, 0.5, 0.5), (26, 400, 340)),
            ("MR", 100, (1.0, 0.9, 0.9), (170, 230, 230)),
        ],
    ),
}


ENCODER_OF = {
    "brain_mr_resenc_l": "resenc_l",
    "thick_slice_ct_resenc_m": "resenc_m",
    "hippocampus_crops_primus_tiny": "primus_tiny",
    "cine_mr_primus_v2_m": "primus_v2_m",
    "brain_mr_vit_b16": "vit_b16",
}
"""Set by the user; planned for all other pools."""


def rows_of(kinds: list[Kind]) -> list[ScanRow]:
    """Scans spread around each kind: sizes by 10 %, spacings by 5 %, one in twenty with an odd
    spacing.
    """
    rng = np.random.default_rng(0)
    rows = []
    for k, (modality, count, spacing, shape) in enumerate(kinds):
        for n in range(count):
            factor = 1 + 0.05 * rng.uniform(-1, 1)
            own = [round(s * factor, 4) for s in spacing] if n % 20 else [s * 1.3 for s in spacing]
            size = [max(8, round(m * (1 + 0.1 * rng.uniform(-1, 1)))) for m in shape]
            name = f"{k}_{n}"
            rows.append(
                ScanRow(
                    name,
                    f"kind{k}",
                    name,
                    "",
                    modality,
                    name,
                    (size[0], size[1], size[2]),
                    (own[0], own[1], own[2]),
                    (size[0], size[1], size[2]),
                    name,
                    "ok",
                    "",
                ),
            )
    return rows


KNOWN: dict[tuple[str, Size, Size, bool, bool], tuple[float, float]] = {}


def memory(encoder: EncoderSize, crop: Size, recompute: bool, half: bool) -> tuple[float, float]:
    # Two tests plan every pool, and each estimate takes seconds.
    key = (encoder.name, encoder.token_size, crop, recompute, half)
    if key not in KNOWN:
        KNOWN[key] = step_memory(encoder, crop, recompute, half)
    return KNOWN[key]


def golden_plan(name: str) -> Plan:
    hardware, kinds = POOLS[name]
    # Intensities of CT, by which a window is chosen.
    hu = np.zeros(0, dtype=np.float32)
    if any(modality == "CT" for modality, *_ in kinds):
        hu = np.linspace(-200, 300, 1001, dtype=np.float32)
    pool = pool_of(fingerprint(Index(tuple(rows_of(kinds)), hu)))
    overrides = Overrides(ENCODER_OF.get(name, "auto"))

    def measured(encoder: EncoderSize, crop: Size, recompute: bool) -> tuple[float, float]:
        return memory(encoder, crop, recompute, hardware.device == "cuda")

    return make_plan(name, pool, hardware, overrides, 0, {}, measured)


@pytest.mark.parametrize("name", POOLS)
def test_the_plan_of_a_pool_is_the_one_that_was_looked_at(name: str) -> None:
    file = GOLDEN / f"{name}.json"
    found = to_jsonable(golden_plan(name))
    if os.environ.get(REGENERATE):
        write_json(file, found)

    changed = differences(read_json(file), found)

    remedy = f"{REGENERATE}=1 writes it again"
    assert not changed, f"{file.name} differs ({remedy}): {'; '.join(changed)}"


@pytest.mark.parametrize("name", POOLS)
def test_the_plan_of_a_pool_can_be_carried_out(name: str) -> None:
    plan = check(golden_plan(name))
    hardware, _ = POOLS[name]

    assert volume(plan.sequence.crop_size_vox) <= 128**3

    # The encoder of the plan, as its memory was estimated when it was planned.
    encoder = replace(
        suited_to(encoder_size(plan.encoder.name), plan.data.spacing_mm),
        arguments=plan.encoder.arguments,
        token_size=plan.encoder.token_size_vox,
        block_tokens=plan.sequence.block_tokens,
    )
    fixed, per_crop = memory(
        encoder,
        plan.sequence.crop_size_vox,
        plan.optim.checkpoint_activations,
        hardware.device == "cuda",
    )

    assert plan.optim.micro_batch_size is not None
    assert fixed + plan.optim.micro_batch_size * per_crop <= hardware.usable_bytes


def test_no_golden_file_is_left_without_its_pool() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(POOLS)
