"""Spatial sequences: one crop of one case, its blocks in order.

What is random is drawn first, as a small record; applying it reads the store. So a sample can be replayed and pictured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sequences.blocks import draw_prefix, sequence_ids, token_ranks
from nnunet_autoreg.sequences.sample import Sample
from nnunet_autoreg.sequences.turn import Turn, draw_turn
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class SpatialDraw:
    """The random choices of one sample.

    Attributes:
        start: first voxel of the crop, (z, y, x); negative where the crop begins in padding.
        turn: how the crop is mirrored and its axes are reordered.
        prefix: number of given blocks.
        ranks: block rank per token, (T,).
    """

    start: Size
    turn: Turn
    prefix: int
    ranks: NDArray[np.int64]


def draw(plan: Plan, shape_vox: Size, generator: np.random.Generator, spacing_mm: Spacing | None = None) -> SpatialDraw:
    """Draw a crop of the plan's size from a case of ``shape_vox``, its turn, prefix and block order.

    Where the case is smaller than the crop, it lies at a random place inside the crop and padding surrounds it.

    Args:
        spacing_mm: of the case; None for the plan's.
    """
    s = plan.sequence
    start = draw_start(shape_vox, s.crop_size_vox, generator)
    turn = draw_turn(plan, s.crop_size_vox, spacing_mm or plan.data.spacing_mm, generator)
    ids = sequence_ids(grid_of(s.crop_size_vox, plan.encoder.token_size_vox), s.block_tokens, 1, s.order)
    ranks = token_ranks(ids, s.order, generator)
    return SpatialDraw(start, turn, draw_prefix(int(ids.max()) + 1, generator, s), ranks)


def apply(plan: Plan, case: StoredCase, drawn: SpatialDraw) -> Sample:
    """Read the crop that was drawn."""
    voxels, real = case.read_padded(drawn.start, plan.sequence.crop_size_vox)
    return Sample(voxels[None], real[None], drawn.ranks, drawn.prefix, turn=drawn.turn)


def draw_start(shape_vox: Sequence[int], size_vox: Sequence[int], generator: np.random.Generator) -> Size:
    """First voxel of a crop anywhere in a case; of a case that is smaller, anywhere in the crop."""
    low = [min(0, c - k) for c, k in zip(shape_vox, size_vox, strict=True)]
    high = [max(0, c - k) for c, k in zip(shape_vox, size_vox, strict=True)]
    return as_size([int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)])
