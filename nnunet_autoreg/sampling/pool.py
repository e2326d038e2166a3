"""The sampling pool: stored cases, groups of cases of one subject, and structures."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.kinds import planned_kinds
from nnunet_autoreg.store.case import StoredCase

Point = tuple[float, float, float]


@dataclass(frozen=True)
class StoredGroup:
    """Several contrasts of one subject on one voxel grid.

    Attributes:
        name: name of the case, for pictures and messages.
        members: (contrast, case) in the fixed order of contrasts; all cases have one shape.
    """

    name: str
    members: tuple[tuple[str, StoredCase], ...]


@dataclass(frozen=True)
class StoredLocation:
    """The position of a structure in one stored case.

    ``corpus.locations.StructureLocation`` is the same in the scan before it was stored.

    Attributes:
        subject: the patient.
        centre_vox: (z, y, x) in the stored case's voxels.
    """

    subject: str
    case: StoredCase
    centre_vox: Point


@dataclass(frozen=True)
class Structure:
    """One structure in several subjects, all stored at one spacing."""

    name: str
    spacing_mm: Spacing
    locations: tuple[StoredLocation, ...]

    def by_subject(self) -> dict[str, list[StoredLocation]]:
        """Return the locations in every subject."""
        found: dict[str, list[StoredLocation]] = {}
        for location in self.locations:
            found.setdefault(location.subject, []).append(location)
        return found


@dataclass(frozen=True)
class SamplingPool:
    """Everything that a sampler may draw from. Small and picklable: no voxels, no open files."""

    cases: tuple[StoredCase, ...]
    groups: tuple[StoredGroup, ...] = ()
    structures: tuple[Structure, ...] = ()
    images: tuple[StoredCase, ...] = ()
    """2D images, as cases of one slice. All other cases are volumes."""

    def num_sources(self, kind: str) -> int:
        """Return the number of cases, groups or structures for sequences of this kind."""
        if kind == "contrast":
            return len(self.groups)
        if kind == "semantic":
            return len(self.structures)
        if kind == "images":
            return len(self.images)
        return len(self.cases)

    def __len__(self) -> int:
        return len(self.cases)


def possible_kinds(plan: Plan, pool: SamplingPool) -> tuple[str, ...]:
    """Return the planned kinds of sequences that can be drawn from this pool."""
    return tuple(kind for kind in planned_kinds(plan) if pool.num_sources(kind))


def as_pool(cases: "SamplingPool | Sequence[StoredCase]") -> SamplingPool:
    """Return plain cases as a pool for sequences of one image each."""
    if isinstance(cases, SamplingPool):
        return cases
    return SamplingPool(tuple(cases))
