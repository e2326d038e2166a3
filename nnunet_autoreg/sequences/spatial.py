"""Spatial sequences: one crop of one case, its blocks in order.

What is random is drawn first, as a small record; applying it reads the store. So a sample can be replayed and pictured.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sequences.blocks import block_ids, draw_prefix, token_ranks
from nnunet_autoreg.sequences.sample import Sample
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class SpatialDraw:
    """The random choices of one sample.

    Attributes:
        start: first voxel of the crop, (z, y, x); negative where the crop begins in padding.
        flips: whether each axis of the crop is mirrored.
        axes: the order in which the crop's axes are taken.
        prefix: number of given blocks.
        ranks: block rank per token, (T,).
    """

    start: Size
    flips: tuple[bool, bool, bool]
    axes: Size
    prefix: int
    ranks: NDArray[np.int64]


def draw(plan: Plan, shape_vox: Size, generator: np.random.Generator) -> SpatialDraw:
    """Draw a crop of the plan's size from a case of ``shape_vox``, its flips, axis order, prefix and block order.

    Where the case is smaller than the crop, it lies at a random place inside the crop and padding surrounds it.
    """
    s = plan.sequence
    low = [min(0, c - k) for c, k in zip(shape_vox, s.crop_size_vox, strict=True)]
    high = [max(0, c - k) for c, k in zip(shape_vox, s.crop_size_vox, strict=True)]
    start = as_size([int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)])
    flips = tuple(bool(f) for f in generator.integers(0, 2, size=3)) if s.flip else (False, False, False)
    axes = _draw_axes(plan, generator) if s.swap_axes else as_size((0, 1, 2))
    ids = block_ids(grid_of(s.crop_size_vox, plan.encoder.token_size_vox), s.block_tokens)
    ranks = token_ranks(ids, s.order, generator)
    return SpatialDraw(start, (flips[0], flips[1], flips[2]), axes, draw_prefix(int(ids.max()) + 1, generator), ranks)


def _draw_axes(plan: Plan, generator: np.random.Generator) -> Size:
    """A random permutation of the axes that moves only axes of equal crop length and equal spacing (to 1 %)."""
    size, spacing = plan.sequence.crop_size_vox, plan.data.spacing_mm
    wish = generator.permutation(3)
    equal = all(size[i] == size[j] and abs(spacing[i] / spacing[j] - 1) < 0.01 for i, j in enumerate(wish))
    return as_size(wish.tolist()) if equal else as_size((0, 1, 2))


def apply(plan: Plan, case: StoredCase, drawn: SpatialDraw) -> Sample:
    """Read the crop that was drawn and transform it."""
    voxels, real = case.read_padded(drawn.start, plan.sequence.crop_size_vox)
    flipped = tuple(axis for axis, flip in enumerate(drawn.flips) if flip)
    voxels = np.flip(voxels, tuple(axis + 1 for axis in flipped)).transpose(0, *(axis + 1 for axis in drawn.axes))
    real = np.flip(real, flipped).transpose(drawn.axes)
    return Sample(np.ascontiguousarray(voxels)[None], np.ascontiguousarray(real)[None], drawn.ranks, drawn.prefix)
