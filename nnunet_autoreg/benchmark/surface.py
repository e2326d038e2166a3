"""Surface Dice: the share of two surfaces that lies within a tolerance of each other.

Dice counts volume. A border that is wrong by one voxel everywhere changes the Dice of a large
structure little, and that of a thin structure much. Surface Dice counts the area of border that is
close enough, in millimetres.

Source: Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", JMIR 2021
(arXiv 1809.04430). Here the surface is the set of border voxels, each weighted with the area of its
outer faces.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def surface_dice(
    truth: Mask,
    prediction: Mask,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> float:
    """Return the surface Dice of one binary structure, in [0, 1].

    Args:
        truth: mask of the reference, (Z, Y, X).
        prediction: mask of the same shape.
        spacing_mm: voxel size along Z, Y and X.
        tolerance_mm: a border voxel agrees if its centre lies at most this far from the centre of
            a border voxel of the other mask.

    Returns:
        NaN if both masks are empty (there is nothing to score); 0 if only one of them is.

    Raises:
        ValueError: the shapes differ, a spacing is not positive, or the tolerance is negative.
    """
    # SciPy is imported late because it takes a tenth of a second.
    from scipy.ndimage import distance_transform_edt

    truth = np.asarray(truth, dtype=bool)
    prediction = np.asarray(prediction, dtype=bool)
    _check(truth, prediction, spacing_mm, tolerance_mm)

    if not truth.any() and not prediction.any():
        return math.nan
    if not truth.any() or not prediction.any():
        return 0.0

    # Both surfaces lie in the box around both masks, so that a small structure in a large scan
    # costs little.
    either = truth | prediction
    sides = []
    for axis in range(either.ndim):
        others = tuple(other for other in range(either.ndim) if other != axis)
        occupied = np.flatnonzero(either.any(axis=others))
        sides.append(slice(int(occupied[0]), int(occupied[-1]) + 1))

    box = tuple(sides)
    areas_truth = border_areas(truth[box], spacing_mm)
    areas_prediction = border_areas(prediction[box], spacing_mm)

    # The distance transform measures from every voxel to the nearest False, here a border voxel.
    to_truth_mm = distance_transform_edt(areas_truth == 0, sampling=spacing_mm)
    to_prediction_mm = distance_transform_edt(areas_prediction == 0, sampling=spacing_mm)

    # A border exactly at the tolerance agrees, however a spacing such as 0.7 mm is rounded.
    limit_mm = tolerance_mm * (1 + 1e-6)
    agreeing_truth = areas_truth[to_prediction_mm <= limit_mm].sum()
    agreeing_prediction = areas_prediction[to_truth_mm <= limit_mm].sum()

    total = areas_truth.sum() + areas_prediction.sum()
    return float((agreeing_truth + agreeing_prediction) / total)


def surface_dice_of_labels(
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    labels: Sequence[int],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> list[float]:
    """Return the surface Dice of each label of two maps (Z, Y, X); NaN if neither holds it."""
    scores = []
    for label in labels:
        score = surface_dice(truth == label, prediction == label, spacing_mm, tolerance_mm)
        scores.append(score)
    return scores


def border_areas(mask: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Return the area in mm2 of each voxel's faces between the mask and its outside, (Z, Y, X).

    It is 0 for voxels outside and for voxels without such a face. Beyond the array is outside.
    """
    # With a margin of one voxel, rolling never brings a voxel back in on the other side.
    padded = np.pad(mask, 1)
    areas = np.zeros(mask.shape)

    for axis in range(mask.ndim):
        face_mm2 = math.prod(spacing_mm) / spacing_mm[axis]

        for step in (-1, 1):
            neighbour = np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
            areas += face_mm2 * (mask & ~neighbour)
    return areas


def _check(
    truth: Mask,
    prediction: Mask,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> None:
    if truth.ndim != 3 or truth.shape != prediction.shape:
        shapes = f"{truth.shape} and {prediction.shape}"
        raise ValueError(f"surface Dice needs two masks (Z, Y, X) of one shape, not {shapes}")
    if len(spacing_mm) != 3 or not all(spacing > 0 for spacing in spacing_mm):
        found = tuple(spacing_mm)
        raise ValueError(f"surface Dice needs three positive spacings in mm, not {found}")
    if not tolerance_mm >= 0:
        raise ValueError(f"the tolerance of surface Dice is {tolerance_mm} mm; give 0 or more")
