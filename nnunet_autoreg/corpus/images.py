"""2D images, read as volumes of one slice: PNG, JPEG, radiographs, and single slices.

Only objectives that learn from 2D images read them. For all others they are left out with the
reason (``read.check_dimensions``).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.corpus.read import (
    MAX_SPACING_MM,
    MIN_AXIS_VOX,
    MIN_SPACING_MM,
    SURE_LABELS,
    ScanHeader,
    check_memory,
    cropped_shape,
    information,
    load_scan,
    read_header,
    reading_failed,
)
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.io.archive import unpacked
from nnunet_autoreg.io.dicom import (
    dicom_image,
    find_stack,
    pick_volume,
    pixels_by_pydicom,
    read_volume,
)
from nnunet_autoreg.io.files import check_file, quiet_readers
from nnunet_autoreg.io.parts import ScanPart, parse_part
from nnunet_autoreg.io.stacks import Stack
from nnunet_autoreg.nnunet_api import Array, RawScan

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey. Source: ITU-R BT.601."""


def load_scan_or_image(path: Path, part: str = "") -> RawScan:
    """Read and check a scan or a 2D image.

    Returns:
        a scan as ``load_scan`` returns it; an image (1, 1, Y, X) float32 in the file's own
        orientation, with colours as grey.

    Raises:
        ScanError: as ``load_scan``.
    """
    wanted = parse_part(part)
    if wanted.series:
        stack = find_stack(path, wanted)
        if not _is_one_slice(stack):
            return load_scan(path, part)
        with quiet_readers():
            slice_1YX = read_volume(path, pick_volume(stack, wanted))
        return _checked(slice_1YX, stack.spacing_mm[1:])

    if wanted.member:
        with unpacked(path, [wanted.member]) as files:
            file = files[wanted.member]
            header = _image_header(file, wanted)
            return load_scan(path, part) if header is None else _load_image(file, header)
    header = _image_header(path, wanted)
    return load_scan(path, part) if header is None else _load_image(path, header)


def header_of_scan_or_image(path: Path, part: str = "") -> ScanHeader:
    """Check the header of a scan or a 2D image, without reading voxels.

    Raises:
        ScanError: as ``read_header``.
    """
    wanted = parse_part(part)
    if wanted.series:
        stack = find_stack(path, wanted)
        if not _is_one_slice(stack):
            return read_header(path, part)
        return _header(stack.shape_vox[1:], stack.spacing_mm[1:])

    if wanted.member:
        with unpacked(path, [wanted.member]) as files:
            header = _image_header(files[wanted.member], wanted)
    else:
        header = _image_header(path, wanted)
    return read_header(path, part) if header is None else header


def _is_one_slice(stack: Stack) -> bool:
    return stack.shape_vox[0] == 1 and len(stack.volumes) == 1


def _size_and_spacing(path: Path) -> tuple[Sequence[int], Sequence[float]]:
    """Return size and spacing (x, y, ...) of a file, by SimpleITK or else by pydicom."""
    # GDCM does not notice that pixels lack, and reads no header that breaks the standard.
    image = dicom_image(path)
    if image is not None and image.is_irregular:
        return image.size, image.spacing_mm
    try:
        reader = information(path)
    except ScanError:
        if image is None:
            raise
        return image.size, image.spacing_mm
    return reader.GetSize(), reader.GetSpacing()


def _image_header(path: Path, part: ScanPart) -> ScanHeader | None:
    """Return the header of a 2D image; None if more than two axes are longer than a voxel."""
    if part.t:
        return None
    check_file(path)
    size_xyz, spacing_xyz = _size_and_spacing(path)
    num_axes = sum(side > 1 for side in size_xyz)
    if num_axes > 2:
        return None
    if num_axes < 2:
        listed = size_text(size_xyz)
        raise ScanError("tiny", f"{listed} pixels; every axis needs at least {MIN_AXIS_VOX}")

    # The axes of the image are those that are longer than a voxel.
    axes = zip(size_xyz, spacing_xyz, strict=True)
    in_plane = [(side, step) for side, step in axes if side > 1]
    shape_yx, spacing_yx = zip(*reversed(in_plane), strict=True)
    return _header(shape_yx, spacing_yx)


def _load_image(path: Path, header: ScanHeader) -> RawScan:
    array = _pixels(path)
    # The last axis is for colours. Axes of one voxel are left out.
    num_pixels = header.shape_vox[1] * header.shape_vox[2]
    num_colours = array.size // num_pixels
    if array.size != num_colours * num_pixels or not num_colours:
        raise ScanError(
            "unreadable",
            f"holds {array.size} values, its header says {size_text(header.shape_vox[1:])} pixels; "
            "export it again",
        )
    if num_colours > 4:
        raise ScanError("rgb", f"{num_colours} values per pixel; colours have three; split it")

    # The second of two values and the last of four are an opacity, which is left out.
    array_YXC = array.reshape(*header.shape_vox[1:], num_colours)
    grey_YX = array_YXC[:, :, 0]
    if num_colours > 2:
        red, green, blue = (array_YXC[:, :, colour] for colour in range(3))
        # Grey images are often stored with three equal colours. They keep their exact values.
        is_grey = np.array_equal(red, green) and np.array_equal(red, blue)
        if not is_grey:
            mixed = LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue
            grey_YX = np.asarray(mixed, dtype=np.float32)
    return _checked(grey_YX[None], header.spacing_mm[1:])


def _pixels(path: Path) -> Array:
    """Return the values of all pixels of a file, by SimpleITK or else by pydicom."""
    import SimpleITK

    image = dicom_image(path)
    is_irregular = image is not None and image.is_irregular
    by_pydicom = pixels_by_pydicom(path) if is_irregular else None
    if by_pydicom is not None:
        return by_pydicom

    with quiet_readers() as captured:
        try:
            read: Any = SimpleITK.ReadImage(str(path))
            array = np.asarray(SimpleITK.GetArrayFromImage(read), dtype=np.float32)
        except (RuntimeError, OSError, ValueError, MemoryError) as error:
            by_pydicom = None if image is None else pixels_by_pydicom(path)
            if by_pydicom is None:
                raise reading_failed(error, captured()) from error
            return by_pydicom
        # libjpeg fills the missing part with grey, and only prints that it did.
        if "Premature end" in captured():
            raise ScanError(
                "unreadable",
                "truncated: pixels are missing at the end; copy the file again",
            )
    return array


def _header(shape_yx: Sequence[int], spacing_yx: Sequence[float]) -> ScanHeader:
    """Return the header of an image as a volume of one slice.

    Pixels without a plausible size count as 1 mm. The slice thickness equals the pixel size, so its
    axis is the first in every order of axes.
    """
    y, x = (int(side) for side in shape_yx)
    if min(y, x) < MIN_AXIS_VOX:
        listed = size_text((x, y))
        raise ScanError("tiny", f"{listed} pixels; every axis needs at least {MIN_AXIS_VOX}")
    check_memory((1, y, x))

    y_mm, x_mm = (float(step) for step in spacing_yx)
    for step in (y_mm, x_mm):
        if not (math.isfinite(step) and MIN_SPACING_MM <= step <= MAX_SPACING_MM):
            return ScanHeader((1, y, x), (1.0, 1.0, 1.0))
    return ScanHeader((1, y, x), (max(y_mm, x_mm), y_mm, x_mm))


def _checked(array_1YX: Array, spacing_yx: Sequence[float]) -> RawScan:
    """Check the values of an image.

    Raises:
        ScanError: nonfinite, constant, tiny (little but zeros) or labelmap.
    """
    low, high = float(array_1YX.min()), float(array_1YX.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ScanError("nonfinite", "some pixels are NaN or infinite; repair or leave it out")
    if low == high:
        raise ScanError("constant", f"every pixel has the value {low:g}")
    if min(cropped_shape(array_1YX)[1:]) < MIN_AXIS_VOX:
        raise ScanError("tiny", "almost all pixels are 0")

    # Neighbours of smooth 8-bit pictures are often equal, so that only the number of values counts.
    num_distinct = np.unique(array_1YX).size
    if num_distinct <= SURE_LABELS:
        raise ScanError(
            "labelmap",
            f"holds only {num_distinct} distinct values: a label map or a drawing",
        )
    header = _header(array_1YX.shape[1:], spacing_yx)
    return RawScan(np.ascontiguousarray(array_1YX)[None], header.spacing_mm)
