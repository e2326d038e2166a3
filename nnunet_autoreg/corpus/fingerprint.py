"""The usable scans in numbers, for planning and for readers of ``fingerprint.json``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.index import Index
from nnunet_autoreg.corpus.intensity import PERCENTILES, window_of
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.corpus.spacing import (
    MEDIAN,
    ScanGeometry,
    group_scans,
    target_spacing,
)
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, volume
from nnunet_autoreg.nnunet_api import resampled_shape
from nnunet_autoreg.plan import DataPlan, IntensityWindow

Axes = tuple[int, int, int]

COARSER = 1.05
IMAGE_SIDE_VOX = 256
"""Larger 2D images are reduced until their shorter side has this many pixels. The size of the
structures is mostly unknown, so 2D images have no target in mm."""
DIGITS = 6


@dataclass(frozen=True)
class Spread:
    """10th percentile, median and 90th percentile over the scans.

    Each has three values, one per axis (z, y, x), or a single one.
    """

    p10: tuple[float, ...]
    median: tuple[float, ...]
    p90: tuple[float, ...]


@dataclass(frozen=True)
class IntensityPrint:
    """Intensities inside the body, not in air, in the scans' own units.

    Attributes:
        num_scans: number of scans in which a body was found.
        percentiles: name -> that percentile of each scan's body, spread over the scans.
    """

    num_scans: int
    percentiles: dict[str, Spread]


@dataclass(frozen=True)
class ModalityPrint:
    """The scans of one modality as they come, cropped to non-zero.

    Attributes:
        anisotropy: coarsest spacing over finest, per scan.
        intensity: None if the index holds no intensities.
    """

    num_scans: int
    num_cases: int
    spacing_mm: Spread
    shape_vox: Spread
    extent_mm: Spread
    anisotropy: Spread
    intensity: IntensityPrint | None


@dataclass(frozen=True)
class GroupPrint:
    """Scans that share a target spacing (``corpus.spacing``).

    Attributes:
        modality: modality of the group; "" if it has all modalities.
        native_mm: median of their own spacings.
        spacing_mm: the target, by the rule in ``reason``.
        shape_vox: shapes after cropping and resampling to the target.
        total_vox: voxels of all scans after cropping and resampling.
    """

    modality: str
    num_scans: int
    native_mm: Spacing
    spacing_mm: Spacing
    reason: str
    shape_vox: Spread
    total_vox: int

    @property
    def median_shape_vox(self) -> Size:
        """Return whole voxels of the median shape."""
        return _whole(self.shape_vox.median)


@dataclass(frozen=True)
class Fingerprint:
    """Numbers about the usable scans.

    Every scan is transposed first: its coarsest axis comes to the front.

    Attributes:
        num_scans, num_cases: usable files; cases are counted by (dataset, case).
        channel_names: all names that occur, sorted.
        modalities: name -> numbers, in falling order of scans.
        groups: target spacings and the sizes at them, in falling order of scans.
        spacing_mm: the target of the largest group.
        shape_vox: shapes of all scans, each at its group's target.
        total_vox: voxels of the whole pool after cropping and resampling.
        ct_window: Hounsfield statistics inside the body over the CT scans; None without CT.
        relative_size_after_cropping: median share of voxels that cropping to non-zero keeps.
    """

    num_scans: int
    num_cases: int
    channel_names: tuple[str, ...]
    modalities: dict[str, ModalityPrint]
    groups: tuple[GroupPrint, ...]
    spacing_mm: Spacing
    shape_vox: Spread
    total_vox: int
    ct_window: IntensityWindow | None
    relative_size_after_cropping: float

    @property
    def median_shape_vox(self) -> Size:
        """Return whole voxels of the median shape."""
        return _whole(self.shape_vox.median)


def transpose_axes(spacing_mm: Sequence[float]) -> Axes:
    """Return the order in which a scan's axes are used.

    The coarsest comes first, if it is clearly coarser than the first.

    nnU-Net does this once per dataset, for any difference. A pool mixes datasets, so each scan is
    treated separately, and a margin of 5 % excludes rounding.
    """
    coarsest = max(range(3), key=lambda axis: spacing_mm[axis])
    if spacing_mm[coarsest] <= COARSER * spacing_mm[0]:
        return (0, 1, 2)
    first, second = (axis for axis in range(3) if axis != coarsest)
    return (coarsest, first, second)


def transposed_geometry(row: ScanRow) -> tuple[Size, Spacing]:
    """Return (cropped shape, spacing) of a usable scan with its axes transposed."""
    assert row.spacing_mm is not None and row.cropped_shape_vox is not None, (
        "only usable rows have a geometry"
    )
    axes = transpose_axes(row.spacing_mm)
    shape = [row.cropped_shape_vox[axis] for axis in axes]
    spacing = [row.spacing_mm[axis] for axis in axes]
    return as_size(shape), as_spacing(spacing)


def relative_size(row: ScanRow) -> float:
    """Return the share of a scan's voxels that cropping to non-zero keeps."""
    assert row.shape_vox is not None and row.cropped_shape_vox is not None, (
        "only usable rows have a geometry"
    )
    return volume(row.cropped_shape_vox) / volume(row.shape_vox)


def scan_geometry(row: ScanRow) -> ScanGeometry:
    """Return the properties of a usable scan by which scans are grouped."""
    shape, spacing = transposed_geometry(row)
    return ScanGeometry(row.modality, spacing, shape)


def row_spacing(row: ScanRow, data: DataPlan) -> Spacing:
    """Return the target spacing of a usable scan; a 2D image is only reduced."""
    if row.is_image:
        (_, *sides), (z_mm, y_mm, x_mm) = transposed_geometry(row)
        factor = max(1.0, min(sides) / IMAGE_SIDE_VOX)
        return (z_mm, factor * y_mm, factor * x_mm)
    return target_spacing(row.modality, transposed_geometry(row)[1], data)


def fingerprint(index: Index, policy: str | Spacing = MEDIAN) -> Fingerprint:
    """Summarise the usable volumes. 2D images do not count.

    Args:
        policy: rule for the target spacings, as ``corpus.spacing.parse_policy`` returns it.

    Raises:
        UsageError: no scan is usable, or all of them are 2D images.
    """
    rows = [row for row in index.usable if not row.is_image]
    if index.usable and not rows:
        raise UsageError(
            f"all {len(index.usable)} usable scans are 2D images; crops, spacings and encoder are "
            "planned for 3D scans, so give some of these as well",
            code="no-usable-volume",
        )
    if not rows:
        raise UsageError(
            f"none of the {len(index.rows)} files and folders found is a usable scan{_why(index)}",
            code="no-usable-scan",
        )

    # Every scan at the target spacing of its own group.
    scans = [scan_geometry(row) for row in rows]
    groups = group_scans(scans, policy)
    shapes = np.zeros((len(rows), 3), dtype=np.int64)
    for group in groups:
        for i in group.members:
            shapes[i] = resampled_shape(scans[i].shape_vox, scans[i].spacing_mm, group.spacing_mm)

    # The most frequent modality first, as planning looks at it first.
    modalities = {}
    for name, _ in Counter(row.modality for row in rows).most_common():
        modalities[name] = _modality_print([row for row in rows if row.modality == name])

    of_groups = []
    for group in groups:
        shapes_of_group = shapes[list(group.members)]  # (scans, 3)
        of_groups.append(
            GroupPrint(
                modality=group.modality,
                num_scans=len(group.members),
                native_mm=group.native_mm,
                spacing_mm=group.spacing_mm,
                reason=group.reason,
                shape_vox=spread(shapes_of_group),
                total_vox=int(shapes_of_group.prod(axis=1).sum()),
            ),
        )

    kept_shares = [relative_size(row) for row in rows]
    return Fingerprint(
        num_scans=len(rows),
        num_cases=_num_cases(rows),
        channel_names=tuple(sorted({row.channel for row in rows} - {""})),
        modalities=modalities,
        groups=tuple(of_groups),
        spacing_mm=groups[0].spacing_mm,
        shape_vox=spread(shapes),
        total_vox=int(shapes.prod(axis=1).sum()),
        ct_window=window_of(index.ct_samples_hu) if "CT" in modalities else None,
        relative_size_after_cropping=round(float(np.median(kept_shares)), DIGITS),
    )


def spread(values: npt.ArrayLike) -> Spread:
    """Return percentiles over the first axis of (scans, axes) or (scans,)."""
    numbers = np.asarray(values, dtype=np.float64)
    per_scan = numbers.reshape(len(numbers), -1)  # (scans, axes)
    percentiles = np.percentile(per_scan, (10, 50, 90), axis=0)

    # Rounded, so that sums in another order give the same file.
    rounded = []
    for of_axes in percentiles.tolist():
        rounded.append(tuple(round(value, DIGITS) for value in of_axes))
    return Spread(*rounded)


def _modality_print(rows: Sequence[ScanRow]) -> ModalityPrint:
    geometries = [transposed_geometry(row) for row in rows]
    shapes = np.array([shape for shape, _ in geometries])
    spacings = np.array([spacing for _, spacing in geometries])

    intensity = None
    known = [row.percentiles for row in rows if row.percentiles]
    if known:
        spreads = {}
        for percentile, values in zip(PERCENTILES, np.array(known).T, strict=True):
            # Names of one width, so that they sort as their numbers do.
            spreads[f"{percentile:04.1f}"] = spread(values)
        intensity = IntensityPrint(len(known), spreads)

    return ModalityPrint(
        num_scans=len(rows),
        num_cases=_num_cases(rows),
        spacing_mm=spread(spacings),
        shape_vox=spread(shapes),
        extent_mm=spread(shapes * spacings),
        anisotropy=spread(spacings.max(axis=1) / spacings.min(axis=1)),
        intensity=intensity,
    )


def _num_cases(rows: Sequence[ScanRow]) -> int:
    return len({(row.dataset, row.case) for row in rows})


def _whole(values: Sequence[float]) -> Size:
    return as_size([max(1, round(v)) for v in values])


def _why(index: Index) -> str:
    """Return an addition to a message about an index without usable scans."""
    if not index.rows:
        return "; give other datasets (-d) or folders (-i)"
    counts = Counter(row.status for row in index.rows).most_common()
    listed = ", ".join(f"{count} {status}" for status, count in counts)
    return f" ({listed}); scans.csv says why for each"
