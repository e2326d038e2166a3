"""The training loop: steps, held-out error, checkpoints.

It knows objectives by their interface only.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, CheckpointError
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import (
    StepBatches,
    dead_workers_in_one_line,
    heldout_by_kind,
    training_batches,
)
from nnunet_autoreg.pretrain.compiled import is_out_of_memory
from nnunet_autoreg.pretrain.display import gauges, postfix
from nnunet_autoreg.pretrain.distributed import ALONE, World, is_lost_peer, is_spread, usable
from nnunet_autoreg.pretrain.folder import public_plan
from nnunet_autoreg.pretrain.guard import Tally, in_words
from nnunet_autoreg.pretrain.health import Health, complaints, failures
from nnunet_autoreg.pretrain.loading import DataWait
from nnunet_autoreg.pretrain.probe import LabelledCrop
from nnunet_autoreg.pretrain.schedule import learning_rate
from nnunet_autoreg.pretrain.signals import InterruptedRunError, stops_noted
from nnunet_autoreg.pretrain.state import Progress, lent, restore, restore_weights, snapshot
from nnunet_autoreg.pretrain.step import TrainingStep
from nnunet_autoreg.pretrain.validation import Validation
from nnunet_autoreg.records import to_jsonable
from nnunet_autoreg.report.charts import draw_progress
from nnunet_autoreg.report.metrics import MetricsFile, NoMetrics
from nnunet_autoreg.report.sinks import open_sinks
from nnunet_autoreg.sampling.material import Material

log = logging.getLogger(__name__)

NUM_HELDOUT_SAMPLES = 16


class Trainer:
    """Trains one objective by one plan in one folder, alone or together with other processes, of
    which the main one alone writes.

    Args:
        objective: on any device; it is moved.
        training, heldout: what sequences are cut from, by purpose; ``heldout`` may be empty.
        num_workers: processes that prepare batches.
        probe: labelled crops for the frozen probe; nothing is learnt from them.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        objective: Objective,
        training: Material,
        heldout: Material,
        device: torch.device,
        num_workers: int,
        probe: Sequence[LabelledCrop] = (),
        world: World = ALONE,
    ):
        self.plan, self.folder, self.objective, self.device, self.world = (
            plan,
            folder,
            objective,
            device,
            world,
        )
        self.module = objective.module.to(device)
        self.is_sharded = is_spread(plan.run.sharding, self.module, device, world)
        self.looks = bool(heldout)
        """Whether there is anything to validate on; the main process does, all of them where none
        has all weights.
        """
        heldout_of = {}
        if heldout and (world.is_main or self.is_sharded):
            size = heldout_batch_size(plan)
            heldout_of = heldout_by_kind(
                objective.sampler, heldout, size, NUM_HELDOUT_SAMPLES // size
            )
        self.heldout = [batch for batches in heldout_of.values() for batch in batches]
        self.validation = Validation(objective, heldout_of, probe, device)
        # Before the step is set up, which from then on sums every gradient over all processes.
        sample = self.heldout[0] if self.heldout and not self.is_sharded else None
        self.gauges = gauges(plan, objective, device, sample, world.size)
        self.train_step = TrainingStep(plan, objective, device, world, self.is_sharded)
        self.optimizer, self.guard = self.train_step.optimizer, self.train_step.guard
        self.batches = StepBatches(objective.sampler, training, self.train_step.numbers)
        self.after_checkpoint: Callable[[], object] = lambda: None
        self.num_workers = num_workers
        dry_step = plan.run.dry_step_seconds
        self.data_wait = DataWait(
            device.type, num_workers, None if dry_step is None else dry_step / world.size
        )
        self.tally = self.guard.tally()
        self.health: Health | None = None
        """What the last look at held-out scans found, in this process."""
        self.identity: tuple[int, int] | None = None
        """Which folder on which disk ``folder`` was when training began."""
        self.progress = Progress()
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
        optim, start = self.plan.optim, self.progress.step
        metrics = self._metrics(start)
        self.identity = identity_of(self.folder)
        steps = range(start, optim.num_steps)
        bar = tqdm(
            total=optim.num_steps,
            initial=start,
            unit="step",
            desc=self.plan.name,
            mininterval=1.0,
            disable=not self.world.is_main,
        )
        loaded = training_batches(self.batches, steps, self.num_workers, self.device.type == "cuda")
        with (
            stops_noted(self._line_if_forced) as stop,
            phase("training"),
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
                if self._due(self.plan.run.log_every):
                    self._heed_guard(step, metrics)
                    error = float(loss)
                    elapsed = time.monotonic() - clock
                    seconds = elapsed / self.plan.run.log_every
                    self._log(metrics, step, error, float(norm), seconds)
                    self._log_wait(metrics, step, elapsed, seconds)
                    bar.set_postfix(postfix(error, self.gauges.read(seconds)))
                    clock = time.monotonic()
                paused = time.monotonic()
                if self._due(self.plan.run.validate_every):
                    self._validate(step, metrics)
                if self.progress.step == optim.num_steps:
                    # Before the state is saved, so that the last good one stays.
                    self._refuse_failure()
                stopping = self.world.any(stop())
                if self._due(self.plan.run.checkpoint_every) or stopping:
                    self._checkpoint(needed=stopping)
                    # Pictures take long, and the next checkpoint brings them.
                    if not stopping:
                        self._show(metrics)
                    self.world.wait()
                clock += time.monotonic() - paused
                if stopping:
                    raise InterruptedRunError(
                        f"stopped after step {self.progress.step} of {optim.num_steps}; the state "
                        "is saved: "
                        "type the same line again to continue"
                    )
        if not steps:
            self._refuse_failure()

    def _refuse_failure(self) -> None:
        """End a run that did all its steps, but whose encoder must not be used, in all processes.

        Raises:
            AutoregError: weights or held-out error are not finite, the features are collapsed, or
                no step was good.
        """
        if self.health is None and self.looks and (self.world.is_main or self.is_sharded):
            with usable(self.train_step.loss_of), phase("measuring the validation error"):
                self.health = self.validation.measure()

        weights_are_finite = not self.world.any(not is_finite(self.module))
        found = failures(
            self.health, self.plan.run, weights_are_finite, self.guard.tally(), self.progress.step
        )
        # Only the main process has looked, and its word counts for all.
        found = self.world.share(found)
        if not found:
            return
        raise AutoregError(
            f"after {self.progress.step} steps the run has failed, and no encoder is exported: "
            f"{'; '.join(found)}. The last good "
            "checkpoint is kept. Start a new --name with a lower rate, e.g. --set "
            f"optim.lr={self.plan.optim.lr / 3:.1e}, or with "
            "another --seed. Should the features be what you want, lower run.min_token_variance or "
            "run.min_effective_rank in "
            f"{self.folder / 'plan.json'}, and type the same line again"
        )

    def require_folder(self) -> None:
        """Make sure that the folder is there and the same as when training began; a new one would
        be another run's.

        Raises:
            AutoregError: it was removed or replaced.
        """
        if self.world.is_main and identity_of(self.folder) != self.identity:
            raise AutoregError(
                f"{self.folder} was removed, renamed or replaced while it was trained in, so that "
                "nothing can be saved; training "
                "stops here. Put the folder back to go on from its last checkpoint, or type the "
                "same line again to start over"
            )

    def _show(self, metrics: MetricsFile) -> None:
        """Draw what was measured until now."""
        self.require_folder()
        with phase("drawing the report"):
            if self.world.is_main:
                draw_progress(metrics.path, self.folder / "progress.png")
            self.after_checkpoint()

    def _line_if_forced(self) -> str:
        """What to say where a stop does not wait for the end of the step."""
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
            f"stopped in step {step + 1}, which takes too long to be waited for; {kept}: type the "
            "same line again to continue from there"
        )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.optim.num_steps

    def _metrics(self, start: int) -> MetricsFile:
        path = self.folder / "metrics.jsonl"
        return (
            MetricsFile(path, start, open_sinks(self.folder, self.plan.name, start))
            if self.world.is_main
            else NoMetrics(path)
        )

    def _log(
        self, metrics: MetricsFile, step: int, error: float, norm: float, seconds: float
    ) -> None:
        self.require_folder()
        # JSON knows no NaN; what the guard says of the step is logged beside.
        if math.isfinite(error) and math.isfinite(norm):
            metrics.log(step, "train_error", error, "squared error")
            metrics.log(step, "gradient_norm", norm, "1")
        metrics.log(step, "lr", learning_rate(self.plan.optim, step), "1")
        metrics.log(step, "step_time", seconds, "s")
        for name, (value, unit) in self.gauges.read(seconds).items():
            metrics.log(step, name, value, unit)

    def _log_wait(self, metrics: MetricsFile, step: int, elapsed: float, seconds: float) -> None:
        """Log which share of the ``elapsed`` seconds went into waiting for data; warn once where
        that is long.
        """
        share = self.data_wait.share(elapsed)
        metrics.log(step, "data_wait", share, "share of time")

        warning = self.data_wait.report(share, seconds)
        if warning is not None:
            log.warning("step %d: %s", step + 1, warning)
            metrics.note(step, "data_wait_warning", warning)

    def _heed_guard(self, step: int, metrics: MetricsFile) -> None:
        """Say what was skipped since the last look; after too many bad steps in a row, go back."""
        before, self.tally = self.tally, self.guard.tally()
        told = in_words(before, self.tally, step)
        if told:
            log.warning(told)
        if self.tally.skipped:
            metrics.log(step, "skipped_steps", self.tally.skipped, "steps")
        if self.tally.in_row >= self.plan.run.max_bad_steps:
            self._roll_back(step, metrics)

    def _roll_back(self, step: int, metrics: MetricsFile) -> None:
        """Weights and optimizer as in the last regular checkpoint; step and data go on, so that
        other data follow.

        Regular checkpoints alone: an interruption must not change where a run goes back to.
        """
        bad, allowed = self.tally.in_row, self.plan.run.max_rollbacks
        advice = (
            "start a new --name with a lower rate, e.g. --set "
            f"optim.lr={self.plan.optim.lr / 3:.1e}"
        )
        seeks = self.world.is_main and self.progress.rollbacks < allowed
        found = checkpoint.newest_scheduled(self.folder) if seeks else None
        good = self.world.share(None if found is None else lent(found))
        if good is None:
            why = (
                f"it went back {allowed} times already"
                if self.progress.rollbacks >= allowed
                else "there is no checkpoint to go back to"
            )
            raise AutoregError(
                f"the last {bad} steps until step {step + 1} were all bad (infinite, NaN or far "
                f"off), and {why}; {advice}"
            )
        restore_weights(good, self.module, self.optimizer, self.world)
        self.guard.forget()
        self.tally = self.guard.tally()
        self.progress.rollbacks += 1
        log.warning(
            "the last %d steps until step %d were all bad: the weights of step %s are taken up "
            "again and training goes on with "
            "other data (time %d of at most %d); if this repeats, %s",
            bad,
            step + 1,
            good["step"],
            self.progress.rollbacks,
            allowed,
            advice,
        )
        metrics.log(step, "rollbacks", self.progress.rollbacks, "times")

    def _validate(self, step: int, metrics: MetricsFile) -> None:
        """Look at held-out scans and keep the best state.

        The main process says whether it is the best.
        """
        if not self.looks:
            return
        with usable(self.train_step.loss_of), phase("measuring the validation error"):
            is_best = self._look(step, metrics) if self.world.is_main or self.is_sharded else False
        self.progress.best_error = self.world.share(self.progress.best_error)
        if self.world.share(is_best):
            self._save(checkpoint.BEST_NAME, scheduled=False)

    def _look(self, step: int, metrics: MetricsFile) -> bool:
        """Measure, log and judge; whether the held-out error is the lowest so far."""
        health = self.validation.measure()
        self.health = health
        if health is None or not self.world.is_main:
            return False
        self.require_folder()
        for name, (value, unit) in health.metrics().items():
            metrics.log(step, name, value, unit)
        log.info("step %d: %s", step + 1, health.sentence())
        for sentence in complaints(
            health, self.plan.run, warm=step >= 2 * self.plan.optim.warmup_steps
        ):
            log.warning("step %d: %s", step + 1, sentence)
            metrics.note(step, "health_warning", sentence)
        is_best = health.errors["error"] < self.progress.best_error
        if is_best:
            self.progress.best_error = health.errors["error"]
        return is_best

    def _checkpoint(self, needed: bool) -> None:
        """Save the newest state, keeping the one before.

        Args:
            needed: also in the middle of a row of bad steps, of which no regular checkpoint is
                made.
        """
        step, every, optim = self.progress.step, self.plan.run.checkpoint_every, self.plan.optim
        scheduled = step % every == 0 and self.guard.tally().in_row == 0
        if not scheduled and not needed and step < optim.num_steps:
            return
        previous = self.folder / checkpoint.PREVIOUS_NAME
        keeps = self.latest_is_scheduled or not previous.exists()
        with phase("saving a checkpoint"):
            self._save(checkpoint.LATEST_NAME, scheduled, previous if keeps else None)
        self.latest_is_scheduled = scheduled
        self.saved_step = step

    def _save(self, name: str, scheduled: bool, previous: Path | None = None) -> None:
        """Gather the state of all processes; the main one writes it."""
        state = snapshot(self.module, self.optimizer, self.guard, self.progress, self.world)
        if self.world.is_main:
            self.require_folder()
            content = {
                **state,
                "told": to_jsonable(self.tally),
                "scheduled": scheduled,
                "plan": to_jsonable(public_plan(self.plan)),
            }
            checkpoint.save_checkpoint(self.folder / name, content, previous)

    def _resume(self) -> None:
        found = checkpoint.load_newest(self.folder) if self.world.is_main else None
        newest = self.world.share(None if found is None else (found[0], lent(found[1])))
        if newest is None:
            return
        path, content = newest
        try:
            self.progress = restore(content, self.module, self.optimizer, self.guard, self.world)
            self.tally = Tally(**content["told"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_lost_peer(error) or is_out_of_memory(
                error
            ):  # while tensors were sent or moved: nothing is wrong with the file
                raise
            why = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path} does not belong to this plan ({why}); move it away to start over"
            ) from error
        self.latest_is_scheduled = path.name == checkpoint.LATEST_NAME and bool(
            content["scheduled"]
        )
        self.saved_step = self.progress.step
        log.info("continuing after step %d of %d", self.progress.step, self.plan.optim.num_steps)


def is_finite(module: torch.nn.Module) -> bool:
    """Return whether all weights of this process are finite; of weights that are spread, its own
    part.
    """
    for tensor in module.state_dict().values():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return False
    return True


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one that takes its place; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def heldout_batch_size(plan: Plan) -> int:
    """A power of two, so that the same samples are held out whatever the memory and the number of
    processes.
    """
    size = min(
        plan.optim.micro_batch_size or plan.optim.batch_size,
        plan.optim.batch_size,
        NUM_HELDOUT_SAMPLES,
    )
    return 1 << int(math.log2(size))
