"""Images as SimpleITK reads them, with their place in the world; one is turned onto another that
has the same voxels in another order.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import AS_STORED, RAS_OF_LPS, Frame, frame_of_itk
from nnunet_autoreg.errors import ObjectsError
from nnunet_autoreg.io.files import quiet_stderr
from nnunet_autoreg.io.orientation import Turn, turn_of, turned, turned_geometry

SPACING_TOLERANCE = 0.01
"""Formats round voxel sizes; more than one part in a hundred is another image."""
MOST_SHIFT_VOX = 0.5
"""At any corner; more would put voxels of one image into others of the other."""


def open_image(file: Path) -> Any:
    """SimpleITK's image of any kind and dimension.

    Raises:
        ObjectsError: it cannot be read.
    """
    import SimpleITK

    with quiet_stderr():
        try:
            return SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            raise ObjectsError(
                f"{file} cannot be read as an image; open it in a viewer, or copy it again"
            ) from error


def array_of(image: Any, file: Path) -> NDArray[Any]:
    """The voxels (Z, Y, X) of SimpleITK's image, as stored.

    Raises:
        ObjectsError: it is not 3D; ``file`` is named.
    """
    import SimpleITK

    array: NDArray[Any] = SimpleITK.GetArrayFromImage(image)
    if (
        image.GetDimension() != 3
        or image.GetNumberOfComponentsPerPixel() != 1
        or np.iscomplexobj(array)
    ):
        raise ObjectsError(f"{file} is no 3D image with one real value per voxel")
    return array


def read_array(file: Path) -> tuple[NDArray[Any], Frame]:
    """An image as stored, (Z, Y, X), and where it lies.

    Raises:
        ObjectsError: it cannot be read, or is not 3D.
    """
    image = open_image(file)
    array = array_of(image, file)
    return array, frame_of_itk(
        array.shape, image.GetSpacing(), image.GetOrigin(), image.GetDirection()
    )


def read_onto(file: Path, onto: Frame) -> NDArray[Any]:
    """An image as an array (Z, Y, X) whose voxels are those of ``onto``: its axes are turned and
    swapped where they run otherwise.

    Raises:
        ObjectsError: it cannot be read, is not 3D, or is another image.
    """
    array, frame = read_array(file)
    return turned(array, same_voxels(file, frame, onto))


def same_voxels(file: Path, frame: Frame, onto: Frame) -> Turn:
    """How an image's axes are to be turned so that its voxels are those of the image that was
    searched.

    Raises:
        ObjectsError: no turn does it: the images differ in size, voxel size, or place in the world;
            ``file`` is named.
    """
    turn = _turn_onto(frame, onto)
    shape, spacing_mm = turned_geometry(frame.shape_vox, frame.spacing_mm, turn)
    if shape != onto.shape_vox:
        sizes = [" x ".join(map(str, of.shape_vox)) for of in (frame, onto)]
        raise ObjectsError(
            f"{file} has {sizes[0]} voxels (z, y, x), the detections were made on {sizes[1]}: "
            "another image?"
        )
    if not np.allclose(spacing_mm, onto.spacing_mm, rtol=SPACING_TOLERANCE):
        listed = [", ".join(f"{s:g}" for s in spacing) for spacing in (spacing_mm, onto.spacing_mm)]
        raise ObjectsError(
            f"{file} has voxels of {listed[0]} mm (z, y, x), the detections were made on "
            f"{listed[1]} mm: another image?"
        )
    if not _most_shift_vox(frame, onto, turn) <= MOST_SHIFT_VOX:
        raise ObjectsError(
            f"{file} lies elsewhere than the image of the detections: {_place(frame)}, there "
            f"{_place(onto)}; give labels of "
            "that very image, or, if they are and only lack its place, copy it into them "
            "(SimpleITK's CopyInformation)"
        )
    return turn


def _turn_onto(frame: Frame, onto: Frame) -> Turn:
    """By the axes of ``onto``, as if they were right, anterior and superior."""
    try:
        relative = np.linalg.solve(_linear(onto), _linear(frame))
    except np.linalg.LinAlgError:
        return AS_STORED
    return turn_of(RAS_OF_LPS @ relative)


def _most_shift_vox(frame: Frame, onto: Frame, turn: Turn) -> float:
    """The farthest that a corner of the turned image lies from the other's, along any of its axes;
    NaN where that has no volume.
    """
    axes, reverse = turn
    there = np.array(list(product(*((0, size) for size in onto.shape_vox))), dtype=np.float64)
    here = np.empty_like(there)
    for n in range(3):
        here[:, axes[n]] = onto.shape_vox[n] - there[:, n] if reverse[n] else there[:, n]
    try:
        return float(
            np.abs(
                np.linalg.solve(_linear(onto), (frame.to_ras(here) - onto.to_ras(there)).T)
            ).max()
        )
    except np.linalg.LinAlgError:
        return float("nan")


def _linear(frame: Frame) -> NDArray[np.float64]:
    return np.array(frame.affine_ras, dtype=np.float64)[:3, :3]


def _place(frame: Frame) -> str:
    """In words: directions of the axes and middle of the first voxel."""
    columns = [
        *(_linear(frame) / np.linalg.norm(_linear(frame), axis=0)).T,
        np.array(frame.affine_ras)[:3, 3],
    ]
    x, y, z, first = (
        f"({', '.join(f'{round(float(v), 3) + 0.0:g}' for v in column)})" for column in columns
    )
    return f"x, y, z run along {x}, {y}, {z} from {first} mm RAS"
