"""Batches by step number: which samples step n sees depends on the seed and n alone, so resuming needs no loader state."""

import signal
from collections.abc import Iterator
from dataclasses import fields, replace

from torch.utils.data import DataLoader, Dataset

from nnunet_autoreg.sequences.sample import Batch, collate
from nnunet_autoreg.sequences.sampler import HELDOUT, TRAINING, SequenceSampler
from nnunet_autoreg.store.case import StoredCase


class StepBatches(Dataset[Batch]):
    """Item n is the batch of training step n."""

    def __init__(self, sampler: SequenceSampler, cases: list[StoredCase], batch_size: int):
        self.sampler, self.cases, self.batch_size = sampler, cases, batch_size

    def __getitem__(self, step: int) -> Batch:
        return collate([self.sampler.draw(self.cases, TRAINING, step, i) for i in range(self.batch_size)])


def parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of ``size`` samples, the last as large as it comes."""
    for start in range(0, len(batch.prefix), size):
        pieces = {f.name: getattr(batch, f.name) for f in fields(batch)}
        yield replace(batch, **{name: p[start : start + size] for name, p in pieces.items() if p is not None})


def training_batches(batches: StepBatches, steps: range, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of ``steps`` in order, prepared ahead by ``num_workers`` processes (0: in this one)."""
    loader = DataLoader(batches, batch_size=None, sampler=list(steps), num_workers=num_workers, pin_memory=pin_memory,
                        worker_init_fn=leave_signals_to_parent)
    return iter(loader)


def leave_signals_to_parent(_: int) -> None:
    """A signal to the whole process group must not end the workers before the main process has saved its state."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def heldout_batches(sampler: SequenceSampler, cases: list[StoredCase], batch_size: int, num_batches: int) -> list[Batch]:
    """The same few held-out batches every time."""
    draws = range(num_batches * batch_size)
    samples = [sampler.draw(cases, HELDOUT, i) for i in draws]
    return [collate(samples[i : i + batch_size]) for i in draws[::batch_size]]
