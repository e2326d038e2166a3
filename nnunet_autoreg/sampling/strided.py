"""Strided sequences: sub-volumes of one crop that overlap along z, concatenated.

AR-SSL4M's spatial sequence is four sub-volumes of 128 x 128 x 32 at a stride of 8 slices. A stride
of the sub-volume's depth makes a plain crop of it. At a smaller one most voxels are shown twice,
and copying them predicts them; ``sequence.mask_seen`` takes them out of the loss. Strided sequences
are mirrored, but neither rotated nor zoomed: their slices lie along the axis z of the scan.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, Spacing, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.blocks import draw_prefix, sequence_ids, token_ranks
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.spatial import draw_start
from nnunet_autoreg.sampling.turn import Turn, draw_turn
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class StridedDraw:
    """The random choices of one sample, as in ``spatial.SpatialDraw``; ``start`` is that of the
    whole stretch of slices.
    """

    start: Size
    turn: Turn
    prefix: int
    ranks: NDArray[np.int64]


def source_slices(plan: Plan) -> NDArray[np.int64]:
    """Slice of the stretch that each slice of the sequence shows, (Z,)."""
    s = plan.sequence
    depth = s.crop_size_vox[0] // s.num_subvolumes
    return np.concatenate(
        [k * s.stride_vox + np.arange(depth, dtype=np.int64) for k in range(s.num_subvolumes)]
    )


def stretch(plan: Plan) -> Size:
    """Voxels that are read: the crop, shorter along z by what overlaps."""
    _, y, x = plan.sequence.crop_size_vox
    return (int(source_slices(plan)[-1]) + 1, y, x)


def draw(
    plan: Plan, shape_vox: Size, generator: np.random.Generator, spacing_mm: Spacing
) -> StridedDraw:
    """Draw a stretch of slices from a case of ``shape_vox``, its turn, prefix and block order."""
    s = plan.sequence
    depth = s.crop_size_vox[0] // s.num_subvolumes
    start = draw_start(shape_vox, stretch(plan), generator)
    turn = draw_turn(plan, (depth, *s.crop_size_vox[1:]), spacing_mm, generator)
    turn = turn if turn.axes[0] == 0 else replace(turn, axes=(0, 1, 2))
    ids = sequence_ids(
        grid_of(s.crop_size_vox, plan.encoder.token_size_vox), s.block_tokens, 1, s.order
    )
    ranks = token_ranks(ids, s.order, generator)
    return StridedDraw(start, turn, draw_prefix(int(ids.max()) + 1, generator, s), ranks)


def apply(plan: Plan, case: StoredCase, drawn: StridedDraw) -> Sample:
    """Read the stretch and lay its sub-volumes after one another.

    Along z it is the stretch that is mirrored, so the slices are taken from its other end; y and x
    are left to the sample's turn.
    """
    voxels, real = case.read_padded(drawn.start, stretch(plan))
    (flip_z, flip_y, flip_x), slices = drawn.turn.flips, source_slices(plan)
    if flip_z:
        slices = len(real) - 1 - slices
    scored = ~seen_before(plan, drawn.ranks)[None] if plan.sequence.mask_seen else None
    turn = Turn((False, flip_y, flip_x), drawn.turn.axes)
    return Sample(
        voxels[None, :, slices],
        real[None, slices],
        drawn.ranks,
        drawn.prefix,
        scored=scored,
        turn=turn,
    )


def seen_before(plan: Plan, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(Z, Y, X): where a voxel was shown by a block of lower rank."""
    token = plan.encoder.token_size_vox
    by_voxel = ranks.reshape(grid_of(plan.sequence.crop_size_vox, token))
    for axis in range(3):
        by_voxel = by_voxel.repeat(token[axis], axis=axis)
    slices = source_slices(plan)
    first = np.full((int(slices[-1]) + 1, *by_voxel.shape[1:]), np.iinfo(np.int64).max)
    np.minimum.at(first, slices, by_voxel)
    return np.asarray(by_voxel > first[slices])
