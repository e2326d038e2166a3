"""Tokens of a Primus follow spacing and size of the scans, from planning over the network to
fine-tuning.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.finetune.plans import Budget, SegmentationTask, fit_configuration, make_block
from nnunet_autoreg.finetune.resolve import Choice, DatasetTraits, choose_weights
from nnunet_autoreg.geometry import Size, Spacing, grid_of, volume
from nnunet_autoreg.model.card import read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.memory import GIB, TrainingMemory
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.plan import EncoderPlan, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.planning.tokens import objection_to_flat_tokens, with_tokens
from nnunet_autoreg.pretrain.pipeline import value_at

CPU, GPU = Hardware("cpu", 24.0), Hardware("cuda", 24.0)
# Spacing in mm and shape in voxels, as the data sets have them.
HIPPOCAMPUS = ((1.0, 1.0, 1.0), (35, 50, 36))
IXI = ((2.0, 2.0, 2.0), (90, 120, 120))
ACDC = ((10.0, 1.5, 1.5), (10, 216, 256))
CT = ((1.5, 0.8, 0.8), (200, 420, 420))
THICK_CT = ((3.0, 0.8, 0.8), (100, 420, 420))


def plan_for(
    spacing: Spacing,
    shape: Size,
    encoder: str,
    hardware: Hardware,
    token: Size | None = None,
) -> Plan:
    pool = Pool(100, spacing, shape, 100 * volume(shape), None)
    overrides = Overrides(encoder, token_size_vox=token)
    return check(make_plan("run", pool, hardware, overrides, 0, {}, lambda *_: (0.0, GIB / 100)))


def with_token(plan: Plan, token: str) -> Plan:
    """Set the token in both places that have it."""
    settings = [f"encoder.arguments.patch_embed_size={token}", f"encoder.token_size_vox={token}"]
    return check(override(plan, settings))


@pytest.mark.parametrize(
    ("scans", "token", "block"),
    [
        # Small images get small tokens, thick slices flat ones.
        (HIPPOCAMPUS, (4, 4, 4), (2, 2, 2)),
        (IXI, (4, 4, 4), (2, 2, 2)),
        (ACDC, (1, 8, 8), (1, 1, 1)),
        (THICK_CT, (2, 8, 8), (1, 1, 1)),
        (CT, (8, 8, 8), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize(
    ("encoder", "hardware", "most"),
    [("primus_tiny", CPU, 512), ("primus_m", GPU, 4096)],
)
def test_tokens_follow_the_scans_and_their_number_is_bounded(
    scans: tuple[Spacing, Size],
    token: Size,
    block: Size,
    encoder: str,
    hardware: Hardware,
    most: int,
) -> None:
    plan = plan_for(*scans, encoder, hardware)

    assert plan.encoder.token_size_vox == token
    assert plan.encoder.arguments["patch_embed_size"] == list(token)
    assert plan.sequence.block_tokens == block
    assert volume(grid_of(plan.sequence.crop_size_vox, token)) <= most
    assert plan.reasons["encoder.token_size_vox"]


def test_weights_that_training_starts_from_fix_the_token() -> None:
    plan = plan_for(*HIPPOCAMPUS, "primus_tiny", CPU, token=(8, 8, 8))

    assert plan.encoder.token_size_vox == (8, 8, 8)
    assert plan.sequence.block_tokens == (1, 1, 1)


@pytest.mark.parametrize("encoder", ["primus_v2_tiny", "primus_v3_tiny", "vit_b16", "resenc_tiny"])
def test_tokens_of_other_families_stay(encoder: str) -> None:
    assert with_tokens(encoder_size(encoder), *ACDC) == (encoder_size(encoder), "")


def test_a_token_that_is_set_by_hand_has_to_be_set_in_both_places() -> None:
    plan = plan_for(*CT, "primus_tiny", CPU)

    changed = with_token(plan, "4,4,4")

    assert changed.encoder.token_size_vox == (4, 4, 4)
    # What a run prints for each reason.
    assert value_at(changed, "encoder.arguments.patch_embed_size") == [4, 4, 4]
    with pytest.raises(PlanError):
        check(override(plan, ["encoder.arguments.patch_embed_size=4,4,4"]))


@pytest.mark.parametrize("token", ["6,8,8", "1,1,1", "0,8,8"])
def test_tokens_that_cannot_be_doubled_back_to_voxels_are_refused(token: str) -> None:
    plan = plan_for(*CT, "primus_tiny", CPU)

    # A decoder doubles its resolution step by step: sides are powers of two, and not all 1.
    with pytest.raises(PlanError):
        with_token(plan, token)


def test_convolutional_tokens_have_one_size() -> None:
    plan = plan_for(*CT, "primus_v2_tiny", CPU)

    with pytest.raises(PlanError):
        with_token(plan, "4,8,8")


@pytest.mark.parametrize("token", [(4, 4, 4), (1, 8, 8), (2, 8, 8), (8, 8, 8), (2, 2, 2)])
def test_the_decoder_of_a_primus_gives_a_value_for_every_voxel(token: Size) -> None:
    size = encoder_size("primus_tiny")
    arguments = {
        **size.arguments,
        "embed_dim": 48,
        "eva_depth": 1,
        "eva_numheads": 2,
        "patch_embed_size": list(token),
    }
    network = build_network(size.class_path, arguments, (8, 16, 24), 1, 3)

    out = network(torch.randn(1, 1, 8, 16, 24))

    assert out.shape == (1, 3, 8, 16, 24)
    # One value for a whole token would mean that a part of the decoder is missing.
    assert out[0, 0, : token[0], : token[1], : token[2]].unique().numel() > 1


def flat_plan() -> EncoderPlan:
    size = encoder_size("primus_tiny")
    arguments = {**size.arguments, "patch_embed_size": [1, 8, 8]}
    return EncoderPlan(size.name, size.class_path, arguments, (1, 8, 8))


def test_a_patch_is_a_multiple_of_the_token_with_bounded_tokens() -> None:
    task = SegmentationTask(20, (10.0, 216.0, 256.0), (10.0, 1.5, 1.5), 1, 4)

    def memory(patch: Size) -> TrainingMemory:
        return TrainingMemory(fixed_bytes=1, sample_bytes=volume(patch))

    fit = fit_configuration(
        flat_plan(),
        task,
        Budget(8, False),
        memory,
        dataset_vox=1e12,
        max_share=0.05,
    )

    # 10 slices of 27 x 32 tokens are too many: ``grid_of`` refuses what is not a multiple of the
    # token.
    assert 1024 < volume(grid_of(fit.patch_size, (1, 8, 8))) <= 2048


def test_flat_tokens_suit_thick_slices_and_no_others() -> None:
    assert objection_to_flat_tokens((1, 8, 8), (10.0, 1.5, 1.5)) is None
    assert objection_to_flat_tokens((1, 8, 8), (5.0, 1.5, 1.5)) is None
    assert objection_to_flat_tokens((8, 8, 8), (10.0, 1.5, 1.5)) is None
    # On voxels of 1 mm a token of 1 x 8 x 8 is a plate, and no longer about as thick as wide.
    assert "1 x 8 x 8 mm" in str(objection_to_flat_tokens((1, 8, 8), (1.0, 1.0, 1.0)))


def test_the_planner_takes_flat_tokens_or_says_why_not(
    tmp_path: Path,
    write_run: Callable[..., Path],
) -> None:
    plan = flat_plan()
    values = {
        "token_size_vox": (1, 8, 8),
        "arguments": plan.arguments,
        "crop_size_vox": (8, 32, 32),
    }
    folder = write_run(tmp_path, "cine", **values, spacing_mm=(10.0, 1.5, 1.5))
    thick = DatasetTraits("Dataset028_X", ("MRI",), (10.0, 1.5, 1.5))
    thin = replace(thick, spacing_mm=(1.0, 1.0, 1.0))

    chosen = choose_weights(tmp_path, thick, "cine")
    task = SegmentationTask(20, (10.0, 216.0, 256.0), (10.0, 1.5, 1.5), 1, 4)
    block = make_block(Choice(read_card(folder), chosen.file, ""), task, Budget(8, False), tmp_path)

    assert block.encoder.token_size_vox == (1, 8, 8)
    for setting in ("cine", None):
        with pytest.raises(WeightsError):
            choose_weights(tmp_path, thin, setting)
