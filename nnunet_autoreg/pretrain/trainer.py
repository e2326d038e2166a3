"""The training loop: steps, validation, checkpoints, roll-backs, and how a run ends.

File 7 of 11 in reading order.

It knows objectives by their interface only. The end of the file has what a process needs to build a
trainer.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_autoreg.downstream.probe import LabelledCrop
from nnunet_autoreg.errors import InterruptedRunError
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.phases import Phase, phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.checkpointing import (
    Checkpoints,
    Progress,
    load_initial_weights,
)
from nnunet_autoreg.pretrain.data import (
    DataWait,
    StepBatches,
    choose_loaders,
    dead_workers_in_one_line,
    training_batches,
    validation_batches,
)
from nnunet_autoreg.pretrain.distributed import (
    SINGLE_PROCESS,
    World,
    device_of,
    is_sharded,
)
from nnunet_autoreg.pretrain.training_step import (
    TrainingStep,
    learning_rate,
    measure_throughput,
    postfix,
    skipped_message,
)
from nnunet_autoreg.pretrain.validation import HealthWatch, Validation
from nnunet_autoreg.report.charts import draw_progress
from nnunet_autoreg.report.metrics import MetricsFile, NoMetrics
from nnunet_autoreg.report.sinks import open_sinks
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.stopping import stop_requested, stops_noted, stops_raised
from nnunet_autoreg.terminal import ProgressBar, progress_bar
from nnunet_autoreg.wording import duration

log = logging.getLogger(__name__)

NUM_VALIDATION_SAMPLES = 16


class Trainer:
    """Trains one objective by one plan in one folder, alone or together with other processes.

    Only the main process writes.

    Args:
        objective: may be on any device; it is moved.
        training, validation: what sequences are cut from; ``validation`` may be empty.
        num_workers: processes that prepare batches.
        probe: labelled crops for the frozen probe; nothing is learnt from them.

    Attributes:
        after_checkpoint: called after every checkpoint, by all processes.
        validation_batches: in the processes that validate; [] in others.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        objective: Objective,
        training: SamplingPool,
        validation: SamplingPool,
        device: torch.device,
        num_workers: int,
        probe: Sequence[LabelledCrop] = (),
        world: World = SINGLE_PROCESS,
    ):
        self.plan = plan
        self.folder = folder
        self.objective = objective
        self.device = device
        self.num_workers = num_workers
        self.world = world
        self.module = objective.module.to(device)
        self.is_sharded = is_sharded(plan.run.sharding, self.module, device, world)

        # The main process validates alone, unless no process has all weights.
        by_kind = {}
        if bool(validation) and (world.is_main or self.is_sharded):
            size = validation_batch_size(plan)
            by_kind = validation_batches(
                objective.sampler,
                validation,
                size,
                NUM_VALIDATION_SAMPLES // size,
            )
        self.validation_batches = [batch for batches in by_kind.values() for batch in batches]

        # Measured before the step is set up: afterwards, every backward pass communicates with the
        # other processes.
        has_sample = bool(self.validation_batches) and not self.is_sharded
        sample = self.validation_batches[0] if has_sample else None
        self.throughput = measure_throughput(plan, objective, device, sample, world.size)

        self.train_step = TrainingStep(plan, objective, device, world, self.is_sharded)
        self.optimizer = self.train_step.optimizer
        self.guard = self.train_step.guard
        self.checkpoints = Checkpoints(plan, folder, objective, self.optimizer, self.guard, world)
        self.health_watch = HealthWatch(
            plan,
            Validation(objective, by_kind, probe, device),
            bool(validation),
            self.train_step,
            self.checkpoints,
        )

        self.batches = StepBatches(objective.sampler, training, self.train_step.numbers)
        dry_step = plan.run.dry_step_seconds
        compute_seconds = None if dry_step is None else dry_step / world.size
        self.data_wait = DataWait(device.type, num_workers, compute_seconds)
        self.after_checkpoint: Callable[[], object] = lambda: None

    @property
    def progress(self) -> Progress:
        """Return the progress of the training."""
        return self.checkpoints.progress

    def run(self) -> None:
        """Train from the latest checkpoint, or from the start, to the plan's last step.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved. Where a step or a
                validation takes so long that it cannot be saved in time, the process is ended
                instead (see ``stopping``).
            AutoregError: too many steps were bad, the features are collapsed at the end, a loader
                process died, the folder was removed, or a checkpoint cannot be read or written.
        """
        self.checkpoints.resume(self.batches.cases)
        num_steps, start = self.plan.optim.num_steps, self.progress.step
        metrics = self._open_metrics(start)
        self.checkpoints.remember_folder()
        steps = range(start, num_steps)
        bar = progress_bar(num_steps, self.plan.name, "step", start, self.world.is_main)
        is_on_gpu = self.device.type == "cuda"
        loaded = training_batches(self.batches, steps, self.num_workers, pin_memory=is_on_gpu)

        with (
            stops_noted(self.checkpoints.line_if_forced) as stop,
            phase("training") as doing,
            bar,
            closing(metrics),
            dead_workers_in_one_line(),
            closing(loaded) as prepared,
        ):
            clock = StepClock(start)
            for step, batch in zip(steps, self.data_wait.timed(prepared), strict=True):
                loss, norm = self.train_step(step, batch)
                self.progress.step = step + 1
                bar.update()

                if self._is_due(self.plan.run.log_every):
                    self._check_bad_steps(step, metrics)
                    loss_value = float(loss)  # waits for the device
                    elapsed, seconds = clock.read(step + 1)
                    self._log_step(metrics, step, loss_value, float(norm), elapsed, seconds)
                    self._show_progress(bar, doing, loss_value, seconds)
                    clock.begin(step + 1)

                # Validation and checkpoints do not count as time of a step.
                paused = time.monotonic()
                if self._is_due(self.plan.run.validate_every):
                    self.health_watch.validate(step, metrics)
                if self.progress.step == num_steps:
                    # Before the state is saved, so that the last good one stays.
                    self.health_watch.refuse_failure()

                stopping = self.world.any(stop())
                if self._is_due(self.plan.run.checkpoint_every) or stopping:
                    self.checkpoints.save_newest(needed=stopping)
                    # Pictures take long, and the next checkpoint brings them.
                    if stopping:
                        self.world.wait()
                    else:
                        self._draw_report(metrics)
                pause = time.monotonic() - paused
                clock.exclude(pause)
                bar.exclude(pause)

                if stopping:
                    raise InterruptedRunError(
                        f"stopped after step {self.progress.step} of {num_steps}; the state is "
                        "saved: type the same line again to continue",
                    )

        # A run that is continued after its last step may have failed by then.
        if not steps:
            self.health_watch.refuse_failure()

    def _draw_report(self, metrics: MetricsFile) -> None:
        """Draw what was measured until now, and wait until all processes are here.

        Raises:
            InterruptedRunError: a signal came, and the state is saved.
        """
        self.checkpoints.require_folder()
        try:
            # Drawing may take longer than a stopped process may live, and the next checkpoint draws
            # again. In a row of bad steps no checkpoint was made, and the state is saved before the
            # run ends.
            is_saved = self.checkpoints.saved_step == self.progress.step
            with phase("drawing the report"), stops_raised() if is_saved else nullcontext():
                if self.world.is_main:
                    draw_progress(metrics.path, self.folder / "progress.png", self.plan)
                self.after_checkpoint()
            self.world.wait()
        except (InterruptedRunError, RuntimeError) as error:
            # The first process that notices a stop leaves the drawing, and the others lose the
            # connection to it.
            if not stop_requested():
                raise
            raise InterruptedRunError(self.checkpoints.line_if_forced()) from error

    def _is_due(self, every: int) -> bool:
        """Return whether something that is done regularly is due; at the last step it always is."""
        step = self.progress.step
        return step % every == 0 or step == self.plan.optim.num_steps

    def _open_metrics(self, start: int) -> MetricsFile:
        path = self.folder / "metrics.jsonl"
        if not self.world.is_main:
            return NoMetrics(path)
        return MetricsFile(path, start, open_sinks(self.folder, self.plan.name, start))

    def _show_progress(self, bar: ProgressBar, doing: Phase, loss: float, seconds: float) -> None:
        """Show how far training is, on the bar and in the text of the current phase.

        Args:
            loss: loss of this step.
            seconds: time of a step.
        """
        throughput = self.throughput.metrics(seconds)
        bar.set_postfix_str(postfix(loss, throughput))

        step, num_steps = self.progress.step, self.plan.optim.num_steps
        left = duration(seconds * (num_steps - step))
        doing.progress = f"step {step:,} of {num_steps:,}, loss {loss:.3f}, about {left} left"

    def _log_step(
        self,
        metrics: MetricsFile,
        step: int,
        loss: float,
        norm: float,
        elapsed: float,
        seconds: float,
    ) -> None:
        """Write the metrics of the newest steps, and warn once if they wait long for data.

        Args:
            loss, norm: loss and norm of the gradient of this step.
            elapsed: seconds since the last log entry.
            seconds: mean time of the steps since then.
        """
        self.checkpoints.require_folder()
        # JSON has no NaN. Steps that are skipped for it are counted in metrics of their own.
        if math.isfinite(loss) and math.isfinite(norm):
            self._log_error(metrics, step, loss)
            metrics.log(step, "gradient_norm", norm, "1")
        metrics.log(step, "lr", learning_rate(self.plan.optim, step), "1")

        metrics.log(step, "step_time", seconds, "s")
        for name, (value, unit) in self.throughput.metrics(seconds).items():
            metrics.log(step, name, value, unit)

        share = self.data_wait.share(elapsed)
        metrics.log(step, "data_wait", share, "share of time")

        warning = self.data_wait.report(share, seconds)
        if warning is not None:
            log.warning("step %d: %s", step + 1, warning)
            metrics.note(step, "data_wait_warning", warning)

    def _log_error(self, metrics: MetricsFile, step: int, loss: float) -> None:
        """Write the figure of merit in training, and the terms of the loss if it has several."""
        figure, means = self.objective.figure, self.train_step.term_means
        error = loss
        if figure.term:
            # The same quantity as in validation, so that both are curves of one chart.
            metrics.log(step, "train_loss", loss, "weighted sum of the terms")
            error = float(means[figure.term])
        metrics.log(step, "train_error", error, figure.unit)
        if len(means) > 1:
            for name, mean in means.items():
                metrics.log(step, f"train_{name}", float(mean), "term of the loss")

    def _check_bad_steps(self, step: int, metrics: MetricsFile) -> None:
        """Log the steps skipped since the last call; after too many bad steps, roll back."""
        before, now = self.checkpoints.statistics, self.guard.statistics()
        self.checkpoints.statistics = now
        message = skipped_message(before, now, step)
        if message:
            log.warning(message)
        if now.skipped:
            metrics.log(step, "skipped_steps", now.skipped, "steps")
        if now.in_row >= self.plan.run.max_bad_steps:
            self.checkpoints.roll_back()
            metrics.log(step, "rollbacks", self.progress.rollbacks, "times")


def validation_batch_size(plan: Plan) -> int:
    """Return the batch size of validation: a power of two, which divides the number of samples.

    The same samples are then used for validation, regardless of the memory and the number of
    processes.
    """
    micro_batch_size = plan.optim.micro_batch_size or plan.optim.batch_size
    size = min(micro_batch_size, plan.optim.batch_size, NUM_VALIDATION_SAMPLES)
    return 1 << int(math.log2(size))


class StepClock:
    """Measures the time of the steps between two log entries.

    Args:
        num_done: steps that are done when the measurement begins.
    """

    def __init__(self, num_done: int):
        self.begin(num_done)

    def begin(self, num_done: int) -> None:
        """Begin the next measurement."""
        self.num_done = num_done
        self.start = time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Leave out a pause that has just ended."""
        self.start += seconds

    def read(self, num_done: int) -> tuple[float, float]:
        """Return the seconds since the measurement began, and their mean over the steps since."""
        elapsed = time.monotonic() - self.start
        # Fewer steps than usual were done after a resume, and before the last entry of a run.
        return elapsed, elapsed / (num_done - self.num_done)


@dataclass(frozen=True)
class TrainingJob:
    """All that a process needs to train with the others. Only the main process uses the folder.

    Attributes:
        device: cpu, cuda or mps.
        training, validation: what sequences are cut from.
        probe: labelled crops for the frozen probe.
        is_new: there is no checkpoint, so that weights named by ``--init`` are loaded.
        num_local: processes on one machine.
    """

    folder: Path
    plan: Plan
    device: str
    training: SamplingPool
    validation: SamplingPool
    probe: Sequence[LabelledCrop]
    is_new: bool
    num_local: int = 1


def build_trainer(job: TrainingJob, world: World = SINGLE_PROCESS, local_rank: int = 0) -> Trainer:
    """Return the trainer of a fresh network, which is the same in all processes."""
    plan = job.plan
    torch.manual_seed(plan.run.seed)
    objective = build_objective(plan)
    if job.is_new:
        load_initial_weights(objective.network, plan, job.folder)
    # How many processes load may differ between machines, and changes no sample.
    num_loaders, _ = choose_loaders(plan, job.device, job.num_local)
    trainer = Trainer(
        plan,
        job.folder,
        objective,
        job.training,
        job.validation,
        device_of(job.device, local_rank, world),
        num_loaders,
        job.probe,
        world,
    )

    # From here on each process draws its own numbers, e.g. for stochastic depth.
    if not world.is_main:
        torch.manual_seed(plan.run.seed + world.rank)
    return trainer
