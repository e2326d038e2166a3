"""Sequences of several images: contrasts of one subject, or one structure in several subjects.

The images of a sequence are its members. They are cropped, mirrored and transposed alike, and have
one window of the plan's grid of positions. All random choices are drawn first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.affine import Affine, CropSource, draw_affine, read_source
from nnunet_autoreg.sampling.blocks import (
    draw_order_index,
    draw_prefix,
    sequence_ids,
    window_positions,
)
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose, draw_flip_transpose
from nnunet_autoreg.sampling.kinds import member_codes, member_crop, num_members
from nnunet_autoreg.sampling.pool import StoredGroup, StoredLocation, Structure
from nnunet_autoreg.sampling.sample import Sample, empty_crops
from nnunet_autoreg.sampling.spatial import draw_start
from nnunet_autoreg.store.case import StoredCase

JITTER = 1 / 8
"""Largest distance of a structure from the middle of its crop, as a share of the crop."""


@dataclass(frozen=True)
class MembersDraw:
    """The random choices of one sample.

    Attributes:
        starts: per member, first voxel of its crop, (z, y, x); may lie outside of the case.
        codes: per member, its code.
        flip_transpose: as in ``spatial.SpatialDraw``, the same for all members.
        window: first token, in the plan's grid, of the positions that the crops take.
        prefix: number of given blocks.
        order_index: position in the order of every token's block, (T,), member after member.
        affine: how the crops are rotated and zoomed, the same for all members; None if they are
            not.
    """

    starts: tuple[Size, ...]
    codes: tuple[int, ...]
    flip_transpose: FlipTranspose
    window: Size
    prefix: int
    order_index: NDArray[np.int64]
    affine: Affine | None = None


def choose_contrasts(
    plan: Plan,
    group: StoredGroup,
    generator: np.random.Generator,
) -> list[tuple[int, StoredCase]]:
    """Draw the members from a group, as (code, case) in the fixed order of contrasts."""
    s = plan.sequence
    chosen = generator.choice(len(group.members), s.contrast_members, replace=False)

    found = []
    for index in sorted(chosen.tolist()):
        contrast, case = group.members[index]
        code = s.contrasts.index(contrast)
        found.append((code, case))
    return found


def draw_contrast(
    plan: Plan,
    shape_vox: Size,
    spacing_mm: Spacing,
    codes: Sequence[int],
    generator: np.random.Generator,
    affine_generator: np.random.Generator | None = None,
) -> MembersDraw:
    """Draw one crop of ``shape_vox`` for all members of a group.

    Args:
        affine_generator: as in ``spatial.draw``.
    """
    start = draw_start(shape_vox, member_crop(plan, "contrast"), generator)
    starts = [start] * len(codes)
    return _draw(plan, "contrast", starts, codes, spacing_mm, generator, affine_generator)


def choose_locations(
    plan: Plan,
    structure: Structure,
    generator: np.random.Generator,
) -> list[StoredLocation]:
    """Draw a location for every member of a sequence, each in another subject, in random order."""
    by_subject = structure.by_subject()
    chosen = generator.choice(len(by_subject), plan.sequence.semantic_members, replace=False)
    # Locations are in the order of the index, and so are their subjects. The names of subjects are
    # salted hashes, whose order differs between folders.
    subjects = list(by_subject) if plan.data.salt_free else sorted(by_subject)

    found = []
    for index in chosen.tolist():
        locations = by_subject[subjects[index]]
        found.append(rng.any_of(locations, generator))
    return found


def draw_semantic(
    plan: Plan,
    locations: Sequence[StoredLocation],
    spacing_mm: Spacing,
    generator: np.random.Generator,
    affine_generator: np.random.Generator | None = None,
) -> MembersDraw:
    """Draw crops with the structure near their middle, each with its own shift.

    Args:
        affine_generator: as in ``spatial.draw``.
    """
    size = np.array(member_crop(plan, "semantic"))  # (3,)
    shares = generator.uniform(-JITTER, JITTER, (len(locations), 3))
    shifts = shares * size  # (M, 3)

    starts = []
    for location, shift in zip(locations, shifts, strict=True):
        middle = np.array(location.centre_vox) + shift
        start = middle - (size - 1) / 2
        starts.append(as_size(np.rint(start).astype(int)))

    codes = list(member_codes(plan)["semantic"])
    return _draw(plan, "semantic", starts, codes, spacing_mm, generator, affine_generator)


def _draw(
    plan: Plan,
    kind: str,
    starts: Sequence[Size],
    codes: Sequence[int],
    spacing_mm: Spacing,
    generator: np.random.Generator,
    affine_generator: np.random.Generator | None,
) -> MembersDraw:
    """Draw all that is alike in both kinds of sequences of several images."""
    s, token = plan.sequence, plan.encoder.token_size_vox
    size = member_crop(plan, kind)
    whole_grid = grid_of(s.crop_size_vox, token)
    grid = grid_of(size, token)

    # The order of the draws is part of the result: another order gives other samples.
    flip_transpose = draw_flip_transpose(plan, size, spacing_mm, generator)
    # The crop of a member is smaller than the plan's: it takes a window of the plan's positions.
    window = []
    for whole, own in zip(whole_grid, grid, strict=True):
        room = whole - own
        window.append(int(generator.integers(room + 1)))

    ids = sequence_ids(grid, s.block_tokens, num_members(s, kind), s.order)  # (T,)
    num_blocks = int(ids.max()) + 1
    order_index = draw_order_index(ids, s.order, generator)  # (T,)
    prefix = draw_prefix(num_blocks, generator, s)
    affine = None
    if affine_generator is not None:
        affine = draw_affine(plan, spacing_mm, affine_generator)

    return MembersDraw(
        tuple(starts),
        tuple(codes),
        flip_transpose,
        as_size(window),
        prefix,
        order_index,
        affine,
    )


def apply(plan: Plan, kind: str, cases: Sequence[StoredCase], drawn: MembersDraw) -> Sample:
    """Read the members' crops, or the parts of the cases that they will be resampled from."""
    s, token = plan.sequence, plan.encoder.token_size_vox
    size = member_crop(plan, kind)

    # Voxels are (M, C, Z, Y, X), the mask (M, Z, Y, X).
    sources: list[CropSource] = []
    if drawn.affine is None:
        crops = []
        for case, start in zip(cases, drawn.starts, strict=True):
            crops.append(case.read_padded(start, size))
        voxels = np.stack([crop for crop, _ in crops])
        valid_mask = np.stack([mask for _, mask in crops])
    else:
        for case, start in zip(cases, drawn.starts, strict=True):
            sources.append(read_source(case, start, size, drawn.affine, s.max_source))
        voxels, valid_mask = empty_crops(len(cases), size)

    # All members have the same N positions, and differ by their codes.
    whole_grid = grid_of(s.crop_size_vox, token)
    positions = window_positions(whole_grid, grid_of(size, token), drawn.window)  # (N,)
    codes = np.array(drawn.codes, dtype=np.int64)  # (M,)
    return Sample(
        voxels,
        valid_mask,
        drawn.order_index,
        drawn.prefix,
        positions=np.tile(positions, len(cases)),  # (T,), T = M * N
        members=np.repeat(codes, len(positions)),  # (T,)
        flip_transpose=drawn.flip_transpose,
        sources=tuple(sources),
    )
