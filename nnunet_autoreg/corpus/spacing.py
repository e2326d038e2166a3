"""Target spacings: groups of scans with similar spacing, each with its own target, and the
policies.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.geometry import Spacing, as_spacing, largest_ratio, volume
from nnunet_autoreg.plan import DataPlan

MEDIAN, FINEST, ISOTROPIC = POLICIES = ("median", "finest", "isotropic")
GROUP_RATIO = 2.0
"""Beyond this factor fine-tuning does not choose weights automatically. Spacings of one group
differ less.
"""
MIN_GROUP_SCANS = 3
"""Fewer scans of an unusual spacing are outliers, which join the nearest group."""
SMALL_IMAGE_VOX = 64**3
ALIKE_RATIO = 1.02
BINS_PER_OCTAVE = 8
FINEST_PERCENTILE = 10
RECENTRINGS = 8

Indices = npt.NDArray[np.int64]
Log2 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScanGeometry:
    """The properties of a scan for its target spacing. Axes are transposed: the coarsest first,
    then (y, x).

    Attributes:
        shape_vox: after cropping to non-zero.
    """

    modality: str
    spacing_mm: Spacing
    shape_vox: tuple[int, int, int]


@dataclass(frozen=True)
class ScanGroup:
    """Scans that share a target spacing.

    Attributes:
        native_mm: median of its scans' own spacings; a scan belongs to the group whose median is
            nearest.
        spacing_mm: the target.
        members: positions in the list that was grouped.
        reason: the rule that gave the target.
    """

    modality: str
    native_mm: Spacing
    spacing_mm: Spacing
    members: tuple[int, ...]
    reason: str


def parse_policy(text: str) -> str | Spacing:
    """Return a policy's name, or an explicit spacing "z,y,x" in mm.

    Raises:
        UsageError: it is neither.
    """
    if text in POLICIES:
        return text
    if not re.search(r"\d", text):
        raise UsageError(
            f"--spacing {text}: {did_you_mean(text, POLICIES)}; or give z,y,x in mm, e.g. 3,1,1",
            code="spacing-unknown-policy",
        )
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 < n < math.inf for n in numbers):
        raise UsageError(
            f"--spacing {text}: give three numbers greater than 0, z,y,x in mm with the coarsest "
            "first, e.g. 3,1,1",
            code="spacing-numbers",
        )
    return as_spacing(numbers)


def group_scans(scans: Sequence[ScanGeometry], policy: str | Spacing) -> list[ScanGroup]:
    """Return groups with their target spacings, the largest first.

    An explicit spacing puts all scans into one group.

    Scans of one modality and of spacings within about a factor of 2 share a target; so a cine MR of
    10 x 1.5 x 1.5 mm and a brain of 1 mm, in one pool, both stay near their own resolution. One or
    two scans of an unusual spacing form no group and do not change a target. Targets within 2 % of
    each other become that of the larger group.
    """
    if not isinstance(policy, str):
        everyone = tuple(range(len(scans)))
        return [ScanGroup("", policy, policy, everyone, "set by the user for all scans")]

    groups = []
    for modality in sorted({scan.modality for scan in scans}):
        positions = np.array([i for i, scan in enumerate(scans) if scan.modality == modality])
        spacings = np.array([scans[i].spacing_mm for i in positions], dtype=np.float64)  # (N, 3)

        # The cores say which groups there are; then every scan joins the nearest of them.
        cores = _cores(np.log2(spacings))
        natives = [_rounded(np.median(spacings[core], axis=0)) for core in cores]
        nearest = np.array([_nearest(spacing, natives) for spacing in spacings.tolist()])

        for number, core in enumerate(cores):
            members = tuple(positions[nearest == number].tolist())
            if members:
                # Only the core determines the target, so outliers do not change it.
                target, reason = target_of([scans[i] for i in positions[core]], policy)
                groups.append(ScanGroup(modality, natives[number], target, members, reason))

    # Of groups of one size the finer comes first, so that the order of the scans changes nothing.
    groups.sort(key=lambda group: (-len(group.members), math.prod(group.spacing_mm)))

    # Almost equal targets are made equal: CT and MR of one patient then have voxels of one size.
    targets: list[Spacing] = []
    aligned = []
    for group in groups:
        alike = [
            target for target in targets if largest_ratio(target, group.spacing_mm) <= ALIKE_RATIO
        ]
        target_mm = alike[0] if alike else group.spacing_mm
        targets.append(target_mm)
        aligned.append(replace(group, spacing_mm=target_mm))
    return aligned


def target_of(scans: Sequence[ScanGeometry], policy: str) -> tuple[Spacing, str]:
    """Return the target spacing of one group, and the rule.

    ``median``: the median of the scans' spacings per axis, but not coarser than the median of the
        small images, whose structures would be lost first. ``finest``: the 10th percentile per
        axis. ``isotropic``: the median's finest axis on all three.
    """
    spacings = np.array([scan.spacing_mm for scan in scans], dtype=np.float64)
    median = np.median(spacings, axis=0)
    if policy == FINEST:
        finest = _rounded(np.percentile(spacings, FINEST_PERCENTILE, axis=0))
        return finest, f"{FINEST_PERCENTILE}th percentile of {len(scans)} scans"
    if policy == ISOTROPIC:
        cube = _rounded(np.full(3, median.min()))
        return cube, f"the finest axis of the median of {len(scans)} scans, on every axis"

    rule = f"native median of {len(scans)} scans"
    small = [i for i, scan in enumerate(scans) if volume(scan.shape_vox) < SMALL_IMAGE_VOX]
    if len(small) >= MIN_GROUP_SCANS:
        median_of_small = np.median(spacings[small], axis=0)
        if (median_of_small < median).any():
            rule += f", no coarser than that of the {len(small)} small images among them"
            return _rounded(np.minimum(median, median_of_small)), rule
    return _rounded(median), rule


def target_spacing(modality: str, spacing_mm: Sequence[float], data: DataPlan) -> Spacing:
    """Return the target spacing of a scan.

    It is the target of its modality's nearest group, else ``data.spacing_mm``.

    Args:
        spacing_mm: spacing of the scan, the coarsest axis first.
    """
    own = [group for group in data.spacing_groups if group.modality == modality]
    if not own:
        return data.spacing_mm
    nearest = _nearest(spacing_mm, [group.native_mm for group in own])
    return own[nearest].spacing_mm


def _nearest(spacing_mm: Sequence[float], others_mm: Sequence[Spacing]) -> int:
    """Return the index of the spacing with the smallest factor on its worst axis."""
    worst = []
    for other_mm in others_mm:
        octaves = [abs(math.log2(p / q)) for p, q in zip(spacing_mm, other_mm, strict=True)]
        worst.append(max(octaves))
    return worst.index(min(worst))


def _rounded(spacing: npt.NDArray[np.float64]) -> Spacing:
    """Round to a nanometre, so that sums in another order give the same plan."""
    return as_spacing([round(float(s), 6) for s in spacing])


def _cores(logs: Log2) -> list[Indices]:
    """Return the cores of the groups of one modality, the densest first.

    The first group has no minimum size.
    """
    # Binned, because comparing every pair of many thousand scans would take too much memory.
    binned = np.round(logs * BINS_PER_OCTAVE) / BINS_PER_OCTAVE
    points, of_scan, counts = np.unique(binned, axis=0, return_inverse=True, return_counts=True)

    # Points are near each other within GROUP_RATIO along every axis.
    radius = math.log2(GROUP_RATIO) + 1e-9
    distances = np.abs(points[:, None] - points[None]).max(axis=-1)  # (points, points)
    near = distances <= radius

    free = np.ones(len(points), dtype=bool)
    cores: list[Indices] = []
    while free.any():
        # The free points around the one with the most scans near it.
        scans_around = np.where(free, (near & free[None]) @ counts, -1)
        ball: npt.NDArray[np.bool_] = near[int(scans_around.argmax())] & free

        # The densest point may lie at the edge of its group, so the ball moves to the median.
        for _ in range(RECENTRINGS):
            centre = np.median(np.repeat(points[ball], counts[ball], axis=0), axis=0)
            moved = (np.abs(points - centre).max(axis=-1) <= radius) & free
            if not moved.any() or (moved == ball).all():
                break
            ball = moved

        if cores and counts[ball].sum() < MIN_GROUP_SCANS:
            break
        cores.append(np.flatnonzero(ball[of_scan.reshape(-1)]))
        free &= ~ball
    return cores
