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
from nnunet_autoreg.store.case import StoredCase

Flips = tuple[bool, bool, bool]


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
    flips: Flips
    axes: Size
    prefix: int
    ranks: NDArray[np.int64]


def draw(plan: Plan, shape_vox: Size, generator: np.random.Generator, spacing_mm: Spacing | None = None) -> SpatialDraw:
    """Draw a crop of the plan's size from a case of ``shape_vox``, its flips, axis order, prefix and block order.

    Where the case is smaller than the crop, it lies at a random place inside the crop and padding surrounds it.

    Args:
        spacing_mm: of the case; None for the plan's.
    """
    s = plan.sequence
    start = draw_start(shape_vox, s.crop_size_vox, generator)
    flips = draw_flips(plan, generator)
    axes = draw_axes(plan, s.crop_size_vox, spacing_mm or plan.data.spacing_mm, generator)
    ids = sequence_ids(grid_of(s.crop_size_vox, plan.encoder.token_size_vox), s.block_tokens, 1, s.order)
    ranks = token_ranks(ids, s.order, generator)
    return SpatialDraw(start, flips, axes, draw_prefix(int(ids.max()) + 1, generator, s), ranks)


def apply(plan: Plan, case: StoredCase, drawn: SpatialDraw) -> Sample:
    """Read the crop that was drawn and transform it."""
    voxels, real = transform(*case.read_padded(drawn.start, plan.sequence.crop_size_vox), drawn.flips, drawn.axes)
    return Sample(voxels[None], real[None], drawn.ranks, drawn.prefix)


def draw_start(shape_vox: Sequence[int], size_vox: Sequence[int], generator: np.random.Generator) -> Size:
    """First voxel of a crop anywhere in a case; of a case that is smaller, anywhere in the crop."""
    low = [min(0, c - k) for c, k in zip(shape_vox, size_vox, strict=True)]
    high = [max(0, c - k) for c, k in zip(shape_vox, size_vox, strict=True)]
    return as_size([int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)])


def draw_flips(plan: Plan, generator: np.random.Generator) -> Flips:
    """Which axes to mirror."""
    if not plan.sequence.flip:
        return (False, False, False)
    z, y, x = (bool(f) for f in generator.integers(0, 2, size=3))
    return (z, y, x)


def draw_axes(plan: Plan, size_vox: Sequence[int], spacing_mm: Sequence[float], generator: np.random.Generator) -> Size:
    """A random permutation of the axes that moves only axes of equal crop length and equal spacing (to 1 %)."""
    if not plan.sequence.swap_axes:
        return (0, 1, 2)
    wish = generator.permutation(3)
    equal = all(size_vox[i] == size_vox[j] and abs(spacing_mm[i] / spacing_mm[j] - 1) < 0.01 for i, j in enumerate(wish))
    return as_size(wish.tolist()) if equal else as_size((0, 1, 2))


def transform(
    voxels_CZYX: NDArray[np.float32], real_ZYX: NDArray[np.bool_], flips: Flips, axes: Size
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mirror, then reorder the axes of a crop and of its padding alike."""
    flipped = tuple(axis for axis, flip in enumerate(flips) if flip)
    voxels = np.flip(voxels_CZYX, tuple(axis + 1 for axis in flipped)).transpose(0, *(axis + 1 for axis in axes))
    real = np.flip(real_ZYX, flipped).transpose(axes)
    return np.ascontiguousarray(voxels), np.ascontiguousarray(real)
