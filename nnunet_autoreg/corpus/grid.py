"""Where a scan's voxels lie in the patient, and another scan brought onto the same voxels.

Arrays in the one orientation throughout.
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
from nnunet_autoreg.io.parts import ScanPart, parse_part
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
        corners = np.array([[0, 0, 0], [n - 1 for n in self.shape_vox[::-1]]], dtype=float)
        return bool(np.abs(_to_world(self, corners) - _to_world(other, corners)).max() < SAME_MM)


def grid_of_scan(path: Path, part: str = "") -> Grid:
    """Return the grid of a file, or of a series of a DICOM folder.

    Raises:
        ScanError: ``geometry``: it is not known.
    """
    image, turn = _header(path, part)
    return _turned_grid(image, turn)


def oriented_voxel(path: Path, part: str, voxel_zyx: Sequence[float]) -> tuple[float, float, float]:
    """Return a voxel counted in the file's own axes (z, y, x) as one of the oriented array.

    Raises:
        ScanError: ``geometry``: the file's own axes are not known.
    """
    image, (axes, reverse) = _header(path, part)
    size = image.GetSize()[::-1]
    z, y, x = (
        size[a] - 1 - float(voxel_zyx[a]) if r else float(voxel_zyx[a])
        for a, r in zip(axes, reverse, strict=True)
    )
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
            "unreadable", f"{path} cannot be read as a label map; repair it, or move it away"
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError("unreadable", f"{path} is no 3D label map; repair it, or move it away")
    turn = _turn(image)
    array = SimpleITK.GetArrayFromImage(image)
    return turned(np.rint(array).astype(np.int64), turn), _turned_grid(image, turn)


def brought_onto(array_ZYX: Array, grid: Grid, target: Grid, outside: float) -> Array:
    """Resample a scan linearly onto another grid by world coordinates.

    ``outside`` fills what it does not cover.
    """
    import SimpleITK

    image: Any = SimpleITK.GetImageFromArray(array_ZYX)
    _place(image, grid)
    frame: Any = SimpleITK.Image([int(n) for n in target.shape_vox[::-1]], SimpleITK.sitkUInt8)  # type: ignore[no-untyped-call]
    _place(frame, target)
    moved = SimpleITK.Resample(image, frame, SimpleITK.Transform(), SimpleITK.sitkLinear, outside)  # type: ignore[no-untyped-call]
    return np.asarray(SimpleITK.GetArrayFromImage(moved), dtype=np.float32)


def _place(image: Any, grid: Grid) -> None:
    image.SetSpacing([float(s) for s in grid.spacing_mm[::-1]])
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction)


def _header(path: Path, part: str) -> tuple[Any, Turn]:
    """Return a SimpleITK image or reader that knows size, spacing, origin and direction."""
    import SimpleITK

    wanted = parse_part(part)
    try:
        if wanted.series:
            image: Any = _series_frame(path, wanted)
        elif path.is_file() and not part:
            image = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
            image.SetFileName(str(path))
            image.ReadImageInformation()
        else:
            raise ScanError(
                "geometry",
                f"where {path.name} ({part}) lies in the patient is not known; give it as a file "
                "or DICOM folder",
            )
    except RuntimeError as error:
        raise ScanError(
            "geometry", f"where {path.name} lies in the patient is not known ({_last_line(error)})"
        ) from error
    return image, _turn(image)


def _series_frame(path: Path, part: ScanPart) -> Any:
    """Return an empty image with the geometry of a DICOM volume, by its headers."""
    import SimpleITK

    stack = find_stack(path, part)
    first = pick_volume(stack, part)[0]
    size = [int(n) for n in stack.shape_vox[::-1]]
    image: Any = SimpleITK.Image(size, SimpleITK.sitkUInt8)  # type: ignore[no-untyped-call]
    image.SetSpacing([float(s) for s in stack.spacing_mm[::-1]])
    image.SetOrigin([float(v) for v in first.position])
    image.SetDirection([float(v) for v in stack.direction.ravel()])
    return image


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]


def _turn(image: Any) -> Turn:
    return turn_of(np.array(image.GetDirection()).reshape(3, 3))


def _turned_grid(image: Any, turn: Turn) -> Grid:
    size, spacing = as_size(image.GetSize()[::-1]), zyx(image.GetSpacing())
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin, columns = np.array(image.GetOrigin()), []
    for axis, reverse in zip(reversed(turn[0]), reversed(turn[1]), strict=True):
        column = direction[:, 2 - axis]
        if reverse:
            origin = origin + column * spacing[axis] * (size[axis] - 1)
        columns.append(-column if reverse else column)
    shape, turned_spacing = turned_geometry(size, spacing, turn)
    x, y, z = (float(v) for v in origin)
    return Grid(
        shape, turned_spacing, (x, y, z), tuple(float(v) for v in np.stack(columns, axis=1).ravel())
    )


def _to_world(grid: Grid, index_xyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    steps = np.array(grid.direction).reshape(3, 3) * np.array(grid.spacing_mm[::-1])
    world: npt.NDArray[np.float64] = index_xyz @ steps.T + np.array(grid.origin_mm)
    return world
