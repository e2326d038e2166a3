"""Spatial sequences: one crop of one case, its blocks in order.

All random choices are drawn first, as a small record; applying the record reads the store. A sample
can therefore be repeated and drawn as a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.affine import Affine, CropSource, draw_affine, read_source
from nnunet_autoreg.sampling.blocks import draw_order_index, draw_prefix, sequence_ids
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose, draw_flip_transpose
from nnunet_autoreg.sampling.sample import Sample, empty_crops
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class SpatialDraw:
    """The random choices of one sample.

    Attributes:
        start: first voxel of the crop, (z, y, x); negative on axes on which the crop begins in
            padding.
        flip_transpose: how the crop is mirrored and its axes are reordered.
        prefix: number of given blocks.
        order_index: position in the order of every token's block, (T,).
        affine: how the crop is rotated and zoomed; None if it is not.
    """

    start: Size
    flip_transpose: FlipTranspose
    prefix: int
    order_index: NDArray[np.int64]
    affine: Affine | None = None


def draw(
    plan: Plan,
    shape_vox: Size,
    generator: np.random.Generator,
    spacing_mm: Spacing | None = None,
    affine_generator: np.random.Generator | None = None,
) -> SpatialDraw:
    """Draw a crop of the plan's size from a case of ``shape_vox``, and all else that is random.

    A case that is smaller than the crop lies at a random position inside the crop, surrounded by
    padding.

    Args:
        spacing_mm: spacing of the case; None for the plan's.
        affine_generator: draws rotation and zoom; None for samples that are never rotated or
            zoomed.
    """
    s = plan.sequence
    spacing_mm = spacing_mm or plan.data.spacing_mm
    grid = grid_of(s.crop_size_vox, plan.encoder.token_size_vox)

    # The order of the draws is part of the result: another order gives other samples.
    start = draw_start(shape_vox, s.crop_size_vox, generator)
    flip_transpose = draw_flip_transpose(plan, s.crop_size_vox, spacing_mm, generator)
    ids = sequence_ids(grid, s.block_tokens, 1, s.order)  # (T,)
    num_blocks = int(ids.max()) + 1
    order_index = draw_order_index(ids, s.order, generator)  # (T,)
    affine = None
    if affine_generator is not None:
        affine = draw_affine(plan, spacing_mm, affine_generator)
    prefix = draw_prefix(num_blocks, generator, s)

    return SpatialDraw(start, flip_transpose, prefix, order_index, affine)


def apply(plan: Plan, case: StoredCase, drawn: SpatialDraw) -> Sample:
    """Read the crop that was drawn, or the part of the case that it will be resampled from."""
    size = plan.sequence.crop_size_vox
    sources: tuple[CropSource, ...] = ()
    if drawn.affine is None:
        voxels_CZYX, valid_ZYX = case.read_padded(drawn.start, size)
        voxels = voxels_CZYX[None]  # (1, C, Z, Y, X)
        valid_mask = valid_ZYX[None]  # (1, Z, Y, X)
    else:
        max_source = plan.sequence.max_source
        sources = (read_source(case, drawn.start, size, drawn.affine, max_source),)
        voxels, valid_mask = empty_crops(1, size)

    return Sample(
        voxels,
        valid_mask,
        drawn.order_index,
        drawn.prefix,
        flip_transpose=drawn.flip_transpose,
        sources=sources,
    )


def draw_start(
    shape_vox: Sequence[int],
    size_vox: Sequence[int],
    generator: np.random.Generator,
) -> Size:
    """Draw the first voxel of a crop anywhere in a case, or of a smaller case in the crop."""
    start = []
    for case_side, crop_side in zip(shape_vox, size_vox, strict=True):
        last = case_side - crop_side
        lowest, highest = min(0, last), max(0, last)
        start.append(int(generator.integers(lowest, highest + 1)))
    return as_size(start)
