"""One random generator for each purpose.

Randomness depends on (run seed, purpose, ids) and on nothing else.

Neither the number of workers nor a restart changes a draw, because no generator outlives the thing
it was made for.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """Return a generator that depends on the run's seed, a purpose, and ids.

    A purpose is, for example, ``"crop"``; ids are, for example, step and sample.
    """
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, key, *ids]))


def any_of(items: Sequence[T], generator: np.random.Generator) -> T:
    """Return one of the items; all have the same probability."""
    return items[int(generator.integers(len(items)))]
