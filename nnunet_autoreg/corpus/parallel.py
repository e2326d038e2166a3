"""A map over worker processes that keeps order, shows progress and speaks plainly when a worker dies."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from tqdm import tqdm

from nnunet_autoreg.errors import AutoregError

In = TypeVar("In")
Out = TypeVar("Out")

# Chunks given to each worker ahead of the results: enough to bridge one slow scan, few enough to stay small in memory.
CHUNKS_AHEAD = 8


def end_with_parent() -> None:
    """Let this worker process end when the process that made it does, however that ends."""
    parent = parent_process()
    assert parent is not None, "only workers call this"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parallel_map(
    function: Callable[[In], Out], items: Sequence[In], num_workers: int, title: str, chunk: int = 1
) -> Iterator[Out]:
    """Yield ``function(item)`` in order, from this process (at most 1 worker) or from spawned ones.

    ``function`` and the items must be picklable. Items are handed out a few chunks ahead of the results, so that memory does
    not grow with their number. The progress bar goes to stderr, on terminals only.

    Args:
        chunk: items per hand-over; more than 1 where an item takes less than some milliseconds.

    Raises:
        AutoregError: a worker process died.
    """
    bar = partial(tqdm, total=len(items), desc=title, unit="scan", disable=None)
    if num_workers <= 1 or len(items) <= chunk:
        yield from bar(map(function, items))
        return
    num_done = 0
    pool = ProcessPoolExecutor(min(num_workers, -(-len(items) // chunk)), get_context("spawn"), initializer=end_with_parent)
    try:
        for result in bar(_in_order(pool, partial(_apply, function), _chunks(items, chunk), CHUNKS_AHEAD * num_workers)):
            num_done += 1
            yield result
    except BrokenProcessPool as error:
        raise AutoregError(
            f"{title}: a worker process died after {num_done} of {len(items)} scans, most likely for want of memory; free some and run "
            "the same line again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _apply(function: Callable[[In], Out], items: list[In]) -> list[Out]:
    return [function(item) for item in items]


def _chunks(items: Iterable[In], size: int) -> Iterator[list[In]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[list[In]], list[Out]], chunks: Iterator[list[In]], ahead: int
) -> Iterator[Out]:
    waiting: deque[Future[list[Out]]] = deque(pool.submit(function, chunk) for chunk in islice(chunks, ahead))
    while waiting:
        done = waiting.popleft().result()
        waiting.extend(pool.submit(function, chunk) for chunk in islice(chunks, 1))
        yield from done
