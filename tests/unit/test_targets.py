"""What is regressed of every token: the three targets, by numbers that are computed by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.prediction_plan import TARGETS, PredictionPlan
from nnunet_autoreg.objectives.targets import as_intensities, num_outputs, output_weight, target_of
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.sampling.sample import Batch

# One token of four voxels: mean 1, unbiased variance 4/3. The last voxel of the second token is
# padding.
VOXELS = torch.tensor([[[0.0, 2.0, 0.0, 2.0], [3.0, 5.0, 4.0, 9.0]]])
REAL = torch.tensor([[[True, True, True, True], [True, True, True, False]]])


def settings(target: str) -> PredictionPlan:
    return PredictionPlan(target=target)


def test_plain_voxels_are_the_target_and_padding_is_0() -> None:
    target = target_of(settings("voxels"), VOXELS, REAL)

    assert target.tolist() == [[[0.0, 2.0, 0.0, 2.0], [3.0, 5.0, 4.0, 0.0]]]
    assert num_outputs(settings("voxels"), 4) == 4


def test_mean_and_log_deviation_follow_the_normalised_pattern() -> None:
    target = target_of(settings("normalised_with_statistics"), VOXELS, REAL)

    deviation = math.sqrt(4 / 3)
    pattern = [-1 / deviation, 1 / deviation, -1 / deviation, 1 / deviation]
    assert num_outputs(settings("normalised_with_statistics"), 4) == 6
    assert target[0, 0].tolist() == pytest.approx([*pattern, 1.0, math.log(deviation)])
    # The real voxels 3, 5 and 4 have mean 4 and deviation 1.
    assert target[0, 1].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0, 4.0, 0.0])


def test_each_statistic_counts_as_much_as_all_voxels_of_its_token() -> None:
    weight = output_weight(settings("normalised_with_statistics"), REAL.float())

    # Four and three voxels, each of weight 1.
    assert weight.tolist() == [[[1, 1, 1, 1, 4, 4], [1, 1, 1, 0, 3, 3]]]
    assert output_weight(settings("voxels"), REAL.float()).shape == VOXELS.shape


@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_prediction_gives_the_true_intensities(target: str) -> None:
    perfect = target_of(settings(target), VOXELS, REAL)

    predicted, _ = as_intensities(settings(target), perfect, VOXELS, REAL)

    assert torch.allclose(predicted[REAL], VOXELS[REAL], atol=1e-6)


@pytest.mark.parametrize("target", ["normalised_with_statistics", "voxels"])
def test_pictures_of_targets_with_means_take_nothing_from_the_truth(target: str) -> None:
    chosen = settings(target)
    outputs = torch.full((1, 2, num_outputs(settings(target), 4)), 0.5)

    one, trivial = as_intensities(chosen, outputs, VOXELS, REAL)
    # Other intensities: a picture that took its scale from the truth would change with them.
    other, _ = as_intensities(chosen, outputs, VOXELS * 7 + 3, REAL)

    assert torch.equal(one, other)
    assert torch.equal(trivial, torch.zeros(1, 2, 4))


def make_plan(target: str, **sequence: object) -> Plan:
    tiny = encoder_size("primus_tiny")
    arguments = {**tiny.arguments, "embed_dim": 48, "eva_depth": 1, "eva_numheads": 2}
    encoder = EncoderPlan("primus_tiny", tiny.class_path, arguments, tiny.token_size)
    chosen = SequencePlan((16, 16, 16), **sequence)  # type: ignore[arg-type]
    return check(
        Plan(
            "t",
            DataPlan((1.0, 1.0, 1.0)),
            encoder,
            chosen,
            settings(target),
            OptimPlan(10, 1, 1e-3, 1),
            RunPlan(0, 10, 10),
        ),
    )


def make_batch() -> Batch:
    voxels = torch.randn(1, 1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
    valid_mask = torch.ones(1, 1, 16, 16, 16, dtype=torch.bool)
    return Batch(voxels, valid_mask, torch.arange(8)[None], torch.tensor([3]))


def outputs_of(objective: Autoregressive, batch: Batch) -> Tensor:
    with torch.no_grad():
        predicted: Tensor = objective.module(batch, torch.ones(1, 8, dtype=torch.bool))
    return predicted


def by_token(batch: Batch) -> Tensor:
    """Return the voxels of the crop as (8 tokens, 512)."""
    split = batch.voxels.reshape(2, 8, 2, 8, 2, 8)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(8, 512)


@pytest.mark.parametrize("predictor", ["next", "query"])
def test_the_loss_per_voxel_is_the_sum_of_three_mean_squared_errors(predictor: str) -> None:
    plan = make_plan("normalised_with_statistics", predictor=predictor)
    torch.manual_seed(0)
    objective = Autoregressive(plan)
    batch = make_batch()

    terms = objective.loss(batch, references=True)

    # Tokens of 8 x 8 x 8 in raster order, of which the first three are given.
    outputs = outputs_of(objective, batch)[0, 3:]
    voxels = by_token(batch)[3:]
    mean = voxels.mean(1)
    deviation = voxels.std(1)
    pattern = (voxels - mean[:, None]) / deviation[:, None]
    of_pattern = (outputs[:, :512] - pattern).square().mean()
    of_mean = (outputs[:, 512] - mean).square().mean()
    of_deviation = (outputs[:, 513] - deviation.log()).square().mean()
    by_hand = float(of_pattern + of_mean + of_deviation)
    assert float(terms.count) == 5 * 512
    assert float(terms.total.detach() / terms.count) == pytest.approx(by_hand, rel=1e-5)
    # Outputs of 0 miss a pattern of variance 511 / 512, the mean and the log deviation.
    nothing = 511 / 512 + mean.square().mean() + deviation.log().square().mean()
    assert float(terms.references["mean"] / terms.count) == pytest.approx(float(nothing), rel=1e-5)


def test_the_loss_of_plain_voxels_is_their_mean_squared_error() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan("voxels"))
    batch = make_batch()

    terms = objective.loss(batch)

    by_hand = (outputs_of(objective, batch)[0, 3:] - by_token(batch)[3:]).square().sum()
    assert float(terms.total.detach()) == pytest.approx(float(by_hand), rel=1e-5)


def test_statistics_of_padding_count_nothing() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan("normalised_with_statistics"))
    batch = make_batch()
    valid_mask = batch.valid_mask.clone()
    valid_mask[:, :, 8:] = False
    padded = replace(batch, voxels=batch.voxels * valid_mask[:, :, None], valid_mask=valid_mask)

    terms = objective.loss(padded)
    other_padding = padded.voxels + 5.0 * ~valid_mask[:, :, None]
    other = objective.loss(replace(padded, voxels=other_padding))

    # Tokens 4 to 7 are padding, so of five that are predicted only token 3 counts.
    assert float(terms.count) == 512
    assert float(terms.total.detach()) == float(other.total.detach())
