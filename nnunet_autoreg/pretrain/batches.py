"""Batches by step number: which samples step n sees depends on the seed and n alone, so resuming
needs no loader state.
"""

import multiprocessing
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from nnunet_autoreg.corpus.parallel import end_with_parent
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.sampling.material import Material, as_material
from nnunet_autoreg.sampling.sample import Batch, Sample, collate
from nnunet_autoreg.sampling.sampler import HELDOUT, TRAINING, SequenceSampler

DEAD_WORKER = "DataLoader worker"
"""How torch's own message begins."""


class StepBatches(Dataset[Batch | AutoregError]):
    """Item n is the batch of training step n, or the error that kept it from being made: raised in
    a loader process it would lose its one line.

    Args:
        numbers: which samples of a step's batch: all of them, or one process's share.
    """

    def __init__(self, sampler: SequenceSampler, cases: Material, numbers: range):
        self.sampler, self.cases, self.numbers = sampler, cases, numbers

    def __getitem__(self, step: int) -> Batch | AutoregError:
        try:
            return collate([self.sampler.draw(self.cases, TRAINING, step, i) for i in self.numbers])
        except AutoregError as error:
            return error


def parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of ``size`` samples, the last as large as it comes."""
    for start in range(0, len(batch.prefix), size):
        pieces = {f.name: getattr(batch, f.name) for f in fields(batch)}
        yield replace(
            batch, **{name: p[start : start + size] for name, p in pieces.items() if p is not None}
        )


def training_batches(
    batches: StepBatches, steps: range, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Batches of ``steps`` in order, prepared ahead by ``num_workers`` processes (0: in this one),
    which end when it is closed.

    Raises:
        AutoregError: a case cannot be read.
    """
    others = set(multiprocessing.active_children())
    # A generator of its own: a loader that begins must not move the one that training may draw
    # from, and which resumes.
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=list(steps),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
    )
    workers = set(multiprocessing.active_children()) - others
    try:
        for _ in steps:
            try:
                item = next(loader)
            except (ConnectionError, EOFError) as error:
                raise RuntimeError(
                    f"{DEAD_WORKER} left its connection ({type(error).__name__})"
                ) from error
            if isinstance(item, AutoregError):
                raise item
            yield item
    finally:
        # What torch does when the loader is collected, which a traceback may put off.
        getattr(loader, "_shutdown_workers", lambda: None)()
        for worker in workers:  # one that is stuck does not heed the SIGTERM that torch sends
            worker.kill()


def begin_worker(_: int) -> None:
    """Leave signals to the whole process group to the main process, which saves its state first,
    but end when it does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """Around all that runs while loader processes live: torch tells of a dead one wherever the main
    process happens to be.

    Raises:
        AutoregError: one died.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DEAD_WORKER):
            raise
        first_line = str(error).splitlines()[0]
        raise AutoregError(
            f"a process that loads data died ({first_line}), most likely for want of memory; free "
            "some and type the same "
            "line again: training goes on from its last checkpoint"
        ) from error


def heldout_batches(
    sampler: SequenceSampler, cases: Material, batch_size: int, num_batches: int
) -> list[Batch]:
    """The same few held-out batches every time, each of sequences of one kind and shape."""
    return [
        batch
        for batches in heldout_by_kind(sampler, cases, batch_size, num_batches).values()
        for batch in batches
    ]


def heldout_by_kind(
    sampler: SequenceSampler, cases: Material, batch_size: int, num_batches: int
) -> dict[str, list[Batch]]:
    """The batches of ``heldout_batches`` by their kind of sequences."""
    alike: dict[str, dict[tuple[int, ...], list[Sample]]] = {}
    for number in range(num_batches * batch_size):
        sample = sampler.draw(cases, HELDOUT, number)
        alike.setdefault(sampler.kind(as_material(cases), HELDOUT, number), {}).setdefault(
            sample.voxels.shape, []
        ).append(sample)
    return {
        kind: [
            collate(group[i : i + batch_size])
            for group in shapes.values()
            for i in range(0, len(group), batch_size)
        ]
        for kind, shapes in alike.items()
    }
