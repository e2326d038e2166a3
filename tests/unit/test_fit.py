"""A plan that does not fit is made smaller, in the order that changes least, and what comes out is
kept.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import Size, volume
from nnunet_autoreg.machine import is_out_of_memory
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
from nnunet_autoreg.planning.length import expected_seconds
from nnunet_autoreg.pretrain.dry_run import (
    dry_step,
    fit_plan,
    memory_errors_in_one_line,
    smaller,
    smaller_crop,
    with_estimated_seconds,
)
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.sampling.sample import Batch, Sample

CPU = torch.device("cpu")
TINY = encoder_size("primus_tiny")
ARGUMENTS = {**TINY.arguments, "embed_dim": 48, "eva_depth": 1, "eva_numheads": 2}
PLAN = Plan(
    "t",
    DataPlan((1.0, 1.0, 1.0)),
    EncoderPlan("primus_tiny", TINY.class_path, ARGUMENTS, TINY.token_size),
    SequencePlan((16, 16, 24)),
    PredictionPlan(),
    OptimPlan(4, 5, 1e-2, 1, micro_batch_size=5),
    RunPlan(0, 2, 2),
)


class Noise:
    """Random crops of the plan's size."""

    def __init__(self, plan: Plan):
        self.size = plan.sequence.crop_size_vox

    def kind(self, cases: Any, purpose: str, number: int) -> str:
        return "spatial"

    def draw(self, cases: Any, purpose: str, *ids: int) -> Sample:
        voxels = np.random.default_rng(ids).normal(size=(1, 1, *self.size)).astype(np.float32)
        # Tokens of 8 x 8 x 8 voxels.
        num_tokens = voxels.size // 512
        return Sample(voxels, np.ones((1, *self.size), dtype=bool), np.arange(num_tokens), 1)


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Callable[[Plan], Trainer]]:
    """Trainers on a device that holds a number of voxels at once, twice as many with activations
    checkpointed, and what they were asked for.
    """

    def with_room_for(
        num_voxels: float,
        asked: list[tuple[int, bool, tuple[int, ...]]],
    ) -> Callable[[Plan], Trainer]:
        def made(plan: Plan) -> Trainer:
            objective = Autoregressive(plan)
            objective.sampler = Noise(plan)  # type: ignore[assignment]
            loss = objective.loss
            room = num_voxels * (2 if plan.optim.checkpoint_activations else 1)

            def limited(batch: Batch, references: bool = False) -> Any:
                checkpointed = plan.optim.checkpoint_activations
                asked.append((len(batch.prefix), checkpointed, plan.sequence.crop_size_vox))
                if batch.voxels.numel() > room:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return loss(batch, references)

            objective.loss = limited  # type: ignore[method-assign]
            return Trainer(plan, tmp_path, objective, [], [], CPU, 0)  # type: ignore[arg-type]

        return made

    return with_room_for


def test_what_fits_stays_and_the_peak_is_kept(
    trainer_of: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    plan = fit_plan(PLAN, trainer_of(5 * 16 * 16 * 24, []), CPU)

    run = plan.run
    assert run.peak_memory_gib is not None
    assert run.peak_memory_gib > 0
    assert run.dry_step_seconds is not None
    assert run.dry_step_seconds > 0
    assert run.loader_seconds_per_crop is not None
    assert run.loader_seconds_per_crop > 0
    assert run.seconds_per_step is None
    # Apart from what was measured the plan is the same.
    assert replace(plan, run=PLAN.run) == PLAN
    assert "4 steps take" in caplog.text
    shown_gib = re.search(r"memory ([\d.]+) GiB", caplog.text)
    assert shown_gib is not None
    # The line shows hundredths of a GiB.
    assert float(shown_gib[1]) == pytest.approx(run.peak_memory_gib, abs=0.0101)


def test_crops_at_once_are_halved_first_and_the_batch_size_stays(
    trainer_of: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[Any] = []

    plan = fit_plan(PLAN, trainer_of(2 * 16 * 16 * 24, asked), CPU)

    assert plan.optim.batch_size == 5
    assert plan.optim.micro_batch_size == 2
    assert not plan.optim.checkpoint_activations
    assert plan.sequence == PLAN.sequence
    # Half of 5 is 3, and half of 3 is 2: rounded up.
    assert list(dict.fromkeys(asked))[:3] == [
        (5, False, (16, 16, 24)),
        (3, False, (16, 16, 24)),
        (2, False, (16, 16, 24)),
    ]
    first, second = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert plan.reasons["optim.micro_batch_size"] == second
    for message, values in ((first, ("5 crops", "3 at once")), (second, ("3 crops", "2 at once"))):
        for value in values:
            assert value in message


def test_then_activations_are_checkpointed_and_the_crop_shrinks_last(
    trainer_of: Callable[..., Any],
) -> None:
    one = 16 * 16 * 24

    # Checkpointing doubles the room: 0.6 becomes 1.2 crops.
    checkpointed = fit_plan(PLAN, trainer_of(0.6 * one, []), CPU)

    assert checkpointed.optim.micro_batch_size == 1
    assert checkpointed.optim.checkpoint_activations
    assert checkpointed.sequence == PLAN.sequence

    # 0.4 becomes 0.8 of a crop; 16 x 16 x 16 voxels are two thirds of one.
    cropped = fit_plan(PLAN, trainer_of(0.4 * one, []), CPU)

    assert cropped.optim.micro_batch_size == 1
    assert cropped.optim.checkpoint_activations
    assert cropped.sequence.crop_size_vox == (16, 16, 16)
    assert "crops of 16 x 16 x 16" in cropped.reasons["sequence.crop_size_vox"]


def test_if_nothing_fits_the_remedy_is_named(trainer_of: Callable[..., Any]) -> None:
    # Ten voxels are less than one token.
    with refused(AutoregError, "fit-no-smaller-crop", "--encoder", "--name"):
        fit_plan(PLAN, trainer_of(10, []), CPU)
    checkpointed = replace(
        PLAN,
        optim=replace(PLAN.optim, micro_batch_size=1, checkpoint_activations=True),
    )

    with refused(AutoregError, "fit-crop-by-user", "sequence.crop_size_vox", "--encoder"):
        smaller(replace(checkpointed, reasons={"sequence.crop_size_vox": "set by the user"}))


def test_a_smaller_crop_is_cut_in_whole_blocks_and_members_follow() -> None:
    # Blocks of 2 x 2 x 2 tokens have sides of 16 voxels; the longest axis, y, gives up one of them.
    plan = replace(
        PLAN,
        sequence=SequencePlan((32, 64, 48), block_tokens=(2, 2, 2), member_crop_vox=(32, 64, 16)),
    )
    reduced = smaller_crop(plan)

    assert reduced is not None
    assert reduced.sequence.crop_size_vox == (32, 48, 48)
    assert reduced.sequence.member_crop_vox == (32, 48, 16)
    # 8 x 8 x 16 are two blocks of one token, and a sequence needs two.
    assert smaller_crop(replace(PLAN, sequence=SequencePlan((8, 8, 16)))) is None


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ((64, 64, 64), (56, 56, 56)),
        # What would be left: 120 of 128 (15/16), 72 of 80 (9/10), then 112 of 128 and 56 of 64,
        # both 7/8, of which the longer goes first.
        ((64, 80, 128), (56, 72, 112)),
        ((64, 64, 80), (56, 56, 72)),
        # A block of 8 along z would be half of it.
        ((16, 128, 128), (16, 104, 112)),
    ],
)
def test_a_smaller_crop_keeps_its_proportions_as_far_as_whole_blocks_allow(
    crop: Size,
    expected: Size,
) -> None:
    reduced = smaller_crop(replace(PLAN, sequence=SequencePlan(crop)))
    assert reduced is not None
    assert reduced.sequence.crop_size_vox == expected
    # A step down leaves at most three quarters of the voxels.
    assert volume(expected) <= 0.75 * volume(crop)


NO_ROOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8 bytes."
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_ROOM),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)."),
        MemoryError(),
    ],
)
def test_want_of_memory_on_a_cpu_steps_the_plan_down_as_on_a_gpu(
    error: Exception,
    trainer_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_room_for_two(trainer: Trainer) -> float:
        if trainer.train_step.micro_batch_size > 2:
            raise error
        return 1.0

    monkeypatch.setattr("nnunet_autoreg.pretrain.dry_run.dry_step", with_room_for_two)
    assert fit_plan(PLAN, trainer_of(1e9, []), CPU).optim.micro_batch_size == 2

    # While a training runs, the same errors end it in one line.
    with (
        refused(AutoregError, "out-of-memory", "the memory", "same line"),
        memory_errors_in_one_line(),
    ):
        raise error


def test_the_error_of_torch_on_this_machine_counts_as_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as failed:
        # 4 PiB, more than any machine has.
        torch.empty(1 << 50)

    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_other_errors_are_not_taken_for_want_of_memory(
    trainer_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(trainer: Trainer) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr("nnunet_autoreg.pretrain.dry_run.dry_step", broken)
    with pytest.raises(ZeroDivisionError):
        fit_plan(PLAN, trainer_of(1e9, []), CPU)


def test_a_loss_that_cannot_be_compiled_runs_as_it_stands(
    trainer_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_a_compiler(trainer: Trainer) -> float:
        if trainer.plan.run.compile:
            raise torch._dynamo.exc.TorchDynamoException("no C compiler")
        return dry_step(trainer)

    monkeypatch.setattr("nnunet_autoreg.pretrain.dry_run.dry_step", without_a_compiler)

    plan = fit_plan(PLAN, trainer_of(1e9, []), CPU)

    assert plan.run.compile is False
    assert "no C compiler" in plan.reasons["run.compile"]
    assert plan.optim == PLAN.optim


def test_a_dry_run_times_a_step_before_any_scan_is_stored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    monkeypatch.setattr(
        "nnunet_autoreg.pretrain.dry_run.write_plan",
        lambda folder, plan: kept.append(plan),
    )

    plan = with_estimated_seconds(tmp_path, PLAN, "cpu")

    step_s = plan.run.dry_step_seconds
    crop_s = plan.run.loader_seconds_per_crop
    assert step_s is not None
    assert crop_s is not None
    assert kept == [plan]
    # Four steps of five crops, which a CPU loads between the steps, and a GPU beside them.
    assert expected_seconds(plan, "cpu") == pytest.approx(4 * (step_s + 5 * crop_s))
    assert expected_seconds(plan, "cuda") == pytest.approx(4 * step_s)
    # The training measures its own step.
    assert plan.run.peak_memory_gib is None
    assert expected_seconds(PLAN, "cpu") is None


def test_a_step_that_does_not_fit_has_no_time_and_leaves_the_plan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_large(*arguments: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("nnunet_autoreg.pretrain.dry_run.dry_step", too_large)

    assert with_estimated_seconds(tmp_path, PLAN, "cpu") == PLAN
