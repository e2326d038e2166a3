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
    frame = frame_of_itk(array.shape, image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    return array, frame


def read_onto(file: Path, onto: Frame) -> NDArray[Any]:
    """Return an image as an array (Z, Y, X) whose voxels are those of ``onto``.

    Its axes are flipped and swapped where they run otherwise.

    Raises:
        ObjectsError: it cannot be read, is not 3D, or is another image.
    """
    array, frame = read_array(file)
    return turned(array, same_voxels(file, frame, onto))


def same_voxels(file: Path, frame: Frame, onto: Frame) -> Turn:
    """Return how to turn an image's axes so that its voxels are those of the image of detections.

    Raises:
        ObjectsError: the images differ in size, voxel size, or location in the world, however one
            is turned; ``file`` is named.
    """
    try:
        # The turn by the axes of ``onto``, as if they were right, anterior and superior.
        relative = np.linalg.solve(_linear(onto), _linear(frame))
        turn = turn_of(RAS_OF_LPS @ relative)
    except np.linalg.LinAlgError:
        turn = AS_STORED

    shape, spacing_mm = turned_geometry(frame.shape_vox, frame.spacing_mm, turn)
    if shape != onto.shape_vox:
        own, other = (size_text(of.shape_vox) for of in (frame, onto))
        raise ObjectsError(
            f"{file} has {own} voxels (z, y, x), the detections were made on {other}: is it "
            "another image?",
            code="objects-other-size",
        )
    if not np.allclose(spacing_mm, onto.spacing_mm, rtol=SPACING_TOLERANCE):
        own, other = (_listed_numbers(spacing) for spacing in (spacing_mm, onto.spacing_mm))
        raise ObjectsError(
            f"{file} has voxels of {own} mm (z, y, x), the detections were made on {other} mm: is "
            "it another image?",
            code="objects-other-spacing",
        )

    # How far a corner of the turned image lies from the other's, along any of its axes.
    axes, reverse = turn
    ends = [(0, size) for size in onto.shape_vox]
    there = np.array(list(product(*ends)), dtype=np.float64)  # (8, 3)
    here = np.empty_like(there)
    for n in range(3):
        here[:, axes[n]] = onto.shape_vox[n] - there[:, n] if reverse[n] else there[:, n]

    shift_mm = frame.to_ras(here) - onto.to_ras(there)  # (8, 3)
    try:
        most_shift_vox = float(np.abs(np.linalg.solve(_linear(onto), shift_mm.T)).max())
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


def _linear(frame: Frame) -> NDArray[np.float64]:
    return np.array(frame.affine_ras, dtype=np.float64)[:3, :3]


def _location(frame: Frame) -> str:
    """Return the directions of the axes and the middle of the first voxel, as text."""
    directions = _linear(frame) / np.linalg.norm(_linear(frame), axis=0)
    first = np.array(frame.affine_ras)[:3, 3]
    # Adding 0.0 turns -0 into 0.
    x, y, z, start = (
        _listed_numbers([round(float(v), 3) + 0.0 for v in column])
        for column in (*directions.T, first)
    )
    return f"x, y, z run along ({x}), ({y}), ({z}) from ({start}) mm RAS"


def _listed_numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
