"""Masked autoencoding, low-pass targets and distributions of the prefix: hidden voxels stay hidden,
whatever is combined.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from refusals import refused

from nnunet_autoreg import rng
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.model.sequence import from_blocks, to_blocks
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives import autoregressive
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.objectives.targets import normalised_target, smoothed, token_statistics
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.sampling.blocks import draw_prefix, fixed_prefix
from nnunet_autoreg.sampling.sample import collate
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler

SMALL = {
    **encoder_size("primus_tiny").arguments,
    "embed_dim": 48,
    "eva_depth": 2,
    "eva_numheads": 2,
}
# 2 x 4 x 3 = 24 tokens of 8 x 8 x 8 voxels, of which masking shows a quarter: 6.
CROP = (16, 32, 24)
PLAIN = PredictionPlan()
MASKED = {"order": "random", "predictor": "query", "prefix": "fixed"}


class EmptyCase:
    """A case that is larger than the crop."""

    shape_vox = (20, 40, 30)
    spacing_mm = (1.0, 1.0, 1.0)

    def read_padded(self, start, size):
        return np.zeros((1, *size), np.float32), np.ones(size, bool)


def make_plan(objective=PLAIN, **sequence):
    tiny = encoder_size("primus_tiny")
    return check(
        Plan(
            "t",
            DataPlan((1.0, 1.0, 1.0)),
            EncoderPlan("primus_tiny", tiny.class_path, SMALL, tiny.token_size),
            SequencePlan(**{"crop_size_vox": CROP, **sequence}),
            objective,
            OptimPlan(10, 2, 1e-3, 1),
            RunPlan(0, 10, 10),
        ),
    )


def masked_plan(**sequence):
    return make_plan(PredictionPlan("masked"), **{**MASKED, **sequence})


def drawn_batch(plan, num_samples=1):
    """As the sampler draws it, of a case that fills the crop, with noise for voxels."""
    sampler = SequenceSampler(plan)
    batch = collate([sampler.draw([EmptyCase()], TRAINING, 0, n) for n in range(num_samples)])
    noise = torch.randn(batch.voxels.shape, generator=torch.Generator().manual_seed(0))
    return replace(batch, voxels=noise)


def changed(batch, plan, chosen_T):
    """The same batch with other voxels in these tokens of the first sample."""
    token = plan.encoder.token_size_vox
    tokens = to_blocks(batch.voxels[:, 0], token).clone()
    # A factor only would vanish when targets are normalised, so a ramp is added.
    tokens[0, chosen_T] = tokens[0, chosen_T] * 2 + torch.linspace(0, 3, 512).reshape(8, 8, 8)
    voxels = from_blocks(tokens, grid_of(plan.sequence.crop_size_vox, token))
    return replace(batch, voxels=voxels[:, None])


def predict(objective, batch):
    objective.module.eval()
    with torch.no_grad():
        return objective.module(batch, torch.ones_like(batch.order_index, dtype=torch.bool))


def targets(objective, batch):
    voxels, valid_mask = objective._target_voxels(batch)
    settings = objective.plan.objective
    return normalised_target(
        voxels,
        valid_mask,
        settings.variance_floor,
        settings.variance_epsilon,
    )


WAYS = [
    ("raster", "next"),
    ("interleaved", "next"),
    ("raster", "query"),
    ("interleaved", "query"),
    ("random", "query"),
]
TARGETS = [
    ("uniform", PredictionPlan()),
    ("long", PredictionPlan(target_smoothing=1.0)),
    ("fixed", PredictionPlan(variance_floor=0.0, variance_epsilon=1e-6)),
]
BLOCKS = [(1, 1, 1), (2, 2, 1)]
COMBINATIONS = []
for (order, predictor), block, (prefix, objective) in product(WAYS, BLOCKS, TARGETS):
    sequence = {"order": order, "predictor": predictor, "block_tokens": block, "prefix": prefix}
    COMBINATIONS.append(make_plan(objective, **sequence))
for sigma, block, share in [(0.0, (1, 1, 1), 0.25), (1.0, (2, 2, 1), 0.5)]:
    objective = PredictionPlan("masked", target_smoothing=sigma)
    COMBINATIONS.append(
        make_plan(objective, block_tokens=block, prefix_share=share, **MASKED),
    )


def named(plan):
    s = plan.sequence
    o = plan.objective
    return f"{o.name} {s.order} {s.predictor} {s.block_tokens[0]} {s.prefix} {o.target_smoothing}"


@pytest.mark.parametrize("plan", COMBINATIONS, ids=named)
def test_no_prediction_knows_its_own_block_or_a_later_one(plan):
    torch.manual_seed(0)
    objective = build_objective(plan)
    batch = drawn_batch(plan)
    predicted = objective.as_predicted(batch)
    order_index = predicted.order_index[0]
    prefix = int(predicted.prefix[0])
    before = predict(objective, batch)
    aims = targets(objective, batch)

    # The first block that is predicted, and the last of all.
    for position_in_order in sorted({prefix, int(order_index.max())}):
        is_changed = order_index == position_in_order
        other = changed(batch, plan, is_changed)
        after = predict(objective, other)
        other_aims = targets(objective, other)

        # No prediction up to the changed block knows of the change, and only its target follows.
        asked = (order_index >= prefix) & (order_index <= position_in_order)
        assert torch.equal(before[0, asked], after[0, asked])
        assert torch.equal(aims[0, ~is_changed], other_aims[0, ~is_changed])
        assert (aims[0, is_changed] != other_aims[0, is_changed]).any(dim=-1).all()

    # The block just before the first prediction is given, and must be used.
    after = predict(objective, changed(batch, plan, order_index == prefix - 1))

    first = order_index == prefix
    assert (before[0, first] != after[0, first]).any()


@pytest.mark.parametrize("plan", COMBINATIONS, ids=named)
def test_every_combination_learns_from_what_is_asked_for_and_nothing_else(plan):
    torch.manual_seed(0)
    objective = build_objective(plan)
    batch = drawn_batch(plan)
    terms = objective.loss(batch, references=True)

    is_asked = batch.order_index >= batch.prefix

    # 512 voxels in each token.
    assert float(terms.count) == 512 * int(is_asked[0].sum())

    terms.total.backward()
    gradients = [p.grad for p in objective.module.parameters() if p.grad is not None]

    assert all(g.isfinite().all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    # Targets have mean 0, so predicting the mean leaves their squares.
    squares = targets(objective, batch)[is_asked].square().sum()
    assert float(terms.references["mean"]) == pytest.approx(float(squares))


def test_predictions_depend_on_visible_blocks_and_on_no_hidden_voxel():
    plan = masked_plan()
    torch.manual_seed(0)
    objective = build_objective(plan)
    batch = drawn_batch(plan)
    hidden = batch.order_index[0] >= batch.prefix[0]
    assert int(hidden.sum()) == 18
    assert int(batch.prefix[0]) == 6

    before = predict(objective, batch)
    after = predict(objective, changed(batch, plan, hidden))

    assert torch.equal(before[0, hidden], after[0, hidden])

    # Each of the six visible tokens matters to every hidden one.
    for position_in_order in range(6):
        is_changed = batch.order_index[0] == position_in_order
        after = predict(objective, changed(batch, plan, is_changed))
        assert (before[0, hidden] != after[0, hidden]).any(dim=-1).all()


NARROW = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2}
CONVOLVED = {"primus_v2_tiny": NARROW}


@pytest.mark.parametrize("encoder", CONVOLVED)
def test_hidden_blocks_of_convolutional_encoders_change_no_prediction(encoder):
    size = encoder_size(encoder)
    arguments = {**size.arguments, **CONVOLVED[encoder]}
    plan = masked_plan(crop_size_vox=(16, 32, 32), block_tokens=(2, 2, 2), prefix_share=0.5)
    convolved = EncoderPlan(encoder, size.class_path, arguments, size.token_size)
    plan = check(replace(plan, encoder=convolved))
    torch.manual_seed(0)
    objective = build_objective(plan)
    batch = drawn_batch(plan)

    hidden = batch.order_index[0] >= batch.prefix[0]

    # Two of four blocks, each of 2 x 2 x 2 tokens.
    assert int(hidden.sum()) == 16

    before = predict(objective, batch)
    with_others_hidden = predict(objective, changed(batch, plan, hidden))
    with_others_visible = predict(objective, changed(batch, plan, ~hidden))

    assert torch.equal(before[0, hidden], with_others_hidden[0, hidden])
    assert (before[0, hidden] != with_others_visible[0, hidden]).any(dim=-1).all()


def test_masked_is_autoregression_whose_queries_see_the_prefix_only(monkeypatch):
    plan = masked_plan()
    torch.manual_seed(0)
    masked = build_objective(plan)
    batch = drawn_batch(plan, 2)
    one = build_objective(replace(plan, objective=PredictionPlan()))
    one.module.load_state_dict(masked.module.state_dict())
    plain = one.loss(batch).total.item()
    rule = autoregressive.strictly_earlier

    def as_if_all_came_first(order_index, valid):
        # As if every asked block came right after the prefix.
        return rule(torch.minimum(order_index, batch.prefix[:, None]), valid)

    monkeypatch.setattr(autoregressive, "strictly_earlier", as_if_all_came_first)

    ours = masked.loss(batch)
    theirs = one.loss(batch)

    assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-5)
    assert float(ours.count) == float(theirs.count)
    # Without the patch the two objectives differ, so the comparison can fail.
    assert plain != ours.total.item()


def test_blocks_beside_which_everything_visible_is_padding_carry_no_loss():
    plan = masked_plan()
    torch.manual_seed(0)
    objective = build_objective(plan)
    batch = drawn_batch(plan)
    valid_mask = to_blocks(torch.ones(1, 1, *CROP, dtype=torch.bool), (8, 8, 8))
    valid_mask[0, batch.order_index[0] < batch.prefix[0]] = False

    nothing = replace(batch, valid_mask=from_blocks(valid_mask, grid_of(CROP, (8, 8, 8))))

    assert float(objective.loss(nothing).count) == 0

    # One visible token with voxels is enough for all 18 hidden ones.
    valid_mask[0, batch.order_index[0] == 0] = True
    one = replace(batch, valid_mask=from_blocks(valid_mask, grid_of(CROP, (8, 8, 8))))

    assert float(objective.loss(one).count) == 18 * 512


def test_a_fixed_prefix_is_the_share_of_the_blocks_but_never_none_or_all():
    assert [fixed_prefix(24, share) for share in (0.25, 0.5, 0.01, 0.99)] == [6, 12, 1, 23]
    assert fixed_prefix(2, 0.25) == 1


def test_held_out_samples_keep_a_fixed_prefix():
    sampler = SequenceSampler(masked_plan())

    prefixes = {sampler.draw([EmptyCase()], VALIDATION, number).prefix for number in range(8)}

    assert prefixes == {6}


def test_long_prefixes_are_the_larger_of_two_and_uniform_from_0_has_0():
    generator = rng.generator(0, "prefix")
    long = SequencePlan(CROP, prefix="long")
    counts = np.bincount([draw_prefix(5, generator, long) for _ in range(16_000)], minlength=5)

    # (2 p - 1) / 16 of 16000, p = 1..4; one standard deviation is at most 63.
    assert np.abs(counts - [0, 1000, 3000, 5000, 7000]).max() < 250

    from_0 = SequencePlan(CROP, prefix="uniform_from_0")
    counts = np.bincount([draw_prefix(4, generator, from_0) for _ in range(4000)], minlength=4)

    # 1000 each, with a standard deviation of 27.
    assert counts.min() > 850
    assert len(counts) == 4


def test_smoothing_is_a_gaussian_mean_over_the_tokens_own_real_voxels():
    voxels = torch.zeros(1, 2, 8)
    voxels[0, 0] = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])
    voxels[0, 1] = 5.0
    valid_mask = torch.ones(1, 2, 8, dtype=torch.bool)
    out = smoothed(voxels, valid_mask, (2, 2, 2), 1.0)

    # Along each axis a voxel counts 1 and its neighbour w = exp(-1/2); a voxel n axes away gets 8
    # w^n / (1 + w)^3.
    w = float(np.exp(-0.5))
    expected = [8 * w**n / (1 + w) ** 3 for n in (0, 1, 1, 2, 1, 2, 2, 3)]

    assert out[0, 0].tolist() == pytest.approx(expected)
    assert out[0, 1].tolist() == pytest.approx([5.0] * 8)

    # Without the second half along z there are two axes left to average over.
    valid_mask[0, :, 4:] = False
    out = smoothed(voxels, valid_mask, (2, 2, 2), 1.0)

    expected = [8 * w**n / (1 + w) ** 2 for n in (0, 1, 1, 2)] + [0] * 4
    assert out[0, 0].tolist() == pytest.approx(expected)
    assert out[0, 1].tolist() == pytest.approx([5.0] * 4 + [0] * 4)


def test_smoothing_by_0_changes_nothing_and_channels_do_not_mix():
    voxels = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    valid_mask = torch.ones(2, 3, 16, dtype=torch.bool)

    assert smoothed(voxels, valid_mask, (2, 2, 2), 0.0) is voxels

    # Two channels of a token of 2 x 2 x 2 voxels lie behind each other.
    both = smoothed(voxels, valid_mask, (2, 2, 2), 1.5)
    second = smoothed(voxels[..., 8:], valid_mask[..., 8:], (2, 2, 2), 1.5)

    assert torch.allclose(both[..., 8:], second)


def test_smoothed_targets_have_mean_0_and_unbiased_deviation_1():
    voxels = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    valid_mask = torch.ones(1, 1, 512, dtype=torch.bool)
    low = smoothed(voxels, valid_mask, (8, 8, 8), 1.0)

    target = normalised_target(low, valid_mask, 1e-6)

    assert float(target.mean()) == pytest.approx(0, abs=1e-5)
    assert float(target.std(unbiased=True)) == pytest.approx(1, abs=1e-4)
    # Smoothing has taken away more than half of the noise, which the target makes up for.
    assert float(low.std()) < 0.5 * float(voxels.std())


def test_epsilon_is_added_under_the_root_while_a_floor_is_a_least_value():
    # The unbiased variance is 4 / 3: four deviations of 1, divided by three.
    voxels = torch.tensor([[[0.0, 2.0, 0.0, 2.0]]])
    valid_mask = torch.ones(1, 1, 4, dtype=torch.bool)

    _, with_epsilon = token_statistics(voxels, valid_mask, 0.0, 1e-6)
    _, with_floor = token_statistics(voxels, valid_mask, 2.0)
    constant = normalised_target(torch.full((1, 1, 4), 7.0), valid_mask, 0.0, 1e-6)

    assert float(with_epsilon) == pytest.approx(np.sqrt(4 / 3 + 1e-6))
    assert float(with_floor) == pytest.approx(np.sqrt(2.0))
    assert torch.equal(constant, torch.zeros(1, 1, 4))


REFUSED = [
    ({"objective": PredictionPlan("masked")}, "plan-ill-posed", "--objective masked"),
    (
        {"objective": PredictionPlan("masked"), "order": "random", "predictor": "query"},
        "plan-ill-posed",
        "sequence.prefix=uniform",
    ),
    ({"objective": PredictionPlan("mased")}, "plan-unknown-name", "'masked'"),
    ({"objective": PredictionPlan(target="voxel")}, "plan-unknown-name", "'voxels'"),
    ({"prefix": "fixed", "prefix_share": 0.0}, "plan-out-of-range", "prefix_share=0.0"),
    ({"prefix": "fixed", "prefix_share": 1.0}, "plan-out-of-range", "prefix_share=1.0"),
    ({"prefix": "short"}, "plan-unknown-name", "fixed, long, uniform, uniform_from_0"),
    ({"prefix": "uniform_from_0"}, "plan-start-token", "sequence.prefix=uniform"),
    (
        {"objective": PredictionPlan(target_smoothing=-1.0)},
        "plan-out-of-range",
        "target_smoothing=-1.0",
    ),
    (
        {"objective": PredictionPlan(target_smoothing=float("nan"))},
        "plan-out-of-range",
        "target_smoothing=nan",
    ),
    ({"objective": PredictionPlan(variance_floor=0.0)}, "plan-out-of-range", "variance_floor"),
]


@pytest.mark.parametrize(("values", "code", "named"), REFUSED)
def test_ill_posed_combinations_are_refused_with_the_way_out(values, code, named):
    with refused(PlanError, code, named):
        make_plan(**values)
