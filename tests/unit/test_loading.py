"""Loading keeps up with training: how many processes load, and what a run says that waits."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_autoreg.errors import StoreError
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.base import LossTerms, Objective, one_term
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain import data, trainer
from nnunet_autoreg.pretrain.data import DataWait, StepBatches, choose_loaders, seconds_per_crop
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.records import from_jsonable, to_jsonable
from nnunet_autoreg.report.metrics import read_lines
from nnunet_autoreg.sampling.sample import Sample

TINY = encoder_size("primus_tiny")
PLAN = Plan(
    "t",
    DataPlan((1.0, 1.0, 1.0)),
    EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
    SequencePlan((16, 16, 16)),
    PredictionPlan(),
    OptimPlan(16, 4, 1e-2, 1),
    RunPlan(0, 100, 100, log_every=2),
)


def measured(load: float | None, step: float | None) -> Plan:
    run = replace(PLAN.run, loader_seconds_per_crop=load, dry_step_seconds=step)
    return replace(PLAN, run=run)


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the training loop and of all that is timed about data."""
    made = Clock()
    stand_in = SimpleNamespace(monotonic=made, perf_counter=made)
    monkeypatch.setattr(data, "time", stand_in)
    monkeypatch.setattr(trainer, "time", stand_in)
    return made


class Loader:
    """Draws empty crops, each of which takes some seconds by its kind; step n is of kind n % 2."""

    def __init__(self, clock: Clock, *seconds: float):
        self.clock, self.seconds = clock, seconds
        self.drawn: list[tuple[int, ...]] = []

    def kind(self, cases: Any, purpose: str, number: int) -> str:
        return ("spatial", "contrast")[number % 2]

    def draw(self, cases: Any, purpose: str, *ids: int) -> Sample:
        self.drawn.append(ids)
        self.clock.now += self.seconds[ids[0] % len(self.seconds)]
        voxels = np.zeros((1, 1, 16, 16, 16), np.float32)
        return Sample(voxels, np.ones((1, 16, 16, 16), bool), np.arange(8), 1)


class OneSecondLoss(Objective):
    """An objective whose loss takes one second for a whole batch."""

    def __init__(self, clock: Clock, loader: Loader):
        self.clock, self.sampler = clock, loader
        self.module = self.network = nn.Linear(1, 1)
        self.plan = PLAN

    def loss(self, batch: Any, references: bool = False) -> LossTerms:
        self.clock.now += 1.0
        total = self.module.weight.square().sum()
        return one_term(total, torch.tensor(8.0))


# The number of loader processes.


@pytest.mark.parametrize(
    ("load", "step", "cores", "num_local", "expected"),
    [
        # Half as many again as are needed, and one more: 1.5 * 0.05 * 4 / 0.4 = 0.75, and
        # 1.5 * 0.3 * 4 / 0.5 = 3.6.
        (0.05, 0.4, 16, 1, 2),
        (0.3, 0.5, 16, 1, 5),
        # 4 cores of which one trains, and 4 cores for each of 4 GPUs.
        (0.3, 0.5, 4, 1, 3),
        (0.3, 0.5, 16, 4, 3),
        (0.3, 0.5, 16, 2, 5),
        # 25 are needed: 16 at most.
        (2.0, 0.5, 64, 1, 16),
        # No core is left.
        (0.3, 0.5, 1, 1, 0),
        (0.3, 0.5, 2, 4, 0),
    ],
)
def test_loader_processes_follow_from_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
    load: float,
    step: float,
    cores: int,
    num_local: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)

    number, reason = choose_loaders(measured(load, step), "cuda", num_local)

    assert number == expected
    assert f"{load:.3g} s" in reason
    assert f"{step:.3g} s" in reason


@pytest.mark.parametrize(
    ("cores", "num_local", "expected"),
    [(16, 1, 8), (16, 4, 3), (16, 16, 0), (4, 1, 3), (1, 1, 0)],
)
def test_unmeasured_each_gpu_has_its_share_of_the_cores_less_one(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    num_local: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)

    assert choose_loaders(PLAN, "cuda", num_local)[0] == expected


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_process_loads_if_the_device_is_not_a_gpu(device: str) -> None:
    number, reason = choose_loaders(measured(2.0, 0.5), device)

    assert number == 0
    assert device in reason


@pytest.mark.parametrize(("load", "step"), [(None, 0.4), (0.05, None)])
def test_one_of_two_measured_figures_decides_nothing(
    monkeypatch: pytest.MonkeyPatch,
    load: float | None,
    step: float | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    # 8 as for a plan without any measurement; with both figures it would be 2.
    assert choose_loaders(measured(load, step), "cuda")[0] == 8


# How long one crop takes.


def test_seconds_of_a_crop_are_weighted_by_kind(clock: Clock) -> None:
    batches = StepBatches(Loader(clock, 1.0, 4.0), [], range(5))  # type: ignore[arg-type]

    seconds = seconds_per_crop(batches, [0, 1], {"spatial": 1.0, "contrast": 0.5})

    # (1.0 x 1 s + 0.5 x 4 s) / 1.5
    assert seconds == pytest.approx(2.0)


def test_timed_crops_are_none_of_those_trained_on(clock: Clock) -> None:
    loader: Any = Loader(clock, 1.0)
    material: Any = []

    seconds_per_crop(StepBatches(loader, material, range(5)), [0], {"spatial": 1.0})

    assert len(loader.drawn) == len(set(loader.drawn)) > 2
    # Samples 0 to 4 make up the batch of step 0: reading them beforehand would warm the disk cache.
    assert all(step == 0 and sample >= 5 for step, sample in loader.drawn)


def test_a_damaged_case_is_an_error_while_loading_is_timed(clock: Clock) -> None:
    class Damaged(Loader):
        def draw(self, cases: Any, purpose: str, *ids: int) -> Sample:
            raise StoreError("the case is damaged")

    batches = StepBatches(Damaged(clock, 1.0), [], range(5))  # type: ignore[arg-type]

    with pytest.raises(StoreError):
        seconds_per_crop(batches, [0], {"spatial": 1.0})


# Plans.


@pytest.mark.parametrize("plan", [PLAN, measured(0.05, 0.4)])
def test_a_plan_keeps_what_was_measured_about_loading(plan: Plan) -> None:
    assert from_jsonable(Plan, to_jsonable(plan), "plan.json") == plan


def test_a_plan_written_before_loading_was_measured_is_read() -> None:
    written = to_jsonable(PLAN)
    del written["run"]["dry_step_seconds"], written["run"]["loader_seconds_per_crop"]

    plan = from_jsonable(Plan, written, "plan.json")

    assert (plan.run.dry_step_seconds, plan.run.loader_seconds_per_crop) == (None, None)


# Waiting.


def trained(folder: Path, clock: Clock, seconds_per_crop: float) -> list[dict[str, Any]]:
    """Train 16 steps of 1 s with 4 crops each; return the lines of metrics.jsonl."""
    objective: Any = OneSecondLoss(clock, Loader(clock, seconds_per_crop))
    material: Any = []
    Trainer(PLAN, folder, objective, material, material, torch.device("cpu"), 0).run()
    return read_lines(folder / "metrics.jsonl")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "draw_progress", lambda *_: None)


def test_slow_loading_is_measured_and_reported_once(
    tmp_path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        lines = trained(tmp_path, clock, 0.25)

    # 4 crops of 0.25 s before each step of 1 s: half of the time.
    shares = [line for line in lines if line["name"] == "data_wait"]
    assert [line["value"] for line in shares] == pytest.approx([0.5] * 8)
    assert {line["unit"] for line in shares} == {"share of time"}

    # Five intervals of two steps, so that it is reported after step 10.
    (warning,) = [message for message in caplog.messages if "waits for data" in message]
    assert warning.startswith("step 10: ")
    for figure in ("50 %", "2 s", "nnUNet_preprocessed"):
        assert figure in warning
    notes = [(line["step"], line["value"]) for line in lines if line["unit"] == "text"]
    assert notes == [(9, warning.removeprefix("step 10: "))]


def test_fast_loading_is_measured_and_not_reported(
    tmp_path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        lines = trained(tmp_path, clock, 0.0625)

    # 0.25 s of 1.25 s: a fifth, which on a CPU is no reason to complain.
    shares = [line["value"] for line in lines if line["name"] == "data_wait"]
    assert shares == pytest.approx([0.2] * 8)
    assert not caplog.messages
    assert not [line for line in lines if line["unit"] == "text"]


def reports(wait: DataWait, shares: list[float], step_seconds: float = 2.0) -> list[str | None]:
    return [wait.report(share, step_seconds) for share in shares]


def test_on_a_gpu_a_tenth_of_the_time_is_a_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)

    # The mean of the first five is 0.2; after a report there is silence.
    given = reports(DataWait("cuda", 7, 1.0), [0.12, 0.2, 0.2, 0.2, 0.28, 0.9, 0.9])

    assert [number for number, text in enumerate(given) if text is not None] == [4]
    warning = given[4]
    assert warning is not None
    # The mean share, the step with and without loading, the processes and the cores.
    for figure in ("20 %", "2 s", "1 s", "7 processes", "12 cores"):
        assert figure in warning


def test_a_short_wait_in_between_starts_the_count_again() -> None:
    # Below a tenth only once, so that the count of five begins after it.
    given = reports(DataWait("cuda", 7), [0.2, 0.2, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2])

    assert [text is not None for text in given] == [False] * 9 + [True]


def test_waits_that_a_gpu_computes_through_are_not_reported() -> None:
    # Steps take 5 % longer than without loading, although the host waits half of the time.
    assert reports(DataWait("cuda", 7, 1.0), [0.5] * 10, 1.05) == [None] * 10


def test_waiting_is_timed_only_around_the_loader(clock: Clock) -> None:
    def loaded() -> Iterator[Any]:
        for number in range(3):
            clock.now += 2.0
            yield number

    wait = DataWait("cpu", 0)
    for _ in wait.timed(loaded()):
        clock.now += 6.0

    # 3 * 2 s of 24 s; what was asked for once is not counted twice.
    assert wait.share(24.0) == pytest.approx(0.25)
    assert wait.share(24.0) == 0
