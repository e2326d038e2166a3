"""Axis order, millimetres and divisibility.

Arrays are always (C, Z, Y, X) or (Z, Y, X). Sizes are in voxels and spacings in mm, in the same
order (z, y, x). SimpleITK has the order (x, y, z), which only ``zyx`` reverses.
"""

import math
from collections.abc import Iterable, Sequence

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]


def zyx(xyz: Sequence[float]) -> Spacing:
    """Return SimpleITK's (x, y, z) triple in array order (z, y, x)."""
    x, y, z = xyz
    return (float(z), float(y), float(x))


def as_size(values: Sequence[int]) -> Size:
    """Return three ints as a ``Size``."""
    z, y, x = (int(v) for v in values)
    return (z, y, x)


def as_spacing(values: Sequence[float]) -> Spacing:
    """Return three floats as a ``Spacing``."""
    z, y, x = (float(v) for v in values)
    return (z, y, x)


def round_up(size: Sequence[int], multiple: Sequence[int]) -> Size:
    """Return ``size`` with each axis rounded up to a multiple of ``multiple``."""
    return as_size([math.ceil(s / m) * m for s, m in zip(size, multiple, strict=True)])


def multiplied(size: Sequence[int], factors: Sequence[int]) -> Size:
    """Return ``size`` times ``factors``, axis by axis: tokens of a block to voxels, for example."""
    return as_size([side * factor for side, factor in zip(size, factors, strict=True)])


def smaller_of(a: Sequence[int], b: Sequence[int]) -> Size:
    """Return the smaller of two sizes, axis by axis."""
    return as_size([min(p, q) for p, q in zip(a, b, strict=True)])


def box_at(start: Sequence[int], size: Sequence[int]) -> tuple[slice, slice, slice]:
    """Return the slices of z, y and x that cut a box of ``size`` out of an array."""
    z, y, x = (slice(low, low + side) for low, side in zip(start, size, strict=True))
    return (z, y, x)


def grid_of(size: Sequence[int], token: Sequence[int]) -> Size:
    """Return the number of tokens per axis of a volume of ``size`` voxels.

    Raises:
        ValueError: an axis is not a multiple of the token size.
    """
    for axis, s, t in zip("zyx", size, token, strict=True):
        if s % t:
            low = s // t * t
            high = low + t
            near = f"{low} or {high}" if low else f"{high}"
            raise ValueError(
                f"size {s} on axis {axis} is not a multiple of the token size {t}; use {near}",
            )
    return as_size([s // t for s, t in zip(size, token, strict=True)])


def size_text(values: Sequence[float], spec: str = "") -> str:
    """Return sizes or spacings as text: "32 x 48 x 32".

    Args:
        spec: format of each value, e.g. ".3g".
    """
    return " x ".join(f"{value:{spec}}" for value in values)


def names_text(names: Iterable[object], most: int = 3) -> str:
    """Return the first few names as text: "a, b, c and 4 more"."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def largest_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest factor between two spacings, axis by axis; it is at least 1."""
    pairs = zip(a, b, strict=True)
    return max(max(p / q, q / p) for p, q in pairs)


def volume(size: Sequence[int]) -> int:
    """Return the number of voxels of a size."""
    return math.prod(int(s) for s in size)


def spacing_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest factor, over the axes, between two spacings (always >= 1).

    Axes are compared sorted by spacing, because nnU-Net moves the coarsest axis to the front.
    """
    return largest_ratio(sorted(a), sorted(b))
