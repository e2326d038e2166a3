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
from nnunet_autoreg.sampling.affine import Affine, draw_affine, read_source
from nnunet_autoreg.sampling.blocks import draw_prefix, sequence_ids, token_ranks
from nnunet_autoreg.sampling.sample import Sample, unread
from nnunet_autoreg.sampling.turn import Turn, draw_turn
from nnunet_autoreg.store.case import StoredCase


@dataclass(frozen=True)
class SpatialDraw:
    """The random choices of one sample.

    Attributes:
        start: first voxel of the crop, (z, y, x); negative where the crop begins in padding.
        turn: how the crop is mirrored and its axes are reordered.
        prefix: number of given blocks.
        ranks: position in the order of every token's block, (T,).
        affine: how the crop is rotated and zoomed; None where it is not.
    """

    start: Size
    turn: Turn
    prefix: int
    ranks: NDArray[np.int64]
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
        spacing_mm: of the case; None for the plan's.
        affine_generator: draws rotation and zoom; None for samples that are never rotated or
            zoomed.
    """
    s = plan.sequence
    spacing_mm = spacing_mm or plan.data.spacing_mm
    grid = grid_of(s.crop_size_vox, plan.encoder.token_size_vox)

    # The order of the draws is part of the result: another order gives other samples.
    start = draw_start(shape_vox, s.crop_size_vox, generator)
    turn = draw_turn(plan, s.crop_size_vox, spacing_mm, generator)
    ids = sequence_ids(grid, s.block_tokens, 1, s.order)
    ranks = token_ranks(ids, s.order, generator)
    affine = None
    if affine_generator is not None:
        affine = draw_affine(plan, spacing_mm, affine_generator)
    prefix = draw_prefix(int(ids.max()) + 1, generator, s)

    return SpatialDraw(start, turn, prefix, ranks, affine)


def apply(plan: Plan, case: StoredCase, drawn: SpatialDraw) -> Sample:
    """Read the crop that was drawn, or the part of the case that it will be resampled from."""
    size = plan.sequence.crop_size_vox
    if drawn.affine is None:
        voxels, real = case.read_padded(drawn.start, size)
        return Sample(voxels[None], real[None], drawn.ranks, drawn.prefix, turn=drawn.turn)

    source = read_source(case, drawn.start, size, drawn.affine, plan.sequence.max_source)
    voxels, real = unread(1, size)
    return Sample(voxels, real, drawn.ranks, drawn.prefix, turn=drawn.turn, sources=(source,))


def draw_start(
    shape_vox: Sequence[int],
    size_vox: Sequence[int],
    generator: np.random.Generator,
) -> Size:
    """Draw the first voxel of a crop anywhere in a case, or of a smaller case in the crop."""
    start = []
    for case_side, crop_side in zip(shape_vox, size_vox, strict=True):
        difference = case_side - crop_side
        start.append(int(generator.integers(min(0, difference), max(0, difference) + 1)))
    return as_size(start)
