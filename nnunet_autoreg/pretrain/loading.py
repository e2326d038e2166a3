"""Whether loading keeps up with training: how many processes load, and how long training waits.

Everything here is timed on the host's clock. Nothing waits for the device.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import StepBatches
from nnunet_autoreg.pretrain.machine import usable_cores
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import TRAINING

CROPS_PER_KIND = 6
"""Crops of every kind of sequence that are loaded to measure how long one takes."""

SPARE = 1.5
"""The loading rate that is aimed at, as a multiple of the rate at which training takes crops."""

MOST_LOADERS = 16
"""Most loader processes for one GPU. Each holds a few whole batches in memory."""

MOST_UNMEASURED = 8
"""The same where it was not measured how many are needed."""

LONG_WAIT = {"cuda": 0.1}
LONG_WAIT_ELSEWHERE = 0.3
"""Shares of the time; longer waits are reported. Devices other than CUDA load between the steps,
so that a part of their time always goes into it."""

LONG_INTERVALS = 5
"""A wait is reported when it was long over so many log intervals in a row."""


def seconds_per_crop(
    batches: StepBatches, steps: Sequence[int], weights: Mapping[str, float]
) -> float:
    """Return the mean seconds in which this process draws and collates one crop.

    The crops belong to the given steps, but lie beyond their batches: training has not read them
    before, so that their scans are as likely to be in the file cache as those of other crops.

    Args:
        steps: one step of every kind of sequence.
        weights: how often each kind is drawn, relative to the others.

    Raises:
        AutoregError: a case cannot be read.
    """
    sampler, cases = batches.sampler, batches.cases
    first = batches.numbers.stop
    warm_up = StepBatches(sampler, cases, range(first, first + 1))
    timed = StepBatches(sampler, cases, range(first + 1, first + 1 + CROPS_PER_KIND))

    weighted_seconds, total_weight = 0.0, 0.0
    for step in steps:
        warm_up[step]

        start = time.perf_counter()
        batch = timed[step]
        seconds = time.perf_counter() - start
        if isinstance(batch, AutoregError):
            raise batch

        weight = weights[sampler.kind(cases, TRAINING, step)]
        weighted_seconds += weight * seconds / CROPS_PER_KIND
        total_weight += weight
    return weighted_seconds / total_weight


def choose_loaders(plan: Plan, device: str, num_local: int = 1) -> tuple[int, str]:
    """Return how many processes load for one that trains, and the reason.

    The number never changes the data, so that a resumed run may have another one.

    Args:
        device: cpu, cuda or mps.
        num_local: processes that train on this machine.
    """
    if device != "cuda":
        return 0, f"on {device} batches are loaded between the steps"

    # One core is left to the process that trains.
    free_cores = max(0, usable_cores() // num_local - 1)
    load, step = plan.run.loader_seconds_per_crop, plan.run.dry_step_seconds
    if load is None or step is None:
        allowed = min(MOST_UNMEASURED, free_cores)
        return allowed, f"not measured: all cores but one, at most {MOST_UNMEASURED}"

    # Several processes share the batch as well as the step's time, so that the ratio is the same.
    crops = plan.optim.batch_size
    needed = ceil(SPARE * load * crops / step) + 1
    reason = f"loading takes {load:.3g} s a crop, a step of {crops} crops {step:.3g} s"
    if needed <= min(MOST_LOADERS, free_cores):
        return needed, reason
    if free_cores < MOST_LOADERS:
        return free_cores, f"{reason}; {needed} are needed, {free_cores} cores are free for them"
    return MOST_LOADERS, f"{reason}; {needed} are needed, {MOST_LOADERS} is the limit"


class DataWait:
    """Time how long a training loop waits for batches, and report once when that is long.

    Args:
        device_type: of the training: cpu, cuda or mps.
        num_loaders: processes that load.
        compute_seconds: of a step without any loading; None where it was not measured.

    Attributes:
        waited: seconds since the last call of ``share``.
    """

    def __init__(self, device_type: str, num_loaders: int, compute_seconds: float | None = None):
        self.device_type, self.num_loaders = device_type, num_loaders
        self.compute_seconds = compute_seconds
        self.limit = LONG_WAIT.get(device_type, LONG_WAIT_ELSEWHERE)
        self.waited = 0.0
        self.long_shares: list[float] = []
        self.is_reported = False

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add up the seconds that each one was waited for."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def share(self, elapsed: float) -> float:
        """Return which share of ``elapsed`` seconds was spent waiting since the last call."""
        waited, self.waited = self.waited, 0.0
        return min(1.0, waited / elapsed) if elapsed > 0 else 0.0

    def report(self, share: float, step_seconds: float) -> str | None:
        """Return a warning if this log interval is the fifth long wait in a row; None if not.

        A GPU works on while the host waits for the next batch. A wait therefore only counts as
        far as the steps take longer than the same step did in the dry step, without loading.

        Args:
            share: of the interval's time, spent waiting.
            step_seconds: mean of the interval.
        """
        lost = share
        if self.device_type == "cuda" and self.compute_seconds is not None:
            lost = min(share, 1 - self.compute_seconds / step_seconds)

        self.long_shares = [*self.long_shares, share] if lost > self.limit else []
        if self.is_reported or len(self.long_shares) < LONG_INTERVALS:
            return None
        self.is_reported = True
        mean = sum(self.long_shares) / len(self.long_shares)
        return self._warning(mean, step_seconds)

    def _warning(self, share: float, step_seconds: float) -> str:
        figures = (
            f"training waits for data {100 * share:.0f} % of the time, over {LONG_INTERVALS} log "
            f"intervals in a row; a step now takes {step_seconds:.3g} s"
        )
        if self.device_type != "cuda":
            return (
                f"{figures}. On {self.device_type} crops are loaded between the steps: put "
                "nnUNet_preprocessed on a faster disk, or train a larger encoder with a new --name"
            )

        if self.compute_seconds is not None:
            figures += f", without loading {self.compute_seconds:.3g} s"
        return (
            f"{figures}. {self.num_loaders} processes load, {usable_cores()} cores can be used: "
            "give the job more cores, put nnUNet_preprocessed on a faster disk, or train a "
            "larger encoder or larger crops with a new --name"
        )
