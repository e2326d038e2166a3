"""Read and check one scan. A scan that cannot be used has a one-word status and a reason."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import Size, Spacing, as_size, size_text, volume, zyx
from nnunet_autoreg.io.archive import unpacked
from nnunet_autoreg.io.dicom import find_stack, pick_volume, read_volume
from nnunet_autoreg.io.files import check_file, quiet_readers
from nnunet_autoreg.io.orientation import Turn, turn_of, turned, turned_geometry
from nnunet_autoreg.io.parts import ScanPart, parse_part
from nnunet_autoreg.io.stacks import Stack
from nnunet_autoreg.machine import memory_bytes
from nnunet_autoreg.nnunet_api import Array, RawScan, read_scan

MIN_AXIS_VOX = 4
MIN_SPACING_MM, MAX_SPACING_MM, MAX_SPACING_RATIO = 0.01, 50.0, 30.0
MAX_DIRECTION_ERROR = 1e-2
# float32 scan, its normalised copy and nnU-Net's float64 resampling live at the same time;
# measured: 34 to 47.
BYTES_PER_VOXEL = 48
NEEDS_3D = "3D scans are needed (--objective joint learns from 2D images as well)"
NOT_AT_RIGHT_ANGLES = (
    "the axes are not at right angles (sheared or tilted gantry); resample the scan first"
)
MAX_LABELS, SURE_LABELS = 512, 16
LABEL_RUNS, NAMED_LABEL_RUNS = 0.6, 0.35
LABEL_NAME = re.compile(
    r"(^|[^a-z])(seg|segmentation|label|labels|labelmap|mask|gt|annotation)([^a-z]|$)",
)


@dataclass(frozen=True)
class ScanHeader:
    """Geometry known without reading voxels: (z, y, x)."""

    shape_vox: Size
    spacing_mm: Spacing


def load_scan(path: Path, part: str = "") -> RawScan:
    """Read and check one scan: a file, or the ``part`` of it that ``Candidate.part`` names.

    Returns:
        The scan, its array (1, Z, Y, X) float32, the axes towards superior, anterior and right
        (io/orientation.py).

    Raises:
        ScanError: with one of the statuses unreadable, not3d, 4d, rgb, complex, spacing, direction,
            slices, tiny, huge, nonfinite, constant, labelmap.
    """
    wanted = parse_part(part)
    if wanted.series:
        stack = find_stack(path, wanted)
        header, turn = _series_header(stack, wanted)
        with quiet_readers():
            array_ZYX = read_volume(path, pick_volume(stack, wanted))
        check_voxels(array_ZYX)
        return RawScan(turned(array_ZYX, turn)[None], header.spacing_mm)
    if wanted.member:
        with unpacked(path, [wanted.member]) as files:
            return _load_file(files[wanted.member], wanted, PurePosixPath(wanted.member).name)
    return _load_file(path, wanted, path.name)


def _load_file(path: Path, part: ScanPart, name: str) -> RawScan:
    """Read and check a file, whose ``name`` may say that it is a label map."""
    import SimpleITK

    check_file(path)
    # The header is checked first: a file that is too large must not be read.
    reader = information(path)
    header, turn = _file_header(reader, part)
    with quiet_readers() as captured:
        try:
            if part.t:
                reader.SetExtractIndex([0, 0, 0, int(part.t)])
                reader.SetExtractSize([*reader.GetSize()[:3], 0])
                reader.SetOutputPixelType(SimpleITK.sitkFloat32)
                volume_ZYX = SimpleITK.GetArrayFromImage(reader.Execute())
                array_ZYX = np.asarray(volume_ZYX, dtype=np.float32)
            else:
                array_ZYX = read_scan(path).array_CZYX[0]
        except (RuntimeError, OSError, ValueError, MemoryError) as error:
            raise reading_failed(error, captured()) from error
    check_voxels(array_ZYX, name)
    return RawScan(turned(array_ZYX, turn)[None], header.spacing_mm)


def _series_header(stack: Stack, part: ScanPart) -> tuple[ScanHeader, Turn]:
    """Return the header of a series, and the reorientation of its array."""
    # Called only for its errors: a series of several volumes is not a scan.
    pick_volume(stack, part)
    check_dimensions(stack.shape_vox[::-1])
    check_spacing(stack.spacing_mm)
    check_memory(stack.shape_vox)
    turn = turn_of(stack.direction)
    return ScanHeader(*turned_geometry(stack.shape_vox, stack.spacing_mm, turn)), turn


def check_stack(stack: Stack, part: str) -> None:
    """Check a DICOM stack as reading it will, by its headers.

    Raises:
        ScanError: slices, direction, unreadable, rgb, 4d, not3d, tiny, spacing, huge.
    """
    if stack.problem[0]:
        raise ScanError(*stack.problem)
    _series_header(stack, parse_part(part))


def read_header(path: Path, part: str = "") -> ScanHeader:
    """Check the header, without reading voxels.

    Shape and spacing are those of the array that ``load_scan`` gives.

    Raises:
        ScanError: unreadable, not3d, 4d, rgb, complex, spacing, direction, slices, tiny, huge.
    """
    wanted = parse_part(part)
    if wanted.series:
        return _series_header(find_stack(path, wanted), wanted)[0]
    if wanted.member:
        with unpacked(path, [wanted.member]) as files:
            return _file_header(information(files[wanted.member]), wanted)[0]
    return _file_header(information(path), wanted)[0]


def num_volumes(path: Path) -> int:
    """Return the number of volumes of a 4D file; 1 for any other.

    It is 1 also for an unreadable file; reading it later gives the reason.
    """
    try:
        size = information(path).GetSize()
    except ScanError:
        return 1
    return int(size[3]) if len(size) == 4 else 1


def information(path: Path) -> Any:
    """Return a reader that has read the header."""
    import SimpleITK

    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetFileName(str(path))
    with quiet_readers() as captured:
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise reading_failed(error, captured()) from error
    return reader


def _file_header(reader: Any, part: ScanPart) -> tuple[ScanHeader, Turn]:
    """Return the header that ``information`` has read, and the reorientation of the array."""
    import SimpleITK

    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())  # type: ignore[no-untyped-call]
    if "complex" in str(kind):
        raise ScanError("complex", "complex voxels; store the magnitude as a separate image")
    num_values = reader.GetNumberOfComponents()
    if num_values > 1:
        raise ScanError("rgb", f"{num_values} values per voxel (RGB or vector image); split it")

    size = list(reader.GetSize())
    if part.t and len(size) == 4:
        if int(part.t) >= size[3]:
            raise ScanError(
                "unreadable",
                f"has {size[3]} volumes, so there is no number {part.t}; run again",
            )
        size.pop()
    # A 4D file of one volume is a 3D scan.
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    check_dimensions(size)

    # SimpleITK counts x, y, z, and its direction has a row and a column for every axis.
    shape_vox = as_size(size[::-1])
    spacing_mm = zyx(reader.GetSpacing()[:3])
    check_spacing(spacing_mm)
    num_axes = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    _check_direction(direction)
    check_memory(shape_vox)

    turn = turn_of(direction)
    return ScanHeader(*turned_geometry(shape_vox, spacing_mm, turn)), turn


def check_dimensions(size: Sequence[int]) -> None:
    """Check a size in any axis order.

    Raises:
        ScanError: not3d, 4d or tiny.
    """
    listed = size_text(size)
    num_volumes = math.prod(size[3:])
    if len(size) > 3 and 1 in size[:3]:
        # Taking each "volume" as a scan would give single slices.
        raise ScanError(
            "not3d",
            f"{num_volumes} single slices along the fourth axis ({listed}), which is time; store "
            "the slices along the third axis",
        )
    if len(size) > 3:
        how = "--split-4d takes each as a scan" if len(size) == 4 else "split it into 3D files"
        raise ScanError("4d", f"a series of {num_volumes} volumes ({listed}); {how}")
    if len(size) < 3 or sorted(size)[0] == 1:
        raise ScanError("not3d", f"a single slice ({listed}); {NEEDS_3D}")
    if min(size) < MIN_AXIS_VOX:
        raise ScanError("tiny", f"{listed} voxels; every axis needs at least {MIN_AXIS_VOX}")


def check_3d(
    num_dimensions: int,
    name: str = "it",
    remedy: str = "store it as a 3D image",
) -> None:
    """Check that the image ``name`` has three dimensions.

    Raises:
        ScanError: not3d.
    """
    if num_dimensions != 3:
        raise ScanError("not3d", f"{name} has {num_dimensions} dimensions; {remedy}")


def check_spacing(spacing_mm: Sequence[float]) -> None:
    """Check voxel sizes in mm.

    Raises:
        ScanError: ``spacing``: not positive, beyond 0.01 .. 50 mm, or an anisotropy beyond 30.
    """
    listed = ", ".join(f"{s:g}" for s in spacing_mm)
    if not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise ScanError(
            "spacing",
            f"voxel size {listed} mm (z, y, x); it must be positive: correct the header",
        )
    if min(spacing_mm) < MIN_SPACING_MM or max(spacing_mm) > MAX_SPACING_MM:
        raise ScanError(
            "spacing",
            f"voxel size {listed} mm (z, y, x) lies outside {MIN_SPACING_MM:g} .. "
            f"{MAX_SPACING_MM:g} mm; a wrong unit in the header?",
        )
    ratio = max(spacing_mm) / min(spacing_mm)
    if ratio > MAX_SPACING_RATIO:
        raise ScanError(
            "spacing",
            f"voxel size {listed} mm (z, y, x) is anisotropic by {ratio:.0f}; at most "
            f"{MAX_SPACING_RATIO:g}",
        )


def _check_direction(direction: Any) -> None:
    is_orthonormal = False
    if np.isfinite(direction).all():
        # Rows of length 1 at right angles to each other give the identity.
        error = np.abs(direction @ direction.T - np.eye(3)).max()
        is_orthonormal = error <= MAX_DIRECTION_ERROR
    if not is_orthonormal:
        raise ScanError("direction", NOT_AT_RIGHT_ANGLES)


def check_memory(shape_vox: Sequence[int]) -> None:
    """Refuse a volume that this machine cannot preprocess.

    Raises:
        ScanError: ``huge``, with the figures.
    """
    needed = volume(shape_vox) * BYTES_PER_VOXEL
    total = memory_bytes()
    if total and needed > 0.8 * total:
        raise ScanError(
            "huge",
            f"{size_text(shape_vox)} voxels need about {needed / 2**30:.0f} GiB of memory, "
            f"this machine has {total / 2**30:.0f}; crop or downsample the scan",
        )


def check_voxels(array_ZYX: Array, name: str = "") -> None:
    """Check the values of a scan.

    Raises:
        ScanError: nonfinite, constant, tiny (little but zeros) or labelmap.
    """
    low, high = float(array_ZYX.min()), float(array_ZYX.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(array_ZYX.size - np.isfinite(array_ZYX).sum())
        raise ScanError(
            "nonfinite",
            f"{bad} of {array_ZYX.size} voxels are NaN, infinite or too large for 32-bit numbers; "
            "repair or leave out the scan",
        )
    if low == high:
        raise ScanError("constant", f"every voxel has the value {low:g}")

    # Preprocessing crops to what is not zero, and too little may be left.
    cropped = cropped_shape(array_ZYX)
    if min(cropped) < MIN_AXIS_VOX:
        raise ScanError("tiny", f"only {size_text(cropped)} voxels hold values other than 0")
    reason = _labelmap_reason(array_ZYX, low, high, name)
    if reason:
        raise ScanError("labelmap", reason)


def cropped_shape(array_ZYX: npt.NDArray[Any]) -> Size:
    """Return the size of the box around all non-zero voxels, to which nnU-Net crops."""
    low, high = box_around(array_ZYX != 0)
    return as_size([end - start for start, end in zip(low, high, strict=True)])


def box_around(mask_ZYX: npt.NDArray[np.bool_]) -> tuple[Size, Size]:
    """Return the first voxel, and the one after the last, of the box around all True voxels.

    Both are (0, 0, 0) if no voxel is True.
    """
    low, high = [], []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hits = np.flatnonzero(mask_ZYX.any(axis=others))
        low.append(int(hits[0]) if hits.size else 0)
        high.append(int(hits[-1]) + 1 if hits.size else 0)
    return as_size(low), as_size(high)


def _labelmap_reason(array_ZYX: Array, low: float, high: float, name: str) -> str:
    """Return why an array looks like a label map; "" if it does not.

    Label maps hold few whole numbers, and a voxel inside a structure equals its neighbour; in scans
    noise prevents that (share of equal neighbours in real scans here: at most 0.33, in real label
    maps: 0.40 to 0.96).
    """
    # A 64th of the voxels decides for most scans, which have many values or fractions.
    sample = array_ZYX[::4, ::4, ::4]
    if high - low > 65535 or np.unique(sample).size > MAX_LABELS:
        return ""
    if not _is_whole(sample) or not _is_whole(array_ZYX):
        return ""

    counts = np.bincount((array_ZYX - low).astype(np.int32).ravel())
    num_distinct = int(np.count_nonzero(counts))
    if num_distinct <= SURE_LABELS:
        return f"holds only {num_distinct} distinct whole numbers: a label map, not a scan"
    if num_distinct > MAX_LABELS:
        return ""

    # Pairs of background voxels say nothing: they are equal in skull-stripped scans too.
    background = low + float(counts.argmax())
    left, right = array_ZYX[..., :-1], array_ZYX[..., 1:]
    is_inside = (left != background) | (right != background)
    num_equal = int(((left == right) & is_inside).sum())
    share_equal = num_equal / max(int(is_inside.sum()), 1)

    # A name such as "seg" lowers the share of equal neighbours that is needed.
    is_named = bool(LABEL_NAME.search(name.lower()))
    if share_equal < (NAMED_LABEL_RUNS if is_named else LABEL_RUNS):
        return ""
    also = " and its name says so" if is_named else ""
    return (
        f"{num_distinct} distinct whole numbers, {100 * share_equal:.0f} % of neighbours "
        f"equal{also}: a label map, not a scan"
    )


def _is_whole(array: Array) -> bool:
    return bool((array == np.rint(array)).all())


# What SimpleITK and the libraries below it say -> status and reason; the first match counts.
TRANSLATIONS = (
    (
        ("bad_alloc", "MemoryError"),
        "huge",
        "the scan does not fit into memory; crop or downsample it, or free some memory",
    ),
    (
        ("orthonormal",),
        "direction",
        NOT_AT_RIGHT_ANGLES,
    ),
    (
        ("Zero-valued spacing", "Negative spacing"),
        "spacing",
        "a voxel size of zero or less; correct the header",
    ),
    (
        ("not read completely", "fread got only"),
        "unreadable",
        "truncated: voxels are missing at the end; copy the file again",
    ),
    (
        ("Cannot open data file", "trouble opening"),
        "unreadable",
        "the data file that the header names is missing; restore it",
    ),
    (
        ("Unable to determine ImageIO",),
        "unreadable",
        "not an image that SimpleITK knows; is it another kind of file?",
    ),
    (("nrrd",), "unreadable", "a damaged NRRD file; copy it again"),
    (
        ("Unknown PixelType: unknown",),
        "unreadable",
        "SimpleITK does not know the type of its values; store them as a usual type of numbers",
    ),
    (
        ("Unknown PixelType",),
        "rgb",
        "SimpleITK does not know its kind of pixels, such as grey with opacity; store one grey "
        "value per pixel",
    ),
)


def reading_failed(error: Exception, captured: str) -> ScanError:
    """Return the reason why a file cannot be read, from SimpleITK's message."""
    text = f"{type(error).__name__} {error} {captured}"
    for signs, status, reason in TRANSLATIONS:
        if any(sign in text for sign in signs):
            return ScanError(status, reason)
    return ScanError(
        "unreadable",
        f"SimpleITK cannot read it ({type(error).__name__}); open it in a viewer, or copy it again",
    )
