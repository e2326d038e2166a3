"""Measure the memory of Python that a step takes, in the same way in every order of the tests."""

import gc
import tracemalloc
from collections.abc import Callable


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that Python held at one time for a step.

    The step runs twice, and its second run is measured: the first one imports what the step needs
    and fills the caches of ``typing`` and ``re``. The garbage collector is off meanwhile, since a
    full collection empties Python's lists of unused tuples and frames; what fills them again would
    count as memory of the step, up to a megabyte, whenever a collection happened to come.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        step()
        tracemalloc.start()
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if was_on:
            gc.enable()
