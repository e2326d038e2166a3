"""DICOM series from folders, files and .zip archives: headers by pydicom, then the pixels of one
volume by SimpleITK's GDCM.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydicom import dcmread
from pydicom.pixels.processing import apply_rescale
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.archive import DAMAGED, damaged_member, members, opened, unpacked
from nnunet_autoreg.io.dicom_header import (
    NotDicomError,
    is_deflated,
    quiet_pydicom,
    read_dicom_header,
    unknown_kinds_are_explicit,
)
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.io.slices import DicomSlice, NotAScanError, problem_of_pixels, slices_of
from nnunet_autoreg.io.stacks import Stack, by_series, stacks_of
from nnunet_autoreg.nnunet_api import Array

ENDINGS = (".dcm", ".dicom", ".ima")
# (is implicit, is little endian) -> transfer syntax
SYNTAX_OF_ENCODING = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}


def may_be_dicom(name: str) -> bool:
    """Return whether a file name is one that DICOM files have.

    These have a usual ending, none, or a number as the end of a UID.
    """
    ending = Path(name).suffix.lower()
    return ending in ENDINGS or not ending or ending[1:].isdecimal()


def claims_dicom(name: str) -> bool:
    """Return whether a file's name promises DICOM."""
    return Path(name).suffix.lower() in ENDINGS


def read_slices(stream: IO[bytes], file: str, num_bytes: int) -> list[DicomSlice]:
    """Return the slices of one opened file of ``num_bytes`` bytes.

    The slices name ``file`` as the one they are in.

    Raises:
        NotAScanError: it is not part of a scan.
        ScanError: ``unreadable``.
    """
    with quiet_pydicom():
        return slices_of(read_dicom_header(stream, num_bytes), file, num_bytes)


def file_slices(path: Path, file: str) -> list[DicomSlice]:
    """Return the slices of a file on disk.

    Raises:
        NotAScanError: it is not part of a scan.
        ScanError: ``unreadable``.
    """
    try:
        with path.open("rb") as stream:
            return read_slices(stream, file, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise ScanError(
            "unreadable",
            f"the file system says: {error.strerror or error}; grant read access, or restore it",
        ) from error


def find_stack(path: Path, part: ScanPart) -> Stack:
    """Return the stack that a part names, from headers only.

    Raises:
        ScanError: ``unreadable`` if its files are gone, or the stack's own problem.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise ScanError(
            "unreadable",
            "vanished after it was found; restore it, or run again without it",
        ) from error

    # Which files hold each series is kept, for the next series of the same folder.
    names = _files_by_series(str(path), bool(part.below), stamp).get(part.series, ())
    found: list[DicomSlice] = []
    if is_archive(path.name):
        for of_member in _archived(path, set(names)):
            found += of_member
    else:
        for name in names:
            found += _or_nothing(path / name if path.is_dir() else path, name)

    # A file may have been replaced by one of another series.
    slices = [one for one in found if one.series == part.series]
    group = by_series(slices).get((part.series, part.instance))
    if not group:
        raise ScanError(
            "unreadable",
            "its DICOM files vanished after they were found; restore them, or run again without "
            "them",
        )
    stacks = stacks_of(group)
    number = int(part.stack or 0)
    if number >= len(stacks):
        raise ScanError(
            "unreadable",
            "its DICOM files changed after they were found; remove scans.csv and run again",
        )
    stack = stacks[number]
    if stack.problem[0]:
        raise ScanError(*stack.problem)
    return stack


def pick_volume(stack: Stack, part: ScanPart) -> tuple[DicomSlice, ...]:
    """Return the slices of the volume that a part names.

    Raises:
        ScanError: ``4d``: there are several and none is named.
    """
    if part.t:
        if int(part.t) >= len(stack.volumes):
            raise ScanError(
                "unreadable",
                f"has {len(stack.volumes)} volumes, so there is no number {part.t}; run again",
            )
        return stack.volumes[int(part.t)]
    if len(stack.volumes) > 1:
        raise ScanError("4d", series_of_volumes(stack))
    return stack.volumes[0]


def series_of_volumes(stack: Stack) -> str:
    """Return an error about a 4D series, with the option that splits it."""
    z, y, x = stack.shape_vox
    what = (
        f"a series of {len(stack.volumes)} volumes of {x} x {y} x {z} voxels over "
        f"{stack.repeated_over}"
    )
    if z == 1:
        return f"{what}; a volume of one slice is not a 3D scan"
    return f"{what}; --split-4d takes each as a scan"


def read_volume(path: Path, slices: Sequence[DicomSlice]) -> Array:
    """Read the voxels of a volume, in the order of its slices.

    Returns:
        (Z, Y, X) float32, rescaled slice by slice.

    Raises:
        ScanError: ``unreadable``.
    """
    names = sorted({one.file for one in slices})
    with _on_disk(path, names) as files:
        # All slices of a multi-frame file are in one file.
        if slices[0].frame >= 0:
            return _frames(files[names[0]], slices)

        pixels = []
        for one in slices:
            # With irregular headers GDCM takes other bytes for lengths, and allocates gigabytes.
            by_pydicom = pixels_by_pydicom(files[one.file]) if one.is_irregular else None
            if by_pydicom is not None and by_pydicom.shape == one.shape:
                pixels.append(by_pydicom)
            else:
                pixels.append(_pixels(files[one.file], (1, *one.shape))[0])
        return np.stack(pixels)  # (Z, Y, X)


def _frames(file: Path, slices: Sequence[DicomSlice]) -> Array:
    """Read frames of a multi-frame file.

    GDCM rescales all of them as it does the first, which is undone if their slopes differ.
    """
    whole = _pixels(file, None)
    last_frame = max(one.frame for one in slices)
    if whole.shape[1:] != slices[0].shape or last_frame >= len(whole):
        raise ScanError(
            "unreadable",
            f"holds {len(whole)} frames of {whole.shape[1:]}, its header says otherwise; export it "
            "again",
        )
    first = min(_or_nothing(file, ""), key=lambda one: one.frame)
    if all((one.slope, one.intercept) == (first.slope, first.intercept) for one in slices):
        return whole[[one.frame for one in slices]]

    # Stored values are whole numbers, so that rounding takes GDCM's rescaling back exactly.
    stored = np.rint((whole.astype(np.float64) - first.intercept) / first.slope)
    rescaled = [stored[one.frame] * one.slope + one.intercept for one in slices]
    return np.stack(rescaled).astype(np.float32)


def _pixels(file: Path, shape: tuple[int, ...] | None) -> Array:
    """Return all pixels of one file, (frames, rows, columns), rescaled by the file's own slope.

    Args:
        shape: as the header says; None for a multi-frame file.
    """
    import SimpleITK

    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    try:
        array = np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()), dtype=np.float32)
    except RuntimeError as error:
        by_pydicom = pixels_by_pydicom(file) if shape is not None else None
        if by_pydicom is None:
            raise ScanError(
                "unreadable",
                "neither GDCM nor pydicom can read the pixels of a slice (damaged, or compressed "
                "in an unknown way); copy it again, or export it uncompressed",
            ) from error
        array = by_pydicom

    array = array.reshape((-1, *array.shape[-2:]))
    if shape is not None and array.shape != shape:
        raise ScanError(
            "unreadable",
            f"a slice holds {array.shape} voxels, its header says {shape}; export the series again",
        )
    return array


@dataclass(frozen=True)
class DicomImage:
    """The pixel format in the header of a DICOM file.

    Attributes:
        size: columns, rows, frames.
        spacing_mm: in the same order.
        is_irregular: GDCM loses its way in such a header.
    """

    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    is_irregular: bool


def dicom_image(file: Path) -> DicomImage | None:
    """Return what the header of a DICOM file says; None if it is another kind of file.

    Raises:
        ScanError: ``unreadable``: the header cannot be parsed, or pixels lack.
    """
    try:
        with file.open("rb") as stream, quiet_pydicom():
            num_bytes = os.fstat(stream.fileno()).st_size
            header = read_dicom_header(stream, num_bytes)
    except NotDicomError:
        return None
    problem = problem_of_pixels(header, num_bytes)
    if problem[0]:
        raise ScanError(*problem)

    rows = int(header.number("Rows", 0))
    columns = int(header.number("Columns", 0))
    frames = int(header.number("NumberOfFrames", 1))
    # Radiographs give the spacing at the detector.
    spacing = header.numbers("PixelSpacing") or header.numbers("ImagerPixelSpacing")
    y, x = (*spacing, 1.0, 1.0)[:2]
    return DicomImage((columns, rows, frames), (x, y, 1.0), header.is_irregular)


def pixels_by_pydicom(file: Path) -> Array | None:
    """Return the rescaled pixels of a file of one slice whose header GDCM cannot parse.

    Compressed pixels are left to GDCM: a damaged file must not be read by a more lenient decoder.
    Deflated files are left to it, too: pydicom would unpack them to any size.

    Returns:
        (rows, columns) float32, with a third axis for colours; None if pydicom cannot read them
        either.
    """
    with quiet_pydicom(), unknown_kinds_are_explicit():
        try:
            with file.open("rb") as stream:
                if is_deflated(stream):
                    return None
            dataset = dcmread(file, force=True)
            if "TransferSyntaxUID" not in dataset.file_meta:
                # pydicom found out how the header is encoded, but does not use it for the pixels.
                is_implicit, is_little = dataset.original_encoding
                encoding = (bool(is_implicit), bool(is_little))
                dataset.file_meta.TransferSyntaxUID = SYNTAX_OF_ENCODING[encoding]
            if dataset.file_meta.TransferSyntaxUID.is_compressed:
                return None
            # Pixels of other kinds are not values, but numbers in a table of colours, say.
            kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
            if not kind.startswith(("MONOCHROME", "RGB")):
                return None
            return np.asarray(apply_rescale(dataset.pixel_array, dataset), dtype=np.float32)
        except Exception:
            return None


@contextmanager
def _on_disk(path: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Yield where the named files are on the disk.

    They are in a folder, the file itself, or unpacked from an archive for the time being.
    """
    if path.is_dir():
        yield {name: path / name for name in names}
    elif is_archive(path.name):
        with unpacked(path, names) as files:
            yield files
    else:
        yield {name: path for name in names}


def is_archive(name: str) -> bool:
    """Return whether a file is searched as an archive."""
    return name.lower().endswith(".zip")


@lru_cache(maxsize=4)
def _files_by_series(folder: str, below: bool, _stamp: int) -> dict[str, list[str]]:
    """Return series -> names of the files that hold its slices.

    Args:
        folder: the folder, archive or file.
        below: also take files from deeper folders.
    """
    root = Path(folder)
    slices: list[DicomSlice] = []
    if is_archive(root.name):
        for of_member in _archived(root, None):
            slices += of_member
    elif root.is_dir():
        names = [path.name for path in root.iterdir() if path.is_file()]
        if below:
            names = []
            for deeper, _, in_folder in os.walk(root, followlinks=True):
                inside = Path(deeper).relative_to(root)
                names += [(inside / name).as_posix() for name in in_folder]
        for name in sorted(names):
            is_hidden = Path(name).name.startswith(".")
            if may_be_dicom(name) and not is_hidden:
                slices += _or_nothing(root / name, name)
    else:
        slices = _or_nothing(root, root.name)

    # The slices of a multi-frame file follow each other, and name it once.
    found: dict[str, list[str]] = {}
    for one in slices:
        files = found.setdefault(one.series, [])
        if not files or files[-1] != one.file:
            files.append(one.file)
    return found


def _or_nothing(path: Path, name: str) -> list[DicomSlice]:
    """Return a file's slices; none if it is not part of a scan, which finding has reported."""
    try:
        return file_slices(path, name)
    except (NotAScanError, ScanError):
        return []


def _archived(path: Path, names: set[str] | None) -> Iterator[list[DicomSlice]]:
    """Yield the slices of members of an archive, all of them or the named ones."""
    with opened(path) as archive:
        for info in members(archive)[0]:
            is_wanted = may_be_dicom(info.filename) if names is None else info.filename in names
            if not is_wanted:
                continue
            try:
                yield member_slices(archive, info)
            except (NotAScanError, ScanError):
                continue


def member_slices(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> list[DicomSlice]:
    """Return the slices of a member of an archive.

    Raises:
        NotAScanError: it is not part of a scan.
        ScanError: ``unreadable``.
    """
    try:
        with archive.open(info) as stream:
            return read_slices(stream, info.filename, info.file_size)
    except DAMAGED as error:
        raise damaged_member(error) from error
