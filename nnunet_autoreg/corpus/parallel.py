"""A map over worker processes that keeps order, shows progress, ends at once and speaks plainly when a worker dies."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

from tqdm import tqdm

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.phases import Phase, phase
from nnunet_autoreg.stopping import raise_if_stopped

In = TypeVar("In")
Out = TypeVar("Out")

# Chunks given to each worker ahead of the results: enough to bridge one slow scan, few enough to stay small in memory.
CHUNKS_AHEAD = 8

TIDY_WITHIN_S = 1.0
"""How long a worker that is ended may take to remove its temporary files, before it is killed."""


class _EndedError(SystemExit):
    """Raised in a worker where it is to end, so that what it was writing is tidied up. multiprocessing prints nothing about it."""


def end_with_parent() -> None:
    """Let this worker process end when the process that made it does, however that ends."""
    parent = parent_process()
    assert parent is not None, "only workers call this"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_worker() -> None:
    """Prepare a process of a pool: it ends with its parent, and leaves Ctrl-C, which reaches the whole group, to its parent."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _EndedError

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()


@contextmanager
def _interruption_held_back() -> Iterator[None]:
    """Around the start of processes, which begin with SIGINT blocked, since one that is interrupted at its start prints a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel_map(
    function: Callable[[In], Out], items: Sequence[In], num_workers: int, title: str, chunk: int = 1
) -> Iterator[Out]:
    """Yield ``function(item)`` in order, from this process (at most 1 worker) or from spawned ones.

    ``function`` and the items must be picklable. Items are handed out a few chunks ahead of the results, so that memory does
    not grow with their number. The progress bar goes to stderr, on terminals only. Where the results are not wanted any more, after an
    interruption for instance, the workers are ended in the middle of their work.

    Args:
        chunk: items per hand-over; more than 1 where an item takes less than some milliseconds.

    Raises:
        AutoregError: a worker process died.
    """
    if not items:
        return
    bar = partial(tqdm, total=len(items), desc=title, unit="scan", disable=None)

    with phase(title) as doing:
        if num_workers <= 1 or len(items) <= chunk:
            yield from _counted(bar(map(function, items)), doing, len(items))
            return

        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(min(num_workers, -(-len(items) // chunk)), get_context("spawn"), initializer=begin_worker)
        results = _in_order(pool, partial(_apply, function), _chunks(items, chunk), CHUNKS_AHEAD * num_workers)
        num_done = 0
        try:
            for result in _counted(bar(results), doing, len(items)):
                num_done += 1
                yield result
        except BrokenProcessPool as error:
            raise_if_stopped()
            raise AutoregError(
                f"{title}: a worker process died after {num_done} of {len(items)} scans, most likely for want of memory; free some and run "
                "the same line again") from error
        finally:
            if num_done < len(items):
                _end([worker for worker in multiprocessing.active_children() if worker not in others])
            pool.shutdown(wait=True, cancel_futures=True)


def _counted(results: Iterable[Out], doing: Phase, total: int) -> Iterator[Out]:
    """Pass the results on and note in the phase how many there are."""
    for number, result in enumerate(results):
        doing.progress = f"{number + 1} of {total} scans are done"
        yield result


def _end(workers: Sequence[BaseProcess]) -> None:
    """End processes, however busy they are."""
    for worker in workers:
        worker.terminate()

    deadline = time.monotonic() + TIDY_WITHIN_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()


def _apply(function: Callable[[In], Out], items: list[In]) -> list[Out]:
    try:
        return [function(item) for item in items]
    except _EndedError:
        os._exit(1)


def _chunks(items: Iterable[In], size: int) -> Iterator[list[In]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[list[In]], list[Out]], chunks: Iterator[list[In]], ahead: int
) -> Iterator[Out]:
    waiting: deque[Future[list[Out]]] = deque()
    with _interruption_held_back():
        waiting.extend(pool.submit(function, chunk) for chunk in islice(chunks, ahead))

    while waiting:
        done = waiting.popleft().result()
        with _interruption_held_back():
            waiting.extend(pool.submit(function, chunk) for chunk in islice(chunks, 1))
        yield from done
