"""Find equal scans: by an exact hash of the content, and by a signature that tolerates rounding and
scaling.

A scan stored as DICOM and as NIfTI differs in the 7th digit: always in the spacing, and in the
voxels if a rescale slope is not a whole number (PET, some MR). A hash of rounded values does not
tolerate this, because among millions of voxels some lie on a border of the rounding. So the hash is
exact, over integers if all voxels are integers (CT, most MR); what it misses is found by
comparing signatures with a tolerance, which has no borders.

Limits: a copy that was cropped, resampled, smoothed, clipped or stored with another voxel size is
    another scan.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.rows import COPY_OF, OK, ScanRow
from nnunet_autoreg.geometry import largest_ratio
from nnunet_autoreg.nnunet_api import Array, RawScan

# Spacings are cut into steps of 1 um whose borders lie off the round numbers: at 0.382 um, where
# 0.78125 or 2/3 never fall.
SPACING_STEP_MM, SPACING_OFFSET = 1e-3, 0.618034
INTEGER_TOLERANCE = 1e-3
NUM_POINTS, POINTS_PER_SD, TOLERANCE = 64, 4000, 8
CENTRAL = 0.6
SAME_SPACING = 1e-3
NUM_PROJECTIONS = 4

Signature = npt.NDArray[np.int16]


def content_hash(scan: RawScan) -> str:
    """Return the hex SHA-256 of voxels, shape and spacing (in steps of 1 um).

    Voxels count as integers if every one lies within 1e-3 of an integer, and rounding loses nothing
    of their spread; else as float32. Origin and direction are left out: arrays come in one
    orientation, nnU-Net ignores the origin, and a copy that was only moved is still the same scan.
    """
    return _digest(scan, near_integers(scan) and _rounding_keeps_spread(scan))


def earlier_hash(scan: RawScan) -> str:
    """Return the hash that indexes of earlier versions contain.

    For nearly all scans it equals ``content_hash``.

    Earlier versions did not check the spread. So scans with values near 0, such as an ADC map in
    m2/s, were all rounded to 0 and had the same hash.
    """
    return _digest(scan, near_integers(scan))


def has_content(scan: RawScan, known: str) -> bool:
    """Return whether ``known`` is the hash of a scan, by this or an earlier version."""
    return content_hash(scan) == known or earlier_hash(scan) == known


def _digest(scan: RawScan, integers: bool) -> str:
    """Return the hash of a scan, whose voxels count as integers or as float32."""
    steps = [math.floor(s / SPACING_STEP_MM + SPACING_OFFSET) for s in scan.spacing_mm]
    geometry = json.dumps([list(scan.array_CZYX.shape), steps, integers])
    digest = hashlib.sha256(geometry.encode())

    # Slice by slice, so that no second copy of the scan is in memory.
    for plane in _planes(scan):
        # + 0 turns -0.0 into 0.0, which equals it but has other bytes.
        real = plane + np.float32(0)
        values = np.rint(plane).astype("<i4") if integers else real.astype("<f4")
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _planes(scan: RawScan) -> Array:
    """Return the slices of all channels, (C * Z, Y, X)."""
    return scan.array_CZYX.reshape(-1, *scan.array_CZYX.shape[2:])


def near_integers(scan: RawScan) -> bool:
    """Return whether every voxel lies within 1e-3 of an integer that fits into 32 bits."""
    for plane in _planes(scan):
        fits = np.abs(plane).max() < 2**31
        is_whole = np.abs(plane - np.rint(plane)) <= INTEGER_TOLERANCE
        if not (fits and is_whole.all()):
            return False
    return True


def _rounding_keeps_spread(scan: RawScan) -> bool:
    """Return whether the rounding error is small compared with the scan's variation."""
    lost = spread = 0.0
    first = float(np.rint(scan.array_CZYX.flat[0]))
    for plane in _planes(scan):
        values = plane.astype(np.float64)
        rounded = np.rint(values)
        lost += float(np.square(values - rounded).sum())
        # Around one of the values instead of their mean, which would need a second pass; it is at
        # least as large.
        spread += float(np.square(rounded - first).sum())
        if spread >= scan.array_CZYX.size:
            # No voxel loses more than the tolerance, so the voxels to come cannot change the
            # answer.
            return True
    return lost <= INTEGER_TOLERANCE**2 * spread


def signature(array_ZYX: Array) -> Signature | None:
    """Return 64 voxels from the middle of a scan, or None if most are equal.

    They are in steps of 1/4000 of their standard deviation, with mean 0.

    They are single voxels, not means: each has its own noise, so two scans of one patient never
    agree in all of them. Scans of another linear scale get the same signature.
    """
    # Positions spread evenly over the unit cube. Source: Roberts 2018, quasirandom sequence R3.
    root = 1.2207440846057596  # of x^4 = x + 1
    numbers = np.arange(1, NUM_POINTS + 1)
    spread_evenly = np.array([(0.5 + numbers / root**axis) % 1 for axis in (1, 2, 3)])  # (3, 64)

    fractions = 0.5 - CENTRAL / 2 + CENTRAL * spread_evenly
    shape = np.array(array_ZYX.shape)
    z, y, x = np.floor(fractions * shape[:, None]).astype(np.int64)
    values = array_ZYX[z, y, x].astype(np.float64)  # (64,)

    _, counts = np.unique(values, return_counts=True)
    are_mostly_equal = counts.max() > NUM_POINTS // 2
    spread = float(values.std())
    if are_mostly_equal or not math.isfinite(spread) or spread == 0:
        return None

    # 64 values lie within (64 - 1) / sqrt(64) < 8 standard deviations of their mean, so 4000 steps
    # each fit into 16 bits.
    steps = (values - values.mean()) / spread * POINTS_PER_SD
    return np.asarray(np.rint(steps), dtype=np.int16)


def settle_copies(rows: Sequence[ScanRow], signatures: Sequence[Signature | None]) -> list[ScanRow]:
    """Mark copies of excluded scans, then all but the first of equal scans.

    ``signatures`` belong to the rows.
    """
    settled = _settle_equal(rows)

    # Only scans of one shape can be copies, which keeps the number of comparisons small.
    of_shape = defaultdict(list)
    for number, (row, points) in enumerate(zip(settled, signatures, strict=True)):
        is_read = row.status in (OK, "excluded") and row.shape_vox is not None
        if is_read and points is not None:
            of_shape[row.shape_vox].append(number)

    for members in of_shape.values():
        if len(members) < 2:
            continue
        # Scans of one shape are copies if spacings and signatures agree within the tolerance.
        how = "voxels, except for rounding or scale (64 compared), as"
        pairs = []
        points_of_members = np.array([signatures[number] for number in members])
        for a, b in _close_pairs(points_of_members):
            first, second = members[a], members[b]
            first_mm, second_mm = settled[first].spacing_mm, settled[second].spacing_mm
            if first_mm is None or second_mm is None:
                continue
            if largest_ratio(first_mm, second_mm) <= 1 + SAME_SPACING:
                pairs.append((first, second))

        # Copies of excluded scans first, in either order of the files, then copies of the others.
        for first, second in pairs:
            for copy, original in ((first, second), (second, first)):
                if settled[copy].status == OK and settled[original].status == "excluded":
                    settled[copy] = _copy_of_excluded(settled[copy], settled[original], how)
        for first, second in pairs:
            if settled[first].status == settled[second].status == OK:
                reason = f"same {how} {settled[first].id}"
                settled[second] = replace(settled[second], status="duplicate", reason=reason)
    return settled


def _settle_equal(rows: Iterable[ScanRow]) -> list[ScanRow]:
    """Return the rows; those with the hash of an earlier or excluded row are marked."""
    rows = list(rows)
    excluded = {}
    for row in rows:
        if row.status == "excluded" and row.content_hash:
            excluded[row.content_hash] = row

    first: dict[str, ScanRow] = {}
    settled = []
    for row in rows:
        if row.status != OK:
            settled.append(row)
            continue
        # Exclusion comes first: the copy of a test scan must not be trained on.
        original = excluded.get(row.content_hash)
        if original is not None:
            settled.append(_copy_of_excluded(row, original, "voxels as"))
            continue
        earlier = first.setdefault(row.content_hash, row)
        if earlier is row:
            settled.append(row)
            continue
        reason = f"same voxels and spacing as {earlier.id}"
        settled.append(replace(row, status="duplicate", reason=reason))
    return settled


def _copy_of_excluded(row: ScanRow, original: ScanRow, how: str) -> ScanRow:
    called = original.name or original.id
    inside = f" ({called})" if original.part and called != original.source else ""
    reason = f"same {how} {COPY_OF}{original.source}{inside}"
    return replace(row, status="excluded", reason=reason)


def _close_pairs(points: npt.NDArray[np.int16]) -> list[tuple[int, int]]:
    """Return all (i, j), i < j, whose signatures differ by at most ``TOLERANCE`` steps.

    Four random projections find the few pairs worth comparing. A projection is a sum of 64 values
    with signs, so within the tolerance it differs by at most 64 times as much.
    """
    from scipy.spatial import cKDTree

    signs = np.random.default_rng(0).choice((-1.0, 1.0), (NUM_POINTS, NUM_PROJECTIONS))
    projected = points.astype(np.float64) @ signs  # (scans, NUM_PROJECTIONS)
    most = NUM_POINTS * TOLERANCE
    near = cKDTree(projected).query_pairs(most, p=np.inf, output_type="ndarray")

    # Sorted by (i, j), because the first scan of a pair is the one that is kept.
    pairs = []
    order = np.lexsort((near[:, 1], near[:, 0]))
    for i, j in near[order].tolist():
        # In 32 bits, since a difference of two 16-bit numbers may not fit into 16.
        difference = np.abs(points[i].astype(np.int32) - points[j])
        if difference.max() <= TOLERANCE:
            pairs.append((i, j))
    return pairs
