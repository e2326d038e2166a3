"""The pool in numbers: what planning needs to know of the scans."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_autoreg.corpus.index import Index, ScanRow
from nnunet_autoreg.corpus.intensity import window_of
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, volume
from nnunet_autoreg.nnunet_api import resampled_shape
from nnunet_autoreg.plan import IntensityWindow

Axes = tuple[int, int, int]

COARSER = 1.05


@dataclass(frozen=True)
class Fingerprint:
    """Numbers about the usable scans. Every scan is transposed first: its coarsest axis comes to the front.

    Attributes:
        num_scans, num_cases: usable files; cases are counted by (dataset, case).
        modalities: met, in falling order of ``scans_per_modality``.
        channel_names: met, sorted.
        spacing_mm, spacing_p10_mm, spacing_p90_mm: median and percentiles per axis.
        median_shape_vox, shape_p10_vox, shape_p90_vox: after cropping and resampling to ``resampled_to_mm``.
        resampled_to_mm: the median spacing, or the one that was asked for.
        total_vox: voxels of the whole pool after cropping and resampling.
        ct_window: Hounsfield statistics inside the body over the CT scans; None without CT.
        relative_size_after_cropping: median share of voxels that cropping to non-zero keeps.
    """

    num_scans: int
    num_cases: int
    modalities: tuple[str, ...]
    scans_per_modality: dict[str, int]
    channel_names: tuple[str, ...]
    spacing_mm: Spacing
    spacing_p10_mm: Spacing
    spacing_p90_mm: Spacing
    median_shape_vox: Size
    shape_p10_vox: Size
    shape_p90_vox: Size
    resampled_to_mm: Spacing
    total_vox: int
    ct_window: IntensityWindow | None
    relative_size_after_cropping: float


def transpose_axes(spacing_mm: Sequence[float]) -> Axes:
    """The order in which a scan's axes are used: the coarsest first, if it is clearly coarser than the first.

    nnU-Net does this once per dataset, and for any excess; a pool mixes datasets, and 5 % keeps rounding from turning axes.
    """
    coarsest = max(range(3), key=lambda axis: spacing_mm[axis])
    if spacing_mm[coarsest] <= COARSER * spacing_mm[0]:
        return (0, 1, 2)
    first, second = (axis for axis in range(3) if axis != coarsest)
    return (coarsest, first, second)


def transposed_geometry(row: ScanRow) -> tuple[Size, Spacing]:
    """(cropped shape, spacing) of a usable scan with its axes transposed."""
    assert row.spacing_mm is not None and row.cropped_shape_vox is not None, "only usable rows have a geometry"
    axes = transpose_axes(row.spacing_mm)
    return as_size([row.cropped_shape_vox[a] for a in axes]), as_spacing([row.spacing_mm[a] for a in axes])


def relative_size(row: ScanRow) -> float:
    """Share of a scan's voxels that cropping to non-zero keeps."""
    assert row.shape_vox is not None and row.cropped_shape_vox is not None, "only usable rows have a geometry"
    return volume(row.cropped_shape_vox) / volume(row.shape_vox)


def fingerprint(index: Index, spacing_mm: Spacing | None = None) -> Fingerprint:
    """Summarise the usable scans; shapes are those at ``spacing_mm``, or at the median spacing if it is None.

    Raises:
        UsageError: no scan is usable.
    """
    rows = index.usable
    if not rows:
        raise UsageError(f"none of the {len(index.rows)} files and folders met is a usable scan{_why(index)}")
    spacings = np.array([transposed_geometry(row)[1] for row in rows])
    median = as_spacing(np.median(spacings, axis=0).tolist())
    target = spacing_mm or median
    shapes = np.array([resampled_shape(*transposed_geometry(row), target) for row in rows], dtype=np.int64)
    per_modality = Counter(row.modality for row in rows).most_common()
    return Fingerprint(
        num_scans=len(rows),
        num_cases=len({(row.dataset, row.case) for row in rows}),
        modalities=tuple(name for name, _ in per_modality),
        scans_per_modality=dict(per_modality),
        channel_names=tuple(sorted({row.channel for row in rows} - {""})),
        spacing_mm=median,
        spacing_p10_mm=as_spacing(np.percentile(spacings, 10, axis=0).tolist()),
        spacing_p90_mm=as_spacing(np.percentile(spacings, 90, axis=0).tolist()),
        median_shape_vox=_rounded(np.median(shapes, axis=0).tolist()),
        shape_p10_vox=_rounded(np.percentile(shapes, 10, axis=0).tolist()),
        shape_p90_vox=_rounded(np.percentile(shapes, 90, axis=0).tolist()),
        resampled_to_mm=as_spacing(target),
        total_vox=int(shapes.prod(axis=1).sum()),
        ct_window=window_of(index.ct_samples_hu) if "CT" in dict(per_modality) else None,
        relative_size_after_cropping=float(np.median([relative_size(row) for row in rows])),
    )


def _rounded(values: Sequence[float]) -> Size:
    return as_size([max(1, round(float(v))) for v in values])


def _why(index: Index) -> str:
    counts = Counter(row.status for row in index.rows).most_common()
    listed = ", ".join(f"{n} {status}" for status, n in counts)
    return f" ({listed}); scans.csv says why for each" if listed else "; give other datasets (-d) or folders (-i)"
