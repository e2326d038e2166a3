"""The pool in numbers, checked by hand."""

import numpy as np
import pytest
from refusals import refused

from nnunet_autoreg.corpus.fingerprint import (
    Fingerprint,
    Spread,
    fingerprint,
    row_spacing,
    transpose_axes,
)
from nnunet_autoreg.corpus.index import Index
from nnunet_autoreg.corpus.intensity import body_percentiles
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.corpus.spacing import ScanGeometry, group_scans, parse_policy
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.plan import DataPlan, SpacingGroup
from nnunet_autoreg.records import from_jsonable, to_jsonable


def row(
    name: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    **changes: object,
) -> ScanRow:
    values: dict[str, object] = {
        "id": name,
        "dataset": "d",
        "case": name,
        "channel": "",
        "modality": "MR",
        "source": name,
        "shape_vox": shape,
        "spacing_mm": spacing,
        "cropped_shape_vox": shape,
        "content_hash": name,
        "status": "ok",
        "reason": "",
    }
    return ScanRow(**{**values, **changes})  # type: ignore[arg-type]


def make_index(*rows: ScanRow, hu: tuple[float, ...] = ()) -> Index:
    return Index(rows, np.array(hu, dtype=np.float32))


# The axis with the largest spacing comes first if it is at least 5 % larger than the others.
@pytest.mark.parametrize(
    ("spacing", "axes"),
    [
        ((1.0, 1.0, 1.0), (0, 1, 2)),
        ((10.0, 1.5, 1.5), (0, 1, 2)),
        ((1.0, 1.0, 3.0), (2, 0, 1)),
        ((0.5, 3.0, 1.0), (1, 0, 2)),
        ((1.0, 1.04, 1.0), (0, 1, 2)),
        ((1.0, 1.06, 1.0), (1, 0, 2)),
    ],
)
def test_a_clearly_coarser_axis_comes_to_the_front(
    spacing: tuple[float, ...],
    axes: tuple[int, ...],
) -> None:
    assert transpose_axes(spacing) == axes


def test_medians_are_taken_over_transposed_scans() -> None:
    # Scan b is stored with its coarse axis last; transposed it equals the others.
    found = fingerprint(
        make_index(
            row("a", (10, 20, 30), (4.0, 1.0, 1.0)),
            row("b", (20, 30, 10), (1.0, 1.0, 4.0)),
            row("c", (10, 20, 30), (4.0, 1.0, 1.0)),
        ),
    )

    mr = found.modalities["MR"]
    same = (4.0, 1.0, 1.0)
    assert found.spacing_mm == same
    assert mr.spacing_mm == Spread(same, same, same)
    # Voxels times spacing; the coarsest axis over the finest.
    assert mr.extent_mm.median == (40.0, 20.0, 30.0)
    assert mr.anisotropy.median == (4.0,)
    assert found.median_shape_vox == (10, 20, 30)
    assert found.total_vox == 3 * 6000


def test_shapes_are_those_at_the_asked_spacing() -> None:
    found = fingerprint(make_index(row("a", (10, 20, 30), (4.0, 1.0, 1.0))), (2.0, 2.0, 2.0))

    # 10 x 4 / 2 = 20, 20 / 2 = 10, 30 / 2 = 15.
    assert found.median_shape_vox == (20, 10, 15)
    assert found.total_vox == 3000
    assert found.spacing_mm == (2.0, 2.0, 2.0)
    assert found.modalities["MR"].spacing_mm.median == (4.0, 1.0, 1.0)


def test_one_odd_scan_does_not_move_the_medians() -> None:
    usual = (1.0, 2.0, 3.0, 4.0, 5.0)
    ordinary = []
    for n in range(4):
        ordinary.append(row(str(n), (40, 50, 60), (1.0, 1.0, 1.0), percentiles=usual))
    # Thick slices, and values of a failed rescaling.
    odd = row("odd", (4, 900, 900), (25.0, 1.0, 1.0), percentiles=(0.0, 0.0, 9e9, 9e9, 9e9))
    index = make_index(*ordinary, odd)

    found = fingerprint(index)

    assert found.median_shape_vox == (40, 50, 60)
    assert found.spacing_mm == (1.0, 1.0, 1.0)
    assert found.modalities["MR"].intensity.percentiles["50.0"].median == (3.0,)
    finest = fingerprint(index, "finest")
    isotropic = fingerprint(index, "isotropic")
    assert finest.spacing_mm == isotropic.spacing_mm


def test_only_usable_rows_count_and_channels_of_a_case_are_one_case() -> None:
    # Two channels of case p, of which the CT is 9 x 9 x 3 after cropping; a copy of another case.
    of_ct = {"channel": "CT", "modality": "CT", "cropped_shape_vox": (9, 9, 3)}
    rows = [
        row("a", (9, 9, 9), (1.0, 1.0, 1.0), case="p", channel="T1"),
        row("b", (9, 9, 9), (1.0, 1.0, 1.0), case="p", **of_ct),
        row("c", (9, 9, 9), (1.0, 1.0, 1.0), case="q", status="duplicate"),
    ]

    found = fingerprint(make_index(*rows, hu=(0.0, 100.0)))

    assert (found.num_scans, found.num_cases, found.channel_names) == (2, 1, ("CT", "T1"))
    assert {name: m.num_scans for name, m in found.modalities.items()} == {"CT": 1, "MR": 1}
    # (1 + 1 / 3) / 2.
    assert found.relative_size_after_cropping == pytest.approx(2 / 3)
    # Of the samples 0 and 100 HU.
    window = found.ct_window
    assert window is not None
    assert (window.mean, window.std, window.max) == (50.0, 50.0, 100.0)


def test_a_fingerprint_survives_json() -> None:
    found = fingerprint(make_index(row("a", (10, 20, 30), (4.0, 1.0, 1.0))))

    assert from_jsonable(Fingerprint, to_jsonable(found), "test") == found


def test_a_pool_without_usable_scans_says_what_was_met() -> None:
    rows = [row(name, (9, 9, 9), (1.0, 1.0, 1.0), status="labelmap") for name in "ab"]

    with refused(UsageError, "no-usable-scan", "2 labelmap"):
        fingerprint(make_index(*rows))
    with refused(UsageError, "no-usable-scan", 0):
        fingerprint(make_index())


# A brain MRI and a cine MRI of the heart, (z, y, x) in mm.
BRAIN = (1.0, 1.0, 1.0)
CINE = (10.0, 1.5, 1.5)


def scans(
    *counted: tuple[int, tuple[float, float, float]],
    modality: str = "MR",
    side: int = 100,
) -> list[ScanGeometry]:
    """Return ``count`` scans of each spacing, all with the same number of voxels on every side."""
    found = []
    for count, spacing in counted:
        found += [ScanGeometry(modality, spacing, (side, side, side))] * count
    return found


def targets(
    found: list[ScanGeometry],
    policy: str = "median",
) -> list[tuple[int, tuple[float, float, float]]]:
    """Return the number of scans and the target spacing of every group."""
    return [(len(group.members), group.spacing_mm) for group in group_scans(found, policy)]


def test_cine_and_brain_scans_of_one_pool_keep_their_own_spacing() -> None:
    assert targets(scans((10, BRAIN), (6, CINE))) == [(10, BRAIN), (6, CINE)]


def test_spacings_within_a_factor_of_two_share_the_median() -> None:
    found = scans((3, (1.0, 1.0, 1.0)), (1, (1.2, 1.2, 1.2)), (1, (1.5, 1.5, 1.5)))

    assert targets(found) == [(5, BRAIN)]


def test_three_scans_of_an_odd_spacing_make_a_group_and_two_do_not() -> None:
    assert targets(scans((10, BRAIN), (2, CINE))) == [(12, BRAIN)]
    assert targets(scans((10, BRAIN), (3, CINE))) == [(10, BRAIN), (3, CINE)]
    # Two scans that are all there is have no other group to join.
    assert targets(scans((2, CINE))) == [(2, CINE)]


def test_modalities_have_separate_groups_even_if_they_are_few() -> None:
    found = [*scans((9, BRAIN)), *scans((1, (3.0, 1.0, 1.0)), modality="CT")]

    assert targets(found) == [(9, BRAIN), (1, (3.0, 1.0, 1.0))]


def test_targets_of_two_modalities_that_all_but_agree_are_made_equal() -> None:
    # 0.98 and 0.9766 mm differ by 0.3 %.
    alike = [*scans((9, (3.27, 0.98, 0.98))), *scans((5, (3.2699, 0.9766, 0.9766)), modality="CT")]
    # 3 % are a difference.
    different = [*scans((9, BRAIN)), *scans((5, (1.03, 1.0, 1.0)), modality="CT")]

    assert targets(alike) == [(9, (3.27, 0.98, 0.98)), (5, (3.27, 0.98, 0.98))]
    assert targets(different)[1] == (5, (1.03, 1.0, 1.0))


def test_the_grouping_does_not_depend_on_the_order_of_the_scans() -> None:
    # Three groups, and one scan that has to join one of them.
    found = scans((4, BRAIN), (5, CINE), (4, (0.6, 0.6, 0.6)), (1, (25.0, 1.0, 1.0)))
    rotated = found[3:] + found[:3]

    assert targets(found) == targets(found[::-1]) == targets(rotated)


def test_policies_choose_a_percentile_the_finest_axis_or_the_users_values() -> None:
    # z from 2.0 to 3.0 mm in steps of 0.1.
    found = scans(*((1, (2.0 + 0.1 * n, 1.0, 1.0)) for n in range(11)))

    # The median is the sixth value, the finest is the 10th percentile, so one odd scan cannot set
    # it.
    assert targets(found, "median") == [(11, (2.5, 1.0, 1.0))]
    assert targets(found, "finest") == [(11, (2.1, 1.0, 1.0))]
    assert targets(found, "isotropic") == [(11, (1.0, 1.0, 1.0))]

    [everyone] = group_scans([*found, *scans((5, CINE))], parse_policy("3,2,1"))

    assert everyone.spacing_mm == (3.0, 2.0, 1.0)
    assert len(everyone.members) == 16


def test_small_images_are_not_made_coarser_than_they_are() -> None:
    large = scans((7, (1.5, 1.5, 1.5)), side=150)
    small = scans((3, (1.0, 1.0, 1.0)), side=40)

    (group,) = group_scans(large + small, "median")

    # The median of 10 scans is 1.5 mm, at which an image of 40 voxels would shrink to 27.
    assert targets(large + small) == [(10, (1.0, 1.0, 1.0))]
    assert "no coarser than that of the 3 small images" in group.reason
    # Two small images are too few to decide for all.
    assert targets(large + small[:2]) == [(9, (1.5, 1.5, 1.5))]
    # Small images that are coarser than the median lose nothing.
    fine = scans((7, (1.0, 1.0, 1.0)), side=150)
    coarse = scans((3, (1.5, 1.5, 1.5)), side=40)
    assert targets(fine + coarse) == [(10, (1.0, 1.0, 1.0))]


@pytest.mark.parametrize("policy", ["median", "finest", "isotropic", (2.0, 1.0, 1.0)])
def test_a_scan_gets_the_spacing_at_which_its_group_was_counted(policy: str) -> None:
    # z from 1 to 11 mm, y and x from 0.5 to 2 mm, evenly on a logarithmic scale.
    rng = np.random.default_rng(0)
    rows = []
    for n in range(60):
        spacing = np.round(2 ** rng.uniform((0, -1, -1), (3.5, 1, 1)), 3)
        rows.append(row(str(n), (30, 40, 50), tuple(spacing.tolist())))
    found = fingerprint(make_index(*rows), policy)
    groups = tuple(SpacingGroup(g.modality, g.native_mm, g.spacing_mm) for g in found.groups)
    data = DataPlan(found.spacing_mm, spacing_groups=groups if len(groups) > 1 else ())

    given = [row_spacing(r, data) for r in rows]

    sizes = sorted(given.count(spacing) for spacing in set(given))
    assert sizes == sorted(g.num_scans for g in found.groups)
    assert {g.spacing_mm for g in found.groups} == set(given)
    # The test would show little if all scans were in one group.
    assert len(found.groups) > 1 or not isinstance(policy, str)


@pytest.mark.parametrize(
    ("text", "code", "remedy"),
    [
        ("medan", "spacing-unknown-policy", "'median'"),
        ("1,2", "spacing-numbers", "3,1,1"),
        ("1,2,x", "spacing-numbers", "3,1,1"),
        ("0,1,1", "spacing-numbers", "3,1,1"),
        ("1,1,inf", "spacing-numbers", "3,1,1"),
        ("1 1 1", "spacing-numbers", "3,1,1"),
    ],
)
def test_a_wrong_spacing_policy_is_refused_in_one_line(text: str, code: str, remedy: str) -> None:
    with refused(UsageError, code, text, remedy):
        parse_policy(text)


def test_air_and_padding_do_not_count_as_intensities() -> None:
    # A body of 10^3 voxels with values from 100 to 200, around it 0 or noise below 5.
    scan = np.zeros((20, 20, 20), dtype=np.float32)
    scan[5:15, 5:15, 5:15] = 100 + np.arange(1000, dtype=np.float32).reshape(10, 10, 10) / 10
    noise = np.random.default_rng(0).uniform(1, 5, scan.shape).astype(np.float32)
    noisy = scan + noise * (scan == 0)

    for image in (scan, noisy):
        low, _, middle, _, high = body_percentiles(image, "MR")
        assert low > 100
        assert middle == pytest.approx(150, abs=8)
        assert high < 200

    ct = np.where(scan > 0, scan, -1000).astype(np.float32)
    ct[8:10, 8:10, 8:10] = -900  # air inside the body counts
    of_ct = body_percentiles(ct, "CT")
    assert of_ct[0] == -900
    assert of_ct[2] == pytest.approx(150, abs=1)

    # Nothing but air, or one value everywhere: there is no body.
    assert body_percentiles(np.full((8, 8, 8), -1000, np.float32), "CT") == ()
    assert body_percentiles(np.ones((8, 8, 8), np.float32), "MR") == ()
