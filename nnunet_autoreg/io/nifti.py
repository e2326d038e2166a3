"""What SimpleITK passes over in a NIfTI file: missing bytes, NaN, impossible voxel sizes, qform and
sform at odds.

ITK fills the missing end of a truncated NIfTI file with zeros, replaces NaN and infinity by 0 and a
voxel size of zero by 1 mm, all without a word, so the header and the bytes are checked here.
Source: the NIfTI-1 and NIfTI-2 header layouts.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

import numpy as np

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.names import voxel_file

GZIP_MAGIC = b"\x1f\x8b"
PAIR_MAGIC, SINGLE_MAGIC = b"ni1\0", b"n+1\0"
"""What a NIfTI-1 header ends with: its voxels are in another file, or behind it."""
POINTERS = (b"version https://git-lfs", b"/annex/objects/", b"../.git/annex/", b".git/annex/")
"""First bytes of text files that replace images which were not downloaded."""
COMPLEX_DATATYPES = (32, 1792, 2048)
FLOAT_DATATYPES = {16: "f4", 64: "f8"}
BITS_OF_DATATYPE = {
    2: 8,
    4: 16,
    8: 32,
    16: 32,
    32: 64,
    64: 64,
    128: 24,
    256: 8,
    512: 16,
    768: 32,
    1024: 64,
    1280: 64,
    1536: 128,
    1792: 128,
    2048: 256,
    2304: 32,
}
"""Bits of a voxel. Every reader goes by the datatype; the header's own bitpix repeats it, and some
writers get it wrong.
"""
PIECE_BYTES = 1 << 22
# From 3 on (Talairach, MNI, template) the sform is a registration, and may scale; the qform keeps
# the scanner's geometry.
REGISTERED_SFORM = 3
MAX_SCALE_DISAGREEMENT = 0.02


@dataclass(frozen=True)
class NiftiHeader:
    """The header fields that are checked.

    Attributes:
        bits: number of bits of a voxel, by its datatype; the header's bitpix counts for datatypes
            that the standard does not know.
        sform_scales: lengths of the affine's columns, in file units.
    """

    byte_order: str
    dims: tuple[int, ...]
    datatype: int
    bits: int
    offset: int
    pixdim: tuple[float, float, float]
    qform_code: int
    sform_code: int
    sform_scales: tuple[float, float, float]


def check_nifti(path: Path) -> None:
    """Check a NIfTI file's header and length; of a pair, those of the .hdr and the .img file.

    Raises:
        ScanError: ``unreadable`` (not NIfTI, truncated, damaged gzip, one file of a pair),
            ``complex``, ``spacing``, ``direction`` (or no direction at all), ``nonfinite``.
    """
    with path.open("rb") as handle:
        compressed = handle.read(2) == GZIP_MAGIC
    is_called_gz = path.name.lower().endswith(".gz")
    if compressed and not is_called_gz:
        raise ScanError(
            "unreadable",
            "the content is compressed by gzip, but the name does not end in .gz; rename the file "
            "to .nii.gz",
        )
    try:
        with _opened(path, compressed) as stream:
            head = _read_piece(stream, 540)
            if is_called_gz and not compressed:
                _check_uncompressed(head)
            header = parse_header(head)
            _check_header(header)
            voxels = _voxels_of_pair(path, head) if path.suffix.lower() == ".hdr" else path
            if voxels == path:
                num_bytes, num_bad = _read_through(stream, head, header)
            else:
                num_bytes, num_bad = _read_voxels(voxels, header)

        num_voxels = math.prod(header.dims)
        num_expected = max(header.offset, 0) + num_voxels * header.bits // 8
        if num_bytes < num_expected:
            raise ScanError(
                "unreadable",
                f"truncated: {num_bytes} of {num_expected} bytes are there; copy the file again",
            )
        if num_bad:
            raise ScanError(
                "nonfinite",
                f"{num_bad} of {num_voxels} voxels are NaN or infinite; repair or leave out the "
                "scan",
            )
    except EOFError as error:
        raise ScanError(
            "unreadable",
            "truncated: the gzip stream ends early; copy the file again",
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(
            "unreadable",
            f"damaged gzip stream ({error}); copy the file again",
        ) from error


def _voxels_of_pair(path: Path, head: bytes) -> Path:
    """Return the file that holds the voxels of a .hdr file.

    Raises:
        ScanError: ``direction``: Analyze 7.5, or ``unreadable``: there is no .img file.
    """
    magic = head[344:348]
    if magic == SINGLE_MAGIC:
        return path
    if struct.unpack_from("<i", head)[0] in NIFTI_2_SIZES:
        raise ScanError(
            "unreadable",
            "a NIfTI-2 pair of .hdr and .img, which SimpleITK does not read; convert it to .nii.gz",
        )
    if magic != PAIR_MAGIC:
        raise ScanError(
            "direction",
            "an Analyze 7.5 image: its header does not say which side is left; convert it to "
            ".nii.gz with a tool that knows how it was written",
        )
    found = voxel_file(path)
    if found is None:
        raise ScanError("unreadable", "the .img file with its voxels is missing; restore it")
    return found


def _read_voxels(path: Path, header: NiftiHeader) -> tuple[int, int]:
    """Return (bytes in all, voxels that are NaN or infinite) of the .img file of a pair."""
    with path.open("rb") as handle:
        compressed = handle.read(2) == GZIP_MAGIC
    with _opened(path, compressed) as stream:
        return _read_through(stream, _read_piece(stream, PIECE_BYTES), header)


def _check_uncompressed(head: bytes) -> None:
    """Let an image pass that is called .gz and is not compressed; SimpleITK reads it.

    Raises:
        ScanError: ``unreadable``: it is not an image either.
    """
    if head.startswith(POINTERS):
        raise ScanError(
            "unreadable",
            "a pointer of git-lfs or git-annex, and not the image itself; get its content (git lfs "
            "pull, git annex get)",
        )
    try:
        parse_header(head)
    except ScanError as error:
        raise ScanError(
            "unreadable",
            "the name ends in .gz but the content is not gzip; is it another kind of file?",
        ) from error


def _opened(path: Path, compressed: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb")


def _read_piece(stream: IO[bytes], size: int) -> bytes:
    """Return up to ``size`` bytes; fewer at the end of the image only.

    What follows a gzip stream and is not gzip is passed over, as zlib and with it every reader
    does.
    """
    pieces: list[bytes] = []
    wanted = size
    while wanted > 0:
        try:
            # read1 hands over what it has before it looks at what follows, so that nothing is lost
            # to an error.
            piece = cast(BufferedReader, stream).read1(wanted)
        except gzip.BadGzipFile as error:
            # A wrong checksum has the same class, and stays an error.
            if not str(error).startswith("Not a gzipped file"):
                raise
            break
        if not piece:
            break
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)


def _read_through(stream: IO[bytes], head: bytes, header: NiftiHeader) -> tuple[int, int]:
    """Return (bytes in all, voxels that are NaN or infinite) of a stream.

    Its first bytes, ``head``, were taken already.
    """
    num_bytes, num_bad, rest = len(head), 0, head
    to_skip = max(header.offset, 0)
    dtype = np.dtype(header.byte_order + FLOAT_DATATYPES.get(header.datatype, "u1"))
    while rest:
        skipped = min(to_skip, len(rest))
        to_skip, rest = to_skip - skipped, rest[skipped:]
        whole = len(rest) // dtype.itemsize * dtype.itemsize
        if dtype.kind == "f":
            values = np.frombuffer(rest[:whole], dtype)
            num_bad += int(values.size - np.isfinite(values).sum())
        piece = _read_piece(stream, PIECE_BYTES)
        num_bytes += len(piece)
        rest = rest[whole:] + piece if piece else b""
    return num_bytes, num_bad


def parse_header(head: bytes) -> NiftiHeader:
    """Parse the first 540 bytes of an (uncompressed) NIfTI-1 or NIfTI-2 file.

    Raises:
        ScanError: ``unreadable``: it is not a NIfTI header.
    """
    if len(head) >= 348:
        for order in "<>":
            size = struct.unpack_from(order + "i", head)[0]
            if size == 348:
                return _parse(head, order, NIFTI_1)
            if size == 540 and len(head) >= 540:
                return _parse(head, order, NIFTI_2)
    raise ScanError("unreadable", "not a NIfTI image: its header is missing or cut short")


NIFTI_2_SIZES = (540, int.from_bytes((540).to_bytes(4, "big"), "little"))
"""The first number of a NIfTI-2 header, in either byte order."""


@dataclass(frozen=True)
class _Layout:
    """Where a NIfTI version keeps its fields: (struct format, byte offset) each."""

    dim: tuple[str, int]
    datatype: tuple[str, int]
    bits: tuple[str, int]
    pixdim: tuple[str, int]
    offset: tuple[str, int]
    codes: tuple[str, int]
    srow: tuple[str, int]


NIFTI_1 = _Layout(
    ("8h", 40),
    ("h", 70),
    ("h", 72),
    ("8f", 76),
    ("f", 108),
    ("2h", 252),
    ("12f", 280),
)
NIFTI_2 = _Layout(
    ("8q", 16),
    ("h", 12),
    ("h", 14),
    ("8d", 104),
    ("q", 168),
    ("2i", 344),
    ("12d", 400),
)


def _parse(head: bytes, order: str, layout: _Layout) -> NiftiHeader:
    def read(field: tuple[str, int]) -> tuple[float, ...]:
        return struct.unpack_from(order + field[0], head, field[1])

    count, *sizes = (int(v) for v in read(layout.dim))
    rows = read(layout.srow)
    scales = [math.hypot(*rows[column::4]) for column in range(3)]
    qform, sform = (int(v) for v in read(layout.codes))
    x, y, z = read(layout.pixdim)[1:4]
    start = read(layout.offset)[0]
    datatype = int(read(layout.datatype)[0])
    bits = BITS_OF_DATATYPE.get(datatype, int(read(layout.bits)[0]))
    return NiftiHeader(
        byte_order=order,
        dims=tuple(sizes[:count]) if 1 <= count <= 7 else (),
        datatype=datatype,
        bits=bits,
        offset=int(start) if math.isfinite(start) else 0,
        pixdim=(x, y, z),
        qform_code=qform,
        sform_code=sform,
        sform_scales=(scales[0], scales[1], scales[2]),
    )


def _check_header(header: NiftiHeader) -> None:
    if not header.dims or min(header.dims) < 1:
        raise ScanError("unreadable", f"the NIfTI header gives impossible dimensions {header.dims}")
    if header.datatype in COMPLEX_DATATYPES:
        raise ScanError("complex", "complex voxels; store the magnitude as a separate image")
    used = header.pixdim[: min(len(header.dims), 3)]
    if not all(math.isfinite(s) and s > 0 for s in used):
        raise ScanError(
            "spacing",
            f"voxel size {_listed(used)} in the header (x, y, z); it must be positive: correct "
            "pixdim",
        )
    registered = header.sform_code >= REGISTERED_SFORM and header.qform_code > 0
    if header.sform_code < 1 or registered or len(header.dims) < 3:
        return
    sizes = zip(header.sform_scales, header.pixdim, strict=True)
    worst = max(abs(of_sform / of_qform - 1) for of_sform, of_qform in sizes)
    # Written so that NaN counts as a disagreement.
    if not worst <= MAX_SCALE_DISAGREEMENT:
        raise ScanError(
            "direction",
            f"pixdim/qform and sform disagree: voxel sizes {_listed(header.pixdim)} mm against "
            f"{_listed(header.sform_scales)} mm (x, y, z); correct the header",
        )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
