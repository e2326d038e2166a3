"""One optimiser step: learning rate, forward and backward, loss-spike guard, update, throughput.

File 8 of 11 in reading order.

The learning rate is a pure function of the step. Everything about a step is decided on the device,
so that nothing waits for it.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.machine import GIB
from nnunet_autoreg.model.compilation import (
    autocast,
    cannot_compile,
    fast_path,
    first_line,
    place_on,
    run_by,
)
from nnunet_autoreg.model.parameters import is_decayed, whole
from nnunet_autoreg.objectives.base import LossTerms, Objective
from nnunet_autoreg.plan import OptimPlan, Plan, RunPlan
from nnunet_autoreg.pretrain.data import micro_batches
from nnunet_autoreg.pretrain.distributed import (
    SINGLE_PROCESS,
    World,
    gradient_sync,
    parallelise,
    process_share,
)
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.wording import amount

log = logging.getLogger(__name__)

WINDOW = 100
"""The usual loss is a running mean over about this many good steps. Before so many were seen,
nothing counts as a spike."""

SPIKE_RATIO = 2.0
"""A spike is at least this many times the usual loss."""

PEAK_SIDE, PEAK_REPEATS = 8192, 20
"""Side of the matrices by which a GPU's peak is measured, and how often they are multiplied."""


def learning_rate(optim: OptimPlan, step: int) -> float:
    """Return the rate of step 0, 1, ...

    It rises linearly to ``lr`` over ``warmup_steps`` and falls as half a cosine to 0 at
    ``num_steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    # A short run may be all warm-up.
    num_falling = max(1, optim.num_steps - optim.warmup_steps)
    share_done = min(1.0, (step - optim.warmup_steps) / num_falling)
    half_cosine = 0.5 * (1 + math.cos(math.pi * share_done))
    return optim.lr * half_cosine


class BatchLoss(nn.Module):
    """An objective's loss as the forward pass of a module, which DDP and FSDP need.

    Args:
        loss: ``objective.loss``, or the same with its layers compiled.
    """

    def __init__(self, objective: Objective, loss: Callable[[Batch], LossTerms]):
        super().__init__()
        self.module = objective.module
        self.loss = loss
        # Name and weight of every term. They are known once the loss has been computed.
        self.weights: dict[str, float] = {}

    def forward(
        self,
        batch: Batch,
        ratios: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate, the sums of all terms, and the statistics.

        Args:
            ratios: for each term, the count of the first term over its own count, by name. The
                sum of a term counts that much more. Empty if all terms count the same things.

        Returns:
            the weighted sum of the terms, a scalar; their sums and counts, (2, terms), without
            gradient; statistics by name.
        """
        loss = self.loss(batch)
        self.weights = {name: term.weight for name, term in loss.terms.items()}

        if not ratios:
            weighted = loss.total
        else:
            parts = []
            for name, term in loss.terms.items():
                parts.append(term.weight * ratios[name] * term.total)
            weighted = torch.stack(parts).sum()

        totals = torch.stack([term.total.detach().float() for term in loss.terms.values()])
        counts = torch.stack([term.count.float() for term in loss.terms.values()])
        return weighted, torch.stack([totals, counts]), dict(loss.statistics)


class TrainingStep:
    """Trains the objective's module in place, one call per step.

    Args:
        sharded: parameters and moments are sharded over the processes.

    Attributes:
        numbers: which samples of a batch are this process's own.
        micro_batch_size: how many of them are on the device at once.
        term_means: mean of each term of the latest loss, by name; scalars on the device.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        device: torch.device,
        world: World = SINGLE_PROCESS,
        sharded: bool = False,
    ):
        self.plan = plan
        self.objective = objective
        self.device = device
        self.world = world
        self.sharded = sharded

        self.numbers = process_share(plan.optim.batch_size, world.rank, world.size, sharded)
        micro_batch_size = plan.optim.micro_batch_size or len(self.numbers)
        self.micro_batch_size = min(micro_batch_size, len(self.numbers))

        place_on(device, objective.module, sharded)
        objective.extra.to(device)
        self.term_means: dict[str, Tensor] = {}
        self.module = objective.module
        self.fast_path = fast_path(plan, device, sharded)
        self.batch_loss = BatchLoss(objective, run_by(self.fast_path, objective.loss))
        self.loss_of = parallelise(self.batch_loss, device, world, sharded)

        # Made after the module was sharded, so that it holds this process's part of the moments.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, plan.optim.weight_decay, plan.optim.decay_all),
            lr=plan.optim.lr,
            betas=plan.optim.betas,
            fused=True,
        )
        self.guard = LossSpikeGuard(plan.run, device)

    def __call__(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do one optimiser step on this process's share of the batch, which may be on any device.

        Returns:
            the loss and the norm of the gradient before clipping, scalars on the device, the same
            in all processes.
        """
        rate = learning_rate(self.plan.optim, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, statistics = self._backward(batch)

        clip_norm = self.plan.optim.clip_norm
        norm = whole(nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm))

        # A bad step changes no weight.
        is_bad = self.guard.judge(loss, norm)
        skip_if(self.optimizer, is_bad)
        self.optimizer.step()
        # Most objectives have nothing to do here, so that nothing has to wait for the device.
        if self.objective.follows_steps and not bool(is_bad):
            self.objective.after_step(step, self.world, statistics)
        return loss, norm

    def _backward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the gradient; return the loss, and the statistics of this process's samples.

        Where compiling fails, this is logged once, and everything runs uncompiled from then on.
        """
        try:
            return self._accumulate(batch)
        except Exception as error:
            path = self.fast_path
            # The dry step, which has no measured peak yet, decides about compiling by itself.
            is_training = self.plan.run.peak_memory_gib is not None
            # Several processes have already added up gradients of this step.
            can_retry = is_training and self.world.size == 1
            failed = path is not None and cannot_compile(error)
            if path is None or path.is_given_up or not (can_retry and failed):
                raise
            path.is_given_up = True
            log.warning(
                "a layer could not be compiled (%s): training continues uncompiled, slower",
                first_line(error),
            )

        self.optimizer.zero_grad(set_to_none=True)
        return self._accumulate(batch)

    def _accumulate(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave the gradient of the loss over the whole batch in the parameters; return the loss.

        Every term is a mean over all that it supervises. How much that is, in all processes, is
        only known after the last part of the batch. So each part adds the gradient of its sum over
        a constant, which keeps numbers near 1, and the division by the first term's count comes at
        the end. The size of the parts therefore changes nothing but rounding. Terms that count
        other things than the first are scaled before, by counts that the objective knows ahead.
        """
        scale = batch.valid_mask[0].numel() * self.plan.optim.batch_size
        parts = list(micro_batches(batch, self.micro_batch_size))
        ratios: dict[str, Tensor] = {}
        if self.objective.counts_ahead:
            # Crops are small beside what the network makes of them, so that all fit at once.
            parts = [part.to(self.device) for part in parts]
            ratios = self._count_ratios(parts)

        sums: Tensor | None = None  # (2, terms): their sums and their counts
        statistics: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with gradient_sync(self.loss_of, is_last=number == len(parts)):
                with autocast(self.device):
                    weighted, part_sums, found = self.loss_of(part.to(self.device), ratios)
                torch.autograd.backward(weighted / scale)
            sums = part_sums if sums is None else sums + part_sums
            add_to(statistics, found)
        assert sums is not None, "a process has at least one sample"

        totals, counts = self.world.add(sums).unbind()  # (terms,) each
        counts = counts.clamp(min=1)
        # DDP and FSDP average over processes; their number turns the average into the sum.
        factor = scale * self.world.size / counts[0]
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

        weights = self.batch_loss.weights
        means = totals / counts  # (terms,)
        self.term_means = dict(zip(weights, means.unbind(), strict=True))
        weighted_means = [weight * self.term_means[name] for name, weight in weights.items()]
        return torch.stack(weighted_means).sum(), statistics

    def _count_ratios(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Return the first term's count over that of each term, in the batch of all processes."""
        totals: dict[str, Tensor] = {}
        for part in parts:
            add_to(totals, self.objective.term_counts(part))

        own_counts = torch.stack([count.float() for count in totals.values()])  # (terms,)
        counts = self.world.add(own_counts).clamp(min=1)
        ratios = counts[0] / counts
        return dict(zip(totals, ratios.unbind(), strict=True))


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to sums of the same names; a name that has no sum yet gets one."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    decay_all: bool = False,
) -> list[dict[str, object]]:
    """Return AdamW's groups with and without decay; ``decay_all`` leaves the second one empty."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        has_decay = decay_all or is_decayed(name, parameter)
        (decayed if has_decay else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class StepStatistics:
    """Counts of steps since training began.

    Attributes:
        nonfinite, spikes: skipped steps by reason.
        in_row: the bad steps that came last, without a good one between.
        usual: running mean of the loss over good steps.
    """

    nonfinite: int
    spikes: int
    in_row: int
    usual: float

    @property
    def skipped(self) -> int:
        """All steps that were skipped."""
        return self.nonfinite + self.spikes


class LossSpikeGuard:
    """Decides for every step whether its update may be applied, and counts bad steps.

    A step is bad if its loss or gradient is not finite, or if its loss is a spike: more than
    ``run.spike_sigmas`` standard deviations above the running mean, and above twice the mean.
    Everything is decided on the device; only ``statistics`` waits for it. The state belongs in
    checkpoints, so that a resumed run decides the same.
    """

    def __init__(self, run: RunPlan, device: torch.device):
        self.spike_sigmas = run.spike_sigmas
        # mean, variance, number of good steps since the last reset
        self.loss = torch.zeros(3, device=device)
        # nonfinite, spikes, in a row
        self.counts = torch.zeros(3, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 (a scalar on the device) if the step must be skipped, else 0.0.

        Args:
            loss: mean loss of the step, without gradient.
            norm: norm of its gradient before clipping.
        """
        loss = loss.float()
        mean, variance, seen = self.loss.unbind()
        nonfinite = ~(torch.isfinite(loss) & torch.isfinite(norm))
        # A smooth loss deviates so little that a spike has to be large beside the mean as well.
        deviation = variance.sqrt()
        margin = torch.maximum(self.spike_sigmas * deviation, (SPIKE_RATIO - 1) * mean.abs())
        spike = ~nonfinite & (seen >= WINDOW) & (loss > mean + margin)
        bad = nonfinite | spike

        # Bad steps do not move the mean.
        self.loss = torch.where(bad, self.loss, update_running(self.loss, loss))
        in_row = torch.where(bad, self.counts[2] + 1, torch.zeros_like(mean))
        self.counts = torch.stack([self.counts[0] + nonfinite, self.counts[1] + spike, in_row])
        return bad.float()

    def statistics(self) -> StepStatistics:
        """Return the counts; this waits for the device."""
        # One tensor, so that the device is waited for once.
        values = torch.cat([self.counts, self.loss[:1]])
        nonfinite, spikes, in_row, mean = values.tolist()
        return StepStatistics(int(nonfinite), int(spikes), int(in_row), float(mean))

    def reset(self) -> None:
        """Start the running mean and the row again, after a roll-back; other counts stay."""
        self.loss = torch.zeros_like(self.loss)
        keeps_all_but_row = torch.tensor([1.0, 1.0, 0.0], device=self.counts.device)
        self.counts = self.counts * keeps_all_but_row

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints."""
        return {"loss": self.loss.cpu(), "counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.loss = state["loss"].to(self.loss.device, copy=True)
        self.counts = state["counts"].to(self.counts.device, copy=True)


def update_running(statistics: Tensor, value: Tensor) -> Tensor:
    """Return (mean, variance, n) after one more value.

    The numbers are exact up to ``WINDOW`` values and then forget exponentially.
    """
    mean, variance, seen = statistics.unbind()
    weight = 1 / torch.clamp(seen + 1, max=WINDOW)
    difference = value - mean
    new_mean = mean + weight * difference
    new_variance = (1 - weight) * (variance + weight * difference.square())
    return torch.stack([new_mean, new_variance, seen + 1])


def skip_if(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Have the next step of a fused optimizer change nothing where ``bad`` is 1.

    No weight, moment or count then changes. torch's gradient scaler uses the same two attributes to
    say whether a gradient is finite. Nothing waits for the device.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad  # type: ignore[attr-defined]


def skipped_message(before: StepStatistics, now: StepStatistics, step: int) -> str:
    """Return one line about the steps skipped between two states; "" if there are none."""
    reasons = []
    nonfinite = now.nonfinite - before.nonfinite
    if nonfinite:
        reasons.append(f"{nonfinite} with a loss or gradient that was infinite or NaN")
    spikes = now.spikes - before.spikes
    if spikes:
        usual = f"{now.usual:.3g}" if math.isfinite(now.usual) else "?"
        reasons.append(f"{spikes} with a loss far above the usual {usual}")
    if not reasons:
        return ""
    return (
        f"up to step {step + 1} these steps were skipped and changed nothing: "
        f"{' and '.join(reasons)}; {now.skipped} since the start"
    )


@dataclass(frozen=True)
class Throughput:
    """What a step amounts to, for the progress bar and the metrics.

    Attributes:
        step_tokens: tokens of an optimiser step, padding included.
        step_flops: multiplications and additions of a step; None if no peak was measured.
        peak_flops: multiplications and additions per second that the device reaches in a large
            bf16 matrix product; None on anything but CUDA.
    """

    device: torch.device
    step_tokens: int
    step_flops: float | None = None
    peak_flops: float | None = None

    def metrics(self, seconds: float) -> dict[str, tuple[float, str]]:
        """Return name -> (value, unit) for steps that take ``seconds`` each."""
        values = {
            "tokens_per_second": (self.step_tokens / seconds, "1/s"),
            "peak_memory": (peak_memory_gib(self.device), "GiB"),
        }
        if self.step_flops and self.peak_flops:
            values["share_of_peak"] = (self.step_flops / seconds / self.peak_flops, "1")
        return values


def measure_throughput(
    plan: Plan,
    objective: Objective,
    device: torch.device,
    sample: Batch | None = None,
    num_devices: int = 1,
) -> Throughput:
    """Return the amount of computation of a step; on CUDA this takes a second.

    Args:
        sample: the arithmetic of a step is counted with its first crop; without it there is no
            share of the peak.
        num_devices: number of devices that share the computation of a step.
    """
    grid = grid_of(plan.sequence.crop_size_vox, plan.encoder.token_size_vox)
    num_tokens = plan.optim.batch_size * volume(grid)
    if device.type != "cuda" or sample is None:
        return Throughput(device, num_tokens)
    try:
        crops_per_device = plan.optim.batch_size / num_devices
        first_crop = next(micro_batches(sample, 1)).to(device)
        # The crops of a batch have one shape, so that one of them is enough.
        flops = crops_per_device * step_flops(objective, first_crop)
        peak = matmul_peak(device)
    except (RuntimeError, NotImplementedError) as error:
        log.warning("the share of the device's peak was not measured (%s)", first_line(error))
        return Throughput(device, num_tokens)
    # The matrices of the measurement are not part of the training.
    torch.cuda.reset_peak_memory_stats(device)
    return Throughput(device, num_tokens, flops, peak)


def step_flops(objective: Objective, batch: Batch) -> float:
    """Return multiplications and additions of forward and backward on a batch.

    Attention is counted dense. No parameter is stepped and no random number is drawn, and gradients
    are cleared afterwards, so that training continues as if this had not been.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(objective.loss(batch).total)
    objective.module.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def matmul_peak(device: torch.device) -> float:
    """Return multiplications and additions per second of a large bf16 matrix product.

    It is the median of a few, on a CUDA device.
    """
    matrix = torch.full((PEAK_SIDE, PEAK_SIDE), 0.5, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(PEAK_REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.matmul(matrix, matrix)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    # The first products wake the device, and the median leaves them out.
    median_s = sorted(times)[len(times) // 2]
    return 2 * PEAK_SIDE**3 / median_s


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far, of a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return used / GIB if sys.platform == "darwin" else used * 1024 / GIB


def postfix(loss: float, values: dict[str, tuple[float, str]]) -> str:
    """Return the text behind the progress bar, which shows the step and the time left itself."""
    tokens_per_second, _ = values["tokens_per_second"]
    memory_gib, _ = values["peak_memory"]
    parts = [f"loss {loss:.3f}", f"{amount(tokens_per_second)} tokens/s"]

    if "share_of_peak" in values:
        share, _ = values["share_of_peak"]
        parts.append(f"{100 * share:.0f} % of peak")
    return ", ".join([*parts, f"{memory_gib:.1f} GiB"])
