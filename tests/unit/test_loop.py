"""The training loop with a stand-in objective: bad steps, roll-backs, signals, checkpoints, loader
processes.
"""

import logging
import math
import os
import random
import signal
from copy import deepcopy as copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused
from stand_in import PLAN, Linear, Numbered, trainer
from torch import nn

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, CheckpointError, InterruptedRunError, StoreError
from nnunet_autoreg.plan import OptimPlan, RunPlan
from nnunet_autoreg.pretrain.distributed import World
from nnunet_autoreg.pretrain.trainer import StepClock, Trainer
from nnunet_autoreg.report.charts import draw_progress
from nnunet_autoreg.report.metrics import MetricsFile, read_lines
from nnunet_autoreg.sampling.sample import collate
from nnunet_autoreg.stopping import stoppable


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take most of the time here; one test draws them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.draw_progress", lambda *_: None)


def spoiled(*steps):
    """Adds a gradient that is infinite, while the loss stays finite."""

    def disturb(step, total):
        # The root of 0 is 0, but its slope is infinite.
        return total + (0 * total).sqrt() if step in steps else total

    return disturb


def nan_between(first, last):
    def disturb(step, total):
        return total * math.nan if first <= step <= last else total

    return disturb


def test_a_finite_loss_with_an_infinite_gradient_is_skipped(tmp_path, caplog):
    short = replace(PLAN, optim=replace(PLAN.optim, num_steps=3))
    before = trainer(tmp_path / "before", Linear(), short)
    before.plan = replace(PLAN, optim=replace(PLAN.optim, num_steps=6))
    for step in range(3):
        before.train_step(step, batch_of(step))
    kept_weight = before.module.weight.clone()
    kept_moments = [copy(state) for state in before.optimizer.state.values()]
    before.objective.disturb = spoiled(3)

    before.train_step(3, batch_of(3))

    assert torch.equal(before.module.weight, kept_weight)
    for old, new in zip(kept_moments, before.optimizer.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(old[key], new[key])

    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, Linear(spoiled(3))).run()
    (skipped,) = (message for message in caplog.messages if "skipped" in message)
    for value in ("step 4", "1 with", "infinite or NaN", "1 since the start"):
        assert value in skipped

    lines = read_lines(tmp_path / "metrics.jsonl")
    counts = [(line["step"], line["value"]) for line in lines if line["name"] == "skipped_steps"]
    assert counts == [(3, 1), (5, 1)]
    # The error of the interval with the bad step is not written: it would be NaN.
    assert [line["step"] for line in lines if line["name"] == "train_error"] == [1, 5]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def batch_of(step):
    return collate([Numbered().draw([], "training", step)])


# 40 steps, a checkpoint every 10, no validation; more than 4 bad steps in a row lead to a
# roll-back, at most twice.
ROUGH = replace(
    PLAN,
    optim=OptimPlan(40, 1, 1e-2, 1),
    run=RunPlan(0, 10, 1000, log_every=2, max_bad_steps=4, max_rollbacks=2),
)


def test_too_many_bad_steps_in_a_row_are_rolled_back(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rough = trainer(tmp_path, Linear(nan_between(13, 17)), ROUGH)
        rough.run()

    assert rough.progress.rollbacks == 1
    assert rough.progress.step == 40

    (warning,) = (message for message in caplog.messages if "olled back" in message)
    # Steps 13 to 17 are the 14th to the 18th; the checkpoint before them is that of step 10.
    for value in ("last 5 steps", "until step 18", "checkpoint of step 10", "--set optim.lr="):
        assert value in warning

    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["value"] for line in lines if line["name"] == "rollbacks"] == [1]
    assert bool(torch.isfinite(rough.module.weight).all())


@pytest.mark.parametrize(
    ("first", "last", "values"),
    [
        # The proposed rate is a third of 1e-2.
        (0, 40, ["last 4 steps until step 4", "no checkpoint", "--set optim.lr=3.3e-03"]),
        (11, 40, ["last 4 steps until step 24", "2 times", "--set optim.lr=3.3e-03"]),
    ],
)
def test_a_run_that_stays_bad_ends_and_keeps_its_last_good_state(tmp_path, first, last, values):
    with refused(AutoregError, "training-diverged", *values) as caught:
        trainer(tmp_path, Linear(nan_between(first, last)), ROUGH).run()
    assert "\n" not in str(caught.value)

    if checkpoint.exists(tmp_path):
        _, state = checkpoint.load_newest(tmp_path)
        assert bool(torch.isfinite(state["network_weights"]["weight"]).all())


# Before, at, within and after the bad steps, and in the middle of the repeated ones.
@pytest.mark.parametrize("stop_at", [(5,), (12,), (14, 15), (17, 19), (20, 29), (18,)])
def test_a_stop_does_not_change_which_checkpoint_is_rolled_back_to(tmp_path, stop_at):
    bad = nan_between(13, 17)
    whole = trainer(tmp_path / "whole", Linear(bad), ROUGH)
    whole.run()
    left = list(stop_at)

    def stopping(step, total):
        if left and step == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return bad(step, total)

    for _ in stop_at:
        with pytest.raises(InterruptedRunError):
            trainer(tmp_path / "stopped", Linear(stopping), ROUGH).run()
    stopped = trainer(tmp_path / "stopped", Linear(stopping), ROUGH)
    stopped.run()
    # A stop writes a checkpoint, which must not become the one to roll back to.
    assert torch.equal(stopped.module.weight, whole.module.weight)
    assert stopped.progress == whole.progress
    assert compared_metrics(tmp_path / "stopped") == compared_metrics(tmp_path / "whole")


COMPARED = ("train_error", "lr", "gradient_norm", "skipped_steps", "rollbacks")


def compared_metrics(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [(x["step"], x["name"], x["value"]) for x in lines if x["name"] in COMPARED]


def test_a_stop_before_anything_was_logged_saves_the_state(tmp_path):
    plan = replace(PLAN, run=RunPlan(0, 100, 100, log_every=100))

    def stop(step, total):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return total

    with pytest.raises(InterruptedRunError) as caught:
        trainer(tmp_path, Linear(stop), plan).run()
    assert "step 2 of 6" in str(caught.value)

    stopped = trainer(tmp_path, Linear(), plan)
    stopped.run()
    whole = trainer(tmp_path / "whole", Linear(), plan)
    whole.run()
    assert torch.equal(stopped.module.weight, whole.module.weight)


def test_a_stop_while_pictures_are_drawn_does_not_wait_for_them(tmp_path, monkeypatch):
    def draw(*_):
        # The trainer raises at the signal, so this line is not reached.
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was only noted")

    monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.draw_progress", draw)
    plan = replace(PLAN, run=RunPlan(0, 2, 100, log_every=1))

    with pytest.raises(InterruptedRunError) as caught:
        trainer(tmp_path, Linear(), plan).run()

    assert "step 2" in str(caught.value)
    assert "saved" in str(caught.value)
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize("was_stopped", [True, False])
def test_a_process_that_left_after_a_stop_is_not_called_lost(tmp_path, monkeypatch, was_stopped):
    # torchrun stops all processes; who heard it first once looked lost to the others.
    def lose_the_others(world):
        if was_stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(World, "wait", lose_the_others)
    plan = replace(PLAN, run=RunPlan(0, 2, 100, log_every=1))

    with pytest.raises(InterruptedRunError if was_stopped else RuntimeError) as caught:
        trainer(tmp_path, Linear(), plan).run()

    assert ("the state is saved" in str(caught.value)) is was_stopped


def test_sigterm_before_training_ends_in_one_line_and_restores_handlers(tmp_path):
    usual = signal.getsignal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError) as caught, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)

    assert "SIGTERM" in str(caught.value)
    assert "same line again" in str(caught.value)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is usual


def seed_all_generators(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_the_state_of_every_generator_is_in_the_checkpoint(tmp_path):
    plan = replace(PLAN, optim=replace(PLAN.optim, num_steps=4))

    def noisy(drawn, last=4):
        def disturb(step, total):
            if step > last:
                raise ZeroDivisionError
            drawn.append((step, float(torch.rand(())), float(np.random.rand()), random.random()))
            return total

        return disturb

    whole = []
    first = []
    second = []
    seed_all_generators(0)
    trainer(tmp_path / "whole", Linear(noisy(whole)), plan).run()
    seed_all_generators(0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "a", Linear(noisy(first, last=1)), plan).run()
    # A new process starts with generators in another state.
    seed_all_generators(5)
    trainer(tmp_path / "a", Linear(noisy(second)), plan).run()

    assert first + second == whole


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    trainer(tmp_path, Linear()).run()
    names = (checkpoint.LATEST_NAME, checkpoint.PREVIOUS_NAME)

    assert [checkpoint.load_checkpoint(tmp_path / name)["step"] for name in names] == [6, 4]

    latest = tmp_path / checkpoint.LATEST_NAME
    whole = checkpoint.load_checkpoint(latest)["network_weights"]["weight"]
    latest.write_bytes(latest.read_bytes()[:-7])
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, Linear()).run()

    assert "continuing after step 4 of 6" in caplog.messages
    assert torch.equal(checkpoint.load_checkpoint(latest)["network_weights"]["weight"], whole)


class DamagedCase(Numbered):
    """Cannot read the case of step 2."""

    def draw(self, cases, purpose, *ids):
        if purpose == "training" and ids[0] == 2:
            raise StoreError("the case is damaged; run the same line again")
        return super().draw(cases, purpose, *ids)


class Dying(Numbered):
    """Its process dies in step 2."""

    def draw(self, cases, purpose, *ids):
        if purpose == "training" and ids[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(cases, purpose, *ids)


@pytest.mark.parametrize(
    ("sampler", "code", "values"),
    [
        (DamagedCase(), "store", ["the case is damaged"]),
        (Dying(), "loader-died", ["DataLoader worker", "memory", "same line", "checkpoint"]),
    ],
)
def test_an_error_or_death_in_a_loader_process_ends_in_one_line(tmp_path, sampler, code, values):
    objective = Linear()
    objective.sampler = sampler

    with refused(AutoregError, code, *values) as caught:
        Trainer(PLAN, tmp_path, objective, [None], [None], torch.device("cpu"), 1).run()
    assert "\n" not in str(caught.value)


def test_the_best_state_is_kept_beside_the_latest_and_a_picture_is_drawn(tmp_path):
    trainer(tmp_path, Linear()).run()

    assert checkpoint.load_checkpoint(tmp_path / checkpoint.BEST_NAME)["best_error"] < 9
    assert checkpoint.load_checkpoint(tmp_path / checkpoint.LATEST_NAME)["step"] == 6
    assert (tmp_path / "progress.png").stat().st_size > 1000


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trainer(tmp_path, Linear()).run()
    other = Linear()
    other.module = other.network = nn.Linear(2, 2)

    with refused(CheckpointError, "checkpoint-other-plan", checkpoint.LATEST_NAME):
        trainer(tmp_path, other).run()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/tcp] Connection closed by peer"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_a_lost_process_while_loading_does_not_blame_the_checkpoint(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    trainer(tmp_path, Linear()).run()
    monkeypatch.setattr("nnunet_autoreg.pretrain.checkpointing.restore", fails)

    with pytest.raises(RuntimeError) as raised:
        trainer(tmp_path, Linear()).run()

    # The older checkpoint is tried if the newest is damaged; here nothing is wrong with it.
    assert raised.value is error


def test_metrics_of_repeated_steps_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(4):
        metrics.log(step, "train_error", 1.0, "squared error")
    with path.open("a") as handle:
        # The rest of a process that was killed while it wrote.
        handle.write('{"step": 4, "na')

    # The run continues after step 1, so step 2 is done once more.
    MetricsFile(path, 2).log(2, "train_error", 0.5, "squared error")

    found = [(line["step"], line["value"]) for line in read_lines(path)]
    assert found == [(0, 1.0), (1, 1.0), (2, 0.5)]

    draw_progress(tmp_path / "none.jsonl", tmp_path / "p.png")

    assert (tmp_path / "p.png").exists()


def test_the_time_of_a_step_is_over_the_steps_since_the_last_entry(monkeypatch):
    # The clock shows 100 s when the measurement begins, at step 10.
    now = [100.0]
    monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.time.monotonic", lambda: now[0])
    clock = StepClock(10)

    # 6 s for 3 steps, of which 3 s are a validation: 1 s per step.
    now[0] = 106.0
    clock.exclude(3.0)
    first = clock.read(13)
    clock.begin(13)
    # A run that ends after one more step has an entry for only this step.
    now[0] = 106.5
    last = clock.read(14)

    assert first == (3.0, 1.0)
    assert last == (0.5, 0.5)
