"""One generator for one purpose: randomness depends on (run seed, purpose, ids) and on nothing
else.

Neither the number of workers nor a restart changes a draw, because no generator outlives the thing
it was made for.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """A generator for ``purpose`` (e.g. ``"crop"``) and ``ids`` (e.g. step, sample) under the run's
    ``seed``.
    """
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, key, *ids]))
