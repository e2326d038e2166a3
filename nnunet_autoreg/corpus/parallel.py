"""A map over worker processes: it keeps the order, shows progress, can be ended immediately, and
reports a dead worker in one line.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TypeVar

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.machine import memory_bytes
from nnunet_autoreg.phases import Phase, phase
from nnunet_autoreg.stopping import raise_if_stopped
from nnunet_autoreg.terminal import ProgressBar, progress_bar
from nnunet_autoreg.wording import counted

log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

# Chunks given to each worker ahead of the results: enough to bridge one slow scan, few enough to
# stay small in memory.
CHUNKS_AHEAD = 8

TIDY_WITHIN_S = 1.0
"""Time for a worker that is ended to remove its temporary files, before it is killed."""


BYTES_PER_VOXEL = 36
"""Peak memory per voxel of checking or preprocessing a scan: 7.5 GB were measured for 600 x 600 x
600 voxels.
"""

SHARE_OF_MEMORY = 0.8
"""Share of the free memory that all workers may use."""

LARGE_VOXELS = 32_000_000
"""A scan of this size occupies a process for seconds, in which it cannot react to signals. So it is
read in a worker, which can be killed.
"""


class _EndedError(SystemExit):
    """Raised in a worker that has to end, so that unfinished files are removed.

    multiprocessing prints nothing about it.
    """


def end_with_parent() -> None:
    """Let this worker process end when its parent ends, for any reason."""
    parent = parent_process()
    assert parent is not None, "only workers call this"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_worker() -> None:
    """Prepare a process of a pool.

    It ends with its parent, and leaves Ctrl-C, which reaches the whole group, to its parent.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _EndedError

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allow_interruption()
    end_with_parent()
    # Last: until there is work, SIGTERM ends the process without a word. An exception in here would
    # be printed with its traceback.
    signal.signal(signal.SIGTERM, end)


def allow_interruption() -> None:
    """Unblock SIGINT in this process, which was started while it was blocked."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def interruption_held_back() -> Iterator[None]:
    """Block SIGINT around the start of processes.

    A process that is interrupted at its start would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel_map(
    function: Callable[[In], Out],
    items: Sequence[In],
    num_workers: int,
    title: str,
    chunk: int = 1,
    apart: bool = False,
) -> Iterator[Out]:
    """Yield ``function(item)`` in order, from this process (at most 1 worker) or from spawned ones.

    ``function`` and the items must be picklable. Items are handed out a few chunks ahead of the
    results, so that memory does not grow with their number. The progress bar goes to stderr, on
    terminals only. If the results are no longer needed, for instance after an interruption, the
    workers are ended in the middle of their work.

    Args:
        chunk: items per hand-over; more than 1 if an item takes less than some milliseconds.
        apart: use a worker even if it is the only one, so that the work can be ended at any moment.

    Raises:
        AutoregError: a worker process died.
    """
    if not items:
        return
    with phase(title) as doing, progress_bar(len(items), title, "scan") as bar:
        if not apart and (num_workers <= 1 or len(items) <= chunk):
            yield from _counted(map(function, items), doing, bar)
            return

        others = set(multiprocessing.active_children())
        num_workers = max(1, min(num_workers, -(-len(items) // chunk)))
        pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=begin_worker)
        chunks = (items[start : start + chunk] for start in range(0, len(items), chunk))
        results = _in_order(
            pool,
            partial(_apply, function),
            chunks,
            CHUNKS_AHEAD * num_workers,
        )
        num_done = 0
        try:
            for result in _counted(results, doing, bar):
                num_done += 1
                yield result
        except BrokenProcessPool as error:
            raise_if_stopped()
            raise AutoregError(
                f"{title}: a worker process died after {num_done} of {len(items)} scans, most "
                "likely for lack of memory; free some and run the same line again",
                code="worker-died",
            ) from error
        finally:
            if num_done < len(items):
                children = multiprocessing.active_children()
                _end([worker for worker in children if worker not in others])
            pool.shutdown(wait=True, cancel_futures=True)


def _counted(results: Iterable[Out], doing: Phase, bar: ProgressBar) -> Iterator[Out]:
    """Pass the results on; the phase and the progress bar show how many there are."""
    for number, result in enumerate(results):
        doing.progress = f"{number + 1:,} of {counted(bar.total, 'scan')} done"
        bar.update()
        yield result


def _end(workers: Sequence[BaseProcess]) -> None:
    """Stop processes, even if they are busy."""
    for worker in workers:
        worker.terminate()

    deadline = time.monotonic() + TIDY_WITHIN_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()


def workers_for(num_workers: int, voxels: Sequence[int]) -> int:
    """Return how many of ``num_workers`` processes fit into the free memory, at least 1.

    Args:
        voxels: size of every scan; the largest ones may come at the same time.
    """
    free = free_memory_bytes()
    if not free:
        return num_workers

    room, fitting = SHARE_OF_MEMORY * free, 0
    for size in sorted(voxels, reverse=True)[:num_workers]:
        room -= size * BYTES_PER_VOXEL
        if room < 0:
            break
        fitting += 1

    if fitting < min(num_workers, len(voxels)):
        log.info(
            "%d scans at a time instead of %d: the largest takes about %.1f GiB of memory, and "
            "%.1f GiB are free",
            max(1, fitting),
            num_workers,
            max(voxels) * BYTES_PER_VOXEL / 2**30,
            free / 2**30,
        )
        return max(1, fitting)
    return num_workers


def is_large(voxels: Sequence[int]) -> bool:
    """Return whether one of the scans is so large that it is better read in a worker process."""
    return max(voxels, default=0) >= LARGE_VOXELS


def free_memory_bytes() -> int:
    """Return the memory that new processes can have, within the limits of a container.

    It is 0 if the system does not report it.
    """
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max", which is not a number, if there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(max(1, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    if memory_bytes():
        found.append(memory_bytes())
    return min(found, default=0)


def _apply(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    try:
        return [function(item) for item in items]
    except _EndedError:
        os._exit(1)


def _in_order(
    pool: ProcessPoolExecutor,
    function: Callable[[Sequence[In]], list[Out]],
    chunks: Iterator[Sequence[In]],
    ahead: int,
) -> Iterator[Out]:
    waiting: deque[Future[list[Out]]] = deque()
    with interruption_held_back():
        waiting.extend(pool.submit(function, chunk) for chunk in islice(chunks, ahead))

    while waiting:
        done = waiting.popleft().result()
        with interruption_held_back():
            waiting.extend(pool.submit(function, chunk) for chunk in islice(chunks, 1))
        yield from done
