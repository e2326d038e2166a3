"""The position of a scan's voxels in the patient, and resampling of another scan onto these voxels.

All arrays are in the one orientation (io/orientation.py). Errors name no file, because they are
written into logs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import Size, Spacing, as_size, zyx
from nnunet_autoreg.io.dicom import find_stack, pick_volume
from nnunet_autoreg.io.orientation import Turn, turn_of, turned, turned_geometry
from nnunet_autoreg.io.parts import parse_part
from nnunet_autoreg.nnunet_api import Array

SAME_MM = 1e-2


@dataclass(frozen=True)
class Grid:
    """Voxels in space.

    Attributes:
        shape_vox, spacing_mm: (z, y, x), of the oriented array.
        origin_mm: centre of its first voxel, (x, y, z) in LPS.
        direction: row-major (3, 3); column k is the direction of axis k of (x, y, z).
    """

    shape_vox: Size
    spacing_mm: Spacing
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]

    def is_like(self, other: "Grid") -> bool:
        """Return whether both have the same voxels, to a hundredth of a millimetre."""
        if self.shape_vox != other.shape_vox:
            return False
        # Grids of one shape that agree in two opposite corners agree everywhere between them.
        last = [size - 1 for size in self.shape_vox[::-1]]
        corners = np.array([[0, 0, 0], last], dtype=float)  # (2, xyz)
        distance_mm = np.abs(_to_world(self, corners) - _to_world(other, corners))
        return bool(distance_mm.max() < SAME_MM)


def grid_of_scan(path: Path, part: str = "") -> Grid:
    """Return the grid of a file, or of a series of a DICOM folder.

    Raises:
        ScanError: ``geometry``: the grid is unknown.
    """
    image, turn = _header(path, part)
    return _turned_grid(image, turn)


def oriented_voxel(path: Path, part: str, voxel_zyx: Sequence[float]) -> tuple[float, float, float]:
    """Return a voxel counted in the file's own axes (z, y, x) as one of the oriented array.

    Raises:
        ScanError: ``geometry``: the file's own axes are unknown.
    """
    image, (axes, reverse) = _header(path, part)
    size = image.GetSize()[::-1]  # SimpleITK counts x, y, z

    oriented = []
    for axis, is_reversed in zip(axes, reverse, strict=True):
        index = float(voxel_zyx[axis])
        oriented.append(size[axis] - 1 - index if is_reversed else index)
    z, y, x = oriented
    return (z, y, x)


def read_label_map(path: Path) -> tuple[npt.NDArray[np.int64], Grid]:
    """Read a label map (Z, Y, X) in the one orientation, and its grid.

    Raises:
        ScanError: ``unreadable``: it cannot be read.
    """
    import SimpleITK

    try:
        image: Any = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise ScanError(
            "unreadable",
            "it cannot be read as a label map; repair it, or move it away",
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError("unreadable", "it is not a 3D label map; repair it, or move it away")

    # Label maps may be stored as floating-point numbers.
    labels_ZYX = np.rint(SimpleITK.GetArrayFromImage(image)).astype(np.int64)
    turn = _turn(image)
    return turned(labels_ZYX, turn), _turned_grid(image, turn)


def brought_onto(array_ZYX: Array, grid: Grid, target: Grid, outside: float) -> Array:
    """Resample a scan linearly onto another grid by world coordinates.

    ``outside`` fills what it does not cover.
    """
    import SimpleITK

    image: Any = SimpleITK.GetImageFromArray(array_ZYX)
    _place(image, grid)
    size_xyz = [int(n) for n in target.shape_vox[::-1]]
    frame: Any = SimpleITK.Image(size_xyz, SimpleITK.sitkUInt8)  # type: ignore[no-untyped-call]
    _place(frame, target)

    unmoved: Any = SimpleITK.Transform()  # type: ignore[no-untyped-call]
    moved = SimpleITK.Resample(image, frame, unmoved, SimpleITK.sitkLinear, outside)
    return np.asarray(SimpleITK.GetArrayFromImage(moved), dtype=np.float32)


def _place(image: Any, grid: Grid) -> None:
    image.SetSpacing([float(s) for s in grid.spacing_mm[::-1]])
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction)


def _header(path: Path, part: str) -> tuple[Any, Turn]:
    """Return a SimpleITK image or reader with size, spacing, origin and direction."""
    import SimpleITK

    wanted = parse_part(part)
    if not wanted.series and (part or not path.is_file()):
        raise ScanError(
            "geometry",
            "its position in the patient is unknown, because it is a part of a file; give it as "
            "a file or DICOM folder",
        )

    try:
        if wanted.series:
            # An empty image with the geometry of the volume, which is known from the headers.
            stack = find_stack(path, wanted)
            first = pick_volume(stack, wanted)[0]
            size = [int(n) for n in stack.shape_vox[::-1]]
            image: Any = SimpleITK.Image(size, SimpleITK.sitkUInt8)  # type: ignore[no-untyped-call]
            image.SetSpacing([float(s) for s in stack.spacing_mm[::-1]])
            image.SetOrigin([float(v) for v in first.position])
            image.SetDirection([float(v) for v in stack.direction.ravel()])
        else:
            image = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
            image.SetFileName(str(path))
            image.ReadImageInformation()
    except RuntimeError as error:
        # The message of SimpleITK holds the path.
        raise ScanError(
            "geometry",
            "its position in the patient is unknown, because SimpleITK cannot use its header; "
            "copy the file again",
        ) from error
    return image, _turn(image)


def _turn(image: Any) -> Turn:
    return turn_of(np.array(image.GetDirection()).reshape(3, 3))


def _turned_grid(image: Any, turn: Turn) -> Grid:
    """Return the grid of an image after its array was turned."""
    size = as_size(image.GetSize()[::-1])
    spacing_mm = zyx(image.GetSpacing())
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin_mm = np.array(image.GetOrigin())

    # The axes of the turned array are z, y, x, and the columns of a direction x, y, z.
    columns = []
    for axis, is_reversed in zip(reversed(turn[0]), reversed(turn[1]), strict=True):
        column = direction[:, 2 - axis]
        if is_reversed:
            # The first voxel of a reversed axis was its last.
            origin_mm = origin_mm + column * spacing_mm[axis] * (size[axis] - 1)
            column = -column
        columns.append(column)

    shape_vox, turned_spacing_mm = turned_geometry(size, spacing_mm, turn)
    x, y, z = origin_mm.tolist()
    turned_direction = np.stack(columns, axis=1).ravel().tolist()
    return Grid(shape_vox, turned_spacing_mm, (x, y, z), tuple(turned_direction))


def _to_world(grid: Grid, index_xyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the world coordinates of voxel indices, (N, xyz) in mm."""
    direction = np.array(grid.direction).reshape(3, 3)
    steps_mm = direction * np.array(grid.spacing_mm[::-1])  # column k: one voxel along axis k
    world_mm: npt.NDArray[np.float64] = index_xyz @ steps_mm.T + np.array(grid.origin_mm)
    return world_mm
