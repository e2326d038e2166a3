"""What a run shows while it goes: tokens per second, share of the device's peak, memory - for the
progress bar and the metrics.
"""

import logging
import resource
import sys
import time
from dataclasses import dataclass

import torch

from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import parts_of
from nnunet_autoreg.sampling.sample import Batch

log = logging.getLogger(__name__)

GIB = 2**30
PEAK_SIDE, PEAK_REPEATS = 8192, 20


@dataclass(frozen=True)
class Gauges:
    """What a step amounts to.

    Attributes:
        step_tokens: tokens of an optimiser step, padding included.
        step_flops: multiplications and additions of a step; None where no peak was measured.
        peak_flops: what the device reaches per second in a large bf16 matrix product; None on
            anything but CUDA.
    """

    device: torch.device
    step_tokens: int
    step_flops: float | None = None
    peak_flops: float | None = None

    def read(self, seconds: float) -> dict[str, tuple[float, str]]:
        """Name -> (value, unit) after steps of ``seconds`` each."""
        values = {
            "tokens_per_second": (self.step_tokens / seconds, "1/s"),
            "peak_memory": (peak_memory_gib(self.device), "GiB"),
        }
        if self.step_flops and self.peak_flops:
            values["share_of_peak"] = (self.step_flops / seconds / self.peak_flops, "1")
        return values


def gauges(
    plan: Plan,
    objective: Objective,
    device: torch.device,
    sample: Batch | None = None,
    num_devices: int = 1,
) -> Gauges:
    """Gauges of a run; on CUDA they take a second to measure the peak.

    Args:
        sample: to count the arithmetic of a step with its first crop; without it there is no share
            of peak.
        num_devices: that share the step's arithmetic.
    """
    tokens = plan.optim.batch_size * volume(
        grid_of(plan.sequence.crop_size_vox, plan.encoder.token_size_vox)
    )
    if device.type != "cuda" or sample is None:
        return Gauges(device, tokens)
    try:
        flops = (
            plan.optim.batch_size
            / num_devices
            * step_flops(objective, next(parts_of(sample, 1)).to(device))
        )
        peak = matmul_peak(device)
    except (RuntimeError, NotImplementedError) as error:
        log.warning(
            "the share of the device's peak could not be measured (%s)", str(error).splitlines()[0]
        )
        return Gauges(device, tokens)
    torch.cuda.reset_peak_memory_stats(device)
    return Gauges(device, tokens, flops, peak)


def step_flops(objective: Objective, batch: Batch) -> float:
    """Multiplications and additions of forward and backward on a batch, attention counted dense;
    gradients are cleared after.

    Parameters are not stepped and no random number is drawn, so that training goes on as if this
    had not been.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(objective.loss(batch).total)
    objective.module.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def matmul_peak(device: torch.device) -> float:
    """Multiplications and additions per second of a large bf16 matrix product on a CUDA device: the
    median of a few.
    """
    a = torch.full((PEAK_SIDE, PEAK_SIDE), 0.5, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(PEAK_REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.matmul(a, a)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / sorted(times)[len(times) // 2]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: allocated on a CUDA device, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / GIB if sys.platform == "darwin" else used * 1024 / GIB


def postfix(error: float, values: dict[str, tuple[float, str]]) -> dict[str, str]:
    """What stands behind the progress bar; the bar itself has the step and the time left."""
    shown = {"error": f"{error:.3f}", "tokens/s": _short(values["tokens_per_second"][0])}
    if "share_of_peak" in values:
        shown["peak"] = f"{100 * values['share_of_peak'][0]:.0f}%"
    return {**shown, "memory": f"{values['peak_memory'][0]:.1f}GiB"}


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
