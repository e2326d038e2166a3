"""Equal scans are recognised by their hash, and nearly equal ones by their signature."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nnunet_autoreg.corpus.content import (
    NUM_POINTS,
    TOLERANCE,
    _close_pairs,
    content_hash,
    earlier_hash,
    has_content,
    settle_copies,
    signature,
)
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.nnunet_api import RawScan

ONE = (2.0, 1.0, 1.0)


def integers(seed: int = 0) -> Any:
    values = np.random.default_rng(seed).integers(-1000, 1000, (1, 12, 16, 20))
    return values.astype(np.float32)


def fractions(seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(300, 100, (1, 12, 16, 20))
    return values.astype(np.float32)


def jittered(array: Any) -> Any:
    """As after a rescale slope that was rounded elsewhere: off in the 7th digit."""
    return (array.astype(np.float64) * (1 + 2e-7)).astype(np.float32)


def row(name: str, array: Any, spacing: Any = ONE, status: str = "ok") -> ScanRow:
    size = tuple(array.shape[1:])
    return ScanRow(
        name,
        "pool",
        name,
        "",
        "MR",
        f"/pool/{name}",
        size,
        spacing,
        size,
        content_hash(RawScan(array, spacing)),
        status,
        "",
    )


def settled(*scans: tuple[ScanRow, Any]) -> list[ScanRow]:
    rows = [r for r, _ in scans]
    signatures = [signature(array[0]) for _, array in scans]
    return settle_copies(rows, signatures)


def test_integers_hash_equally_although_rounded_elsewhere() -> None:
    array = integers()

    assert (jittered(array) != array).any()
    assert content_hash(RawScan(jittered(array), ONE)) == content_hash(RawScan(array, ONE))

    changed = array.copy()
    changed[0, 0, 0, 0] += 1

    assert content_hash(RawScan(changed, ONE)) != content_hash(RawScan(array, ONE))


def test_fractions_hash_exactly_so_that_no_rounding_has_a_border() -> None:
    array = fractions()
    same = content_hash(RawScan(array, ONE))

    assert content_hash(RawScan(array.copy(), ONE)) == same
    assert content_hash(RawScan(jittered(array), ONE)) != same


@pytest.mark.parametrize(
    "mm",
    [
        # Field of view through matrix size (400 / 512, 250 / 256, ...), thirds, and round numbers.
        0.78125,
        0.9765625,
        0.46875,
        0.6835938,
        2 / 3,
        1 / 3,
        0.7,
        0.75,
        1.0,
        1.25,
        3.27,
        0.5005,
        1.1719,
        0.00125,
    ],
)
def test_usual_voxel_sizes_are_not_at_a_border_of_rounding(mm: float) -> None:
    # Headers store voxel sizes as text or as float32, so the last digits differ between files.
    hashes = set()
    for factor in (1 - 1e-6, 1.0, 1 + 1e-6):
        hashes.add(content_hash(RawScan(integers(), (mm * factor, mm, mm))))

    assert len(hashes) == 1
    assert content_hash(RawScan(integers(), (mm + 0.002, mm, mm))) not in hashes


@pytest.mark.parametrize(
    "change",
    [jittered, lambda a: a * np.float32(0.5) + 10, lambda a: (a - a.mean()) / a.std()],
)
def test_a_copy_that_was_rounded_scaled_or_normalised_is_a_duplicate(change: Any) -> None:
    array = fractions()
    copy = change(array).astype(np.float32)
    original = row("a", array)
    changed = row("b", copy, (2.0000004, 1.0, 1.0))

    first, second = settled((original, array), (changed, copy))

    assert first.status == "ok"
    assert (second.status, second.reason) == (
        "duplicate",
        "same voxels, except for rounding or scale (64 compared), as a",
    )


def test_a_repeated_measurement_is_not_a_duplicate() -> None:
    array = fractions()
    # Noise of 1 on values that vary by 100.
    again = (array + np.random.default_rng(1).normal(0, 1, array.shape)).astype(np.float32)

    rows = settled((row("a", array), array), (row("b", again), again))

    assert [r.status for r in rows] == ["ok", "ok"]


def test_the_same_voxels_with_another_voxel_size_are_another_scan() -> None:
    array = fractions()
    thicker = row("b", array, (2.01, 1.0, 1.0))

    rows = settled((row("a", array), array), (thicker, array))

    assert [r.status for r in rows] == ["ok", "ok"]


def test_a_rounded_copy_of_an_excluded_scan_is_excluded_in_any_order() -> None:
    array = fractions()
    copy = jittered(fractions())
    excluded = ("test", array, "excluded")
    copied = ("b", copy, "ok")
    for scans in ([excluded, copied], [copied, excluded]):
        rows = settled(*((row(name, a, status=status), a) for name, a, status in scans))
        found = next(r for r in rows if r.id == "b")
        assert (found.status, found.reason) == (
            "excluded",
            "same voxels, except for rounding or scale (64 compared), as the excluded /pool/test",
        )


def test_of_three_alike_the_first_stays() -> None:
    arrays = [fractions(), jittered(fractions()), jittered(jittered(fractions()))]

    rows = settled(*((row(name, a), a) for name, a in zip("abc", arrays, strict=True)))

    assert [r.status for r in rows] == ["ok", "duplicate", "duplicate"]


def test_a_scan_that_is_mostly_background_has_no_signature() -> None:
    array = np.zeros((12, 16, 20), np.float32)
    # 10 of 3840 voxels.
    array[6, 8, 10:] = 5

    assert signature(array) is None

    # A file that could not be read has no size either; two of them are not copies of each other.
    unread = replace(row("a", fractions()), status="unreadable", shape_vox=None, spacing_mm=None)

    assert settle_copies([unread, unread], [None, None]) == [unread, unread]


def test_a_signature_fits_into_16_bits_for_the_widest_spread() -> None:
    array = np.arange(12 * 16 * 20, dtype=np.float32).reshape(12, 16, 20) * 1e-6
    z, y, x = 6, 8, 10
    array[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2] = 1e6

    points = signature(array)

    assert points is not None
    assert abs(int(points.sum())) <= NUM_POINTS
    assert points.max() < 8 * 4000


def test_close_pairs_are_those_that_comparing_all_would_find() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(-8000, 8000, (200, NUM_POINTS)).astype(np.int16)
    # Within the tolerance, at its edge, and one beyond it in a single point.
    points[150] = points[3] + rng.integers(-TOLERANCE, TOLERANCE + 1, NUM_POINTS)
    points[20] = points[7] + TOLERANCE
    points[160] = points[50]
    points[160, 5] += TOLERANCE + 1
    wide = points.astype(int)  # differences of 16-bit numbers could overflow

    every = []
    for i in range(200):
        for j in range(i + 1, 200):
            if np.abs(wide[i] - wide[j]).max() <= TOLERANCE:
                every.append((i, j))

    assert _close_pairs(points) == every == [(3, 150), (7, 20)]


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 3e-4, 1e-3])
def test_scans_of_tiny_values_have_different_hashes(scale: float) -> None:
    """An ADC map in m2/s has values near 1e-9, which all round to 0."""
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(0.1, 1, (1, 8, 9, 10)) * scale for _ in range(2)]
    first, second = (RawScan(array.astype(np.float32), ONE) for array in arrays)

    assert content_hash(first) != content_hash(second)
    assert content_hash(first) == content_hash(RawScan(first.array_CZYX.copy(), ONE))


def test_tiny_values_of_two_patients_are_not_duplicates() -> None:
    arrays = []
    for n in range(2):
        values = np.random.default_rng(n).uniform(0.5e-9, 2e-9, (1, 12, 13, 14))
        arrays.append(values.astype(np.float32))
    first, second = (row(f"s{n}", array) for n, array in enumerate(arrays))

    rows = settled((first, arrays[0]), (second, arrays[1]))

    assert [r.status for r in rows] == ["ok", "ok"]


def test_indexes_of_earlier_versions_are_still_recognised() -> None:
    usual = RawScan(jittered(integers()), ONE)
    # The earlier hash rounded small values to 0; it was the same for usual ones.
    small = np.random.default_rng(0).uniform(0, 1e-9, (1, 8, 9, 10)).astype(np.float32)
    large = np.random.default_rng(1).uniform(0, 5, (1, 8, 9, 10)).astype(np.float32)
    tiny = RawScan(small, ONE)
    other = RawScan(large, ONE)

    assert content_hash(usual) == earlier_hash(usual)
    assert content_hash(tiny) != earlier_hash(tiny)
    assert has_content(tiny, earlier_hash(tiny))
    assert has_content(tiny, content_hash(tiny))
    assert not has_content(other, earlier_hash(tiny))
