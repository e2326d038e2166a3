"""Boxes between the preprocessed image, the original one and the world.

Voxel edges scale and shift without half-voxel terms, because voxel i covers [i, i + 1). In the
continuous indices of world coordinates, whole numbers are the centres of voxels: an edge e has the
index e - 0.5.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.errors import ObjectsError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, size_text, zyx
from nnunet_autoreg.io.orientation import Turn

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float, float, float]
"""Edges (z0, y0, x0, z1, y1, x1) of one box."""

RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0])
"""DICOM and SimpleITK count towards left and posterior, NIfTI and nibabel towards right and
anterior. The matrix is its own inverse.
"""


@dataclass(frozen=True)
class Preprocessing:
    """Hold how nnU-Net made the preprocessed image: transpose, crop, resample.

    Attributes:
        shape_vox: shape of the preprocessed image.
        cropped_shape_vox, crop_start_vox: shape and first voxel of the crop, axes transposed.
        transpose_backward: axis i of the original is axis ``transpose_backward[i]`` of the
            transposed image.
    """

    shape_vox: Size
    cropped_shape_vox: Size
    crop_start_vox: Size
    transpose_backward: tuple[int, int, int] = (0, 1, 2)

    def to_original(self, boxes_N6: Any) -> Floats:
        """Return boxes of the preprocessed image in voxel edges of the original one."""
        cropped = _ends(boxes_N6) * self._factor()  # (N, 2, 3)
        transposed = cropped + np.array(self.crop_start_vox)
        return _boxes(transposed[..., list(self.transpose_backward)])

    def to_preprocessed(self, boxes_N6: Any) -> Floats:
        """Return boxes of the original image in voxel edges of the preprocessed one."""
        forward = np.argsort(self.transpose_backward)
        transposed = _ends(boxes_N6)[..., forward]  # (N, 2, 3)
        cropped = transposed - np.array(self.crop_start_vox)
        return _boxes(cropped / self._factor())

    def _factor(self) -> Floats:
        """Return voxels of the crop per voxel of the preprocessed image, (3,)."""
        # The ratio of shapes, not of spacings: nnU-Net rounds the new shape and stretches the image
        # to it.
        cropped = np.array(self.cropped_shape_vox, dtype=np.float64)
        return np.asarray(cropped / np.array(self.shape_vox))


def preprocessing_of(
    properties: Mapping[str, Any],
    shape_vox: Sequence[int],
    transpose_backward: Sequence[int],
) -> Preprocessing:
    """Return how a case was preprocessed.

    Args:
        properties: content of the case's ``.pkl`` file of nnU-Net.
        shape_vox: spatial shape of its preprocessed array.
        transpose_backward: value of the plans.
    """
    backward = as_size(transpose_backward)
    start = as_size([low for low, _ in properties["bbox_used_for_cropping"]])
    return Preprocessing(
        shape_vox=as_size(shape_vox),
        cropped_shape_vox=as_size(properties["shape_after_cropping_and_before_resampling"]),
        crop_start_vox=start,
        transpose_backward=backward,
    )


@dataclass(frozen=True)
class Frame:
    """Hold where an image lies in the world.

    Attributes:
        shape_vox: (z, y, x).
        affine_ras: 4 rows of 4 numbers, as nibabel has them. They map the index (i, j, k) = (x, y,
            z) to mm towards right, anterior and superior.
    """

    shape_vox: Size
    affine_ras: tuple[tuple[float, ...], ...]

    @property
    def spacing_mm(self) -> Spacing:
        """Return the voxel size (z, y, x)."""
        return zyx(np.linalg.norm(self.linear, axis=0).tolist())

    @property
    def linear(self) -> Floats:
        """Return the affine without its origin, (3, 3): a step along each axis, in mm."""
        return np.array(self.affine_ras, dtype=np.float64)[:3, :3]

    def to_ras(self, points_zyx: Any) -> Floats:
        """Return points (..., 3) given as (z, y, x) in voxel edges, in mm as (x, y, z).

        The axes run towards right, anterior and superior.
        """
        edges_xyz = np.asarray(points_zyx, dtype=np.float64)[..., ::-1]
        # An index is the centre of a voxel, half a voxel after its edge.
        index_xyz = edges_xyz - 0.5
        origin = np.array(self.affine_ras)[:3, 3]
        return np.asarray(index_xyz @ self.linear.T + origin)

    def to_lps(self, points_zyx: Any) -> Floats:
        """Return the same points as ``to_ras``, with axes towards left, posterior and superior."""
        return np.asarray(self.to_ras(points_zyx) @ RAS_OF_LPS)

    def corners_ras(self, box_zyx: Sequence[float]) -> Floats:
        """Return the corners in mm, (8, 3), x (i) varying fastest.

        On an oblique image the box is not parallel to the axes of the world.
        """
        low_z, low_y, low_x, high_z, high_y, high_x = box_zyx
        corners = list(product((low_z, high_z), (low_y, high_y), (low_x, high_x)))
        return self.to_ras(corners)

    def size_mm(self, box_zyx: Sequence[float]) -> tuple[float, float, float]:
        """Return the sides in mm along the image's own axes i, j, k (x, y, z)."""
        sides_mm = []
        for low, high, mm in zip(box_zyx[:3], box_zyx[3:], self.spacing_mm, strict=True):
            sides_mm.append(float((high - low) * mm))
        z, y, x = sides_mm
        return (x, y, z)


def frame_of_affine(affine_ras: Any, shape_vox: Sequence[int]) -> Frame:
    """Return the frame of nibabel's affine (4, 4) and the array's shape (z, y, x)."""
    rows = np.asarray(affine_ras, dtype=np.float64).tolist()
    affine = tuple(tuple(row) for row in rows)
    return Frame(as_size(shape_vox), affine)


def frame_of_itk(
    shape_vox: Sequence[int],
    spacing_xyz: Sequence[float],
    origin_xyz: Sequence[float],
    direction: Sequence[float],
) -> Frame:
    """Return the frame of an image of SimpleITK.

    All but the shape is in (x, y, z); ``direction`` is given row by row, in LPS.
    """
    directions = np.array(direction, dtype=np.float64).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = RAS_OF_LPS @ directions @ np.diag(spacing_xyz)
    affine[:3, 3] = RAS_OF_LPS @ np.array(origin_xyz, dtype=np.float64)
    return frame_of_affine(affine, shape_vox)


def frame_of_properties(properties: Mapping[str, Any], shape_vox: Sequence[int]) -> Frame:
    """Return the frame of an array (z, y, x) that one of nnU-Net's readers gave.

    For a reader that keeps no origin (2D formats, plain TIFF), the image lies at the origin with
    the spacing that was read.
    """
    if "sitk_stuff" in properties:
        itk = properties["sitk_stuff"]
        return frame_of_itk(shape_vox, itk["spacing"], itk["origin"], itk["direction"])
    if "nibabel_stuff" in properties:
        known = properties["nibabel_stuff"]
        affine = known.get("reoriented_affine", known["original_affine"])
        return frame_of_affine(affine, shape_vox)

    z, y, x = as_spacing(properties["spacing"])
    return frame_of_itk(shape_vox, (x, y, z), (0, 0, 0), np.eye(3).ravel().tolist())


AS_STORED: Turn = ((0, 1, 2), (False, False, False))

OPPOSITE = {"R": "L", "A": "P", "S": "I"}
"""Directions of the axes x, y and z after nnU-Net's reorienting readers, and their opposites."""


@dataclass(frozen=True)
class StoredArray:
    """Relate the array that a file stores to the array that nnU-Net's reader makes of it.

    Most readers give the stored array. Those whose names end in ``WithReorient`` turn it, and files
    of boxes keep counting in the stored one.

    Attributes:
        frame: position of the stored array in the world.
        turn: which stored axis becomes each axis (z, y, x) of the reader's array, and whether it is
            reversed.
    """

    frame: Frame
    turn: Turn

    def to_reader(self, boxes_N6: Any) -> Floats:
        """Return boxes of the stored array in voxel edges of the reader's array."""
        axes, reverse = self.turn
        stored = _ends(boxes_N6)
        read = np.empty_like(stored)
        for axis, stored_axis in enumerate(axes):
            edges = stored[..., stored_axis]  # (N, 2)
            if reverse[axis]:
                # The far end becomes the near one, so the two change places.
                edges = (self.frame.shape_vox[stored_axis] - edges)[..., ::-1]
            read[..., axis] = edges
        return _boxes(read)

    def to_stored(self, boxes_N6: Any) -> Floats:
        """Return boxes of the reader's array in voxel edges of the stored array."""
        axes, reverse = self.turn
        read = _ends(boxes_N6)
        stored = np.empty_like(read)
        for axis, stored_axis in enumerate(axes):
            edges = read[..., axis]  # (N, 2)
            if reverse[axis]:
                edges = (self.frame.shape_vox[stored_axis] - edges)[..., ::-1]
            stored[..., stored_axis] = edges
        return _boxes(stored)


def stored_array(properties: Mapping[str, Any], shape_vox: Sequence[int]) -> StoredArray:
    """Return the stored array of an image that was read with the shape (z, y, x)."""
    read = frame_of_properties(properties, shape_vox)
    turn = reader_turn(properties)
    axes, reverse = turn
    shape = [0, 0, 0]
    # From indices (x, y, z, 1) of the stored array to those of the reader's array.
    to_read = np.zeros((4, 4))
    to_read[3, 3] = 1
    for axis, stored_axis in enumerate(axes):
        size = read.shape_vox[axis]
        shape[stored_axis] = size

        # Indices run x, y, z, axes run z, y, x.
        row = 2 - axis
        column = 2 - stored_axis
        to_read[row, column] = -1 if reverse[axis] else 1
        to_read[row, 3] = size - 1 if reverse[axis] else 0

    affine_ras = np.array(read.affine_ras) @ to_read
    return StoredArray(frame_of_affine(affine_ras, shape), turn)


def reader_turn(properties: Mapping[str, Any]) -> Turn:
    """Return how nnU-Net's reader turned the stored array into the one that it gave."""
    nibabel = properties.get("nibabel_stuff", {})
    itk = properties.get("sitk_stuff", {})
    if "reoriented_affine" in nibabel:
        stored = np.asarray(nibabel["original_affine"], dtype=np.float64)[:3, :3]
        read = np.asarray(nibabel["reoriented_affine"], dtype=np.float64)[:3, :3]
        # Both span the same axes, so this is a permutation with signs.
        permutation = np.linalg.solve(stored, read)
        return _turn_of_permutation(np.asarray(permutation, dtype=np.float64))
    if "original_orientation" in itk:
        permutation = np.zeros((3, 3))
        for stored_axis, letter in enumerate(itk["original_orientation"]):
            for axis, (towards, away) in enumerate(OPPOSITE.items()):
                permutation[stored_axis, axis] = {towards: 1, away: -1}.get(letter, 0)
        return _turn_of_permutation(permutation)
    return AS_STORED


def _turn_of_permutation(permutation: Floats) -> Turn:
    """Return the turn for a (3, 3) matrix.

    Its column k marks the stored axis of (x, y, z) that becomes axis k, with a sign.
    """
    axes = []
    reverse = []
    for axis in (2, 1, 0):
        column = permutation[:, axis]
        stored_axis = int(np.abs(column).argmax())
        axes.append(2 - stored_axis)
        reverse.append(bool(column[stored_axis] < 0))
    return as_size(axes), (reverse[0], reverse[1], reverse[2])


def to_ijk(boxes_N6: Any) -> Floats:
    """Return boxes (N, 6) in continuous indices (i0, j0, k0, i1, j1, k1).

    Whole numbers are the centres of voxels: voxel 4 is written as 3.5, 4.5.
    """
    edges_xyz = _ends(boxes_N6)[..., ::-1]
    return _boxes(edges_xyz - 0.5)


def as_box(values: Iterable[float]) -> Box:
    """Return six numbers, such as the row of an array, as a box of Python's floats."""
    z0, y0, x0, z1, y1, x1 = (float(v) for v in values)
    return (z0, y0, x0, z1, y1, x1)


def check_inside(
    box_zyx: Sequence[float],
    shape_vox: Sequence[int],
    where: str,
    tolerance_vox: float = 0.01,
) -> None:
    """Check that a box has an extent and lies in its image.

    Raises:
        ObjectsError: its ends are not finite or not in order, or it lies partly outside. The
            message begins with ``where``.
    """
    listed = ", ".join(f"{v:g}" for v in box_zyx)
    if len(box_zyx) != 6 or not np.isfinite(box_zyx).all():
        raise ObjectsError(
            f"{where}: box [{listed}] is not 6 finite numbers z0, y0, x0, z1, y1, x1",
            code="box-not-finite",
        )

    low = box_zyx[:3]
    high = box_zyx[3:]
    if any(start >= end for start, end in zip(low, high, strict=True)):
        raise ObjectsError(
            f"{where}: box [{listed}] has no extent; z0 < z1, y0 < y1 and x0 < x1 are needed, in "
            "that order",
            code="box-without-extent",
        )

    is_beyond = [end > size + tolerance_vox for end, size in zip(high, shape_vox, strict=True)]
    if min(low) < -tolerance_vox or any(is_beyond):
        size = size_text(shape_vox)
        raise ObjectsError(
            f"{where}: box [{listed}] lies outside the image of {size} voxels (z, y, x); are the "
            "axes in the order z, y, x?",
            code="box-outside",
        )


def _ends(boxes: Any) -> Floats:
    """Return boxes (..., 6) as their two ends (..., 2, 3)."""
    values = np.asarray(boxes, dtype=np.float64)
    return values.reshape(*values.shape[:-1], 2, 3)


def _boxes(ends: Floats) -> Floats:
    """Return the two ends (..., 2, 3) as boxes (..., 6)."""
    return ends.reshape(*ends.shape[:-2], 6)
