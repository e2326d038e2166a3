"""Read the size of an ordinary scan from the first kilobytes of its file, ten times as fast as
SimpleITK.

The first pass of the index over many thousand files uses this. Anything unusual gives None; the
file is then read by SimpleITK.
"""

import gzip
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from nnunet_autoreg.corpus.read import ScanHeader, check_dimensions, check_memory, check_spacing
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import as_size, zyx
from nnunet_autoreg.io.nifti import GZIP_MAGIC, parse_header

HEAD_BYTES = 4096
SCALAR_DATATYPES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)
UNKNOWN_UNIT, MILLIMETRES = 0, 2
META_LINE = re.compile(rb"^(\w+) *= *(.*?)\r?$", re.MULTILINE)


def peek(path: Path, part: str = "") -> ScanHeader | None:
    """Return size and spacing (z, y, x) of a plain NIfTI or MetaImage file, by its first bytes.

    They are along the file's own axes. None for anything else.
    """
    name = path.name.lower()
    if part or not name.endswith((".nii", ".nii.gz", ".mha", ".mhd")):
        return None
    try:
        head = _head(path)
        size, spacing_mm = _nifti(head) if ".nii" in name else _meta(head)
        check_dimensions(size)
        check_spacing(spacing_mm)
        check_memory(size)
    except (ScanError, OSError, EOFError, ValueError, KeyError, struct.error):
        return None
    return ScanHeader(as_size(size[::-1]), zyx(spacing_mm))


def _head(path: Path) -> bytes:
    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    if head[:2] != GZIP_MAGIC:
        return head
    with gzip.open(path, "rb") as stream:
        return stream.read(HEAD_BYTES)


def _nifti(head: bytes) -> tuple[list[int], Sequence[float]]:
    """Return size and spacing (x, y, z) of a plain NIfTI header.

    Raises:
        ValueError: it is not plain.
    """
    header = parse_header(head)

    # The unit is one byte in version 1 and four in version 2; its lowest three bits are of space.
    size_of_header = struct.unpack_from(header.byte_order + "i", head)[0]
    unit = head[123]
    if size_of_header != 348:
        unit = struct.unpack_from(header.byte_order + "i", head, 500)[0]

    is_scalar = header.datatype in SCALAR_DATATYPES
    is_in_mm = unit & 7 in (UNKNOWN_UNIT, MILLIMETRES)
    is_3d = all(size == 1 for size in header.dims[3:])
    if not (is_scalar and is_in_mm and is_3d):
        raise ValueError("not plain")
    return list(header.dims[:3]), header.pixdim


def _meta(head: bytes) -> tuple[list[int], Sequence[float]]:
    """Return size and spacing (x, y, z) of a plain MetaImage header.

    Raises:
        KeyError, ValueError: it is not plain.
    """
    # Behind this field the voxels may begin, which may look like anything.
    text = head.partition(b"ElementDataFile")[0]
    fields = {}
    for key, value in META_LINE.findall(text):
        fields[key.decode()] = value.decode("ascii")
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise ValueError("not plain")

    size = [int(number) for number in fields["DimSize"].split()]
    spacing_mm = [float(number) for number in fields["ElementSpacing"].split()]
    return size, spacing_mm
