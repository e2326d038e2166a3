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
from nnunet_autoreg.sampling.pool import SamplingPool, StoredGroup, StoredLocation, Structure

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
        # The same crop has the same noise, as if it were read from a file.
        seeds = [abs(int(first)) for first in start_zyx]
        generator = rng.generator(0, "cost of a step", *seeds)
        noise = generator.normal(size=(1, *size)).astype(np.float32)  # (1, Z, Y, X)

        is_inside = []
        for first, length, extent in zip(start_zyx, size, self.shape_vox, strict=True):
            positions = np.arange(first, first + length)
            is_inside.append((positions >= 0) & (positions < extent))

        inside_z, inside_y, inside_x = is_inside  # (Z,), (Y,), (X,)
        valid_mask = inside_z[:, None, None] & inside_y[:, None] & inside_x  # (Z, Y, X)
        return noise * valid_mask, valid_mask


def noise_pool(plan: Plan) -> SamplingPool:
    """Return a sampling pool for every kind of sequence, in scans of twice the crop's extent."""
    depth, height, width = (2 * extent for extent in plan.sequence.crop_size_vox)
    spacing_mm = plan.data.spacing_mm
    # Noise replaces stored cases: it has the attributes and the method of them that draws need.
    case: Any = NoiseCase((depth, height, width), spacing_mm)
    image: Any = NoiseCase((1, height, width), spacing_mm)

    members = tuple((name, case) for name in plan.sequence.contrasts)
    group = StoredGroup("noise", members)

    centre = (depth / 2, height / 2, width / 2)
    locations = []
    for number in range(NUM_SUBJECTS):
        locations.append(StoredLocation(f"subject {number}", case, centre))
    structure = Structure("noise", spacing_mm, tuple(locations))

    return SamplingPool((case,), (group,), (structure,), (image,))
