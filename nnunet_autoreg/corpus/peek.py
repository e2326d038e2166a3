"""A scan's size from the first kilobytes of its file, ten times as fast as SimpleITK, where nothing
about it is unusual.

This serves the index's first pass over many thousand files. It judges nothing: whatever is not
plain gets None, and a full look.
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
    header = parse_header(head)
    version_1 = struct.unpack_from(header.byte_order + "i", head)[0] == 348
    unit = (
        head[123] if version_1 else struct.unpack_from(header.byte_order + "i", head, 500)[0]
    ) & 7
    if (
        header.datatype not in SCALAR_DATATYPES
        or unit not in (UNKNOWN_UNIT, MILLIMETRES)
        or any(d != 1 for d in header.dims[3:])
    ):
        raise ValueError("not plain")
    return list(header.dims[:3]), header.pixdim


def _meta(head: bytes) -> tuple[list[int], Sequence[float]]:
    fields = {
        key.decode(): value.decode("ascii")
        for key, value in META_LINE.findall(head.partition(b"ElementDataFile")[0])
    }
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise ValueError("not plain")
    return [int(v) for v in fields["DimSize"].split()], [
        float(v) for v in fields["ElementSpacing"].split()
    ]
