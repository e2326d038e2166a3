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
"""Slices are thick where their spacing is more than this many times the finest one.

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

    These are all three, or those with small spacings where slices are thick.
    """
    finest = min(spacing_mm)
    return tuple(axis for axis, spacing in enumerate(spacing_mm) if spacing <= COARSE * finest)


def draw_affine(
    plan: Plan,
    spacing_mm: Sequence[float],
    generator: np.random.Generator,
) -> Affine | None:
    """Draw a rotation and a zoom, each with the plan's probability; None if there is neither.

    The rotation is about a random axis, or about the normal of the slices where these are thick.
    The zoom is drawn evenly on a logarithmic scale, so that things become twice as large as often
    as half as large.
    """
    s = plan.sequence
    # All numbers are drawn in every case, so that later draws do not depend on these.
    rotated, zoomed = generator.random(2) < s.spatial_share
    angle_deg = float(generator.uniform(-s.max_rotation_deg, s.max_rotation_deg)) * rotated
    axis = generator.normal(size=3)
    smallest, largest = s.zoom
    logarithm = float(generator.uniform(math.log(smallest), math.log(largest))) * zoomed

    # With a single axis left there is no plane to rotate in, and a zoom would only stretch things.
    plane = in_plane_axes(spacing_mm)
    if len(plane) < 2 or (angle_deg == 0 and logarithm == 0):
        return None
    if len(plane) == 2:
        axis = np.array([0.0 if i in plane else 1.0 for i in range(3)])
    return affine_of(angle_deg, axis, math.exp(logarithm), spacing_mm)


def _cross_product_matrix(z: float, y: float, x: float) -> NDArray[np.float64]:
    """Return the matrix K with K v = (z, y, x) x v, (3, 3)."""
    return np.array(
        [
            [0, -x, y],
            [x, 0, -z],
            [-y, z, 0],
        ],
    )


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
    unit_axis = np.asarray(axis_zyx, dtype=np.float64) / np.linalg.norm(axis_zyx)
    cross = _cross_product_matrix(*unit_axis)
    angle = math.radians(angle_deg)
    sine, cosine = math.sin(angle), math.cos(angle)
    rotation = np.eye(3) + sine * cross + (1 - cosine) * cross @ cross

    plane = in_plane_axes(spacing_mm)
    shrink = np.array([1 / zoom if i in plane else 1.0 for i in range(3)])
    mm_of_voxel = np.diag(spacing_mm)
    voxel_of_mm = np.diag(1 / np.asarray(spacing_mm))

    # Read from right to left: voxels of the crop to mm, zoom, rotate, mm to voxels of the scan.
    first, second, third = voxel_of_mm @ rotation @ np.diag(shrink) @ mm_of_voxel
    return Affine(angle_deg, zoom, (_vector(first), _vector(second), _vector(third)))


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
        """Return the same with its voxels on ``device``; does not wait where memory is pinned."""
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
        start: first voxel of the crop before it is rotated, (z, y, x); negative where the crop
            begins in padding.
        size: voxels of the crop, (z, y, x).
        max_source: most voxels to read along an axis, as a multiple of the crop's.
    """
    matrix = np.array(affine.matrix)  # (3, 3)
    shape = np.array(case.shape_vox)
    begin = np.array(start)
    length = np.array(size)

    # The pivot is the middle of what lies inside the scan, in voxels of the scan.
    low = np.clip(begin, 0, shape - 1)
    high = np.clip(begin + length - 1, 0, shape - 1)
    pivot = (low + high) / 2
    in_crop = pivot - begin

    # The crop's corners span a box in the scan. Each of its sides is a sum over the axes of the
    # crop.
    steps = np.stack([matrix * -in_crop, matrix * (length - 1 - in_crop)])
    low = np.minimum(pivot + steps.min(axis=0).sum(axis=1), pivot)
    high = np.maximum(pivot + steps.max(axis=0).sum(axis=1), pivot)

    # Read neither beyond the scan nor more than the plan allows.
    half_extent = max_source * length / 2
    lowest = np.maximum(pivot - half_extent, 0)
    highest = np.minimum(pivot + half_extent, shape - 1)
    first = np.floor(np.maximum(low, lowest)).astype(int)
    last = np.ceil(np.minimum(high, highest)).astype(int)

    voxels, _ = case.read_padded(as_size(first), as_size(last - first + 1))
    offset = pivot - first - matrix @ in_crop
    return CropSource(torch.from_numpy(voxels), affine.matrix, _vector(offset))


def resampled(source: CropSource, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Resample a crop of ``size``: trilinear for the voxels, nearest for the mask of valid voxels.

    The mask of a part is True everywhere, so the nearest voxel is valid exactly where it exists.
    Outside there is padding: value 0. On the scan's border a voxel is interpolated only from voxels
    of the scan, never from padding.

    Returns:
        (C, Z, Y, X) float32 and (Z, Y, X) bool, queued on the source's device without waiting for
        it.
    """
    device = source.voxels.device
    z, y, x = (torch.arange(n, device=device, dtype=torch.float32) for n in size)
    valid_mask = torch.ones(tuple(size), dtype=torch.bool, device=device)
    normalised = []
    rows = zip(source.matrix, source.offset, source.voxels.shape[1:], strict=True)

    for (by_z, by_y, by_x), offset, n in rows:
        along_z, along_y, along_x = by_z * z, by_y * y, by_x * x
        position_ZYX = along_z[:, None, None] + along_y[:, None] + along_x + offset
        valid_mask = valid_mask & (position_ZYX >= -0.5) & (position_ZYX <= n - 0.5)
        # -1 and 1 are the outer faces of the first and the last voxel (align_corners=False).
        normalised.append((2 * position_ZYX + 1) / n - 1)

    # grid_sample takes the positions in the order x, y, z.
    grid_ZYX3 = torch.stack(normalised[::-1], dim=-1)
    with torch.autocast(device.type, enabled=False):
        voxels_CZYX = F.grid_sample(
            source.voxels[None],
            grid_ZYX3[None],
            "bilinear",
            "border",
            align_corners=False,
        )[0]
    return torch.where(valid_mask, voxels_CZYX, 0.0), valid_mask


def _vector(values: Sequence[float] | NDArray[np.float64]) -> Vector:
    z, y, x = (float(v) for v in values)
    return (z, y, x)
