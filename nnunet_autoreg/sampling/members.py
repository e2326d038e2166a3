"""Sequences of several images: contrasts of one subject at one place, or one structure in several
subjects.

All members are cropped alike, turned alike and given one window of the plan's grid of positions.
What is random is drawn first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.affine import Affine, Source, draw_affine, read_source
from nnunet_autoreg.sampling.blocks import draw_prefix, sequence_ids, token_ranks, window_positions
from nnunet_autoreg.sampling.kinds import member_codes, member_crop, num_members
from nnunet_autoreg.sampling.pool import Place, StoredGroup, Structure
from nnunet_autoreg.sampling.sample import Sample, unread
from nnunet_autoreg.sampling.spatial import draw_start
from nnunet_autoreg.sampling.turn import Turn, draw_turn
from nnunet_autoreg.store.case import StoredCase

JITTER = 1 / 8
"""How far a structure may lie from the middle of its crop, as a share of the crop."""


@dataclass(frozen=True)
class MembersDraw:
    """The random choices of one sample.

    Attributes:
        starts: per member, first voxel of its crop, (z, y, x); may reach beyond the case.
        codes: per member, its code.
        turn: as in ``spatial.SpatialDraw``, the same for all members.
        window: first token, in the plan's grid, of the positions that the crops take.
        prefix: number of given blocks.
        ranks: block rank per token, (T,), member after member.
        affine: how the crops are rotated and zoomed, the same for all members; None where they are
            not.
    """

    starts: tuple[Size, ...]
    codes: tuple[int, ...]
    turn: Turn
    window: Size
    prefix: int
    ranks: NDArray[np.int64]
    affine: Affine | None = None


def choose_contrasts(
    plan: Plan, group: StoredGroup, generator: np.random.Generator
) -> list[tuple[int, StoredCase]]:
    """(code, case) of the members: all of the group, or a random choice of it where it has more; in
    the fixed order of contrasts.
    """
    chosen = generator.choice(len(group.members), plan.sequence.contrast_members, replace=False)
    members = (group.members[i] for i in sorted(chosen.tolist()))
    return [(plan.sequence.contrasts.index(contrast), case) for contrast, case in members]


def draw_contrast(
    plan: Plan,
    shape_vox: Size,
    spacing_mm: Spacing,
    codes: Sequence[int],
    generator: np.random.Generator,
    affine_generator: np.random.Generator | None = None,
) -> MembersDraw:
    """Draw one crop of ``shape_vox`` for all members of a group; ``affine_generator`` as in
    ``spatial.draw``.
    """
    start = draw_start(shape_vox, member_crop(plan, "contrast"), generator)
    return _draw(
        plan, "contrast", [start] * len(codes), codes, spacing_mm, generator, affine_generator
    )


def choose_places(plan: Plan, structure: Structure, generator: np.random.Generator) -> list[Place]:
    """As many places as a sequence has members, each of another subject, in random order."""
    subjects = structure.by_subject()
    chosen = generator.choice(len(subjects), plan.sequence.semantic_members, replace=False)
    names = sorted(subjects)
    return [
        subjects[names[i]][int(generator.integers(len(subjects[names[i]])))]
        for i in chosen.tolist()
    ]


def draw_semantic(
    plan: Plan,
    places: Sequence[Place],
    spacing_mm: Spacing,
    generator: np.random.Generator,
    affine_generator: np.random.Generator | None = None,
) -> MembersDraw:
    """Draw crops with the structure near their middle, each moved a little by itself;
    ``affine_generator`` as in ``spatial.draw``.
    """
    size = np.array(member_crop(plan, "semantic"))
    moved = generator.uniform(-JITTER, JITTER, (len(places), 3)) * size
    starts = [
        as_size(np.rint(np.array(p.centre_vox) + m - (size - 1) / 2).astype(int))
        for p, m in zip(places, moved, strict=True)
    ]
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
    s, size, token = plan.sequence, member_crop(plan, kind), plan.encoder.token_size_vox
    turn = draw_turn(plan, size, spacing_mm, generator)
    room = [
        a - b for a, b in zip(grid_of(s.crop_size_vox, token), grid_of(size, token), strict=True)
    ]
    window = as_size([int(generator.integers(r + 1)) for r in room])
    ids = sequence_ids(grid_of(size, token), s.block_tokens, num_members(s, kind), s.order)
    ranks = token_ranks(ids, s.order, generator)
    prefix = draw_prefix(int(ids.max()) + 1, generator, s)
    affine = None if affine_generator is None else draw_affine(plan, spacing_mm, affine_generator)
    return MembersDraw(tuple(starts), tuple(codes), turn, window, prefix, ranks, affine)


def apply(plan: Plan, kind: str, cases: Sequence[StoredCase], drawn: MembersDraw) -> Sample:
    """Read the members' crops, or what they are going to be resampled from; all are turned
    alike.
    """
    size, token, affine = member_crop(plan, kind), plan.encoder.token_size_vox, drawn.affine
    places = list(zip(cases, drawn.starts, strict=True))
    if affine is None:
        crops = [case.read_padded(start, size) for case, start in places]
        voxels, real = (
            np.stack([voxels for voxels, _ in crops]),
            np.stack([real for _, real in crops]),
        )
        sources: tuple[Source, ...] = ()
    else:
        voxels, real = unread(len(places), size)
        sources = tuple(
            read_source(case, start, size, affine, plan.sequence.max_source)
            for case, start in places
        )

    positions = window_positions(
        grid_of(plan.sequence.crop_size_vox, token), grid_of(size, token), drawn.window
    )
    return Sample(
        voxels,
        real,
        drawn.ranks,
        drawn.prefix,
        positions=np.tile(positions, len(places)),
        members=np.repeat(np.array(drawn.codes, dtype=np.int64), len(positions)),
        turn=drawn.turn,
        sources=sources,
    )
