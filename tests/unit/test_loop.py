"""The training loop with a stand-in objective: non-finite gradients, signals before the first log, checkpoints."""

import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, CheckpointError
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.base import LossTerms
from nnunet_autoreg.plan import DataPlan, EncoderPlan, ObjectivePlan, OptimPlan, Plan, RunPlan, SequencePlan
from nnunet_autoreg.pretrain.loop import InterruptedRunError, Trainer
from nnunet_autoreg.pretrain.metrics import MetricsFile, draw_progress, read_lines
from nnunet_autoreg.sequences.sample import Sample

TINY = encoder_size("primus_tiny")
PLAN = Plan("t", DataPlan((1.0, 1.0, 1.0)), EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
            SequencePlan((16, 16, 16)), ObjectivePlan(), OptimPlan(6, 1, 1e-2, 1), RunPlan(0, 2, 2, log_every=2))


@dataclass(frozen=True)
class Constant:
    """Draws the same sample for ever."""

    def draw(self, cases, purpose, *ids):
        return Sample(np.ones((1, 1, 16, 16, 16), np.float32), np.ones((1, 16, 16, 16), bool), np.arange(8), 1)


class Linear:
    """Fits one weight to 3; ``disturb`` may spoil a step's loss."""

    def __init__(self, disturb=lambda step, total: total):
        torch.manual_seed(0)
        self.module = self.network = nn.Linear(1, 1)
        self.sampler, self.disturb, self.step = Constant(), disturb, 0

    def loss(self, batch, references=False):
        total = self.disturb(self.step, (self.module.weight.sum() - 3).square() * 8)
        return LossTerms(total, torch.tensor(8.0), {"mean": torch.tensor(8.0)} if references else {})

    def after_step(self, step):
        self.step = step + 1


def trainer(folder, objective, plan=PLAN):
    return Trainer(plan, folder, objective, [None], [None], torch.device("cpu"), 0)


def test_a_finite_loss_with_an_infinite_gradient_ends_the_run_and_the_last_good_state_stays(tmp_path):
    objective = Linear(lambda step, total: total + (0 * objective.module.weight.sum()).sqrt() if step == 3 else total)
    with pytest.raises(AutoregError, match=r"infinite or NaN by step 3.*--set optim.lr=3.3e-03"):
        trainer(tmp_path, objective).run()
    kept = checkpoint.load_checkpoint(tmp_path / checkpoint.LATEST_NAME)
    assert kept["step"] == 2
    assert all(bool(torch.isfinite(w).all()) for w in kept["network_weights"].values())


def test_a_stop_before_anything_was_logged_saves_the_state_and_the_run_goes_on(tmp_path):
    plan = replace(PLAN, run=RunPlan(0, 100, 100, log_every=100))

    def stop(step, total):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return total

    with pytest.raises(InterruptedRunError, match="stopped after step 2 of 6"):
        trainer(tmp_path, Linear(stop), plan).run()
    stopped = trainer(tmp_path, Linear(), plan)
    stopped.run()
    (tmp_path / "whole").mkdir()
    whole = trainer(tmp_path / "whole", Linear(), plan)
    whole.run()
    assert torch.equal(stopped.module.weight, whole.module.weight)


def test_the_best_held_out_state_is_kept_beside_the_latest(tmp_path):
    trainer(tmp_path, Linear()).run()
    assert checkpoint.load_checkpoint(tmp_path / checkpoint.BEST_NAME)["best_error"] < 9
    assert checkpoint.load_checkpoint(tmp_path / checkpoint.LATEST_NAME)["step"] == 6
    assert (tmp_path / "progress.png").stat().st_size > 1000


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trainer(tmp_path, Linear()).run()
    other = Linear()
    other.module = other.network = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="does not belong to this plan"):
        trainer(tmp_path, other).run()


def test_metrics_of_steps_that_run_again_are_dropped_and_a_torn_line_is_no_harm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(4):
        metrics.log(step, "train_error", 1.0, "squared error")
    with path.open("a") as handle:
        handle.write('{"step": 4, "na')
    MetricsFile(path, 2).log(2, "train_error", 0.5, "squared error")
    assert [(line["step"], line["value"]) for line in read_lines(path)] == [(0, 1.0), (1, 1.0), (2, 0.5)]
    draw_progress(tmp_path / "none.jsonl", tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()
