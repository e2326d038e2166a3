"""Cases of noise, for sequences of which only the size matters.

The cost of a step can then be counted or timed before any scan was preprocessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import Size, Spacing, as_size
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.pool import Place, SamplingPool, StoredGroup, Structure

NUM_SUBJECTS = 16


@dataclass(frozen=True)
class NoiseCase:
    """A case without a file: noise of some shape."""

    shape_vox: Size
    spacing_mm: Spacing

    def read_padded(
        self,
        start_zyx: Sequence[int],
        size_zyx: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return noise (1, Z, Y, X) and which of its voxels lie inside the case."""
        size = as_size(size_zyx)
        # The same crop has the same noise, as of a case on disk.
        generator = rng.generator(0, "cost of a step", *(abs(int(first)) for first in start_zyx))
        noise = generator.normal(size=(1, *size)).astype(np.float32)

        is_real = np.ones(size, dtype=bool)
        for axis, (first, extent) in enumerate(zip(start_zyx, self.shape_vox, strict=True)):
            positions = np.arange(first, first + size[axis])
            is_inside = (positions >= 0) & (positions < extent)
            is_real &= is_inside.reshape([-1 if a == axis else 1 for a in range(3)])
        return noise * is_real, is_real


def noise_pool(plan: Plan) -> SamplingPool:
    """Return a sampling pool for every kind of sequence, in scans of twice the crop's extent."""
    depth, height, width = (2 * extent for extent in plan.sequence.crop_size_vox)
    spacing_mm = plan.data.spacing_mm
    # Noise replaces stored cases: it has their shape, their spacing and their one method.
    case: Any = NoiseCase((depth, height, width), spacing_mm)
    image: Any = NoiseCase((1, height, width), spacing_mm)

    members = tuple((name, case) for name in plan.sequence.contrasts)
    group = StoredGroup("noise", members)
    centre = (depth / 2, height / 2, width / 2)
    places = [Place(f"subject {n}", case, centre) for n in range(NUM_SUBJECTS)]
    structure = Structure("noise", spacing_mm, tuple(places))
    return SamplingPool((case,), (group,), (structure,), (image,))
