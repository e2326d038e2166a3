"""From scans, groups and places to the pool that sequences are cut from."""

import logging
from collections.abc import Mapping, Sequence

from nnunet_autoreg.corpus.groups import ContrastGroup
from nnunet_autoreg.corpus.locations import StructureLocation
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.kinds import wanted
from nnunet_autoreg.sampling.pool import Place, SamplingPool, StoredGroup, Structure
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)


def gather(
    plan: Plan,
    cases: Mapping[str, StoredCase],
    groups: Sequence[tuple[ContrastGroup, Sequence[StoredCase]]],
    places: Sequence[StructureLocation],
) -> SamplingPool:
    """What the plan's kinds of sequences may be cut from.

    Args:
        cases: by id of the scan; only their scans are used, also of groups and places.
        groups: with their members' cases on one grid.
        places: of structures in the scans.
    """
    kinds, s = wanted(plan), plan.sequence
    chosen_groups, structures = [], []
    if "contrast" in kinds:
        chosen_groups = [
            _group(group, members, s.contrasts)
            for group, members in groups
            if all(row.id in cases for row in group.rows)
        ]
        chosen_groups = [
            group for group in chosen_groups if len(group.members) >= s.contrast_members
        ]
    if "semantic" in kinds:
        structures = [
            x for x in _structures(cases, places) if len(x.by_subject()) >= s.semantic_members
        ]
    return SamplingPool(tuple(cases.values()), tuple(chosen_groups), tuple(structures))


def check_training(plan: Plan, pool: SamplingPool) -> None:
    """Refuse a plan that asks for sequences that the training scans cannot give.

    Raises:
        AutoregError: with the way out.
    """
    s = plan.sequence
    needed = {
        "contrast": f"subject has {s.contrast_members} of the contrasts {', '.join(s.contrasts)}",
        "semantic": f"structure is known in {s.semantic_members} subjects",
    }
    for kind in wanted(plan):
        if not pool.num_sources(kind):
            raise AutoregError(
                f"sequence.weights.{kind}={s.weights[kind]}: among the training scans no "
                f"{needed.get(kind, 'scan is left')}; "
                f"give more scans, or use another --name and leave {kind} out of --sequences",
                code="sequences-impossible",
            )


def validation_kinds(plan: Plan, pool: SamplingPool) -> tuple[str, ...]:
    """Return the kinds that validation scans can give, and log those that they cannot."""
    given = tuple(kind for kind in wanted(plan) if pool.num_sources(kind))
    lacking = [kind for kind in wanted(plan) if kind not in given]
    if pool.cases and lacking:
        log.info(
            "the validation scans are too few for %s sequences; their error is not measured",
            " and ".join(lacking),
        )
    return given


def _group(
    group: ContrastGroup, members: Sequence[StoredCase], contrasts: Sequence[str]
) -> StoredGroup:
    pairs = [
        (word, case)
        for word, case in zip(group.contrasts, members, strict=True)
        if word in contrasts
    ]
    return StoredGroup(
        group.name, tuple(sorted(pairs, key=lambda pair: list(contrasts).index(pair[0])))
    )


def _structures(
    cases: Mapping[str, StoredCase], places: Sequence[StructureLocation]
) -> list[Structure]:
    """Structures by name and spacing: what lies in one sequence has one voxel size."""
    found: dict[tuple[str, tuple[float, float, float]], list[Place]] = {}
    for known in places:
        if known.scan in cases:
            case = cases[known.scan]
            z, y, x = (
                share * n - 0.5 for share, n in zip(known.centre, case.shape_vox, strict=True)
            )
            found.setdefault((known.structure, case.spacing_mm), []).append(
                Place(known.subject, case, (z, y, x))
            )
    return [
        Structure(name, spacing, tuple(where))
        for (name, spacing), where in sorted(found.items(), key=lambda item: item[0])
    ]
