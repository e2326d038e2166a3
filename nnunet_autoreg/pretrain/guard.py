"""Bad training steps - a loss or gradient that is not finite, or a loss far off the usual - are
skipped, on the device, without waiting.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_autoreg.plan import RunPlan

WINDOW = 100
"""The usual loss is a running mean over about this many good steps; before as many were seen
nothing is a spike.
"""
SPIKE_RATIO = 2.0


@dataclass(frozen=True)
class Tally:
    """Steps since training began, but for ``in_row``: the bad ones that came last, without a good
    one between.

    Attributes:
        nonfinite, spikes: skipped, by reason.
        usual: running mean of the loss over good steps.
    """

    nonfinite: int
    spikes: int
    in_row: int
    usual: float

    @property
    def skipped(self) -> int:
        """All that were skipped."""
        return self.nonfinite + self.spikes


class StepGuard:
    """Says of every step whether its update may be applied, and counts.

    A loss is a spike if it lies more than ``run.spike_sigmas`` standard deviations above the
    running mean and above twice the mean. Everything is decided on the device; ``tally`` is the
    only look from the host. Its state belongs in checkpoints, so that a resumed run decides the
    same.
    """

    def __init__(self, run: RunPlan, device: torch.device):
        self.spike_sigmas = run.spike_sigmas
        # mean, variance, number of good steps seen since the last reset
        self.loss = torch.zeros(3, device=device)
        # nonfinite, spikes, in a row
        self.counts = torch.zeros(3, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 (a scalar on the device) if the step must be skipped, else 0.0.

        Args:
            loss: mean loss of the step, without gradient.
            norm: norm of its gradient before clipping.
        """
        loss = loss.float()
        mean, variance, seen = self.loss.unbind()
        nonfinite = ~(torch.isfinite(loss) & torch.isfinite(norm))
        margin = torch.maximum(self.spike_sigmas * variance.sqrt(), (SPIKE_RATIO - 1) * mean.abs())
        spike = ~nonfinite & (seen >= WINDOW) & (loss > mean + margin)
        bad = nonfinite | spike
        self.loss = torch.where(bad, self.loss, running(self.loss, loss))
        in_row = torch.where(bad, self.counts[2] + 1, torch.zeros_like(mean))
        self.counts = torch.stack([self.counts[0] + nonfinite, self.counts[1] + spike, in_row])
        return bad.float()

    def tally(self) -> Tally:
        """The counts; waits for the device."""
        nonfinite, spikes, in_row, mean = torch.cat([self.counts, self.loss[:1]]).tolist()
        return Tally(int(nonfinite), int(spikes), int(in_row), float(mean))

    def forget(self) -> None:
        """Start the running mean and the row anew, after a roll-back; what was counted stays."""
        self.loss = torch.zeros_like(self.loss)
        self.counts = self.counts * torch.tensor([1.0, 1.0, 0.0], device=self.counts.device)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"loss": self.loss.cpu(), "counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.loss, self.counts = (
            state[key].to(getattr(self, key).device, copy=True) for key in ("loss", "counts")
        )


def running(statistics: Tensor, value: Tensor) -> Tensor:
    """(mean, variance, n) after one more value: exact up to ``WINDOW`` values, then exponentially
    forgetting.
    """
    mean, variance, seen = statistics.unbind()
    weight = 1 / torch.clamp(seen + 1, max=WINDOW)
    difference = value - mean
    return torch.stack(
        [
            mean + weight * difference,
            (1 - weight) * (variance + weight * difference.square()),
            seen + 1,
        ]
    )


def skip_if(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Have the next step of a fused optimizer change nothing - no weight, moment or count - where
    ``bad`` is 1.

    This is how torch's gradient scaler hands its verdict to fused kernels; nothing waits for the
    device.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad  # type: ignore[attr-defined]


def in_words(before: Tally, now: Tally, step: int) -> str:
    """What was skipped between two looks, in a sentence; "" if nothing was."""
    nonfinite, spikes = now.nonfinite - before.nonfinite, now.spikes - before.spikes
    told = []
    if nonfinite:
        told.append(f"{nonfinite} with a loss or gradient that was infinite or NaN")
    if spikes:
        usual = f"{now.usual:.3g}" if math.isfinite(now.usual) else "?"
        told.append(f"{spikes} with a loss far above the usual {usual}")
    if not told:
        return ""
    return (
        f"by step {step + 1} these steps were skipped and changed nothing: {' and '.join(told)}; "
        f"{now.skipped} since the start"
    )
