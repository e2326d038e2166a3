"""Rotation and zoom of a crop, by one resampling.

They are drawn when a crop is read and applied where it is used. A loader reads the part of the scan
that the rotated and zoomed crop covers. The device resamples the crop from that part. Crops that
are neither rotated nor zoomed are not resampled, so their voxels equal those of the store.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.store.case import StoredCase

COARSE = 3.0
"""Slices are thick if their spacing is more than this many times the finest one.

nnU-Net calls this the anisotropy threshold.
"""

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]


@dataclass(frozen=True)
class Affine:
    """A rotation and a zoom.

    Attributes:
        angle_deg: angle of the rotation, for display.
        zoom: factor by which structures become larger, for display.
        matrix: converts a step in voxels of the crop into one in voxels of the scan; both (z, y,
            x).
    """

    angle_deg: float
    zoom: float
    matrix: Matrix


def in_plane_axes(spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Return the axes that may be rotated and zoomed.

    These are all three or, if slices are thick, the axes within a slice.
    """
    thickest = COARSE * min(spacing_mm)
    return tuple(axis for axis in range(3) if spacing_mm[axis] <= thickest)


def draw_affine(
    plan: Plan,
    spacing_mm: Sequence[float],
    generator: np.random.Generator,
) -> Affine | None:
    """Draw a rotation and a zoom, each with the plan's probability; None if there is neither.

    The rotation is about a random axis or, if slices are thick, about their normal. The zoom is
    drawn evenly on a logarithmic scale, so that things become twice as large as often as half as
    large.
    """
    s = plan.sequence
    log_smallest, log_largest = (math.log(factor) for factor in s.zoom)

    # All numbers are drawn in every case, so that later draws do not depend on these.
    is_rotated, is_zoomed = generator.random(2) < s.spatial_share
    angle_deg = float(generator.uniform(-s.max_rotation_deg, s.max_rotation_deg)) * is_rotated
    axis = generator.normal(size=3)
    log_zoom = float(generator.uniform(log_smallest, log_largest)) * is_zoomed

    if angle_deg == 0 and log_zoom == 0:
        return None

    # With a single axis left there is no plane to rotate in, and a zoom would only stretch things.
    plane = in_plane_axes(spacing_mm)
    if len(plane) < 2:
        return None
    if len(plane) == 2:
        axis = np.array([0.0 if i in plane else 1.0 for i in range(3)])
    return affine_of(angle_deg, axis, math.exp(log_zoom), spacing_mm)


def affine_of(
    angle_deg: float,
    axis_zyx: Sequence[float] | NDArray[np.float64],
    zoom: float,
    spacing_mm: Sequence[float],
) -> Affine:
    """Return the affine of a rotation, and of a zoom of the in-plane axes.

    Rotations happen in mm, so that voxels of unequal sides do not shear structures.

    Args:
        axis_zyx: the axis of the rotation, of any length, in mm.

    Source: Rodrigues' formula, R = 1 + sin(a) K + (1 - cos(a)) K^2 with K the matrix of the cross
        product.
    """
    z, y, x = np.asarray(axis_zyx, dtype=np.float64) / np.linalg.norm(axis_zyx)
    # K v is the cross product of the axis and v.
    cross = np.array(
        [
            [0, -x, y],
            [x, 0, -z],
            [-y, z, 0],
        ],
    )
    angle = math.radians(angle_deg)
    sine, cosine = math.sin(angle), math.cos(angle)
    rotation = np.eye(3) + sine * cross + (1 - cosine) * cross @ cross  # (3, 3)

    # Structures become larger if neighbouring voxels of the crop are closer to each other.
    plane = in_plane_axes(spacing_mm)
    shrink = np.diag([1 / zoom if i in plane else 1.0 for i in range(3)])
    mm_of_voxel = np.diag(spacing_mm)
    voxel_of_mm = np.diag(1 / np.asarray(spacing_mm))

    # Read from right to left: voxels of the crop to mm, zoom, rotate, mm to voxels of the scan.
    matrix = voxel_of_mm @ rotation @ shrink @ mm_of_voxel  # (3, 3)
    along_z, along_y, along_x = (_vector(row) for row in matrix)
    return Affine(angle_deg, zoom, (along_z, along_y, along_x))


@dataclass(frozen=True)
class CropSource:
    """A part of a scan from which a crop is resampled.

    Voxel q of the crop shows the point ``matrix @ q + offset`` of the part.

    Attributes:
        voxels: (C, Z, Y, X) float32, all of them inside the scan.
        matrix, offset: known to the host, so that no device is waited for.
    """

    voxels: Tensor
    matrix: Matrix
    offset: Vector

    def to(self, device: torch.device) -> "CropSource":
        """Return the same with its voxels on ``device``; does not wait if memory is pinned."""
        return replace(self, voxels=self.voxels.to(device, non_blocking=True))

    def pin_memory(self) -> "CropSource":
        """Return the same in page-locked memory."""
        return replace(self, voxels=self.voxels.pin_memory())


def read_source(
    case: StoredCase,
    start: Size,
    size: Size,
    affine: Affine,
    max_source: float,
) -> CropSource:
    """Read the part of a case that the rotated and zoomed crop covers, and no more.

    The crop is rotated about the middle of that part of it which lies inside the scan, so that it
    always keeps some of the scan.

    Args:
        start: first voxel of the crop before it is rotated, (z, y, x); negative on axes on which
            the crop begins in padding.
        size: voxels of the crop, (z, y, x).
        max_source: most voxels to read along an axis, as a multiple of the crop's.
    """
    # All vectors are (3,), in voxels of the scan.
    matrix = np.array(affine.matrix)  # (3, 3)
    crop_begin = np.array(start)
    length = np.array(size)
    crop_end = crop_begin + length - 1
    scan_end = np.array(case.shape_vox) - 1

    # The pivot is the middle of the part of the crop that lies inside the scan.
    inside_begin = np.clip(crop_begin, 0, scan_end)
    inside_end = np.clip(crop_end, 0, scan_end)
    pivot = (inside_begin + inside_end) / 2

    # The rotated corners of the crop span a box in the scan. Each of its sides is a sum over the
    # axes of the crop, of which one end gives the smaller and one the larger term.
    before_pivot = pivot - crop_begin
    after_pivot = length - 1 - before_pivot
    terms = np.stack([matrix * -before_pivot, matrix * after_pivot])  # (2, 3, 3)
    box_begin = pivot + terms.min(axis=0).sum(axis=1)
    box_end = pivot + terms.max(axis=0).sum(axis=1)

    # Read the pivot at least, and neither beyond the scan nor more than the plan allows.
    half_extent = max_source * length / 2
    lowest = np.maximum(pivot - half_extent, 0)
    highest = np.minimum(pivot + half_extent, scan_end)
    begin = np.maximum(np.minimum(box_begin, pivot), lowest)
    end = np.minimum(np.maximum(box_end, pivot), highest)
    first = np.floor(begin).astype(int)
    last = np.ceil(end).astype(int)

    voxels, _ = case.read_padded(as_size(first), as_size(last - first + 1))  # (C, Z, Y, X)
    offset = pivot - first - matrix @ before_pivot
    return CropSource(torch.from_numpy(voxels), affine.matrix, _vector(offset))


def resampled(source: CropSource, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Resample a crop of ``size``: trilinear for the voxels, nearest for the mask of valid voxels.

    A voxel is valid exactly if the part has a voxel there: a part holds no padding. All others are
    padding, with the value 0. On the scan's border a voxel is interpolated only from voxels of the
    scan, never from padding.

    Returns:
        (C, Z, Y, X) float32 and (Z, Y, X) bool, queued on the source's device without waiting for
        it.
    """
    device = source.voxels.device
    z, y, x = (
        torch.arange(n, device=device, dtype=torch.float32) for n in size
    )  # (Z,), (Y,), (X,)
    valid_mask_ZYX = torch.ones(tuple(size), dtype=torch.bool, device=device)
    normalised = []
    rows = zip(source.matrix, source.offset, source.voxels.shape[1:], strict=True)

    # One row of the matrix gives the positions along one axis of the part, which has n voxels.
    for (by_z, by_y, by_x), offset, n in rows:
        from_z = (by_z * z)[:, None, None]  # (Z, 1, 1)
        from_y = (by_y * y)[:, None]  # (Y, 1)
        from_x = by_x * x  # (X,)
        position_ZYX = from_z + from_y + from_x + offset

        # The outer faces of the first and the last voxel. grid_sample calls them -1 and 1
        # (align_corners=False).
        is_inside_ZYX = (position_ZYX >= -0.5) & (position_ZYX <= n - 0.5)
        valid_mask_ZYX = valid_mask_ZYX & is_inside_ZYX
        normalised.append((2 * position_ZYX + 1) / n - 1)

    # grid_sample takes the positions in the order x, y, z.
    grid_ZYX3 = torch.stack(normalised[::-1], dim=-1)
    with torch.autocast(device.type, enabled=False):
        voxels_1CZYX = F.grid_sample(
            source.voxels[None],
            grid_ZYX3[None],
            "bilinear",
            "border",
            align_corners=False,
        )
    voxels_CZYX = torch.where(valid_mask_ZYX, voxels_1CZYX[0], 0.0)
    return voxels_CZYX, valid_mask_ZYX


def _vector(values: Sequence[float] | NDArray[np.float64]) -> Vector:
    z, y, x = values
    return (float(z), float(y), float(x))
