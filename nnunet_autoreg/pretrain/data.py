"""Batches for training and validation, the processes that load them, and their measured rates.

File 9 of 11 in reading order.

The samples of step n depend only on the seed and n, so resuming needs no loader state. All times
are measured on the host without waiting for the device.
"""

import multiprocessing
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from math import ceil

import torch
from torch.utils.data import DataLoader, Dataset

from nnunet_autoreg.corpus.parallel import end_with_parent
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.machine import usable_cores
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.pool import SamplingPool, as_pool
from nnunet_autoreg.sampling.sample import Batch, Sample, collate
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler

DEAD_WORKER = "DataLoader worker"
"""How torch's own message begins."""

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
"""A wait is reported when it was long over this many log intervals in a row."""


class StepBatches(Dataset[Batch | AutoregError]):
    """Item n is the batch of training step n, or the error that was raised while making it.

    Errors are returned, because an error raised in a loader process would arrive with a traceback
    instead of one line.

    Args:
        numbers: indices of the samples of a step's batch: all of them, or one process's share.
    """

    def __init__(self, sampler: SequenceSampler, cases: SamplingPool, numbers: range):
        self.sampler = sampler
        self.cases = cases
        self.numbers = numbers

    def __getitem__(self, step: int) -> Batch | AutoregError:
        try:
            samples = [self.sampler.draw(self.cases, TRAINING, step, i) for i in self.numbers]
            return collate(samples)
        except AutoregError as error:
            return error


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield the batch in parts of ``size`` samples; the last part may be smaller."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    # Parts of a batch that not every kind of sequence has are None.
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for start in range(0, len(batch.prefix), size):
        part = {name: tensor[start : start + size] for name, tensor in present.items()}
        yield replace(batch, **part)


def training_batches(
    batches: StepBatches,
    steps: range,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Yield the batches of ``steps`` in order.

    Args:
        num_workers: number of loader processes; 0 to load in this process. They end when the
            generator is closed.

    Raises:
        AutoregError: a case cannot be read.
    """
    others = set(multiprocessing.active_children())
    # The loader draws a seed for its workers. A separate generator keeps it from moving the global
    # one, which training may draw from and which is restored on resuming.
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=list(steps),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=begin_loader_process,
            generator=torch.Generator(),
        ),
    )
    workers = set(multiprocessing.active_children()) - others

    try:
        for _ in steps:
            try:
                item = next(loader)
            except (ConnectionError, EOFError) as error:
                raise RuntimeError(
                    f"{DEAD_WORKER} left its connection ({type(error).__name__})",
                ) from error
            if isinstance(item, AutoregError):
                raise item
            yield item
    finally:
        # torch does this when the loader is collected, which a traceback may put off.
        getattr(loader, "_shutdown_workers", lambda: None)()
        # A worker that is stuck does not react to the SIGTERM that torch sends.
        for worker in workers:
            worker.kill()


def begin_loader_process(_: int) -> None:
    """Have a loader process ignore stop signals, and end when the main process ends.

    Ctrl-C reaches the whole process group. The main process saves its state first, and needs its
    loaders until then.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """Turn torch's error about a dead loader process into one line for the user.

    It must surround all code that runs while loader processes live, because torch raises the error
    anywhere in the main process.

    Raises:
        AutoregError: a loader process died.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DEAD_WORKER):
            raise
        first_line = str(error).splitlines()[0]
        raise AutoregError(
            f"a process that loads data died ({first_line}), most likely for lack of memory; free "
            "some and type the same line again: training continues from its last checkpoint",
            code="loader-died",
        ) from error


def validation_batches(
    sampler: SequenceSampler,
    cases: SamplingPool,
    batch_size: int,
    num_batches: int,
) -> dict[str, list[Batch]]:
    """Return the validation batches by their kind of sequences; they are always the same.

    Sequences of one batch have one kind and one shape.
    """
    pool = as_pool(cases)
    # kind -> shape of the voxels -> samples
    samples: dict[str, dict[tuple[int, ...], list[Sample]]] = {}
    for number in range(num_batches * batch_size):
        sample = sampler.draw(pool, VALIDATION, number)
        of_kind = samples.setdefault(sampler.kind(pool, VALIDATION, number), {})
        of_kind.setdefault(sample.voxels.shape, []).append(sample)

    batches: dict[str, list[Batch]] = {}
    for kind, by_shape in samples.items():
        batches[kind] = []
        for alike in by_shape.values():
            for start in range(0, len(alike), batch_size):
                batches[kind].append(collate(alike[start : start + batch_size]))
    return batches


def seconds_per_crop(
    batches: StepBatches,
    steps: Sequence[int],
    weights: Mapping[str, float],
) -> float:
    """Return the mean seconds in which this process draws and collates one crop.

    The crops continue the batches of the given steps. So training has not read them before, and
    their scans are as likely to be in the file cache as those of other crops.

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
    """Return the number of loader processes per training process, and the reason.

    The number does not affect the data, so a resumed run may use another one.

    Args:
        device: cpu, cuda or mps.
        num_local: processes that train on this machine.
    """
    if device != "cuda":
        return 0, f"on {device} batches are loaded between the steps"

    # One core is left to the process that trains.
    free_cores = max(0, usable_cores() // num_local - 1)
    load = plan.run.loader_seconds_per_crop
    step = plan.run.dry_step_seconds
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
    """Measure how long a training loop waits for batches, and report once if it is long.

    Args:
        device_type: device of the training: cpu, cuda or mps.
        num_loaders: number of loader processes.
        compute_seconds: duration of a step without any loading; None if it was not measured.

    Attributes:
        waited: seconds since the last call of ``share``.
    """

    def __init__(self, device_type: str, num_loaders: int, compute_seconds: float | None = None):
        self.device_type = device_type
        self.num_loaders = num_loaders
        self.compute_seconds = compute_seconds
        self.limit = LONG_WAIT.get(device_type, LONG_WAIT_ELSEWHERE)
        self.waited = 0.0
        self.long_shares: list[float] = []
        self.is_reported = False

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add up the seconds of waiting for them."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def share(self, elapsed: float) -> float:
        """Return the share of ``elapsed`` seconds that was spent waiting since the last call."""
        waited, self.waited = self.waited, 0.0
        return min(1.0, waited / elapsed) if elapsed > 0 else 0.0

    def report(self, share: float, step_seconds: float) -> str | None:
        """Return a warning if this is the fifth log interval in a row with a long wait; else None.

        A GPU continues to compute while the host waits for the next batch. So only the time by
        which steps are longer than in the dry step, which has no loading, counts as waiting.

        Args:
            share: share of the interval's time, spent waiting.
            step_seconds: mean of the interval.
        """
        # How much longer a step takes because of the loading, as a share of its time.
        slow_down = share
        if self.device_type == "cuda" and self.compute_seconds is not None:
            slow_down = min(share, 1 - self.compute_seconds / step_seconds)

        self.long_shares = [*self.long_shares, share] if slow_down > self.limit else []
        if self.is_reported or len(self.long_shares) < LONG_INTERVALS:
            return None
        self.is_reported = True
        mean = sum(self.long_shares) / len(self.long_shares)
        figures = (
            f"training waits for data {100 * mean:.0f} % of the time, over {LONG_INTERVALS} log "
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
