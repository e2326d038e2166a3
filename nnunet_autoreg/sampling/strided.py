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
    depth = s.crop_size_vox[0] // s.num_subvolumes
    starts = s.stride_vox * np.arange(s.num_subvolumes, dtype=np.int64)  # (num_subvolumes,)
    within = np.arange(depth, dtype=np.int64)  # (depth,)
    return (starts[:, None] + within).reshape(-1)


def stretch(plan: Plan) -> Size:
    """Return the size of the region that is read: the crop, shorter along z by the overlap."""
    _, y, x = plan.sequence.crop_size_vox
    return (int(source_slices(plan)[-1]) + 1, y, x)


def draw(
    plan: Plan,
    shape_vox: Size,
    generator: np.random.Generator,
    spacing_mm: Spacing,
) -> StridedDraw:
    """Draw the slices to read from a case of ``shape_vox``, and all else that is random."""
    s = plan.sequence
    depth = s.crop_size_vox[0] // s.num_subvolumes
    grid = grid_of(s.crop_size_vox, plan.encoder.token_size_vox)

    # The order of the draws is part of the result: another order gives other samples.
    start = draw_start(shape_vox, stretch(plan), generator)
    flip_transpose = draw_flip_transpose(plan, (depth, *s.crop_size_vox[1:]), spacing_mm, generator)
    if flip_transpose.axes[0] != 0:
        # The sub-volumes overlap along z, so that z has to stay the first axis.
        flip_transpose = replace(flip_transpose, axes=(0, 1, 2))

    ids = sequence_ids(grid, s.block_tokens, 1, s.order)
    order_index = draw_order_index(ids, s.order, generator)
    prefix = draw_prefix(int(ids.max()) + 1, generator, s)

    return StridedDraw(start, flip_transpose, prefix, order_index)


def apply(plan: Plan, case: StoredCase, drawn: StridedDraw) -> Sample:
    """Read the slices and concatenate the sub-volumes.

    Along z all slices that were read are mirrored together, so the sub-volumes are taken from their
    other end. Mirroring of y and x is left to the sample.
    """
    voxels, valid_mask = case.read_padded(drawn.start, stretch(plan))
    slices = source_slices(plan)
    flip_z, flip_y, flip_x = drawn.flip_transpose.flips
    if flip_z:
        slices = len(valid_mask) - 1 - slices

    loss_mask = None
    if plan.sequence.mask_seen:
        loss_mask = ~seen_before(plan, drawn.order_index)[None]

    return Sample(
        voxels[None, :, slices],
        valid_mask[None, slices],
        drawn.order_index,
        drawn.prefix,
        loss_mask=loss_mask,
        flip_transpose=FlipTranspose((False, flip_y, flip_x), drawn.flip_transpose.axes),
    )


def seen_before(plan: Plan, order_index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where an earlier block has shown a voxel already, (Z, Y, X)."""
    token = plan.encoder.token_size_vox
    by_voxel = order_index.reshape(grid_of(plan.sequence.crop_size_vox, token))
    for axis in range(3):
        by_voxel = by_voxel.repeat(token[axis], axis=axis)  # finally (Z, Y, X)

    # For every voxel that is read: the first block that shows it.
    slices = source_slices(plan)
    first = np.full((int(slices[-1]) + 1, *by_voxel.shape[1:]), np.iinfo(np.int64).max)
    np.minimum.at(first, slices, by_voxel)
    return np.asarray(by_voxel > first[slices])
