"""Collect scans, groups and positions of structures in a sampling pool."""

import logging
from collections.abc import Mapping, Sequence

from nnunet_autoreg.corpus.groups import ContrastGroup
from nnunet_autoreg.corpus.locations import StructureLocation
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.kinds import planned_kinds
from nnunet_autoreg.sampling.pool import (
    SamplingPool,
    StoredGroup,
    StoredLocation,
    Structure,
    possible_kinds,
)
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)


def gather(
    plan: Plan,
    cases: Mapping[str, StoredCase],
    groups: Sequence[tuple[ContrastGroup, Sequence[StoredCase]]],
    locations: Sequence[StructureLocation],
    images: Sequence[StoredCase] = (),
) -> SamplingPool:
    """Return the sampling pool for the plan's kinds of sequences.

    Args:
        cases: by id of the scan. Groups and locations of other scans are left out.
        groups: with their members' cases on one grid.
        locations: positions of structures in the scans.
        images: 2D images.
    """
    kinds, s = planned_kinds(plan), plan.sequence

    stored_groups = []
    if "contrast" in kinds:
        for group, group_cases in groups:
            # A group is used as a whole, so that validation scans never enter by it.
            if not all(row.id in cases for row in group.rows):
                continue
            by_contrast = dict(zip(group.contrasts, group_cases, strict=True))
            members = [(name, by_contrast[name]) for name in s.contrasts if name in by_contrast]
            if len(members) >= s.contrast_members:
                stored_groups.append(StoredGroup(group.name, tuple(members)))

    structures = []
    if "semantic" in kinds:
        # All members of a sequence have one voxel size, so structures are split by spacing.
        found: dict[tuple[str, Spacing], list[StoredLocation]] = {}
        for location in locations:
            case = cases.get(location.scan)
            if case is None:
                continue
            # Shares of an axis count from the outer face of the first voxel, positions from its
            # middle.
            shares = zip(location.centre, case.shape_vox, strict=True)
            z, y, x = (share * length - 0.5 for share, length in shares)
            stored = StoredLocation(location.subject, case, (z, y, x))
            found.setdefault((location.structure, case.spacing_mm), []).append(stored)

        for name, spacing_mm in sorted(found):
            structure = Structure(name, spacing_mm, tuple(found[name, spacing_mm]))
            if len(structure.by_subject()) >= s.semantic_members:
                structures.append(structure)

    return SamplingPool(
        tuple(cases.values()),
        tuple(stored_groups),
        tuple(structures),
        tuple(images),
    )


def check_training(plan: Plan, pool: SamplingPool) -> None:
    """Refuse a plan with kinds of sequences that the training scans do not allow.

    Raises:
        AutoregError: the training scans lack what a kind of sequence needs.
    """
    s = plan.sequence
    contrasts = ", ".join(s.contrasts)
    needed = {
        "contrast": f"subject has {s.contrast_members} of the contrasts {contrasts}",
        "semantic": f"structure is known in {s.semantic_members} subjects",
        "images": "2D image is left",
    }
    for kind in planned_kinds(plan):
        if not pool.num_sources(kind):
            missing = needed.get(kind, "scan is left")
            raise AutoregError(
                f"sequence.weights.{kind}={s.weights[kind]}: among the training scans no "
                f"{missing}; give more scans, or use another --name and leave {kind} out of "
                "--sequences",
                code="sequences-impossible",
            )


def validation_kinds(plan: Plan, pool: SamplingPool) -> tuple[str, ...]:
    """Return the kinds of sequences that the validation scans allow, and log the others."""
    possible = possible_kinds(plan, pool)
    lacking = [kind for kind in planned_kinds(plan) if kind not in possible]
    if pool.cases and lacking:
        log.info(
            "the validation scans are too few for %s sequences; their error is not measured",
            " and ".join(lacking),
        )
    return possible
