"""The training loop: steps, held-out error, checkpoints. It knows objectives by their interface only."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, CheckpointError
from nnunet_autoreg.model.parameters import is_decayed
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import StepBatches, dead_workers_in_one_line, heldout_batches, parts_of, training_batches
from nnunet_autoreg.pretrain.display import gauges, postfix
from nnunet_autoreg.pretrain.guard import StepGuard, Tally, in_words, skip_if
from nnunet_autoreg.pretrain.health import complaints
from nnunet_autoreg.pretrain.metrics import MetricsFile, draw_progress
from nnunet_autoreg.pretrain.probe import LabelledCrop
from nnunet_autoreg.pretrain.schedule import learning_rate
from nnunet_autoreg.pretrain.signals import InterruptedRunError, stop_signals
from nnunet_autoreg.pretrain.sinks import open_sinks
from nnunet_autoreg.pretrain.state import Progress, restore, restore_weights, snapshot
from nnunet_autoreg.pretrain.validation import Validation, autocast
from nnunet_autoreg.records import to_jsonable
from nnunet_autoreg.sequences.material import Material
from nnunet_autoreg.sequences.sample import Batch

log = logging.getLogger(__name__)

NUM_HELDOUT_SAMPLES = 16


class Trainer:
    """Trains one objective by one plan in one folder.

    Args:
        objective: on any device; it is moved.
        training, heldout: what sequences are cut from, by purpose; ``heldout`` may be empty.
        num_workers: processes that prepare batches.
        probe: labelled crops for the frozen probe; nothing is learnt from them.
    """

    def __init__(
        self, plan: Plan, folder: Path, objective: Objective, training: Material, heldout: Material,
        device: torch.device, num_workers: int, probe: Sequence[LabelledCrop] = (),
    ):
        self.plan, self.folder, self.objective, self.device = plan, folder, objective, device
        self.module = objective.module.to(device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, plan.optim.weight_decay), lr=plan.optim.lr, betas=plan.optim.betas,
            fused=True,
        )
        self.batches = StepBatches(objective.sampler, training, plan.optim.batch_size)
        self.micro_batch_size = min(plan.optim.micro_batch_size or plan.optim.batch_size, plan.optim.batch_size)
        # A power of two, so that the same samples are held out whatever the memory.
        size = 2 ** int(math.log2(min(self.micro_batch_size, NUM_HELDOUT_SAMPLES)))
        self.heldout = heldout_batches(objective.sampler, heldout, size, NUM_HELDOUT_SAMPLES // size) if heldout else []
        self.validation = Validation(objective, self.heldout, probe, device)
        self.gauges = gauges(plan, objective, device, self.heldout[0] if self.heldout else None)
        self.after_checkpoint: Callable[[], None] = lambda: None
        self.num_workers = num_workers
        self.guard = StepGuard(plan.run, device)
        self.tally = self.guard.tally()
        self.progress = Progress()
        self.latest_is_scheduled = False

    def run(self) -> None:
        """Train from the latest checkpoint, or from the start, to the plan's last step.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
            AutoregError: too many steps were bad, a loader process died, or a checkpoint cannot be read or written.
        """
        self._resume()
        optim, start = self.plan.optim, self.progress.step
        metrics = MetricsFile(self.folder / "metrics.jsonl", start, open_sinks(self.folder, self.plan.name, start))
        steps = range(start, optim.num_steps)
        bar = tqdm(total=optim.num_steps, initial=start, unit="step", desc=self.plan.name, mininterval=1.0)
        loaded = training_batches(self.batches, steps, self.num_workers, self.device.type == "cuda")
        with stop_signals() as stop, bar, closing(metrics), dead_workers_in_one_line(), closing(loaded) as prepared:
            clock = time.monotonic()
            for step, batch in zip(steps, prepared, strict=True):
                loss, norm = self.train_step(step, batch)
                self.progress.step = step + 1
                bar.update()
                if self._due(self.plan.run.log_every):
                    self._heed_guard(step, metrics)
                    error = float(loss)
                    seconds = (time.monotonic() - clock) / self.plan.run.log_every
                    self._log(metrics, step, error, float(norm), seconds)
                    bar.set_postfix(postfix(error, self.gauges.read(seconds)))
                    clock = time.monotonic()
                paused = time.monotonic()
                if self._due(self.plan.run.validate_every):
                    self._validate(step, metrics)
                if self._due(self.plan.run.checkpoint_every) or stop:
                    self._checkpoint(needed=bool(stop))
                    draw_progress(metrics.path, self.folder / "progress.png")
                    self.after_checkpoint()
                clock += time.monotonic() - paused
                if stop and self.progress.step < optim.num_steps:
                    raise InterruptedRunError(
                        f"stopped after step {self.progress.step} of {optim.num_steps}; the state is saved: "
                        "type the same line again to continue"
                    )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.optim.num_steps

    def _log(self, metrics: MetricsFile, step: int, error: float, norm: float, seconds: float) -> None:
        # JSON knows no NaN; what the guard says of the step is logged beside.
        if math.isfinite(error) and math.isfinite(norm):
            metrics.log(step, "train_error", error, "squared error")
            metrics.log(step, "gradient_norm", norm, "1")
        metrics.log(step, "lr", learning_rate(self.plan.optim, step), "1")
        metrics.log(step, "step_time", seconds, "s")
        for name, (value, unit) in self.gauges.read(seconds).items():
            metrics.log(step, name, value, unit)

    def train_step(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch of any device; returns the loss and the gradient's norm before clipping."""
        rate = learning_rate(self.plan.optim, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(batch)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.optim.clip_norm)
        skip_if(self.optimizer, self.guard.judge(loss, norm))
        self.optimizer.step()
        self.objective.after_step(step)
        return loss, norm

    def _accumulate(self, batch: Batch) -> Tensor:
        """Leave the gradient of the mean over all that is supervised in the whole batch, part by part; return that mean.

        How much is supervised is known after the last part only: each part adds the gradient of its sum (over a constant,
        to keep numbers near 1), and the division comes at the end. So the parts' sizes change nothing but rounding.
        """
        scale = batch.real.numel()
        total = torch.zeros((), device=self.device)
        count = torch.zeros((), device=self.device)
        for part in parts_of(batch, self.micro_batch_size):
            with autocast(self.device):
                terms = self.objective.loss(part.to(self.device))
            torch.autograd.backward(terms.total / scale)
            total += terms.total.detach()
            count += terms.count
        count = count.clamp(min=1)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale / count)
        return total / count

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
        """Weights and optimizer as in the last regular checkpoint; step and data go on, so that other data follow.

        Regular checkpoints alone: an interruption must not change where a run goes back to.
        """
        bad, allowed = self.tally.in_row, self.plan.run.max_rollbacks
        advice = f"start a new --name with a lower rate, e.g. --set optim.lr={self.plan.optim.lr / 3:.1e}"
        good = checkpoint.newest_scheduled(self.folder) if self.progress.rollbacks < allowed else None
        if good is None:
            why = f"it went back {allowed} times already" if self.progress.rollbacks >= allowed else "there is no checkpoint to go back to"
            raise AutoregError(f"the last {bad} steps until step {step + 1} were all bad (infinite, NaN or far off), and {why}; {advice}")
        restore_weights(good, self.module, self.optimizer)
        self.guard.forget()
        self.tally = self.guard.tally()
        self.progress.rollbacks += 1
        log.warning("the last %d steps until step %d were all bad: the weights of step %s are taken up again and training goes on with "
                    "other data (time %d of at most %d); if this repeats, %s",
                    bad, step + 1, good["step"], self.progress.rollbacks, allowed, advice)
        metrics.log(step, "rollbacks", self.progress.rollbacks, "times")

    def _validate(self, step: int, metrics: MetricsFile) -> None:
        health = self.validation.measure()
        if health is None:
            return
        for name, (value, unit) in health.metrics().items():
            metrics.log(step, name, value, unit)
        log.info("step %d: %s", step + 1, health.sentence())
        for sentence in complaints(health, self.plan.run, warm=step >= 2 * self.plan.optim.warmup_steps):
            log.warning("step %d: %s", step + 1, sentence)
            metrics.note(step, "health_warning", sentence)
        if health.errors["error"] < self.progress.best_error:
            self.progress.best_error = health.errors["error"]
            checkpoint.save_checkpoint(self.folder / checkpoint.BEST_NAME, self._content(scheduled=False))

    def _checkpoint(self, needed: bool) -> None:
        """Save the newest state, keeping the one before.

        Args:
            needed: also in the middle of a row of bad steps, of which no regular checkpoint is made.
        """
        step, every, optim = self.progress.step, self.plan.run.checkpoint_every, self.plan.optim
        scheduled = step % every == 0 and self.guard.tally().in_row == 0
        if not scheduled and not needed and step < optim.num_steps:
            return
        previous = self.folder / checkpoint.PREVIOUS_NAME
        keeps = self.latest_is_scheduled or not previous.exists()
        path = self.folder / checkpoint.LATEST_NAME
        checkpoint.save_checkpoint(path, self._content(scheduled), previous if keeps else None)
        self.latest_is_scheduled = scheduled

    def _content(self, scheduled: bool) -> dict[str, Any]:
        state = snapshot(self.module, self.optimizer, self.guard, self.progress)
        return {**state, "told": to_jsonable(self.tally), "scheduled": scheduled, "plan": to_jsonable(self.plan)}

    def _resume(self) -> None:
        newest = checkpoint.load_newest(self.folder)
        if newest is None:
            return
        path, content = newest
        try:
            self.progress = restore(content, self.module, self.optimizer, self.guard)
            self.tally = Tally(**content["told"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"{path} does not belong to this plan ({why}); move it away to start over") from error
        self.latest_is_scheduled = path.name == checkpoint.LATEST_NAME and bool(content["scheduled"])
        log.info("continuing after step %d of %d", self.progress.step, self.plan.optim.num_steps)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups, with and without decay."""
    decayed = [p for name, p in module.named_parameters() if is_decayed(name, p)]
    plain = [p for name, p in module.named_parameters() if not is_decayed(name, p)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
