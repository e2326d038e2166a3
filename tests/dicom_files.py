"""DICOM files for tests, written tag by tag, so that every tag can be wrong on purpose."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

# Unique identifiers of the kinds of images, and of the ways in which values are written.
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
PET = "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4.1"
EXPLICIT, IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
# Kinds of values whose length is written with 32 bits after two empty bytes.
LONG = ("OB", "OW", "SQ", "UN", "UT")

Values = dict[int, tuple[str, Any]]
"""Tag -> (value representation, value); None as the whole entry removes a tag."""


def write(
    path: Path,
    values: Values,
    pixels: Any = None,
    syntax: str = EXPLICIT,
    preamble: bool = True,
) -> Path:
    """Write one file; ``pixels`` (rows, columns) or (frames, rows, columns), int16 or uint16."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    values = {k: v for k, v in values.items() if v is not None}
    if pixels is not None:
        array = np.asarray(pixels)
        stored = array.astype(array.dtype.newbyteorder(order))
        values[0x7FE00010] = ("OW", stored.tobytes())
    body = _elements(values, syntax != IMPLICIT, order)
    # The file meta group is explicit and little endian in every syntax.
    group = {
        0x00020002: values.get(0x00080016, ("UI", CT)),
        0x00020003: values.get(0x00080018, ("UI", "1.2")),
        0x00020010: ("UI", syntax),
    }
    meta = _elements(group, True, "<")
    length = _elements({0x00020000: ("UL", [len(meta)])}, True, "<")
    head = b"\0" * 128 + b"DICM" + length + meta
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((head if preamble else b"") + body)
    return path


def _elements(values: Values, explicit: bool, order: str) -> bytes:
    parts = []
    for tag in sorted(values):
        vr, value = values[tag]
        raw = _raw(vr, value, explicit, order)
        # Values have an even length; identifiers and bytes are padded with 0, text with a space.
        if len(raw) % 2:
            raw += b"\0" if vr in ("UI", "OB") else b" "
        head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
        if not explicit:
            head += struct.pack(order + "I", len(raw))
        elif vr in LONG:
            head += vr.encode() + b"\0\0" + struct.pack(order + "I", len(raw))
        else:
            head += vr.encode() + struct.pack(order + "H", len(raw))
        parts.append(head + raw)
    return b"".join(parts)


def _raw(vr: str, value: Any, explicit: bool, order: str) -> bytes:
    if vr == "SQ":
        parts = []
        for item in value:
            content = _elements(item, explicit, order)
            parts.append(struct.pack(order + "HHI", 0xFFFE, 0xE000, len(content)) + content)
        return b"".join(parts)
    if isinstance(value, bytes):
        return value
    if vr in ("US", "UL", "FD"):
        kind = {"US": "H", "UL": "I", "FD": "d"}[vr]
        return b"".join(struct.pack(order + kind, number) for number in value)
    if isinstance(value, (tuple, list)):
        # Numbers are text with at most 16 characters, separated by backslashes.
        value = "\\".join(f"{v:.10g}" if isinstance(v, float) else str(v) for v in value)
    return str(value).encode("latin-1")


def slice_values(
    number: int,
    series: str = "1.2.3",
    sop_class: str = CT,
    z_mm: float | None = None,
    spacing: tuple[float, float] = (1.5, 1.0),
    step_mm: float = 2.0,
    shape: tuple[int, int] = (18, 20),
    **changes: Any,
) -> Values:
    """The tags of axial slice ``number`` of a series.

    ``changes`` are tags as ``t00080060=("CS", "MR")``, or None to drop one.
    """
    modalities = {CT: "CT", MR: "MR", PET: "PT", ENHANCED_CT: "CT", ENHANCED_MR: "MR"}
    modality = modalities.get(sop_class, "OT")
    height = number * step_mm if z_mm is None else z_mm
    values: Values = {
        0x00080008: ("CS", "ORIGINAL\\PRIMARY\\AXIAL"),
        0x00080016: ("UI", sop_class),
        0x00080018: ("UI", f"{series}.9.{number}"),
        0x00080060: ("CS", modality),
        0x00100020: ("LO", "P1"),
        0x0020000D: ("UI", "1.2.77"),
        0x0020000E: ("UI", series),
        0x00200013: ("IS", str(number)),
        0x00200032: ("DS", (-10.0, -20.0, float(height))),
        0x00200037: ("DS", (1, 0, 0, 0, 1, 0)),
        0x00280002: ("US", [1]),
        0x00280004: ("CS", "MONOCHROME2"),
        0x00280010: ("US", [shape[0]]),
        0x00280011: ("US", [shape[1]]),
        0x00280030: ("DS", spacing),
        # Signed numbers of 16 bits.
        0x00280100: ("US", [16]),
        0x00280101: ("US", [16]),
        0x00280102: ("US", [15]),
        0x00280103: ("US", [1]),
    }
    for name, value in changes.items():
        values[int(name[1:], 16)] = value
    return {k: v for k, v in values.items() if v is not None}


def volume(num: int = 8, shape: tuple[int, int] = (18, 20), seed: int = 0) -> Any:
    """int16 (Z, Y, X) noise."""
    values = np.random.default_rng(seed).integers(0, 1000, (num, *shape))
    return values.astype(np.int16)


def write_series(
    folder: Path,
    array: Any = None,
    syntax: str = EXPLICIT,
    skip: tuple[int, ...] = (),
    prefix: str = "",
    **settings: Any,
) -> Path:
    """A series of one file per slice in ``folder``; ``settings`` go to ``slice_values``."""
    array = volume() if array is None else array
    for number, pixels in enumerate(array):
        if number in skip:
            continue
        values = slice_values(number, shape=pixels.shape, **settings)
        write(folder / f"{prefix}{number:03d}.dcm", values, pixels, syntax)
    return folder


def multiframe_values(
    positions: list[tuple[float, float, float]],
    sop_class: str = ENHANCED_CT,
    slopes: list[float] | None = None,
    extra: list[Values] | None = None,
    **changes: Any,
) -> Values:
    """The tags of an enhanced file with one frame per position.

    ``extra`` are further tags of each frame's content.
    """
    values = slice_values(0, sop_class=sop_class)
    # Where a frame lies is written frame by frame, or once for all of them.
    for tag in (0x00200032, 0x00200037, 0x00280030):
        del values[tag]
    values[0x00280008] = ("IS", str(len(positions)))
    # Shared by all frames: orientation, voxel size and slice thickness.
    shared: Values = {
        0x00209116: ("SQ", [{0x00200037: ("DS", (1, 0, 0, 0, 1, 0))}]),
        0x00289110: ("SQ", [{0x00280030: ("DS", (1.5, 1.0)), 0x00180050: ("DS", "2")}]),
    }
    values[0x52009229] = ("SQ", [shared])

    frames = []
    for index, position in enumerate(positions):
        content: Values = {0x00209157: ("UL", [1, index + 1])}
        if extra:
            content |= extra[index]
        frame: Values = {
            0x00209111: ("SQ", [content]),
            0x00209113: ("SQ", [{0x00200032: ("DS", position)}]),
        }
        if slopes:
            rescaling: Values = {
                0x00281052: ("DS", "-1000"),
                0x00281053: ("DS", slopes[index]),
                0x00281054: ("LO", "HU"),
            }
            frame[0x00289145] = ("SQ", [rescaling])
        frames.append(frame)
    values[0x52009230] = ("SQ", frames)
    for name, value in changes.items():
        values[int(name[1:], 16)] = value
    return {k: v for k, v in values.items() if v is not None}
