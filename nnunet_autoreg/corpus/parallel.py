"""A map over worker processes that keeps order, shows progress and speaks plainly when a worker dies."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from tqdm import tqdm

from nnunet_autoreg.errors import AutoregError

In = TypeVar("In")
Out = TypeVar("Out")


def end_with_parent() -> None:
    """Let this worker process end when the process that made it does, however that ends."""
    parent = parent_process()
    assert parent is not None, "only workers call this"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parallel_map(function: Callable[[In], Out], items: Sequence[In], num_workers: int, title: str) -> Iterator[Out]:
    """Yield ``function(item)`` in order, from this process (at most 1 worker) or from spawned ones.

    ``function`` and the items must be picklable. The progress bar goes to stderr, on terminals only.

    Raises:
        AutoregError: a worker process died.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from tqdm(map(function, items), total=len(items), desc=title, unit="scan", disable=None)
        return
    num_done = 0
    pool = ProcessPoolExecutor(min(num_workers, len(items)), get_context("spawn"), initializer=end_with_parent)
    try:
        for result in tqdm(pool.map(function, items), total=len(items), desc=title, unit="scan", disable=None):
            num_done += 1
            yield result
    except BrokenProcessPool as error:
        raise AutoregError(
            f"{title}: a worker process died after {num_done} of {len(items)} scans, most likely for want of memory; free some and run "
            "the same line again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
