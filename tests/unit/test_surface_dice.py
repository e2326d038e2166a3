"""Surface Dice, with values computed by hand."""

import math

import numpy as np
import pytest

from nnunet_autoreg.benchmark.surface import border_areas, surface_dice, surface_dice_of_labels

ISOTROPIC = (1.0, 1.0, 1.0)


def cube(start: tuple[int, int, int], edges: tuple[int, int, int] = (4, 4, 4)) -> np.ndarray:
    mask = np.zeros((16, 16, 16), bool)
    z, y, x = start
    mask[z : z + edges[0], y : y + edges[1], x : x + edges[2]] = True
    return mask


def test_the_border_of_a_cube_has_the_area_of_its_six_faces() -> None:
    spacing = (3.0, 2.0, 0.5)

    areas = border_areas(cube((4, 4, 4)), spacing)

    # Two faces each of 8 x 2, 12 x 2 and 12 x 8 mm.
    assert areas.sum() == pytest.approx(2 * (8 * 2 + 12 * 2 + 12 * 8))
    assert areas[5:7, 5:7, 5:7].sum() == 0


def test_a_mask_at_the_edge_of_the_scan_ends_there() -> None:
    # Faces of 2 x 3, 2 x 4 and 3 x 4 voxels.
    assert border_areas(np.ones((2, 3, 4), bool), ISOTROPIC).sum() == 2 * (6 + 8 + 12)


def test_equal_masks_score_one_at_any_tolerance() -> None:
    assert surface_dice(cube((4, 4, 4)), cube((4, 4, 4)), ISOTROPIC, 0.0) == 1.0


def test_a_cube_shifted_by_one_voxel_scores_one_within_it() -> None:
    assert surface_dice(cube((4, 4, 4)), cube((4, 4, 5)), ISOTROPIC, 1.0) == 1.0


def test_a_cube_shifted_by_one_voxel_scores_as_counted_by_hand() -> None:
    # A cube has 96 mm2: four layers across the shift with 16 mm2 of sides, and two ends of 16 mm2.
    # The first layer lies outside the other cube. The two middle layers agree with their sides.
    # In the last layer, the ring agrees with its 16 mm2 of sides and its 12 end faces, whereas the
    # 4 inner voxels lie inside the other cube.
    score = surface_dice(cube((4, 4, 4)), cube((4, 4, 5)), ISOTROPIC, 0.5)

    assert score == pytest.approx((16 + 16 + 16 + 12) / 96)


def test_the_tolerance_is_in_millimetres_along_each_axis() -> None:
    spacing = (5.0, 1.0, 1.0)

    # One voxel is 5 mm between slices and 1 mm within them; the tolerance is 2 mm.
    along_slices = surface_dice(cube((4, 4, 4)), cube((5, 4, 4)), spacing, 2.0)
    in_plane = surface_dice(cube((4, 4, 4)), cube((4, 5, 4)), spacing, 2.0)

    assert in_plane == 1.0
    assert along_slices < 1.0


def test_a_border_exactly_at_the_tolerance_agrees() -> None:
    # 0.1 * 3 is a little more than 0.3 in binary numbers, and sums of 0.1 are not exact either.
    assert surface_dice(cube((4, 4, 4)), cube((4, 4, 7)), (1.0, 1.0, 0.1), 0.1 * 3) == 1.0


def test_masks_far_apart_score_zero() -> None:
    assert surface_dice(cube((0, 0, 0)), cube((11, 11, 11)), ISOTROPIC, 2.0) == 0.0


def test_both_masks_empty_is_nothing_to_score() -> None:
    empty = np.zeros((16, 16, 16), bool)

    assert math.isnan(surface_dice(empty, empty, ISOTROPIC, 1.0))


def test_one_empty_mask_scores_zero() -> None:
    empty = np.zeros((16, 16, 16), bool)

    assert surface_dice(cube((4, 4, 4)), empty, ISOTROPIC, 100.0) == 0.0
    assert surface_dice(empty, cube((4, 4, 4)), ISOTROPIC, 100.0) == 0.0


def test_the_score_does_not_depend_on_which_mask_is_the_truth() -> None:
    first = cube((4, 4, 4), (5, 3, 4))
    second = cube((5, 4, 3), (3, 5, 4))

    there = surface_dice(first, second, (2.0, 1.0, 1.0), 1.0)
    back = surface_dice(second, first, (2.0, 1.0, 1.0), 1.0)

    assert there == back
    assert 0 < there < 1


def test_every_label_is_scored_separately() -> None:
    truth = cube((2, 2, 2)) + 2 * cube((9, 9, 9))
    prediction = 1 * cube((2, 2, 2))

    scores = surface_dice_of_labels(truth, prediction, (1, 2, 3), ISOTROPIC, 1.0)

    assert scores[:2] == [1.0, 0.0]
    assert math.isnan(scores[2])


@pytest.mark.parametrize(
    ("spacing", "tolerance", "shape"),
    [
        ((1, 1, 0), 1.0, (4, 4, 4)),
        ((1, 1), 1.0, (4, 4, 4)),
        ((1, 1, 1), -1.0, (4, 4, 4)),
        ((1, 1, 1), math.nan, (4, 4, 4)),
        ((1, 1, 1), 1.0, (4, 4, 5)),
    ],
)
def test_what_cannot_be_scored_is_refused(
    spacing: tuple[float, ...],
    tolerance: float,
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError):
        surface_dice(np.ones((4, 4, 4), bool), np.ones(shape, bool), spacing, tolerance)
