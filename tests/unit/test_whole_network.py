"""Whole-network autoregression for CNNs: what is hidden stays hidden, and what it learns leaves.

Shape suffixes: B samples, M members, C channels, Z Y X voxels, T tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from narrow_cnn import batch_of, objective_of, outputs, plan_of, predictions
from torch import Tensor

from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sequence import from_tokens, to_tokens
from nnunet_autoreg.model.unet import PretrainingUNet
from nnunet_autoreg.objectives.whole_network import known_tokens
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.corruption import Corruption, stacked
from nnunet_autoreg.sampling.sample import Batch

# As nnU-Net plans for slices of some millimetres: strides and kernels of 1 along z at first.
THICK_SLICES = {
    "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one image": {},
    "thick slices": {"arguments": THICK_SLICES, "crop": (8, 32, 32)},
    "two members": {"num_members": 2, "crop": (16, 16, 32)},
    "padding": {"num_padded": 10},
    "padding and two members": {"num_members": 2, "num_padded": 10, "crop": (16, 16, 32)},
    "learned mark": {"unknown_mark": "learned"},
    "normalised target": {"target": "normalised"},
    "smoothed target": {"target_smoothing": 1.0},
    "corruption": {"corrupted": True},
    "corruption, padding and members": {
        "corrupted": True,
        "num_members": 2,
        "num_padded": 10,
        "crop": (16, 16, 32),
    },
    "segments": {"num_segments": 4},
    "segments, padding and members": {
        "num_segments": 4,
        "num_members": 2,
        "num_padded": 10,
        "crop": (16, 16, 32),
    },
}


def known_voxels(plan: Plan, batch: Batch) -> Tensor:
    """Return which voxels the network may see, (B, M, Z, Y, X)."""
    token = plan.encoder.token_size_vox
    real_BTP = to_tokens(batch.valid_mask[:, :, None], token)
    known_BT = known_tokens(batch.order_index, batch.prefix, real_BTP.any(dim=-1))
    known_BTP = known_BT[:, :, None].expand_as(real_BTP)
    return from_tokens(known_BTP, token, batch.voxels.shape)


def with_other_voxels(batch: Batch, where_BMZYX: Tensor) -> Batch:
    """Return the batch with other noise at the given voxels."""
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(batch.voxels.shape, generator=generator)
    return replace(batch, voxels=torch.where(where_BMZYX[:, :, None], noise, batch.voxels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unknown_voxels_change_no_prediction_by_one_bit(variant: str) -> None:
    settings = dict(VARIANTS[variant])
    num_members = settings.pop("num_members", 1)
    num_padded = settings.pop("num_padded", 0)
    is_corrupted = settings.pop("corrupted", False)
    plan = plan_of(**settings)
    objective = objective_of(plan)
    batch = batch_of(plan, num_members, num_padded)
    if is_corrupted:
        drawn = stacked([Corruption(1.4, 0.8, 0.2, seed=3), Corruption(0.8, 1.2, 0.1, seed=4)])
        batch = replace(batch, corruption=drawn.with_noise(batch.voxels))

    # Padding may be seen: it is known to be padding.
    unknown = ~known_voxels(plan, batch) & batch.valid_mask
    assert 0.1 < float(unknown.float().mean()) < 0.95
    other = with_other_voxels(batch, unknown)

    before = outputs(objective, batch)
    after = outputs(objective, other)

    assert torch.equal(before.values, after.values)
    assert torch.equal(before.scores, after.scores)
    assert before.scores.shape[1] == plan.objective.num_segments


def test_without_the_marking_the_exactness_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    # The encoder reads all voxels, as a network would that nobody hides anything from.
    encode = PretrainingUNet.encode
    monkeypatch.setattr(PretrainingUNet, "encode", lambda self, voxels, known: encode(self, voxels))

    unknown = ~known_voxels(plan, batch)
    other = with_other_voxels(batch, unknown)

    assert not torch.equal(predictions(objective, batch), predictions(objective, other))


def test_known_voxels_of_one_member_reach_the_other() -> None:
    plan = plan_of(crop=(16, 16, 32))
    objective = objective_of(plan)
    batch = batch_of(plan, num_members=2)
    first_member = torch.zeros_like(batch.valid_mask)
    first_member[:, 0] = True
    other = with_other_voxels(batch, known_voxels(plan, batch) & first_member)

    before = predictions(objective, batch)
    after = predictions(objective, other)

    num_tokens = before.shape[1] // 2
    assert not torch.equal(before[:, num_tokens:], after[:, num_tokens:])


def test_a_padded_crop_has_one_to_all_but_one_real_block_known() -> None:
    order_index_BT = torch.tensor([[3, 0, 4, 2, 1, 5]])
    valid_BT = torch.tensor([[True, True, False, True, True, False]])

    # The real blocks in the drawn order are those at tokens 1, 4, 3, 0.
    numbers = []
    for prefix in range(1, 6):
        known_BT = known_tokens(order_index_BT, torch.tensor([prefix]), valid_BT)
        assert known_BT[0, [2, 5]].all()
        in_order = known_BT[0, [1, 4, 3, 0]].tolist()
        assert in_order == sorted(in_order, reverse=True)
        numbers.append(sum(in_order))

    assert min(numbers) == 1
    assert max(numbers) == 3


def test_without_padding_exactly_the_drawn_number_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    order_index_BT = torch.randperm(12, generator=generator)[None]
    valid_BT = torch.ones_like(order_index_BT).bool()
    for prefix in range(1, 12):
        known_BT = known_tokens(order_index_BT, torch.tensor([prefix]), valid_BT)
        assert torch.equal(known_BT, order_index_BT < prefix)


def test_the_loss_is_the_mean_of_each_samples_mean() -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    unknown = ~known_voxels(plan, batch)[:, 0]

    terms = objective.loss(batch)

    token = plan.encoder.token_size_vox
    predicted = from_tokens(predictions(objective, batch), token, batch.voxels.shape)[:, 0]
    error = (predicted - batch.voxels[:, 0, 0]).square()
    # The total is a sum over samples, of which the count is 2.
    expected = 0.0
    for b in range(2):
        expected += float(error[b][unknown[b]].mean())
    assert int(terms.count) == 2
    assert float(terms.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_flat_blocks_are_hidden_but_carry_no_loss() -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    batch.voxels[:, :, :, :8] = 0.5
    mask = objective._targets(batch).loss_mask
    where = from_tokens(mask, plan.encoder.token_size_vox, batch.voxels.shape)

    # Nothing can be learnt from a constant, and a network that saw it would know where it is.
    assert not where[:, :, :8].any()
    assert where[:, :, 8:].any()
    assert (~known_voxels(plan, batch)[:, :, :8]).any()


def test_a_batch_without_unknown_voxels_gives_a_finite_loss_of_zero() -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    batch.voxels[:] = 1.0

    terms = objective.loss(batch, references=True)

    assert float(terms.total.detach()) == 0
    assert int(terms.count) == 0


def test_trivial_predictions_are_the_known_mean_and_the_nearest_block() -> None:
    plan = plan_of(crop=(8, 8, 32))
    objective = objective_of(plan)
    levels = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(8)
    ripple = torch.tensor([0.5, -0.5]).repeat(16)
    voxels = (levels + ripple).expand(1, 1, 1, 8, 8, 32).clone()
    valid_mask = torch.ones(1, 1, 8, 8, 32, dtype=torch.bool)
    # Blocks 0 and 3 are known; block 1 is nearest to 0, block 2 to 3.
    batch = Batch(voxels, valid_mask, torch.tensor([[0, 2, 3, 1]]), torch.tensor([2]))

    references = objective.loss(batch, references=True).references

    # Block 1 has 2 and is taken for 1; block 2 has 4 and is taken for 8.
    assert float(references["copy"]) == pytest.approx((1.0**2 + 4.0**2) / 2)
    # The known mean is 4.5; the ripple of 0.5 adds its variance.
    assert float(references["mean"]) == pytest.approx((2.5**2 + 0.5**2) / 2 + 0.25)


def test_computing_stages_twice_changes_no_number() -> None:
    once = objective_of(plan_of())
    twice = objective_of(plan_of(recompute=True))
    batch = batch_of(once.plan)

    gradients = []
    for objective in (once, twice):
        objective.loss(batch).total.backward()
        parts = [p.grad.flatten() for p in objective.module.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))

    # Recomputation repeats the same operations, so only rounding may differ.
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_encoder_and_decoder_are_transferred_and_the_head_is_not() -> None:
    plan = plan_of(unknown_mark="learned")
    objective = objective_of(plan)
    state = objective.transferable_state()

    encoder = plan.encoder
    downstream: Any = build_network(
        encoder.class_path,
        encoder.arguments,
        plan.sequence.crop_size_vox,
        1,
        3,
    )
    live = downstream.state_dict(keep_vars=True)
    loaded = {id(live[key]) for key in state}
    heads = {id(p) for p in downstream.decoder.seg_layers.parameters()}

    assert not any("seg_layers" in key or "decoder.encoder" in key for key in state)
    assert len(loaded) == len(state)
    assert loaded == {id(p) for p in downstream.parameters()} - heads


def test_features_are_those_that_fine_tuning_computes() -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    objective.module.eval()
    encoder = plan.encoder
    downstream: Any = build_network(
        encoder.class_path,
        encoder.arguments,
        plan.sequence.crop_size_vox,
        1,
        3,
    ).eval()
    downstream.load_state_dict(objective.transferable_state(), strict=False)

    with torch.no_grad():
        described = objective.describe(batch).features
        deepest = downstream.encoder(batch.voxels[:, 0])[-1]

    assert torch.allclose(described, deepest.flatten(2).transpose(1, 2), atol=1e-5)


def test_pictures_show_the_truth_of_known_voxels() -> None:
    plan = plan_of(target="normalised")
    objective = objective_of(plan)
    batch = batch_of(plan, num_padded=10)
    with torch.no_grad():
        made = objective.reconstruct(batch)

    assert torch.equal(made.given, known_voxels(plan, batch) & batch.valid_mask)
    assert not (made.given & made.loss_mask).any()
    assert made.loss_mask.any()
    assert made.predicted.shape == made.truth.shape == batch.valid_mask.shape


def test_the_masked_twin_is_the_same_network_with_a_fixed_share() -> None:
    plan = plan_of()
    twin = plan_of(name="masked", prefix="fixed")
    batch = batch_of(plan)

    losses = [objective_of(p).loss(batch).total.item() for p in (plan, twin)]

    assert losses[0] == losses[1]


def test_a_network_learns_one_batch_by_heart() -> None:
    plan = plan_of(unknown_mark="learned")
    objective = objective_of(plan)
    batch = batch_of(plan)
    # Planes that go up and down along x; noise could not be predicted.
    waves = torch.arange(32.0).mul(0.4).sin().expand_as(batch.voxels)
    batch = replace(batch, voxels=waves + 0.05 * batch.voxels)
    optimiser = torch.optim.AdamW(objective.module.parameters(), 3e-3)

    errors = []
    for _ in range(30):
        terms = objective.loss(batch)
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        errors.append(float(terms.total.detach()))

    assert errors[-1] < 0.5 * errors[0]


def test_shown_voxels_are_corrupted_and_predicted_ones_are_not() -> None:
    plan = plan_of()
    objective = objective_of(plan)
    batch = batch_of(plan)
    drawn = stacked([Corruption(1.4, 0.8, 0.2, seed=3)] * 2)
    other = replace(batch, corruption=drawn.with_noise(batch.voxels))

    assert not torch.equal(predictions(objective, batch), predictions(objective, other))
    assert torch.equal(objective._targets(batch).values, objective._targets(other).values)
