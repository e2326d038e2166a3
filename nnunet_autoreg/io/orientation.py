"""One orientation for all scans: array axes (z, y, x) run towards superior, anterior, right (RAS,
as most NIfTI files are stored).
"""

from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing

# Directions are in DICOM's LPS, so x has to run against L and y against P.
TOWARDS_LPS = (-1.0, -1.0, 1.0)
# Of axes at 45 degrees the stored order stays, regardless of rounding.
CLEARLY = 1e-3

Turn = tuple[tuple[int, int, int], tuple[bool, bool, bool]]


def turn_of(direction: npt.NDArray[Any]) -> Turn:
    """Return how to bring an array to the one orientation, by the whole axes nearest to it.

    Args:
        direction: (3, 3), SimpleITK's: column k is the direction of axis k of (x, y, z) in LPS.

    Returns:
        Which stored array axis comes to z, y and x, and whether it is reversed.
    """
    best, chosen = -1.0, (0, 1, 2)
    # The stored order comes first, so that another one has to be clearly better.
    orders = sorted(permutations(range(3)), key=lambda order: order != (0, 1, 2))
    for order in orders:
        score = 0.0
        for world in range(3):
            score += abs(float(direction[world, order[world]]))
        if score > best + CLEARLY:
            best, chosen = score, (order[0], order[1], order[2])

    reverse = []
    for world in range(3):
        along = float(direction[world, chosen[world]])
        reverse.append(along * TOWARDS_LPS[world] < 0)
    # SimpleITK counts axes as (x, y, z), arrays as (z, y, x).
    x, y, z = (2 - axis for axis in chosen)
    return (z, y, x), (reverse[2], reverse[1], reverse[0])


def turned(array_ZYX: npt.NDArray[Any], turn: Turn) -> npt.NDArray[Any]:
    """Return the array in the one orientation, contiguous."""
    axes, reverse = turn
    steps = tuple(slice(None, None, -1 if r else 1) for r in reverse)
    return np.ascontiguousarray(array_ZYX.transpose(axes)[steps])


def turned_geometry(shape_vox: Size, spacing_mm: Spacing, turn: Turn) -> tuple[Size, Spacing]:
    """Return shape and spacing (z, y, x) in the one orientation."""
    axes, _ = turn
    shape = as_size([shape_vox[axis] for axis in axes])
    spacing = as_spacing([spacing_mm[axis] for axis in axes])
    return shape, spacing
