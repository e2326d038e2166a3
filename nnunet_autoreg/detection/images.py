"""Images as SimpleITK reads them, with their location in the world.

One image can be turned onto another that has the same voxels in another order.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import AS_STORED, RAS_OF_LPS, Frame, frame_of_itk
from nnunet_autoreg.errors import ObjectsError
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.io.files import quiet_readers
from nnunet_autoreg.io.orientation import Turn, turn_of, turned, turned_geometry

SPACING_TOLERANCE = 0.01
"""Formats round voxel sizes; more than one part in a hundred is another image."""
MOST_SHIFT_VOX = 0.5
"""At any corner; more would put voxels of one image into others of the other."""


def open_image(file: Path) -> Any:
    """Return SimpleITK's image of any kind and dimension.

    Raises:
        ObjectsError: it cannot be read.
    """
    import SimpleITK

    with quiet_readers():
        try:
            return SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            raise ObjectsError(
                f"{file} cannot be read as an image; open it in a viewer, or copy it again",
                code="objects-image-unreadable",
            ) from error


def array_of(image: Any, file: Path) -> NDArray[Any]:
    """Return the voxels (Z, Y, X) of SimpleITK's image, as stored.

    Raises:
        ObjectsError: it is not 3D; ``file`` is named.
    """
    import SimpleITK

    array: NDArray[Any] = SimpleITK.GetArrayFromImage(image)
    is_scalar = image.GetNumberOfComponentsPerPixel() == 1 and not np.iscomplexobj(array)
    if image.GetDimension() != 3 or not is_scalar:
        raise ObjectsError(
            f"{file} is not a 3D image with one real value per voxel",
            code="objects-image-not-3d",
        )
    return array


def read_array(file: Path) -> tuple[NDArray[Any], Frame]:
    """Return an image as stored, (Z, Y, X), and where it lies.

    Raises:
        ObjectsError: it cannot be read, or is not 3D.
    """
    image = open_image(file)
    array = array_of(image, file)
    frame = frame_of_itk(
        shape_vox=array.shape,
        spacing_xyz=image.GetSpacing(),
        origin_xyz=image.GetOrigin(),
        direction=image.GetDirection(),
    )
    return array, frame


def read_onto(file: Path, onto: Frame) -> NDArray[Any]:
    """Return an image as an array (Z, Y, X) with the axes of ``onto``.

    Axes that run in another order or direction are swapped and flipped.

    Raises:
        ObjectsError: it cannot be read, is not 3D, or is another image.
    """
    array, frame = read_array(file)
    return turned(array, same_voxels(file, frame, onto))


def same_voxels(file: Path, frame: Frame, onto: Frame) -> Turn:
    """Return how to turn an image's axes so that its voxels are those of the image of detections.

    Args:
        file: the image, for messages.
        frame: where it lies.
        onto: where the image of the detections lies.

    Raises:
        ObjectsError: the images differ in size, voxel size, or location in the world, even if one
            is turned.
    """
    try:
        # The turn by the axes of ``onto``, as if they were right, anterior and superior.
        relative = np.linalg.solve(onto.linear, frame.linear)
        turn = turn_of(RAS_OF_LPS @ relative)
    except np.linalg.LinAlgError:
        turn = AS_STORED

    shape, spacing_mm = turned_geometry(frame.shape_vox, frame.spacing_mm, turn)
    if shape != onto.shape_vox:
        raise ObjectsError(
            f"{file} has {size_text(frame.shape_vox)} voxels (z, y, x), the detections were made "
            f"on {size_text(onto.shape_vox)}: is it another image?",
            code="objects-other-size",
        )
    if not np.allclose(spacing_mm, onto.spacing_mm, rtol=SPACING_TOLERANCE):
        raise ObjectsError(
            f"{file} has voxels of {_listed_numbers(spacing_mm)} mm (z, y, x), the detections were "
            f"made on {_listed_numbers(onto.spacing_mm)} mm: is it another image?",
            code="objects-other-spacing",
        )

    # How far a corner of the turned image lies from the other's, along any of its axes.
    ends = [(0, size) for size in onto.shape_vox]
    there = np.array(list(product(*ends)), dtype=np.float64)  # (8, 3)
    here = np.empty_like(there)
    for axis, stored_axis in enumerate(turn[0]):
        edges = there[:, axis]
        here[:, stored_axis] = onto.shape_vox[axis] - edges if turn[1][axis] else edges

    shift_mm = frame.to_ras(here) - onto.to_ras(there)  # (8, 3)
    try:
        shift_vox = np.linalg.solve(onto.linear, shift_mm.T)  # (3, 8)
        most_shift_vox = float(np.abs(shift_vox).max())
    except np.linalg.LinAlgError:
        most_shift_vox = float("nan")

    # Not ">": the shift is NaN for an image without volume.
    if not most_shift_vox <= MOST_SHIFT_VOX:
        raise ObjectsError(
            f"{file} has another position than the image of the detections. Here "
            f"{_location(frame)}, there {_location(onto)}. Give labels of the same image. If only "
            "their position is wrong, copy it from the image (SimpleITK's CopyInformation)",
            code="objects-other-location",
        )
    return turn


def _location(frame: Frame) -> str:
    """Return the directions of the axes and the middle of the first voxel, as text."""
    directions = frame.linear / np.linalg.norm(frame.linear, axis=0)
    first = np.array(frame.affine_ras)[:3, 3]
    listed = []
    for column in (*directions.T, first):
        # Adding 0.0 turns -0 into 0.
        rounded = [round(float(v), 3) + 0.0 for v in column]
        listed.append(_listed_numbers(rounded))

    x, y, z, start = listed
    return f"x, y, z run along ({x}), ({y}), ({z}) from ({start}) mm RAS"


def _listed_numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
