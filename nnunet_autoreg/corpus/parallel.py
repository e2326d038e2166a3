"""A map over worker processes that keeps order, shows progress and speaks plainly when a worker dies."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

from nnunet_autoreg.errors import AutoregError

In = TypeVar("In")
Out = TypeVar("Out")


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
    pool = ProcessPoolExecutor(min(num_workers, len(items)), mp_context=get_context("spawn"))
    try:
        for result in tqdm(pool.map(function, items), total=len(items), desc=title, unit="scan", disable=None):
            num_done += 1
            yield result
    except BrokenProcessPool as error:
        raise AutoregError(
            f"{title}: a worker process died after {num_done} of {len(items)} scans, most likely for want of memory; run the same "
            f"line again with fewer workers (now {num_workers})") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
