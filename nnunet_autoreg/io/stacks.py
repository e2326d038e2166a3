"""The slices of a DICOM series sorted into volumes; what keeps them from being one is said with
figures. Pure: no file is read.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.io.slices import ORDER_NAMES, DicomSlice

# Slices that differ in one of these belong to different volumes, wherever they lie.
VOLUME_NAMES = (
    "time",
    "b-value",
    "echo",
    "inversion time",
    "flip angle",
    "gradient direction",
    "acquisition",
)
# Written with few digits, so equal directions and positions differ a little.
SAME_DIRECTION, SAME_SPACING_MM, SAME_POSITION_MM = 5e-3, 1e-3, 1e-2
GRADIENT = ORDER_NAMES.index("gradient direction")
UNEVEN, MISSING = 0.05, 1.5
MAX_DECIMALS = 3
MAX_TILT_DEGREES = 0.5
MAX_STACKS = 6
# Of one series, told apart by the header: phases of a heart, or time points of other coverage each.
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
        repeated_over: what tells the volumes apart.
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
    """The stacks of one series, the largest first; always the same for the same slices, in whatever
    order they come.
    """
    kept = without_copies(originals(slices))
    ordered = sorted(kept, key=lambda s: (s.order[-1], s.position, s.order, s.file, s.frame))
    whole = _whole_problem(ordered)
    if whole[0]:
        return [_broken(ordered, whole)]
    groups: list[list[DicomSlice]] = []
    for one in ordered:
        group = next((g for g in groups if _alike(g[0], one)), None)
        if group is None:
            groups.append(group := [])
        group.append(one)
    if len(groups) > MAX_STACKS:
        return [
            _broken(
                ordered,
                (
                    "slices",
                    f"{len(ordered)} slices in {len(groups)} orientations or sizes (radial, or a "
                    "planning scan); "
                    "no stack of parallel slices",
                ),
            )
        ]
    stacks = [stack for group in groups for stack in _separated(group)]
    return sorted(stacks, key=lambda stack: sum(map(len, stack.volumes)), reverse=True)


def originals(slices: Sequence[DicomSlice]) -> Sequence[DicomSlice]:
    """Return the slices of a series that are not derived; all of them if every one is."""
    kept = [one for one in slices if not one.derived]
    return kept or slices


def _separated(group: list[DicomSlice]) -> list[Stack]:
    """Return the stacks of slices of one size and orientation.

    Slices that differ in echo, time, acquisition and the like are of different volumes. Where these
    lie at the same positions they are the volumes of one 4D stack; elsewhere each is a stack of its
    own, since putting them into one would mix them.
    """
    whole = _stack(group)
    for name in VOLUME_NAMES:
        parts = _parts_by_value(group, ORDER_NAMES.index(name))
        stacks = _stacks_of_parts(parts)
        if not stacks:
            continue
        if whole.problem[0] and (_overlap(stacks) or len(stacks) <= MAX_STACKS):
            return stacks
        # Slabs side by side, as of a CT that moves its table between exposures, make one volume.
        if _overlap(stacks) and not (name == "acquisition" and _are_packages(whole)):
            return stacks

    if whole.problem[0]:
        # Without an overlap the cut is where a slice is missing, and the series stays incomplete.
        passes = _stacks_of_parts(_parts_by_runs(group))
        return passes if passes and _overlap(passes) else [whole]
    return [whole]


def _parts_by_value(group: Sequence[DicomSlice], index: int) -> list[list[DicomSlice]]:
    """Return the slices by the value of ``order[index]``; values that differ by rounding are
    one.
    """
    ordered = sorted(group, key=lambda s: s.order[index])
    parts: list[list[DicomSlice]] = []
    for one in ordered:
        value = one.order[index]
        if parts and math.isclose(
            value, parts[-1][-1].order[index], rel_tol=SAME_VALUE if index != GRADIENT else 0.0
        ):
            parts[-1].append(one)
        else:
            parts.append([one])
    return parts


def _parts_by_runs(group: Sequence[DicomSlice]) -> list[list[DicomSlice]]:
    """Return the slices cut where instance numbers begin a new pass: where the slices jump or turn
    back.
    """
    numbers = {s.order[-1] for s in group}
    direction, bad = _direction(group[0])
    if bad or len(numbers) != len(group):
        return []
    ordered = sorted(group, key=lambda s: s.order[-1])
    heights = (np.array([s.position for s in ordered]) @ direction[:, 2]).tolist()

    parts = [[ordered[0]]]
    step: float | None = None
    for one, before, height in zip(ordered[1:], heights, heights[1:], strict=False):
        gap = height - before
        if step is None or abs(gap - step) <= (MISSING - 1) * abs(step):
            parts[-1].append(one)
            step = gap if step is None else step
        else:
            parts.append([one])
            step = None
    return parts


def _stacks_of_parts(parts: Sequence[list[DicomSlice]]) -> list[Stack]:
    """Return one stack for all parts at the same positions; nothing where that gives one stack, or
    a bad one.
    """
    if not 1 < len(parts) <= MAX_PARTS or min(map(len, parts)) < MIN_PART_SLICES:
        return []
    together: list[list[DicomSlice]] = []
    heights_of: list[npt.NDArray[Any]] = []
    for part in parts:
        direction, _ = _direction(part[0])
        heights = _distinct(np.sort(np.array([s.position for s in part]) @ direction[:, 2]))
        alike = [n for n, known in enumerate(heights_of) if _at_same_places(heights, known)]
        if alike:
            together[alike[0]].extend(part)
        else:
            together.append(list(part))
            heights_of.append(heights)

    stacks = [_stack(members) for members in together]
    if len(stacks) < 2 or any(stack.problem[0] for stack in stacks):
        return []
    return stacks


def _distinct(heights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return sorted heights without repetitions: a part may be several volumes itself, such as all
    directions of a b-value.
    """
    is_new = np.diff(heights, prepend=-np.inf) > SAME_POSITION_MM
    return heights[is_new]


def _at_same_places(heights: npt.NDArray[Any], others: npt.NDArray[Any]) -> bool:
    return len(heights) == len(others) and bool(np.abs(heights - others).max() <= SAME_POSITION_MM)


def _overlap(stacks: Sequence[Stack]) -> bool:
    """Return whether two stacks share more of their extent than one slice; slabs side by side do
    not.
    """
    ends = sorted(_extent(stack) for stack in stacks)
    step = min(stack.spacing_mm[0] for stack in stacks)
    return any(after[0] < before[1] - step / 2 for before, after in pairwise(ends))


def _extent(stack: Stack) -> tuple[float, float]:
    normal = stack.direction[:, 2]
    low, high = (float(np.array(stack.volumes[0][end].position) @ normal) for end in (0, -1))
    return low, high


def _are_packages(whole: Stack) -> bool:
    """Return whether acquisitions between each other's slices make one volume: the slices fit side
    by side.
    """
    return whole.first.thickness < PACKAGE_OVERLAP * whole.spacing_mm[0]


def without_copies(slices: Sequence[DicomSlice]) -> list[DicomSlice]:
    """Each instance once: a file that lies there twice is no second slice."""
    kept: dict[tuple[object, ...], DicomSlice] = {}
    for one in sorted(slices, key=lambda s: (s.file, s.frame)):
        kept.setdefault(one.identity, one)
    return list(kept.values())


def _whole_problem(slices: Sequence[DicomSlice]) -> tuple[str, str]:
    broken = [s.problem for s in slices if s.problem[0]]
    if broken:
        status, reason = broken[0]
        return status, reason if len(
            slices
        ) == 1 else f"{reason} ({len(broken)} of {len(slices)} slices)"
    num_subjects = len({s.subject for s in slices})
    if num_subjects > 1:
        return (
            "slices",
            f"its slices name {num_subjects} different patients under one series; export the "
            "patients apart",
        )
    return "", ""


def _broken(slices: Sequence[DicomSlice], problem: tuple[str, str]) -> Stack:
    return Stack((tuple(slices),), np.eye(3), (math.nan,) * 3, problem=problem)


def _alike(a: DicomSlice, b: DicomSlice) -> bool:
    return (
        a.shape == b.shape
        and a.parts == b.parts
        and a.derived == b.derived
        and (a.frame < 0) == (b.frame < 0)
        and all(
            abs(p - q) <= SAME_SPACING_MM * max(p, q, 1)
            for p, q in zip(a.spacing, b.spacing, strict=True)
        )
        and all(
            abs(p - q) <= SAME_DIRECTION for p, q in zip(a.orientation, b.orientation, strict=True)
        )
    )


def _stack(group: list[DicomSlice]) -> Stack:
    direction, bad = _direction(group[0])
    if bad:
        return _broken(
            group,
            (
                "direction",
                "the rows and columns of its slices are not at right angles; resample the scan "
                "first",
            ),
        )
    heights = np.array([s.position for s in group]) @ direction[:, 2]
    order = np.argsort(heights, kind="stable")
    places: list[list[DicomSlice]] = []
    levels: list[float] = []
    for i in order:
        if not levels or heights[i] - levels[-1] > SAME_POSITION_MM:
            levels.append(float(heights[i]))
            places.append([])
        places[-1].append(group[i])
    volumes, repeated_over, problem = _volumes(places, levels)
    step, uneven = _step(
        levels, places[0][0].spacing, _rounding([place[0] for place in places], direction)
    )
    spacing = (step, *group[0].spacing)
    problem = (
        problem
        if problem[0]
        else uneven
        if uneven[0]
        else _tilt([place[0] for place in places], direction)
    )
    return Stack(volumes, direction, spacing, repeated_over, problem)


def _direction(one: DicomSlice) -> tuple[npt.NDArray[Any], bool]:
    """(directions of x, y and z as columns, whether they are impossible)."""
    x, y = np.array(one.orientation[:3]), np.array(one.orientation[3:])
    lengths = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if any(abs(length - 1) > 1e-2 for length in lengths) or abs(float(x @ y)) > 1e-2:
        return np.eye(3), True
    x = x / lengths[0]
    y = y - (x @ y) * x
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], axis=1), False


def _volumes(
    places: list[list[DicomSlice]], levels: list[float]
) -> tuple[tuple[tuple[DicomSlice, ...], ...], str, tuple[str, str]]:
    """(volumes, what tells them apart, problem) of the slices at each place along the normal."""
    counts = [len(place) for place in places]
    most = max(counts)
    if most == 1:
        return (tuple(place[0] for place in places),), "", ("", "")
    everything = (tuple(s for place in places for s in place),)
    doubled = sum(n > 1 for n in counts)
    where = f"{levels[next(i for i, n in enumerate(counts) if n > 1)]:.2f} mm"
    if len(set(counts)) > 1:
        reason = (
            f"{doubled} of {len(places)} slice positions occur up to {most} times and others "
            f"{min(counts)} (first at {where}); "
            "duplicate slices, or a 4D series with slices missing: export it again"
        )
        return everything, "", ("slices", reason)
    for index, name in enumerate(ORDER_NAMES):
        sets = [sorted({s.order[index] for s in place}) for place in places]
        shared = len(sets[0]) == most and all(
            np.allclose(s, sets[0], rtol=1e-3) for s in sets if len(s) == most
        )
        if all(len(s) == most for s in sets) and (
            shared or name in ("acquisition", "trigger time")
        ):
            ordered = [sorted(place, key=lambda s, i=index: s.order[i]) for place in places]  # type: ignore[misc]
            return tuple(zip(*ordered, strict=True)), name, ("", "")
    if all(len({s.order[:-1] for s in place}) == most for place in places):
        ordered = [sorted(place, key=lambda s: s.order) for place in places]
        return tuple(zip(*ordered, strict=True)), "instance number", ("", "")
    if _runs(places) or _runs_of_places(places):
        ordered = [sorted(place, key=lambda s: s.order[-1]) for place in places]
        return tuple(zip(*ordered, strict=True)), "instance number", ("", "")
    return (
        everything,
        "",
        (
            "slices",
            f"each of {len(places)} slice positions occurs {most} times with nothing that tells "
            "them apart "
            f"(first at {where}): duplicate slices; export it again",
        ),
    )


def _runs(places: list[list[DicomSlice]]) -> bool:
    """Whether instance numbers run through one volume after the other, as in a 4D series that says
    nothing else.
    """
    lowest = [min(s.order[-1] for s in place) for place in places]
    numbers = {s.order[-1] for place in places for s in place}
    total = sum(len(place) for place in places)
    return (
        len(numbers) == total
        and max(lowest) - min(lowest) == len(places) - 1
        and len(places[0]) > 2
    )


def _runs_of_places(places: list[list[DicomSlice]]) -> bool:
    """Whether instance numbers run through all volumes of a slice before the next slice."""
    numbers = [sorted(s.order[-1] for s in place) for place in places]
    total = sum(len(place) for place in places)
    if len({n for of_place in numbers for n in of_place}) != total:
        return False
    return all(of_place[-1] - of_place[0] == len(of_place) - 1 for of_place in numbers)


def _rounding(slices: Sequence[DicomSlice], direction: npt.NDArray[Any]) -> float:
    """Return by how much rounded positions may change the distance of two slices, in mm; 0 for
    exact ones.
    """
    positions = np.array([s.position for s in slices])
    moving = np.ptp(positions, axis=0) > SAME_POSITION_MM
    for num_decimals in range(MAX_DECIMALS + 1):
        scaled = positions[:, moving] * 10**num_decimals
        if np.abs(scaled - np.rint(scaled)).max(initial=0) < 1e-6 * 10**num_decimals:
            # Either end is off by up to half of the last decimal, along each axis that the normal
            # has a part of.
            return float(10.0**-num_decimals * np.abs(direction[moving, 2]).sum())
    return 0.0


def _is_even_within_rounding(levels: list[float], rounding: float) -> bool:
    """Return whether rounding alone can have made the gaps of evenly spaced slices differ as they
    do.
    """
    gaps = np.diff(levels)
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    tolerance = rounding * 1.01
    # Where rounding is coarse beside the gaps, a missing slice would pass for a rounded position.
    if not 0 < tolerance <= step / 2:
        return False
    straight = levels[0] + step * np.arange(len(levels))
    return bool(
        gaps.max() - gaps.min() <= tolerance
        and np.abs(np.array(levels) - straight).max() <= tolerance
    )


def _step(
    levels: list[float], spacing: Sequence[float], rounding: float
) -> tuple[float, tuple[str, str]]:
    """(distance of the slices in mm, problem)."""
    if len(levels) < 2:
        return float(max(spacing)), ("", "")
    gaps = np.diff(levels)
    multiples = gaps / gaps.min()
    usual = float(
        gaps.min() if np.abs(multiples - np.rint(multiples)).max() < UNEVEN else np.median(gaps)
    )
    wrong = np.flatnonzero(np.abs(gaps - usual) > max(UNEVEN * usual, 2 * SAME_POSITION_MM))
    if not wrong.size or _is_even_within_rounding(levels, rounding):
        return round((levels[-1] - levels[0]) / (len(levels) - 1), 5), ("", "")
    widest = int(gaps.argmax())
    between = f"between {levels[widest]:.2f} and {levels[widest + 1]:.2f} mm"
    if gaps[widest] > MISSING * usual:
        num = sum(max(0, round(float(g) / usual) - 1) for g in gaps)
        return usual, (
            "slices",
            f"about {num} of {len(levels) + num} slices are missing: the widest gap is "
            f"{gaps[widest]:.2f} mm "
            f"{between}, the others are {usual:.2f} mm; export the whole series again",
        )
    return usual, (
        "slices",
        f"uneven slices: {gaps.min():.2f} to {gaps.max():.2f} mm apart (widest {between}); "
        "resample the scan first",
    )


def _tilt(places: list[DicomSlice], direction: npt.NDArray[Any]) -> tuple[str, str]:
    """A stack whose slices are shifted against each other in their own plane."""
    if len(places) < 2:
        return "", ""
    along = np.array(places[-1].position) - np.array(places[0].position)
    x, y, z = (float(along @ direction[:, axis]) for axis in range(3))
    degrees = math.degrees(math.atan2(math.hypot(x, y), abs(z)))
    if degrees <= MAX_TILT_DEGREES:
        return "", ""
    return "direction", (
        f"tilted gantry: the slices are sheared by {degrees:.1f} degrees; convert it with "
        "dcm2niix, which corrects that, "
        "and give the result"
    )


def by_series(slices: Sequence[DicomSlice]) -> dict[tuple[str, str], list[DicomSlice]]:
    """Slices by (series, instance of a multi-frame file or ""): each of them is judged alone."""
    groups: dict[tuple[str, str], list[DicomSlice]] = defaultdict(list)
    for one in slices:
        groups[(one.series, one.instance if one.frame >= 0 else "")].append(one)
    return dict(groups)
