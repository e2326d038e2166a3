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
from torch.distributed.tensor import DTensor

from nnunet_autoreg import checkpoint
from nnunet_autoreg.downstream.probe import LabelledCrop
from nnunet_autoreg.errors import AutoregError, CheckpointError, InterruptedRunError
from nnunet_autoreg.model.compilation import is_out_of_memory
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.checkpointing import (
    Progress,
    folder_identity,
    load_initial_weights,
    measure_pool,
    restore,
    restore_weights,
    shareable,
    snapshot,
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
    ALONE,
    World,
    device_of,
    gathered,
    is_lost_peer,
    is_sharded,
)
from nnunet_autoreg.pretrain.request import public_plan
from nnunet_autoreg.pretrain.training_step import (
    StepStatistics,
    TrainingStep,
    learning_rate,
    measure_throughput,
    postfix,
    skipped_message,
)
from nnunet_autoreg.pretrain.validation import (
    Health,
    Validation,
    collapse_messages,
    failure_messages,
    health_warnings,
)
from nnunet_autoreg.records import to_jsonable
from nnunet_autoreg.report.charts import draw_progress
from nnunet_autoreg.report.metrics import MetricsFile, NoMetrics
from nnunet_autoreg.report.sinks import open_sinks
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.stopping import stop_requested, stops_noted, stops_raised
from nnunet_autoreg.terminal import progress_bar
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
        world: World = ALONE,
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
        self.has_validation = bool(validation)
        self.validates = self.has_validation and (world.is_main or self.is_sharded)
        by_kind = {}
        if self.validates:
            size = validation_batch_size(plan)
            by_kind = validation_batches(
                objective.sampler, validation, size, NUM_VALIDATION_SAMPLES // size
            )
        self.validation_batches = [batch for batches in by_kind.values() for batch in batches]
        self.validation = Validation(objective, by_kind, probe, device)

        # Before the step is set up, which from then on adds up every gradient over all processes.
        has_sample = bool(self.validation_batches) and not self.is_sharded
        sample = self.validation_batches[0] if has_sample else None
        self.throughput = measure_throughput(plan, objective, device, sample, world.size)

        self.train_step = TrainingStep(plan, objective, device, world, self.is_sharded)
        self.optimizer = self.train_step.optimizer
        self.guard = self.train_step.guard
        self.batches = StepBatches(objective.sampler, training, self.train_step.numbers)
        dry_step = plan.run.dry_step_seconds
        compute_seconds = None if dry_step is None else dry_step / world.size
        self.data_wait = DataWait(device.type, num_workers, compute_seconds)
        self.after_checkpoint: Callable[[], object] = lambda: None

        self.statistics = self.guard.statistics()
        self.progress = Progress()
        self.health: Health | None = None
        """The newest validation of this process."""
        self.identity: tuple[int, int] | None = None
        """Which folder on which disk ``folder`` was when training began."""
        self.latest_is_scheduled = False
        self.saved_step = 0
        """The step that the newest checkpoint was made after; 0 if there is none."""

    def run(self) -> None:
        """Train from the latest checkpoint, or from the start, to the plan's last step.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved. Where a step or a
                validation takes so long that it cannot be saved in time, the process is ended
                instead (see ``stopping``).
            AutoregError: too many steps were bad, the features are collapsed at the end, a loader
                process died, the folder was removed, or a checkpoint cannot be read or written.
        """
        self._resume()
        num_steps, start = self.plan.optim.num_steps, self.progress.step
        metrics = self._open_metrics(start)
        self.identity = folder_identity(self.folder)
        steps = range(start, num_steps)
        bar = progress_bar(num_steps, self.plan.name, "step", start, self.world.is_main)
        pin_memory = self.device.type == "cuda"
        loaded = training_batches(self.batches, steps, self.num_workers, pin_memory)

        with (
            stops_noted(self._line_if_forced) as stop,
            phase("training") as doing,
            bar,
            closing(metrics),
            dead_workers_in_one_line(),
            closing(loaded) as prepared,
        ):
            clock = time.monotonic()
            for step, batch in zip(steps, self.data_wait.timed(prepared), strict=True):
                loss, norm = self.train_step(step, batch)
                self.progress.step = step + 1
                bar.update()

                if self._is_due(self.plan.run.log_every):
                    self._check_bad_steps(step, metrics)
                    error = float(loss)  # waits for the device
                    elapsed = time.monotonic() - clock
                    seconds = elapsed / self.plan.run.log_every
                    self._log_step(metrics, step, error, float(norm), elapsed)
                    bar.set_postfix_str(postfix(error, self.throughput.metrics(seconds)))
                    left = duration(seconds * (num_steps - self.progress.step))
                    doing.progress = (
                        f"step {self.progress.step:,} of {num_steps:,}, error {error:.3f}, "
                        f"about {left} left"
                    )
                    clock = time.monotonic()

                # Validation and checkpoints do not count as time of a step.
                paused = time.monotonic()
                if self._is_due(self.plan.run.validate_every):
                    self._validate(step, metrics)
                if self.progress.step == num_steps:
                    # Before the state is saved, so that the last good one stays.
                    self._refuse_failure()
                stopping = self.world.any(stop())
                if self._is_due(self.plan.run.checkpoint_every) or stopping:
                    self._checkpoint(needed=stopping)
                    # Pictures take long, and the next checkpoint brings them.
                    if stopping:
                        self.world.wait()
                    else:
                        self._draw_report(metrics)
                clock += time.monotonic() - paused
                bar.exclude(time.monotonic() - paused)

                if stopping:
                    raise InterruptedRunError(
                        f"stopped after step {self.progress.step} of {num_steps}; the state is "
                        "saved: type the same line again to continue"
                    )

        # A run that is continued after its last step may have failed by then.
        if not steps:
            self._refuse_failure()

    def _refuse_failure(self) -> None:
        """End a run that did all its steps, but whose encoder must not be used, in all processes.

        Raises:
            AutoregError: weights or validation error are not finite, the features are collapsed,
                or no step was good.
        """
        # It is None if the run was continued after its last step.
        if self.health is None and self.validates:
            with gathered(self.train_step.loss_of), phase("measuring the validation error"):
                self.health = self.validation.measure()

        weights_are_finite = not self.world.any(
            not (is_finite(self.module) and is_finite(self.objective.extra))
        )
        statistics = self.guard.statistics()
        messages = failure_messages(
            self.health, self.plan.run, weights_are_finite, statistics, self.progress.step
        )
        # Only the main process has validated, and what it found counts for all.
        messages = self.world.share(messages)
        if not messages:
            return
        raise AutoregError(
            f"after {self.progress.step} steps the run has failed, and no encoder is exported: "
            f"{'; '.join(messages)}. The last good checkpoint is kept. Start a new --name with a "
            f"lower rate, e.g. --set optim.lr={self.plan.optim.lr / 3:.1e}, or with another "
            "--seed. If you accept such features, lower run.min_token_variance or "
            f"run.min_effective_rank in {self.folder / 'plan.json'}, and type the same line again",
            code="training-failed",
        )

    def require_folder(self) -> None:
        """Make sure that the folder is there and the same as when training began.

        A folder that was made since belongs to another run.

        Raises:
            AutoregError: it was removed or replaced.
        """
        if self.world.is_main and folder_identity(self.folder) != self.identity:
            raise AutoregError(
                f"{self.folder} was removed, renamed or replaced during training, so nothing can "
                "be saved; training stops here. Put the folder back to continue from its last "
                "checkpoint, or type the same line again to start over",
                code="training-folder-gone",
            )

    def _draw_report(self, metrics: MetricsFile) -> None:
        """Draw what was measured until now, and wait until all processes are here.

        Raises:
            InterruptedRunError: a signal came, and the state is saved.
        """
        self.require_folder()
        try:
            # Drawing may take longer than a stop may, and the next checkpoint draws again. In a row
            # of bad steps no checkpoint was made, and the state is saved before the run ends.
            is_saved = self.saved_step == self.progress.step
            with phase("drawing the report"), stops_raised() if is_saved else nullcontext():
                if self.world.is_main:
                    draw_progress(metrics.path, self.folder / "progress.png", self.plan)
                self.after_checkpoint()
            self.world.wait()
        except (InterruptedRunError, RuntimeError) as error:
            # A process that hears of a stop first leaves the drawing, and the others lose it.
            if not stop_requested():
                raise
            raise InterruptedRunError(self._line_if_forced()) from error

    def _line_if_forced(self) -> str:
        """Return the line that ends the command where a stop does not wait for the step's end."""
        step = self.progress.step
        if self.saved_step == step > 0:
            return (
                f"stopped after step {step}; the state is saved: type the same line again to "
                "continue"
            )
        kept = (
            f"the checkpoint of step {self.saved_step} is kept"
            if self.saved_step
            else "there was no checkpoint yet"
        )
        return (
            f"stopped in step {step + 1}, which takes too long to finish; {kept}: type the "
            "same line again to continue from there"
        )

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.optim.num_steps

    def _open_metrics(self, start: int) -> MetricsFile:
        path = self.folder / "metrics.jsonl"
        if not self.world.is_main:
            return NoMetrics(path)
        return MetricsFile(path, start, open_sinks(self.folder, self.plan.name, start))

    def _log_step(
        self, metrics: MetricsFile, step: int, error: float, norm: float, elapsed: float
    ) -> None:
        """Write what the newest steps have shown, and warn once if they wait long for data.

        Args:
            error, norm: loss and norm of the gradient of this step.
            elapsed: seconds since the last log entry.
        """
        self.require_folder()
        # JSON knows no NaN; the skipped steps are logged beside.
        if math.isfinite(error) and math.isfinite(norm):
            figure, means = self.objective.figure, self.train_step.term_means
            if figure.term:
                # The same quantity as in validation, so that both are curves of one chart.
                metrics.log(step, "train_loss", error, "weighted sum of the terms")
                error = float(means[figure.term])
            metrics.log(step, "train_error", error, figure.unit)
            if len(means) > 1:
                for name, mean in means.items():
                    metrics.log(step, f"train_{name}", float(mean), "term of the loss")
            metrics.log(step, "gradient_norm", norm, "1")
        metrics.log(step, "lr", learning_rate(self.plan.optim, step), "1")

        seconds = elapsed / self.plan.run.log_every
        metrics.log(step, "step_time", seconds, "s")
        for name, (value, unit) in self.throughput.metrics(seconds).items():
            metrics.log(step, name, value, unit)

        share = self.data_wait.share(elapsed)
        metrics.log(step, "data_wait", share, "share of time")

        warning = self.data_wait.report(share, seconds)
        if warning is not None:
            log.warning("step %d: %s", step + 1, warning)
            metrics.note(step, "data_wait_warning", warning)

    def _check_bad_steps(self, step: int, metrics: MetricsFile) -> None:
        """Log the steps skipped since the last call; after too many bad steps in a row, roll
        back."""
        before, self.statistics = self.statistics, self.guard.statistics()
        message = skipped_message(before, self.statistics, step)
        if message:
            log.warning(message)
        if self.statistics.skipped:
            metrics.log(step, "skipped_steps", self.statistics.skipped, "steps")
        if self.statistics.in_row >= self.plan.run.max_bad_steps:
            self._roll_back(step, metrics)

    def _roll_back(self, step: int, metrics: MetricsFile) -> None:
        """Restore weights and optimizer of the last regular checkpoint.

        Step and data continue, so that other data follow. Only regular checkpoints are used,
        because an interruption must not change where a run goes back to.

        Raises:
            AutoregError: there is no such checkpoint, or the run went back too often.
        """
        num_bad, most = self.statistics.in_row, self.plan.run.max_rollbacks
        lower_rate = f"--set optim.lr={self.plan.optim.lr / 3:.1e}"
        advice = f"start a new --name with a lower rate, e.g. {lower_rate}"

        may_go_back = self.progress.rollbacks < most
        # Only the main process reads the folder.
        searches = self.world.is_main and may_go_back
        found = checkpoint.newest_scheduled(self.folder) if searches else None
        good = self.world.share(None if found is None else shareable(found))
        if good is None:
            why = "there is no checkpoint to roll back to"
            if not may_go_back:
                why = f"it was rolled back {most} times already"
            raise AutoregError(
                f"the last {num_bad} steps until step {step + 1} were all bad (infinite, NaN or "
                f"far too large), and {why}; {advice}",
                code="training-diverged",
            )

        restore_weights(good, self.objective, self.optimizer, self.world)
        # The usual loss belongs to weights that are gone.
        self.guard.reset()
        self.statistics = self.guard.statistics()
        self.progress.rollbacks += 1
        log.warning(
            "the last %d steps until step %d were all bad. Rolled back to the checkpoint of step "
            "%s; training continues with other data (roll-back %d of at most %d). If this repeats, "
            "%s",
            num_bad,
            step + 1,
            good["step"],
            self.progress.rollbacks,
            most,
            advice,
        )
        metrics.log(step, "rollbacks", self.progress.rollbacks, "times")

    def _validate(self, step: int, metrics: MetricsFile) -> None:
        """Validate, and keep the state if it is the best so far.

        Raises:
            AutoregError: the features have been collapsed for several validations in a row.
        """
        if not self.has_validation:
            return
        is_best = False
        with gathered(self.train_step.loss_of), phase("measuring the validation error"):
            if self.validates:
                is_best = self._measure_and_log(step, metrics)

        # The main process decides for all.
        self.progress.best_error = self.world.share(self.progress.best_error)
        self.progress.collapsed = self.world.share(self.progress.collapsed)
        if self.world.share(is_best):
            self._save(checkpoint.BEST_NAME, scheduled=False)

        # More steps would only cost time: a collapsed network hardly ever recovers, and its encoder
        # would be refused at the end. All processes end together. 0 switches this off.
        most = self.plan.run.max_collapsed
        if not 0 < most <= self.progress.collapsed:
            return
        signs = [] if self.health is None else collapse_messages(self.health, self.plan.run)
        signs = self.world.share(signs)
        kept = (
            f"The checkpoint of step {self.saved_step}, before the collapse, is kept"
            if self.saved_step
            else "There was no checkpoint before the collapse"
        )
        raise AutoregError(
            f"after step {self.progress.step} the features were collapsed in "
            f"{self.progress.collapsed} validations in a row, so training stops and no encoder is "
            f"exported: {'; '.join(signs)}. {kept}. Start a new --name with a lower rate, e.g. "
            f"--set optim.lr={self.plan.optim.lr / 3:.1e}, or with another --seed. If you accept "
            f"such features, set run.max_collapsed to 0 in {self.folder / 'plan.json'}, and type "
            "the same line again",
            code="training-collapsed",
        )

    def _measure_and_log(self, step: int, metrics: MetricsFile) -> bool:
        """Return whether the state is the best so far, by the objective's figure of merit."""
        health = self.validation.measure()
        self.health = health
        if health is None or not self.world.is_main:
            return False

        self.require_folder()
        for name, (value, unit) in health.metrics().items():
            metrics.log(step, name, value, unit)
        log.info("step %d: %s", step + 1, health.message())
        optim = self.plan.optim
        # Before a tenth of the run, even good runs have often learnt nothing that can be measured.
        is_warm = step >= max(2 * optim.warmup_steps, optim.num_steps / 10)
        for warning in health_warnings(health, self.plan.run, is_warm):
            log.warning("step %d: %s", step + 1, warning)
            metrics.note(step, "health_warning", warning)

        is_collapsed = is_warm and bool(collapse_messages(health, self.plan.run))
        self.progress.collapsed = self.progress.collapsed + 1 if is_collapsed else 0

        is_best = health.merit < self.progress.best_error and not is_collapsed
        if is_best:
            self.progress.best_error = health.merit
        return is_best

    def _checkpoint(self, needed: bool) -> None:
        """Save the newest state, keeping the one before.

        Args:
            needed: also in the middle of a row of bad steps, or while the features are collapsed,
                of which no regular checkpoint is made.
        """
        step = self.progress.step
        is_regular = step % self.plan.run.checkpoint_every == 0
        is_good = self.guard.statistics().in_row == 0 and self.progress.collapsed == 0
        # A roll-back to a bad state would help nobody.
        scheduled = is_regular and is_good
        if not scheduled and not needed and step < self.plan.optim.num_steps:
            return

        # The previous checkpoint is replaced by a scheduled one only.
        previous = self.folder / checkpoint.PREVIOUS_NAME
        keeps = self.latest_is_scheduled or not previous.exists()
        with phase("saving a checkpoint"):
            self._save(checkpoint.LATEST_NAME, scheduled, previous if keeps else None)
        self.latest_is_scheduled = scheduled
        self.saved_step = step

    def _save(self, name: str, scheduled: bool, previous: Path | None = None) -> None:
        """Gather the state of all processes, which the main process writes."""
        state = snapshot(self.objective, self.optimizer, self.guard, self.progress, self.world)
        if self.world.is_main:
            self.require_folder()
            content = {
                **state,
                # The name of this key is part of the format of checkpoints.
                "told": to_jsonable(self.statistics),
                "scheduled": scheduled,
                "plan": to_jsonable(public_plan(self.plan)),
            }
            checkpoint.save_checkpoint(self.folder / name, content, previous)

    def _resume(self) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: it belongs to another plan.
        """
        found = checkpoint.load_newest(self.folder) if self.world.is_main else None
        newest = self.world.share(None if found is None else (found[0], shareable(found[1])))
        if newest is None:
            measure_pool(self.objective, self.batches.cases, self.world)
            return

        path, content = newest
        try:
            self.progress = restore(content, self.objective, self.optimizer, self.guard, self.world)
            self.statistics = StepStatistics(**content["told"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            # Tensors are sent and moved here: nothing may be wrong with the file.
            if is_lost_peer(error) or is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path} does not belong to this plan ({why}); move it away to start over",
                code="checkpoint-other-plan",
            ) from error

        is_latest = path.name == checkpoint.LATEST_NAME
        self.latest_is_scheduled = is_latest and bool(content["scheduled"])
        self.saved_step = self.progress.step
        log.info("continuing after step %d of %d", self.progress.step, self.plan.optim.num_steps)


def is_finite(module: torch.nn.Module) -> bool:
    """Return whether all weights of this process are finite; of sharded weights, its own part."""
    for tensor in module.state_dict().values():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return False
    return True


def validation_batch_size(plan: Plan) -> int:
    """Return a power of two.

    The same samples are then used for validation, regardless of the memory and the number of
    processes.
    """
    micro_batch_size = plan.optim.micro_batch_size or plan.optim.batch_size
    size = min(micro_batch_size, plan.optim.batch_size, NUM_VALIDATION_SAMPLES)
    return 1 << int(math.log2(size))


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


def build_trainer(job: TrainingJob, world: World = ALONE, local_rank: int = 0) -> Trainer:
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
