"""Sort the slices of a DICOM series into volumes, or say with figures why they are not volumes.

Pure: no file is read.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.io.slices import NO_PROBLEM, ORDER_NAMES, DicomSlice

# The slices at one height along the normal of a stack.
Level = list[DicomSlice]

# Slices that differ in one of these belong to different volumes, wherever they lie.
VOLUME_NAMES = (
    "time",
    "b-value",
    "echo",
    "inversion time",
    "flip angle",
    "gradient direction",
    "contrast agent",
    "acquisition",
    "trigger time",
    "acquisition time",
)
# These may differ between the packages of one volume, and from slice to slice.
PACKAGE_NAMES = ("acquisition", "trigger time", "acquisition time")
# Written with few digits, so equal directions and positions differ a little.
SAME_DIRECTION, SAME_SPACING_MM, SAME_POSITION_MM = 5e-3, 1e-3, 1e-2
# No rounding is allowed for these.
EXACT = tuple(map(ORDER_NAMES.index, ("gradient direction", "acquisition time")))
UNEVEN, MISSING = 0.05, 1.5
MAX_DECIMALS = 3
MAX_TILT_DEGREES = 0.5
MAX_STACKS = 6
# Of one series, by the header: phases of a heart, or time points of different coverage.
MAX_PARTS = 64
MIN_PART_SLICES = 2
SAME_VALUE = 1e-3
# Two acquisitions whose slices lie between each other's are packages of one volume if the slices
# fit side by side.
PACKAGE_OVERLAP = 1.5


@dataclass(frozen=True)
class Stack:
    """The slices of a series that share size, orientation and kind.

    Attributes:
        volumes: the slices of each volume, from the lowest along the normal on; more than one for a
            4D series.
        direction: (3, 3), column k the direction of axis k of (x, y, z) in LPS.
        spacing_mm: (z, y, x).
        repeated_over: the value that differs between the volumes.
        problem: (status, reason) that keeps it from being used; ("", "") mostly.
    """

    volumes: tuple[tuple[DicomSlice, ...], ...]
    direction: npt.NDArray[Any]
    spacing_mm: Spacing
    repeated_over: str = ""
    problem: tuple[str, str] = ("", "")

    @property
    def first(self) -> DicomSlice:
        return self.volumes[0][0]

    @property
    def shape_vox(self) -> Size:
        return (len(self.volumes[0]), *self.first.shape)


def stacks_of(slices: Sequence[DicomSlice]) -> list[Stack]:
    """Return the stacks of one series, the largest first.

    They are the same for the same slices, in any order.
    """
    kept = without_copies(originals(slices))
    ordered = sorted(kept, key=lambda s: (s.order[-1], s.position, s.order, s.file, s.frame))
    problems = [one.problem for one in ordered if one.problem[0]]
    if problems:
        status, reason = problems[0]
        if len(ordered) > 1:
            reason += f" ({len(problems)} of {len(ordered)} slices)"
        return [_broken(ordered, (status, reason))]

    num_subjects = len({one.subject for one in ordered})
    if num_subjects > 1:
        reason = (
            f"its slices name {num_subjects} different patients under one series; export each "
            "patient separately"
        )
        return [_broken(ordered, ("slices", reason))]

    # Slices of like size and orientation, in the order of their first slices.
    groups: list[list[DicomSlice]] = []
    for one in ordered:
        for group in groups:
            if _alike(group[0], one):
                group.append(one)
                break
        else:
            groups.append([one])
    if len(groups) > MAX_STACKS:
        reason = (
            f"{len(ordered)} slices in {len(groups)} orientations or sizes (radial, or a planning "
            "scan); no stack of parallel slices"
        )
        return [_broken(ordered, ("slices", reason))]

    stacks = []
    for group in groups:
        stacks += _separated(group)
    return sorted(stacks, key=lambda stack: sum(map(len, stack.volumes)), reverse=True)


def originals(slices: Sequence[DicomSlice]) -> Sequence[DicomSlice]:
    """Return the slices of a series that are not derived; all of them if every one is."""
    kept = [one for one in slices if not one.derived]
    return kept or slices


def _separated(group: list[DicomSlice]) -> list[Stack]:
    """Return the stacks of slices of one size and orientation.

    Slices that differ in echo, time, acquisition and the like are of different volumes. Where these
    lie at the same positions they are the volumes of one 4D stack; elsewhere each is a separate
    stack, since putting them into one would mix them.
    """
    whole = _stack(group)

    # Some anonymisers give the series of several studies one UID.
    if whole.problem[0]:
        slices_of: dict[str, list[DicomSlice]] = defaultdict(list)
        for one in group:
            slices_of[one.study].append(one)
        studies = _sound_stacks(list(slices_of.values()))
        if studies:
            return studies

    # Slices between each other's slices make one volume if all of them fit side by side. Nothing is
    # known without a thickness (NaN).
    thickest = PACKAGE_OVERLAP * whole.spacing_mm[0]
    thickness, distance = whole.first.thickness, whole.first.distance
    are_packages = thickness < thickest
    # Without a thickness, slices that state a larger distance than they have together are of
    # several passes. Some files state the empty gap instead of the distance, which is less, so that
    # a small number says nothing.
    stated = distance if math.isnan(thickness) else thickness
    are_too_thick = stated >= thickest
    for name in VOLUME_NAMES:
        parts = _parts_by_value(group, ORDER_NAMES.index(name))
        stacks = _stacks_of_parts(parts)
        if not stacks:
            continue
        if whole.problem[0] and (_overlap(stacks) or len(stacks) <= MAX_STACKS):
            return stacks
        # Of one volume, slices may have been acquired at different times.
        is_sure = are_too_thick if name == "acquisition time" else not are_packages
        # Slabs side by side, as of a CT that moves its table between exposures, make one volume.
        if _overlap(stacks) and (name not in PACKAGE_NAMES or is_sure):
            return stacks

    if whole.problem[0] or are_too_thick:
        # Without an overlap the cut is where a slice is missing, and the series stays incomplete.
        passes = _stacks_of_parts(_parts_by_runs(group))
        return passes if passes and _overlap(passes) else [whole]
    return [whole]


def _parts_by_value(group: Sequence[DicomSlice], index: int) -> list[list[DicomSlice]]:
    """Return the slices by the value of ``order[index]``.

    Values that differ by rounding are one. Gradient directions and times have to agree.
    """
    tolerance = 0.0 if index in EXACT else SAME_VALUE
    parts: list[list[DicomSlice]] = []
    for one in sorted(group, key=lambda s: s.order[index]):
        value = one.order[index]
        last = parts[-1][-1].order[index] if parts else math.nan
        if math.isclose(value, last, rel_tol=tolerance):
            parts[-1].append(one)
        else:
            parts.append([one])
    return parts


def _parts_by_runs(group: Sequence[DicomSlice]) -> list[list[DicomSlice]]:
    """Return the slices cut where instance numbers begin a new pass over the patient.

    A new pass begins where the slices jump or turn back.
    """
    numbers = {s.order[-1] for s in group}
    direction, is_impossible = _direction(group[0])
    if is_impossible or len(numbers) != len(group):
        return []
    ordered = sorted(group, key=lambda s: s.order[-1])
    positions = np.array([one.position for one in ordered])  # (N, xyz) in mm
    heights = (positions @ direction[:, 2]).tolist()

    parts = [[ordered[0]]]
    step: float | None = None
    for one, before, height in zip(ordered[1:], heights, heights[1:], strict=False):
        gap = height - before
        if step is None:
            # The second slice of a pass determines the step of the pass.
            parts[-1].append(one)
            step = gap
        elif abs(gap - step) <= (MISSING - 1) * abs(step):
            parts[-1].append(one)
        else:
            parts.append([one])
            step = None
    return parts


def _stacks_of_parts(parts: Sequence[list[DicomSlice]]) -> list[Stack]:
    """Return one stack for all parts at the same positions.

    Returns:
        Nothing if that gives a single stack, or one with a problem.
    """
    is_likely = 1 < len(parts) <= MAX_PARTS
    if not is_likely or min(map(len, parts)) < MIN_PART_SLICES:
        return []
    together: list[list[DicomSlice]] = []
    heights_of: list[npt.NDArray[Any]] = []
    for part in parts:
        direction, _ = _direction(part[0])
        positions = np.array([one.position for one in part])  # (N, xyz) in mm
        all_heights = np.sort(positions @ direction[:, 2])
        # A part may be several volumes itself, such as all directions of a b-value.
        is_new = np.diff(all_heights, prepend=-np.inf) > SAME_POSITION_MM
        heights = all_heights[is_new]

        for known, members in zip(heights_of, together, strict=True):
            is_same_number = len(known) == len(heights)
            if is_same_number and np.abs(heights - known).max() <= SAME_POSITION_MM:
                members.extend(part)
                break
        else:
            together.append(list(part))
            heights_of.append(heights)

    return _sound_stacks(together)


def _sound_stacks(groups: Sequence[list[DicomSlice]]) -> list[Stack]:
    """Return the stack of each group; nothing if there is one group, or a stack has a problem."""
    if len(groups) < 2 or min(map(len, groups)) < MIN_PART_SLICES:
        return []
    stacks = [_stack(group) for group in groups]
    return [] if any(stack.problem[0] for stack in stacks) else stacks


def _overlap(stacks: Sequence[Stack]) -> bool:
    """Return whether two stacks share more of their extent than one slice.

    Slabs side by side do not.
    """
    # Heights of the lowest and the highest slice of each stack along its normal, in mm.
    extents: list[tuple[float, float]] = []
    for stack in stacks:
        normal = stack.direction[:, 2]
        volume = stack.volumes[0]
        lowest_mm = float(np.array(volume[0].position) @ normal)
        highest_mm = float(np.array(volume[-1].position) @ normal)
        extents.append((lowest_mm, highest_mm))

    step = min(stack.spacing_mm[0] for stack in stacks)
    pairs = itertools.pairwise(sorted(extents))
    return any(next_start < end - step / 2 for (_, end), (next_start, _) in pairs)


def without_copies(slices: Sequence[DicomSlice]) -> list[DicomSlice]:
    """Return each instance once: a file that is there twice is not a second slice."""
    kept: dict[tuple[object, ...], DicomSlice] = {}
    for one in sorted(slices, key=lambda s: (s.file, s.frame)):
        kept.setdefault(one.identity, one)
    return list(kept.values())


def _broken(slices: Sequence[DicomSlice], problem: tuple[str, str]) -> Stack:
    return Stack((tuple(slices),), np.eye(3), (math.nan,) * 3, problem=problem)


def _alike(a: DicomSlice, b: DicomSlice) -> bool:
    """Return whether two slices may belong to one stack."""
    kinds = [(one.shape, one.parts, one.derived, one.frame < 0) for one in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    for p, q in zip(a.spacing, b.spacing, strict=True):
        if not abs(p - q) <= SAME_SPACING_MM * max(p, q, 1):
            return False
    differences = [abs(p - q) for p, q in zip(a.orientation, b.orientation, strict=True)]
    return all(difference <= SAME_DIRECTION for difference in differences)


def _stack(group: list[DicomSlice]) -> Stack:
    """Return the stack of slices of one size and orientation, with its problem if it has one."""
    direction, is_impossible = _direction(group[0])
    if is_impossible:
        reason = (
            "the rows and columns of its slices are not at right angles; resample the scan first"
        )
        return _broken(group, ("direction", reason))

    # Slices at one height along the normal are of different volumes.
    positions = np.array([one.position for one in group])  # (N, xyz) in mm
    heights = positions @ direction[:, 2]
    levels: list[Level] = []
    level_mm: list[float] = []
    for i in np.argsort(heights, kind="stable").tolist():
        height = float(heights[i])
        if not level_mm or height - level_mm[-1] > SAME_POSITION_MM:
            level_mm.append(height)
            levels.append([])
        levels[-1].append(group[i])

    lowest = [level[0] for level in levels]
    volumes, repeated_over, problem = _volumes(levels, level_mm)
    step, uneven = _step(level_mm, lowest, direction)
    if not problem[0]:
        problem = uneven

    # Slices may be shifted against each other in their plane.
    along = np.array(lowest[-1].position) - np.array(lowest[0].position)
    x, y, z = (float(along @ direction[:, axis]) for axis in range(3))
    tilt_degrees = math.degrees(math.atan2(math.hypot(x, y), abs(z)))
    if not problem[0] and tilt_degrees > MAX_TILT_DEGREES:
        reason = (
            f"tilted gantry: the slices are sheared by {tilt_degrees:.1f} degrees; convert it "
            "with dcm2niix, which corrects that, and give the result"
        )
        problem = ("direction", reason)
    return Stack(volumes, direction, (step, *group[0].spacing), repeated_over, problem)


def _direction(one: DicomSlice) -> tuple[npt.NDArray[Any], bool]:
    """Return (directions of x, y and z as columns, whether they are impossible)."""
    x = np.array(one.orientation[:3])
    y = np.array(one.orientation[3:])
    errors = (np.linalg.norm(x) - 1, np.linalg.norm(y) - 1, x @ y)
    if max(map(abs, errors)) > 1e-2:
        return np.eye(3), True

    # Headers are rounded, so the axes are made exactly orthonormal.
    x = x / np.linalg.norm(x)
    y = y - (x @ y) * x
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], axis=1), False


def _volumes(
    levels: list[Level],
    level_mm: list[float],
) -> tuple[tuple[tuple[DicomSlice, ...], ...], str, tuple[str, str]]:
    """Return (volumes, the distinguishing value, problem) of the slices at each level."""
    counts = [len(level) for level in levels]
    most = max(counts)
    everything = (tuple(itertools.chain(*levels)),)
    if most == 1:
        return everything, "", NO_PROBLEM

    repeated = [n for n, count in enumerate(counts) if count > 1]
    first_mm = f"{level_mm[repeated[0]]:.2f} mm"
    if len(set(counts)) > 1:
        reason = (
            f"{len(repeated)} of {len(levels)} slice positions occur up to {most} times and others "
            f"{min(counts)} (first at {first_mm}); duplicate slices, or a 4D series with slices "
            "missing: export it again"
        )
        return everything, "", ("slices", reason)

    index, name = _distinguishing_value(levels)
    if name:
        sorted_levels = []
        for level in levels:
            sorted_levels.append(sorted(level, key=lambda one: one.order[index:]))
        return tuple(zip(*sorted_levels, strict=True)), name, NO_PROBLEM
    reason = (
        f"each of {len(levels)} slice positions occurs {most} times and no value "
        f"distinguishes them (first at {first_mm}): duplicate slices; export it again"
    )
    return everything, "", ("slices", reason)


def _distinguishing_value(levels: list[Level]) -> tuple[int, str]:
    """Return where in ``order`` the sorting of each level begins, and the value that differs.

    Returns:
        (0, "") if nothing does.
    """
    num_volumes = len(levels[0])
    for index, name in enumerate(ORDER_NAMES):
        values = []
        for level in levels:
            values.append(sorted({one.order[index] for one in level}))
        if any(len(of_level) != num_volumes for of_level in values):
            continue
        # These continue from slice to slice; the others are the same for a whole volume.
        are_equal = all(np.allclose(of_level, values[0], rtol=1e-3) for of_level in values)
        if name in PACKAGE_NAMES or are_equal:
            return index, name

    # No single value distinguishes the volumes, but all of them together may.
    counts = []
    for level in levels:
        counts.append(len({one.order[:-1] for one in level}))
    if all(count == num_volumes for count in counts):
        return 0, "instance number"
    if _instance_numbers_run(levels):
        return -1, "instance number"
    return 0, ""


def _instance_numbers_run(levels: list[Level]) -> bool:
    """Return whether instance numbers run through volume after volume, or slice after slice.

    This is so in a 4D series that says nothing else.
    """
    numbers = [one.order[-1] for one in itertools.chain(*levels)]
    if len(set(numbers)) != len(numbers):
        return False
    lowest = []
    by_slice = True
    for level in levels:
        of_level = [one.order[-1] for one in level]
        lowest.append(min(of_level))
        by_slice &= max(of_level) - min(of_level) == len(of_level) - 1

    # The first volume has the lowest number of every level, and these follow each other.
    by_volume = max(lowest) - min(lowest) == len(levels) - 1
    return by_slice or (by_volume and len(levels[0]) > 2)


def _is_even_within_rounding(
    level_mm: list[float],
    lowest: Sequence[DicomSlice],
    direction: npt.NDArray[Any],
) -> bool:
    """Return whether rounded positions can make the gaps of even slices differ as they do."""
    positions = np.array([s.position for s in lowest])  # (N, xyz) in mm
    moving = np.ptp(positions, axis=0) > SAME_POSITION_MM
    rounding_mm = 0.0
    for num_decimals in range(MAX_DECIMALS + 1):
        scaled = positions[:, moving] * 10**num_decimals
        if np.abs(scaled - np.rint(scaled)).max(initial=0) < 1e-6 * 10**num_decimals:
            # Either end is off by up to half of the last decimal, along each axis that the normal
            # has a part of.
            rounding_mm = float(10.0**-num_decimals * np.abs(direction[moving, 2]).sum())
            break

    gaps = np.diff(level_mm)
    step = (level_mm[-1] - level_mm[0]) / (len(level_mm) - 1)
    tolerance = rounding_mm * 1.01
    # Where rounding is coarse beside the gaps, a missing slice would pass for a rounded position.
    if not 0 < tolerance <= step / 2:
        return False
    straight = level_mm[0] + step * np.arange(len(level_mm))
    are_like = gaps.max() - gaps.min() <= tolerance
    is_straight = np.abs(np.array(level_mm) - straight).max() <= tolerance
    return bool(are_like and is_straight)


def _step(
    level_mm: list[float],
    lowest: Sequence[DicomSlice],
    direction: npt.NDArray[Any],
) -> tuple[float, tuple[str, str]]:
    """Return (distance of the slices in mm, problem)."""
    if len(level_mm) < 2:
        return float(max(lowest[0].spacing)), NO_PROBLEM
    gaps = np.diff(level_mm)
    multiples = gaps / gaps.min()
    are_multiples = np.abs(multiples - np.rint(multiples)).max() < UNEVEN
    usual = float(gaps.min() if are_multiples else np.median(gaps))

    tolerance = max(UNEVEN * usual, 2 * SAME_POSITION_MM)
    is_even = np.abs(gaps - usual).max() <= tolerance
    if is_even or _is_even_within_rounding(level_mm, lowest, direction):
        extent = level_mm[-1] - level_mm[0]
        return round(extent / (len(level_mm) - 1), 5), NO_PROBLEM

    widest = int(gaps.argmax())
    below, above = level_mm[widest : widest + 2]
    between = f"between {below:.2f} and {above:.2f} mm"
    if gaps[widest] > MISSING * usual:
        num_missing = 0
        for gap in gaps.tolist():
            num_missing += max(0, round(gap / usual) - 1)
        return usual, (
            "slices",
            f"about {num_missing} of {len(level_mm) + num_missing} slices are missing: the widest "
            f"gap is {gaps[widest]:.2f} mm {between}, the others are {usual:.2f} mm; export the "
            "whole series again",
        )
    return usual, (
        "slices",
        f"uneven slices: {gaps.min():.2f} to {gaps.max():.2f} mm apart (widest {between}); "
        "resample the scan first",
    )


def by_series(slices: Sequence[DicomSlice]) -> dict[tuple[str, str], list[DicomSlice]]:
    """Return slices by (series, instance of a multi-frame file or "").

    A multi-frame file is a separate series.
    """
    groups: dict[tuple[str, str], list[DicomSlice]] = defaultdict(list)
    for one in slices:
        instance = one.instance if one.frame >= 0 else ""
        groups[one.series, instance].append(one)
    return dict(groups)
