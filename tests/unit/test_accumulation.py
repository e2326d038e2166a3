"""A step in parts is the step in one: same loss, same gradient, same weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain.data import micro_batches
from nnunet_autoreg.pretrain.dry_run import seconds_per_step
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.sampling.sample import Batch, Sample, collate

# The smallest encoder that still has two blocks of attention: 16^3 voxels are 8 tokens of 8^3.
TINY = encoder_size("primus_tiny")
ARGUMENTS = {**TINY.arguments, "embed_dim": 48, "eva_depth": 2, "eva_numheads": 4}
PLAN = Plan(
    "t",
    DataPlan((1.0, 1.0, 1.0)),
    EncoderPlan("primus_tiny", TINY.class_path, ARGUMENTS, TINY.token_size),
    SequencePlan((16, 16, 16)),
    PredictionPlan(),
    # Batches of 5, so that parts of 2, 3 and 4 leave a smaller last part.
    OptimPlan(4, 5, 1e-2, 1),
    RunPlan(0, 2, 2, log_every=2),
)


def sample(number: int) -> Sample:
    """A crop with padding from plane 9 on in every other sample, and prefixes 1 to 5: parts that
    differ in what they supervise.
    """
    rng = np.random.default_rng(number)
    valid_mask = np.ones((1, 16, 16, 16), dtype=bool)
    if number % 2:
        valid_mask[:, 9:] = False
    voxels = rng.normal(size=(1, 1, 16, 16, 16)).astype(np.float32) * valid_mask[:, None]
    return Sample(voxels, valid_mask, np.arange(8), 1 + number % 5)


class Five:
    """The same five samples at every step."""

    def draw(self, cases: Any, purpose: str, *ids: int) -> Sample:
        return sample(ids[-1])


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[int | None], tuple[Trainer, torch.Tensor]]:
    """One step in parts of a size: the trainer after it, and the loss."""

    def step(micro: int | None) -> tuple[Trainer, torch.Tensor]:
        # Every trainer starts from the same weights. A limit of 1e9 never clips the gradient.
        torch.manual_seed(0)
        plan = replace(PLAN, optim=replace(PLAN.optim, micro_batch_size=micro, clip_norm=1e9))
        trainer = Trainer(plan, tmp_path, Autoregressive(plan), [], [], torch.device("cpu"), 0)
        loss, _ = trainer.train_step(0, collate([sample(n) for n in range(5)]))
        return trainer, loss

    return step


def gradient(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.module.parameters() if p.grad is not None])


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 5, 9])
def test_parts_give_the_gradient_of_the_whole_batch(
    trained: Callable[..., Any],
    micro: int,
) -> None:
    whole, loss = trained(None)
    parts, loss_of_parts = trained(micro)

    expected = gradient(whole)
    relative_error = (expected - gradient(parts)).norm() / expected.norm()
    # Only the order of the float32 sums differs between the two.
    assert float(relative_error) < 1e-6
    assert float(loss_of_parts) == pytest.approx(float(loss), rel=1e-6)


def test_the_gradient_is_that_of_the_mean_over_all_supervised_voxels(
    trained: Callable[..., Any],
) -> None:
    whole, loss = trained(2)
    torch.manual_seed(0)
    objective = Autoregressive(PLAN)
    # Each sample is weighted by its number of supervised voxels, which differs by prefix and
    # padding.
    terms = [objective.loss(collate([sample(n)])) for n in range(5)]
    mean = sum(t.total for t in terms) / sum(t.count for t in terms)
    mean_of_means = sum(t.total / t.count for t in terms) / 5
    mean.backward()

    gradients = [p.grad for p in objective.module.parameters() if p.grad is not None]
    expected = torch.cat([g.flatten() for g in gradients])

    relative_error = (gradient(whole) - expected).norm() / expected.norm()
    assert float(relative_error) < 1e-6
    assert float(loss) == pytest.approx(float(mean.detach()), rel=1e-6)
    # The mean of the five means is another number, so a trainer that took it would fail above.
    assert abs(float(mean_of_means.detach() / mean.detach()) - 1) > 1e-4


def test_a_batch_falls_into_parts_whole_and_in_order() -> None:
    batch = collate([sample(n) for n in range(5)])
    parts = list(micro_batches(batch, 2))

    assert [len(part.prefix) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.voxels for part in parts]), batch.voxels)
    assert torch.equal(torch.cat([part.prefix for part in parts]), batch.prefix)
    assert all(isinstance(part, Batch) and part.positions is None for part in parts)


def test_the_pace_is_measured_on_steps_that_leave_no_trace(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three steps are enough to see whether they write files.
    monkeypatch.setattr("nnunet_autoreg.pretrain.dry_run.MAX_STEPS", 3)
    objective = Autoregressive(PLAN)
    objective.sampler = Five()  # type: ignore[assignment]
    trainer = Trainer(PLAN, tmp_path, objective, [], [], torch.device("cpu"), 0)

    seconds = seconds_per_step(trainer)

    assert 0 < seconds < 60
    assert list(tmp_path.iterdir()) == []
