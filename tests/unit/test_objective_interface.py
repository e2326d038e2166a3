"""What the loop does for objectives: own terms, state beside the module, steps, collapse."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from stand_in import PLAN, Collapsing, Linear, trainer
from torch import Tensor, nn

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import volume
from nnunet_autoreg.model.memory import pretraining_memory
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.objectives.base import LossTerm, LossTerms, one_term
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.dry_run import plan_memory
from nnunet_autoreg.pretrain.training_step import TrainingStep, parameter_groups
from nnunet_autoreg.pretrain.validation import Health
from nnunet_autoreg.report.slices import validation_pictures
from nnunet_autoreg.sampling.sample import Batch, collate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.draw_progress", lambda *_: None)


def plan_with(micro: int | None = None, batch_size: int = 4, **run: Any) -> Plan:
    optim = replace(PLAN.optim, batch_size=batch_size, micro_batch_size=micro, clip_norm=1e9)
    return replace(PLAN, optim=optim, run=replace(PLAN.run, **run))


# Named terms.


class TwoTerms(Linear):
    """The mean of x w over samples, and 0.5 times the mean of (x w)^2 over voxels above 0."""

    counts_ahead = True

    def loss(self, batch: Any, references: bool = False) -> LossTerms:
        weight = self.module.weight.sum()
        values = batch.voxels[:, 0, 0]
        is_counted = batch.valid_mask[:, 0]
        first = (values.mean(dim=(1, 2, 3)) * weight).sum()
        second = ((values * weight).square() * is_counted).sum()
        counts = self.term_counts(batch)
        return LossTerms(
            {
                "samples": LossTerm(first, counts["samples"]),
                "voxels": LossTerm(second, counts["voxels"], 0.5),
            },
            statistics={"sum": values.sum()},
        )

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "samples": torch.tensor(float(len(batch.voxels))),
            "voxels": batch.valid_mask.sum().float(),
        }


def uneven_batch() -> Batch:
    """Four samples of 1, 2, 3 and 4, of which ever fewer planes are counted."""
    voxels = torch.arange(1.0, 5.0).reshape(4, 1, 1, 1, 1, 1).expand(4, 1, 1, 16, 16, 16)
    valid_mask = torch.zeros(4, 1, 16, 16, 16, dtype=torch.bool)
    for number, planes in enumerate((16, 8, 4, 1)):
        valid_mask[number, :, :planes] = True
    order_index = torch.arange(8).expand(4, 8)
    return Batch(voxels.contiguous(), valid_mask, order_index, torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_each_term_is_a_mean_over_its_own_things_in_any_parts(micro: int | None) -> None:
    objective = TwoTerms()
    start = objective.module.weight.item()
    step = TrainingStep(plan_with(micro), objective, CPU)

    loss, norm = step(0, uneven_batch())

    # Samples of 1, 2, 3 and 4 with 16, 8, 4 and 1 counted planes. With the weight w the first term
    # is 2.5 w, and the second w^2 times the mean square over counted voxels; the loss takes half
    # of that, and its slope is 2.5 + 0.5 * 2 w * mean square.
    mean_square = (16 * 1 + 8 * 4 + 4 * 9 + 1 * 16) / (16 + 8 + 4 + 1)
    gradient = 2.5 + 0.5 * mean_square * 2 * start
    assert float(loss) == pytest.approx(2.5 * start + 0.5 * mean_square * start**2, rel=1e-5)
    assert float(norm) == pytest.approx(abs(gradient), rel=1e-5)
    assert float(step.term_means["voxels"]) == pytest.approx(mean_square * start**2, rel=1e-5)


# Steps and state.


class Averaged(Linear):
    """Keeps a running mean of its weight beside the module, and notes its calls."""

    follows_steps = True

    def __init__(self, disturb: Any = lambda step, total: total):
        super().__init__(disturb)
        self.extra = nn.Linear(1, 1).requires_grad_(False)
        self.extra.load_state_dict(self.module.state_dict())
        self.calls: list[tuple[int, int, float]] = []

    def loss(self, batch: Any, references: bool = False) -> LossTerms:
        return replace(
            super().loss(batch, references),
            statistics={"sum": batch.voxels.mean(dim=(1, 2, 3, 4, 5)).sum()},
        )

    def after_step(self, step: int, processes: Any, statistics: Any) -> None:
        self.calls.append((step, processes.size, float(statistics["sum"])))
        self.extra.weight.lerp_(self.module.weight.detach(), 0.25)


def test_after_step_follows_accepted_steps_with_the_whole_share() -> None:
    def disturb(step: int, total: Tensor) -> Tensor:
        return total * (torch.inf if step == 2 else 1)

    objective = Averaged(disturb)
    step = TrainingStep(plan_with(micro=1, batch_size=2), objective, CPU)
    for number in range(4):
        step(number, collate([objective.sampler.draw((), "training", number)] * 2))

    # Step 2 was skipped. Each batch is two samples full of the step's number.
    assert objective.calls == [(0, 1, 0.0), (1, 1, 2.0), (3, 1, 6.0)]


def test_extra_state_is_in_checkpoints_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole = Averaged()
    (tmp_path / "whole").mkdir()
    trainer(tmp_path / "whole", whole).run()
    (tmp_path / "cut").mkdir()
    cut = Averaged()
    short = replace(PLAN, optim=replace(PLAN.optim, num_steps=6), run=replace(PLAN.run))
    first = trainer(tmp_path / "cut", cut, short)
    for number in range(2):
        first.train_step(number, first.batches[number])
    first.progress.step = 2
    first.checkpoints.remember_folder()
    first.checkpoints.save_newest(needed=True)

    resumed = Averaged()
    # A value that only the checkpoint can replace.
    nn.init.constant_(resumed.extra.weight, 77.0)  # type: ignore[arg-type]
    trainer(tmp_path / "cut", resumed).run()

    assert torch.equal(resumed.extra.weight, whole.extra.weight)  # type: ignore[arg-type]
    assert torch.equal(resumed.module.weight, whole.module.weight)
    saved = checkpoint.load_checkpoint(tmp_path / "whole" / checkpoint.LATEST_NAME)
    assert torch.equal(saved["extra"]["weight"], whole.extra.weight)  # type: ignore[arg-type]


def test_a_roll_back_restores_the_extra_state(tmp_path: Path) -> None:
    objective = Averaged()
    made = trainer(tmp_path, objective)
    made.checkpoints.remember_folder()
    made.train_step(0, made.batches[0])
    made.progress.step = 2
    made.checkpoints.save_newest(needed=False)
    saved = objective.extra.weight.clone()  # type: ignore[operator]
    nn.init.constant_(objective.extra.weight, 77.0)  # type: ignore[arg-type]

    made.checkpoints.roll_back()

    assert torch.equal(objective.extra.weight, saved)  # type: ignore[arg-type]


def test_checkpoints_without_extra_state_are_still_read(tmp_path: Path) -> None:
    made = trainer(tmp_path, Linear())
    made.checkpoints.remember_folder()
    made.progress.step = 2
    made.checkpoints.save_newest(needed=False)
    path = tmp_path / checkpoint.LATEST_NAME
    content = checkpoint.load_checkpoint(path)
    older = {key: value for key, value in content.items() if key not in ("extra", "collapsed")}
    checkpoint.save_checkpoint(path, older, None)

    resumed = trainer(tmp_path, Linear())
    resumed.checkpoints.resume(resumed.batches.cases)

    assert (resumed.progress.step, resumed.progress.collapsed) == (2, 0)


def test_extra_state_has_no_gradient_no_moments_and_is_not_optimised() -> None:
    objective = Averaged()
    groups: Any = parameter_groups(objective.module, 0.1)
    optimised = [parameter for group in groups for parameter in group["params"]]

    def loss_of(number: int) -> Tensor:
        return torch.empty(number, 1, requires_grad=True) * 2

    with torch.device("meta"):
        module = nn.Linear(1000, 1000)
        teacher = nn.Linear(1000, 1000).requires_grad_(False)
        alone = pretraining_memory(module, loss_of)
        taught = pretraining_memory(module, loss_of, extra=teacher)

    assert all(parameter is not objective.extra.weight for parameter in optimised)
    # Weights of 4 bytes, and the slack of a tenth; a trained copy would take 16 bytes each.
    more = taught.fixed_bytes - alone.fixed_bytes
    assert more == pytest.approx(1.1 * 4 * (1000 * 1000 + 1000), rel=1e-3)


def test_the_memory_estimate_asks_the_objective_for_its_batch() -> None:
    with torch.device("meta"):
        batch = build_objective(PLAN).example_batch(3)

    assert batch.voxels.shape == (3, 1, 1, 16, 16, 16)
    assert batch.order_index.shape == (3, volume((2, 2, 2)))
    assert plan_memory(PLAN).sample_bytes > 0


# What the objective says about itself.


def test_states_are_ranked_by_the_probe_if_the_objective_says_so() -> None:
    by_probe = FigureOfMerit("x", "1", "", {}, ranks_by_probe=True)
    probe = {"features": 0.7, "voxels": 0.5, "chance": 0.5}

    health = Health({"error": 0.4}, probe=probe)

    assert health.merit == 0.4
    # The accuracy with its sign turned, because smaller is better; without a probe the error
    # decides.
    assert replace(health, figure=by_probe).merit == -0.7
    assert replace(health, figure=by_probe, probe=None).merit == 0.4


def test_an_objective_without_reconstruction_has_no_pictures() -> None:
    objective = Linear()
    batch = collate([objective.sampler.draw((), "validation", 0)])

    assert objective.reconstruct(batch) is None
    assert validation_pictures(objective, [batch], CPU, (1.0, 1.0, 1.0)) == []


# Collapse.


def test_a_run_that_collapses_stops_and_keeps_its_last_good_state(tmp_path: Path) -> None:
    plan = plan_with(batch_size=1, max_collapsed=3)
    plan = replace(plan, optim=replace(plan.optim, num_steps=40))

    with refused(AutoregError, "training-collapsed", "plan.json", "run.max_collapsed"):
        trainer(tmp_path, Collapsing(8), plan).run()

    # It collapsed in step 9: validations after steps 10, 12 and 14 saw it.
    newest = checkpoint.load_newest(tmp_path)
    best = checkpoint.load_checkpoint(tmp_path / checkpoint.BEST_NAME)
    assert newest is not None
    assert newest[1]["step"] == 8
    assert best["step"] <= 8
    last = re.findall(r'"step": (\d+)', (tmp_path / "metrics.jsonl").read_text())[-1]
    assert int(last) == 13


def test_a_run_that_allows_a_collapse_or_recovers_is_not_stopped(tmp_path: Path) -> None:
    class Recovering(Collapsing):
        def after_step(self, step: int, *_: object) -> None:
            self.has_collapsed = 8 <= step < 12

    # The first collapses for two validations of three and recovers; the second may collapse.
    for name, objective, most in (("on", Recovering(0), 3), ("off", Collapsing(8), 0)):
        (tmp_path / name).mkdir()
        plan = plan_with(batch_size=1, max_collapsed=most)
        plan = replace(plan, optim=replace(plan.optim, num_steps=20))
        made = trainer(tmp_path / name, objective, plan)

        if most:
            made.run()
        else:
            # At the end a collapsed encoder is refused all the same.
            with refused(AutoregError, "training-failed"):
                made.run()
        assert made.progress.step == 20


def test_one_term_is_the_loss_itself() -> None:
    loss = one_term(torch.tensor(6.0), torch.tensor(2.0), {"mean": torch.tensor(8.0)})

    assert (float(loss.total), float(loss.count)) == (6.0, 2.0)
    assert float(loss.references["mean"]) == 8.0
