"""The training loop: steps, held-out error, checkpoints. It knows objectives by their interface only."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, CheckpointError
from nnunet_autoreg.model.parameters import is_decayed
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import StepBatches, heldout_batches, parts_of, training_batches
from nnunet_autoreg.pretrain.metrics import MetricsFile, draw_progress
from nnunet_autoreg.pretrain.schedule import learning_rate
from nnunet_autoreg.records import to_jsonable
from nnunet_autoreg.sequences.sample import Batch
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)

NUM_HELDOUT_SAMPLES = 16


@dataclass
class Progress:
    """Where training stands: steps done, and the best held-out error so far (infinite before the first)."""

    step: int = 0
    best_error: float = math.inf


class InterruptedRunError(AutoregError):
    """The user or the cluster asked the run to stop; its state was saved."""

    exit_code = 130


class Trainer:
    """Trains one objective by one plan in one folder.

    Args:
        objective: on any device; it is moved.
        training, heldout: cases by purpose; ``heldout`` may be empty.
        num_workers: processes that prepare batches.
    """

    def __init__(
        self, plan: Plan, folder: Path, objective: Objective, training: list[StoredCase], heldout: list[StoredCase],
        device: torch.device, num_workers: int,
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
        self.num_workers = num_workers
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self.progress = Progress()

    def run(self) -> None:
        """Train from the latest checkpoint, or from the start, to the plan's last step.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
            AutoregError: the loss is not finite.
        """
        self._resume()
        optim, start = self.plan.optim, self.progress.step
        metrics = MetricsFile(self.folder / "metrics.jsonl", start)
        steps = range(start, optim.num_steps)
        bar = tqdm(total=optim.num_steps, initial=start, unit="step", desc=self.plan.name, mininterval=1.0)
        with stop_signals() as stop, bar:
            prepared = training_batches(self.batches, steps, self.num_workers, self.device.type == "cuda")
            clock = time.monotonic()
            for step, batch in zip(steps, prepared, strict=True):
                loss, norm = self.train_step(step, batch)
                self.progress.step = step + 1
                bar.update()
                if self._due(self.plan.run.log_every):
                    self._refuse_nonfinite(step)
                    error = float(loss)
                    seconds = (time.monotonic() - clock) / self.plan.run.log_every
                    self._log(metrics, step, error, float(norm), seconds)
                    bar.set_postfix(error=f"{error:.3f}")
                    clock = time.monotonic()
                if self._due(self.plan.run.validate_every):
                    self._refuse_nonfinite(step)
                    self._validate(step, metrics)
                if self._due(self.plan.run.checkpoint_every) or stop:
                    self._refuse_nonfinite(step)
                    self._save(checkpoint.LATEST_NAME)
                    draw_progress(metrics.path, self.folder / "progress.png")
                if stop and self.progress.step < optim.num_steps:
                    raise InterruptedRunError(
                        f"stopped after step {self.progress.step} of {optim.num_steps}; the state is saved: "
                        "type the same line again to continue"
                    )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.optim.num_steps

    def _log(self, metrics: MetricsFile, step: int, error: float, norm: float, seconds: float) -> None:
        metrics.log(step, "train_error", error, "squared error")
        metrics.log(step, "lr", learning_rate(self.plan.optim, step), "1")
        metrics.log(step, "gradient_norm", norm, "1")
        metrics.log(step, "step_time", seconds, "s")

    def train_step(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch of any device; returns the loss and the gradient's norm before clipping."""
        rate = learning_rate(self.plan.optim, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(batch)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.optim.clip_norm)
        self.nonfinite |= ~(torch.isfinite(loss) & torch.isfinite(norm))
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
            with self._autocast():
                terms = self.objective.loss(part.to(self.device))
            torch.autograd.backward(terms.total / scale)
            total += terms.total.detach()
            count += terms.count
        count = count.clamp(min=1)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale / count)
        return total / count

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _refuse_nonfinite(self, step: int) -> None:
        """End the run if any step since the last look had a non-finite loss or gradient; nothing of it is saved."""
        if bool(self.nonfinite):
            raise AutoregError(
                f"the loss or its gradient became infinite or NaN by step {step}; {self.folder / checkpoint.LATEST_NAME} keeps the "
                f"last good state: start a new --name with a lower rate, e.g. --set optim.lr={self.plan.optim.lr / 3:.1e}"
            )

    @torch.no_grad()
    def _validate(self, step: int, metrics: MetricsFile) -> None:
        if not self.heldout:
            return
        self.module.eval()
        sums: dict[str, float] = {}
        for batch in self.heldout:
            with self._autocast():
                terms = self.objective.loss(batch.to(self.device), references=True)
            for name, term in {"error": terms.total, "count": terms.count, **terms.references}.items():
                sums[name] = sums.get(name, 0.0) + float(term)
        count = max(sums.pop("count"), 1.0)
        for name, value in sums.items():
            metrics.log(step, f"heldout_{name}", value / count, "squared error")
        error = sums["error"] / count
        trivial = ", ".join(f"{name} {value / count:.4f}" for name, value in sums.items() if name != "error")
        log.info("step %d: held-out next-block error %.4f (baselines: %s)", step + 1, error, trivial)
        if error < self.progress.best_error:
            self.progress.best_error = error
            self._save(checkpoint.BEST_NAME)

    def _save(self, name: str) -> None:
        checkpoint.save_checkpoint(self.folder / name, {
            "network_weights": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.progress.step,
            "best_error": self.progress.best_error,
            "torch_rng": torch.get_rng_state(),
            "plan": to_jsonable(self.plan),
        })

    def _resume(self) -> None:
        path = self.folder / checkpoint.LATEST_NAME
        if not path.exists():
            return
        content = checkpoint.load_checkpoint(path)
        try:
            self.module.load_state_dict(content["network_weights"])
            self.optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["torch_rng"])
            self.progress = Progress(int(content["step"]), float(content["best_error"]))
        except (KeyError, RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"{path} does not belong to this plan ({why}); move it away to start over") from error
        log.info("continuing after step %d of %d", self.progress.step, self.plan.optim.num_steps)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups, with and without decay."""
    decayed = [p for name, p in module.named_parameters() if is_decayed(name, p)]
    plain = [p for name, p in module.named_parameters() if not is_decayed(name, p)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that is empty until SIGINT or SIGTERM comes; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
