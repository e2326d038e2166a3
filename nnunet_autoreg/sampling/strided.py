"""Strided sequences: sub-volumes of one crop that overlap along z, concatenated.

AR-SSL4M's spatial sequence is four sub-volumes of 128 x 128 x 32 at a stride of 8 slices. With a
stride equal to the depth of a sub-volume, the sequence is a plain crop. With a smaller one most
voxels are shown twice, and copying them predicts them; ``sequence.mask_seen`` takes them out of the
loss. Strided sequences are mirrored, but neither rotated nor zoomed: their slices lie along the
axis z of the scan.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, Spacing, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.blocks import draw_order_index, draw_prefix, sequence_ids
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose, draw_flip_transpose
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.spatial import draw_start
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class StridedDraw:
    """The random choices of one sample, as in ``spatial.SpatialDraw``.

    Attributes:
        start: the first voxel of all slices that are read.
    """

    start: Size
    flip_transpose: FlipTranspose
    prefix: int
    order_index: NDArray[np.int64]


def source_slices(plan: Plan) -> NDArray[np.int64]:
    """Return which of the slices that are read each slice of the sequence shows, (Z,)."""
    s = plan.sequence
    starts = s.stride_vox * np.arange(s.num_subvolumes, dtype=np.int64)  # (num_subvolumes,)
    within = np.arange(subvolume_size(plan)[0], dtype=np.int64)  # (depth of a sub-volume,)
    slices = starts[:, None] + within  # (num_subvolumes, depth of a sub-volume)
    return slices.reshape(-1)


def subvolume_size(plan: Plan) -> Size:
    """Return the voxels of a sub-volume, (z, y, x)."""
    z, y, x = plan.sequence.crop_size_vox
    return (z // plan.sequence.num_subvolumes, y, x)


def stretch(plan: Plan) -> Size:
    """Return the size of the region that is read: the crop, shorter along z by the overlap."""
    _, y, x = plan.sequence.crop_size_vox
    num_slices = int(source_slices(plan)[-1]) + 1
    return (num_slices, y, x)


def draw(
    plan: Plan,
    shape_vox: Size,
    generator: np.random.Generator,
    spacing_mm: Spacing,
) -> StridedDraw:
    """Draw the slices to read from a case of ``shape_vox``, and all else that is random."""
    s = plan.sequence
    grid = grid_of(s.crop_size_vox, plan.encoder.token_size_vox)

    # The order of the draws is part of the result: another order gives other samples.
    start = draw_start(shape_vox, stretch(plan), generator)
    flip_transpose = draw_flip_transpose(plan, subvolume_size(plan), spacing_mm, generator)
    if flip_transpose.axes[0] != 0:
        # The sub-volumes overlap along z, so that z has to stay the first axis.
        flip_transpose = replace(flip_transpose, axes=(0, 1, 2))

    ids = sequence_ids(grid, s.block_tokens, 1, s.order)  # (T,)
    num_blocks = int(ids.max()) + 1
    order_index = draw_order_index(ids, s.order, generator)  # (T,)
    prefix = draw_prefix(num_blocks, generator, s)

    return StridedDraw(start, flip_transpose, prefix, order_index)


def apply(plan: Plan, case: StoredCase, drawn: StridedDraw) -> Sample:
    """Read the slices and concatenate the sub-volumes.

    Along z all slices that were read are mirrored together, so the sub-volumes are taken from their
    other end. Mirroring of y and x is left to the sample.
    """
    read_CZYX, valid_ZYX = case.read_padded(drawn.start, stretch(plan))
    slices = source_slices(plan)
    flip_z, flip_y, flip_x = drawn.flip_transpose.flips
    if flip_z:
        slices = len(valid_ZYX) - 1 - slices

    voxels = read_CZYX[None, :, slices]  # (1, C, Z, Y, X)
    valid_mask = valid_ZYX[None, slices]  # (1, Z, Y, X)
    loss_mask = None
    if plan.sequence.mask_seen:
        is_seen_ZYX = seen_before(plan, drawn.order_index)
        loss_mask = ~is_seen_ZYX[None]  # (1, Z, Y, X)

    return Sample(
        voxels,
        valid_mask,
        drawn.order_index,
        drawn.prefix,
        loss_mask=loss_mask,
        flip_transpose=FlipTranspose((False, flip_y, flip_x), drawn.flip_transpose.axes),
    )


def seen_before(plan: Plan, order_index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which voxels of the sequence an earlier block has shown already, (Z, Y, X)."""
    token = plan.encoder.token_size_vox
    grid = grid_of(plan.sequence.crop_size_vox, token)

    # For every voxel of the sequence: its block's position in the order.
    shown_by_ZYX = order_index.reshape(grid)
    for axis in range(3):
        shown_by_ZYX = shown_by_ZYX.repeat(token[axis], axis=axis)

    # For every voxel that is read: the first block that shows it.
    slices = source_slices(plan)
    first_shown_by = np.full(stretch(plan), np.iinfo(np.int64).max)
    np.minimum.at(first_shown_by, slices, shown_by_ZYX)
    return np.asarray(shown_by_ZYX > first_shown_by[slices])
