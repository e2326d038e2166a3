"""Pseudo-segments: where they lie, how their centres are found, and what a network learns of them.

Shape suffixes: B samples, M members, C channels, Z Y X voxels, P points, F features, K segments.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow_cnn import batch_of, objective_of, outputs, plan_of
from refusals import refused
from torch import Tensor

from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.model.sequence import from_tokens
from nnunet_autoreg.objectives.segments import NUM_FEATURES, SegmentMap, measured
from nnunet_autoreg.objectives.whole_network import WholeNetwork, side_by_side
from nnunet_autoreg.plan import Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.checkpointing import measure_pool
from nnunet_autoreg.pretrain.data import StepBatches
from nnunet_autoreg.pretrain.dry_run import plan_memory
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.records import from_jsonable, read_json
from nnunet_autoreg.sampling.noise import NoiseCase
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch

CPU = torch.device("cpu")
CROP = (16, 16, 16)
ISOTROPIC = (1.0, 1.0, 1.0)


def pool() -> SamplingPool:
    cases: Any = (NoiseCase((24, 24, 24), ISOTROPIC), NoiseCase((12, 30, 20), ISOTROPIC))
    return SamplingPool(cases)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_intensity(levels: list[float]) -> SegmentMap:
    """Return a map whose centres are uniform regions of these intensities."""
    segment_map = SegmentMap(len(levels), ISOTROPIC)
    segment_map.centres[:, 0] = torch.tensor(levels)
    return segment_map


# Features and classes


def test_a_uniform_image_has_its_intensity_and_no_texture() -> None:
    voxels = torch.full((1, 1, 1, 8, 8, 8), 3.0)
    valid_mask = torch.ones(1, 1, 8, 8, 8).bool()

    features = SegmentMap(2, ISOTROPIC).features(voxels, valid_mask)

    assert features.shape == (1, NUM_FEATURES, 8, 8, 8)
    assert torch.allclose(features[:, 0], torch.tensor(3.0), atol=1e-5)
    # Roots of differences of squares: float32 rounds 9 by 1e-6, whose root is 1e-3.
    assert features[:, 1:].abs().max() < 5e-3


def test_every_voxel_belongs_to_the_nearest_centre() -> None:
    voxels = torch.zeros(1, 2, 1, 8, 8, 32)
    voxels[:, 1, ..., 16:] = 5.0

    classes = by_intensity([0.0, 4.0])(voxels, torch.ones(1, 2, 8, 8, 32).bool())

    assert classes.shape == (1, 2, 8, 8, 32)
    # Gaussians blur the edge at x = 16, so two voxels on either side are left out.
    assert not classes[:, 0].any()
    assert not classes[:, 1, ..., :14].any()
    assert classes[:, 1, ..., 18:].all()


def test_padding_changes_no_feature_of_a_real_voxel() -> None:
    voxels = noise(1, 1, 1, 8, 8, 16)
    valid_mask = torch.ones(1, 1, 8, 8, 16).bool()
    valid_mask[..., 12:] = False
    other = torch.where(valid_mask[:, :, None], voxels, 100.0)
    segment_map = SegmentMap(2, ISOTROPIC)

    before = segment_map.features(voxels, valid_mask)
    after = segment_map.features(other, valid_mask)

    assert torch.equal(before, after)


def test_gaussians_are_equally_wide_in_millimetres() -> None:
    voxels = noise(1, 1, 1, 8, 16, 16)
    valid_mask = torch.ones(1, 1, 8, 16, 16).bool()
    other = voxels.clone()
    other[:, :, :, 4] = 10.0

    changes = {}
    for spacing in (ISOTROPIC, (5.0, 1.0, 1.0)):
        segment_map = SegmentMap(2, spacing)
        before = segment_map.features(voxels, valid_mask)
        after = segment_map.features(other, valid_mask)
        changes[spacing] = float((before - after)[:, 0, 3].abs().max())

    # A changed slice 1 mm away is seen in slice 3; one 5 mm away is beyond the Gaussians.
    assert changes[ISOTROPIC] > 1
    assert changes[(5.0, 1.0, 1.0)] < 1e-3


def test_half_precision_around_it_changes_no_class() -> None:
    voxels = noise(1, 1, 1, *CROP)
    valid_mask = torch.ones(1, 1, *CROP).bool()
    segment_map = by_intensity([-0.2, -0.1, 0.0, 0.1, 0.2])

    classes = segment_map(voxels, valid_mask)
    with torch.autocast("cpu", torch.bfloat16):
        in_half = segment_map(voxels, valid_mask)

    assert torch.equal(classes, in_half)
    assert len(classes.unique()) == 5


# Centres


def test_centres_are_the_means_of_separate_clouds() -> None:
    generator = np.random.default_rng(0)
    means = np.array([[0.0] * 5, [10.0] * 5, [0.0, 10.0, 0.0, 10.0, 0.0]])
    points_PF = np.concatenate([generator.normal(m, 0.1, size=(200, 5)) for m in means])

    found = measured(points_PF, 3, np.random.default_rng(1))
    again = measured(points_PF, 3, np.random.default_rng(1))

    # Centres are kept in standardised units.
    centres_KF = found["centres"] * found["deviation"] + found["mean"]
    distance_KK = torch.cdist(centres_KF, torch.from_numpy(means).float())
    # 200 points of deviation 0.1 around each: their mean is known to 0.007 per axis.
    assert distance_KK.min(dim=1).values.max() < 0.1
    assert sorted(distance_KK.argmin(dim=1).tolist()) == [0, 1, 2]
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("points_PF", [np.zeros((3, 5)), np.zeros((100, 5))])
def test_too_few_different_voxels_are_refused(points_PF: np.ndarray) -> None:
    with refused(AutoregError, "segments-too-few-voxels", len(points_PF), "num_segments=4"):
        measured(points_PF, 4, np.random.default_rng(0))


def test_the_pool_is_measured_by_the_run_seed_only() -> None:
    plan = plan_of(crop=CROP, num_segments=4)
    first = WholeNetwork(plan)
    second = objective_of(plan)
    other = WholeNetwork(override(plan, ["run.seed=1"]))

    centres = []
    for objective in (first, second, other):
        measure_pool(objective, pool())
        centres.append(objective.module.state_dict()["segment_map.centres"])

    assert torch.equal(centres[0], centres[1])
    assert not torch.equal(centres[0], centres[2])
    assert len(centres[0].unique(dim=0)) == 4


def test_without_segments_nothing_is_measured_and_no_weight_is_added() -> None:
    plain = objective_of(plan_of())
    with_segments = objective_of(plan_of(num_segments=4))
    names = set(plain.module.state_dict())
    more = set(with_segments.module.state_dict())

    assert plain.pool_statistics(pool()) == {}
    assert names < more
    assert all(name.startswith("segment_") for name in more - names)
    # The network begins with the same weights either way.
    begun = plain.module.state_dict()
    other = with_segments.module.state_dict()
    assert all(torch.equal(begun[name], other[name]) for name in names)


# Loss


def test_the_loss_is_squared_error_plus_weighted_cross_entropy() -> None:
    plan = plan_of(num_segments=4, segment_weight=0.5)
    objective = objective_of(plan)
    batch = batch_of(plan, num_padded=10)
    objective.module.eval()
    mask = objective._targets(batch).loss_mask
    mask_BZYX = from_tokens(mask, plan.encoder.token_size_vox, batch.voxels.shape)[:, 0]
    assert objective.segment_map is not None

    terms = objective.loss(batch)

    classes_BZYX = objective.segment_map(batch.voxels, batch.valid_mask)[:, 0]
    log_share_BKZYX = outputs(objective, batch).scores.log_softmax(dim=1)
    entropy_BZYX = -log_share_BKZYX.gather(1, classes_BZYX[:, None])[:, 0]
    expected = 0.0
    for entropy_ZYX, mask_ZYX in zip(entropy_BZYX, mask_BZYX, strict=True):
        expected += float(entropy_ZYX[mask_ZYX].mean())
    plain = objective_of(plan_of())
    plain.module.eval()
    assert len(classes_BZYX.unique()) == 4
    assert float(terms.terms["segments"].total) == pytest.approx(expected, rel=1e-5)
    assert float(terms.terms["voxels"].total) == plain.loss(batch).total.item()
    total = float(terms.terms["voxels"].total) + 0.5 * expected
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-5)


def test_segments_of_members_stay_with_their_members() -> None:
    plan = plan_of(crop=CROP, num_segments=2)
    objective = objective_of(plan)
    batch = batch_of(plan, num_members=2)
    # The scores say class 1 only in the second member.
    classes_BMZYX = torch.zeros(2, 2, *CROP, dtype=torch.int64)
    classes_BMZYX[:, 1] = 1
    one_hot_BMZYXK = torch.nn.functional.one_hot(classes_BMZYX, 2).float()
    scores_BKZYX = side_by_side(one_hot_BMZYXK.movedim(-1, 2)) * 100

    weight_BTP = objective._targets(batch).loss_mask.float()
    right = objective._cross_entropy(scores_BKZYX, classes_BMZYX, batch, weight_BTP)
    wrong = objective._cross_entropy(scores_BKZYX, 1 - classes_BMZYX, batch, weight_BTP)

    # A lead of 100 for the right class costs nothing, and for the wrong one 100.
    assert torch.allclose(right, torch.zeros(2))
    assert torch.allclose(wrong, torch.full((2,), 100.0))


def test_references_are_the_shares_of_segments_in_known_tokens() -> None:
    plan = plan_of(crop=(8, 8, 32), num_segments=3)
    objective = objective_of(plan)
    voxels = noise(1, 1, 1, 8, 8, 32)
    valid_mask = torch.ones(1, 1, 8, 8, 32).bool()
    # Tokens 0 and 3 are known; token 1 is nearest to 0, token 2 to 3.
    batch = Batch(voxels, valid_mask, torch.tensor([[0, 2, 3, 1]]), torch.tensor([2]))
    classes = torch.tensor([0, 1, 0, 2]).repeat_interleave(8).expand(1, 1, 8, 8, 32)
    targets = objective._targets(batch)

    nearest = objective._nearest_known(batch, targets)
    found = objective._trivial_entropies(classes, targets, nearest)

    # A token has 512 voxels, and one voxel of every segment is added. Known are the segments 0 and
    # 2, with 513 of 2 * 512 + 3 = 1027 each, and segment 1 has 1. Of one token only it is 1 in 515.
    of_all = (math.log(1027 / 1) + math.log(1027 / 513)) / 2
    of_nearest = (math.log(515 / 1) + math.log(515 / 1)) / 2
    assert float(found["mean"]) == pytest.approx(of_all)
    assert float(found["copy"]) == pytest.approx(of_nearest)


def test_references_count_both_terms() -> None:
    plain = objective_of(plan_of())
    both = objective_of(plan_of(num_segments=4))
    batch = batch_of(plain.plan)

    without = plain.loss(batch, references=True).references
    found = both.loss(batch, references=True).references

    assert both.segment_map is not None
    classes = both.segment_map(batch.voxels, batch.valid_mask)
    targets = both._targets(batch)
    nearest = both._nearest_known(batch, targets)
    entropies = both._trivial_entropies(classes, targets, nearest)
    assert set(found) == set(without) == {"mean", "copy"}
    for name, entropy in entropies.items():
        assert entropy > 0
        assert float(found[name]) == pytest.approx(float(without[name] + entropy))


def test_the_loss_in_half_precision_is_summed_in_full() -> None:
    plan = plan_of(num_segments=4)
    objective = objective_of(plan)
    batch = batch_of(plan)

    in_full = objective.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        in_half = objective.loss(batch)
        targets = objective._targets(batch)
        scores = torch.full((2, 4, 16, 32, 32), 0.1).requires_grad_()
        classes = torch.zeros(2, 1, 16, 32, 32, dtype=torch.int64)
        entropy = objective._cross_entropy(scores, classes, batch, targets.loss_mask.float())

    assert in_half.total.dtype == torch.float32
    # Of uniform scores it is log 4, which bfloat16 misses by 3e-3.
    assert torch.allclose(entropy, torch.full((2,), math.log(4.0)), atol=1e-6)
    assert float(in_half.total.detach()) == pytest.approx(float(in_full.total.detach()), rel=0.05)


def test_the_memory_estimate_counts_the_segments() -> None:
    plain = plan_memory(plan_of())
    with_segments = plan_memory(plan_of(num_segments=16))

    # At least the logarithms of the shares, in single precision.
    assert with_segments.sample_bytes - plain.sample_bytes > 16 * 4 * 16 * 32 * 32 / 2


# Runs


def trained(
    plan: Plan,
    steps: range,
    state: dict[str, Any] | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """Return the losses of some steps and the state after them; a new run measures the pool."""
    torch.manual_seed(0)
    objective = WholeNetwork(plan)
    step = TrainingStep(plan, objective, CPU)
    if state is None:
        measure_pool(objective, pool())
    else:
        objective.module.load_state_dict(state["weights"])
        step.optimizer.load_state_dict(state["optimizer"])

    batches = StepBatches(objective.sampler, pool(), step.numbers)
    losses = []
    for number in steps:
        batch = batches[number]
        assert isinstance(batch, Batch)
        losses.append(float(step(number, batch)[0]))
    weights = {name: value.clone() for name, value in objective.module.state_dict().items()}
    return losses, {"weights": weights, "optimizer": step.optimizer.state_dict()}


def test_a_resumed_run_with_segments_continues_bit_for_bit() -> None:
    plan = plan_of(crop=CROP, num_segments=4)

    through, last = trained(plan, range(4))
    first, state = trained(plan, range(2))
    rest, found = trained(plan, range(2, 4), state)

    assert first + rest == through
    assert len(set(through)) == 4
    for name, weight in last["weights"].items():
        assert torch.equal(weight, found["weights"][name])


def test_a_training_measures_the_pool_before_its_first_step(tmp_path: Path) -> None:
    plan = override(plan_of(crop=CROP, num_segments=4), ["optim.num_steps=2"])
    objective = objective_of(plan)
    assert objective.segment_map is not None
    torch.nn.init.zeros_(objective.segment_map.centres)

    Trainer(plan, tmp_path, objective, pool(), pool(), CPU, 0).run()

    expected = objective.pool_statistics(pool())["segment_map.centres"]
    assert torch.equal(objective.segment_map.centres, expected)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {line["name"]: line["value"] for line in lines if "value" in line}
    parts = logged["heldout_voxels"] + logged["heldout_segments"]
    assert logged["heldout_error"] == pytest.approx(parts)


def test_segments_learn_from_a_batch_by_heart() -> None:
    plan = plan_of(crop=CROP, num_segments=4)
    objective = objective_of(plan)
    batch = batch_of(plan, prefix=2)
    # Planes that go up and down along x; noise could not be predicted.
    waves = torch.arange(16.0).mul(0.4).sin().expand_as(batch.voxels)
    batch = replace(batch, voxels=waves + 0.05 * batch.voxels)
    optimiser = torch.optim.AdamW(objective.module.parameters(), 3e-3)

    entropies = []
    for _ in range(30):
        terms = objective.loss(batch)
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        entropies.append(float(terms.terms["segments"].total))

    assert entropies[-1] < 0.7 * entropies[0]


def test_neither_head_nor_centres_of_segments_are_transferred() -> None:
    plain = objective_of(plan_of())
    with_segments = objective_of(plan_of(num_segments=4))

    assert set(with_segments.transferable_state()) == set(plain.transferable_state())


# Plans


def test_the_masked_twin_predicts_the_same_segments() -> None:
    plan = plan_of(num_segments=4)
    twin = plan_of(name="masked", prefix="fixed", num_segments=4)
    batch = batch_of(plan)

    losses = [objective_of(p).loss(batch).total.item() for p in (plan, twin)]

    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [1, 5000])
def test_a_number_of_segments_that_teaches_nothing_is_refused(number: int) -> None:
    with refused(PlanError, "plan-num-segments", number, 16):
        plan_of(num_segments=number)


def test_a_transformer_refuses_segments() -> None:
    file = Path(__file__).parents[1] / "golden" / "hippocampus_crops_primus_tiny.json"
    plan = from_jsonable(Plan, read_json(file), str(file))

    with refused(PlanError, "plan-segments-need-cnn", "primus_tiny", "num_segments=16"):
        check(override(plan, ["objective.num_segments=16"]))


@pytest.mark.parametrize("setting", ["objective.segment_weight=0", "objective.num_segments=-1"])
def test_weights_and_numbers_must_not_be_negative(setting: str) -> None:
    with refused(PlanError, "plan-out-of-range", *setting.split("=")):
        check(override(plan_of(), [setting]))
