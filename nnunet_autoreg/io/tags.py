"""The header of a DICOM file, read up to its pixels: the tags that finding, sorting and grouping
need, and no others.

SimpleITK reads no nested sequences (where multi-frame files keep their geometry), no files without
an image (RTSTRUCT), and takes
ten times as long per file. Source: DICOM PS3.5, chapter 7 and annex A.
"""

import io
import struct
import zlib
from typing import IO, Any

from nnunet_autoreg.errors import ScanError

Tags = dict[int, Any]

TRANSFER_SYNTAX = 0x00020010
IMAGE_TYPE, SOP_CLASS, SOP_INSTANCE, MODALITY = 0x00080008, 0x00080016, 0x00080018, 0x00080060
SERIES_DESCRIPTION, PATIENT_ID = 0x0008103E, 0x00100020
CONTRAST_AGENT, SCANNING_SEQUENCE, PROTOCOL_NAME, SEQUENCE_NAME = (
    0x00180010,
    0x00180020,
    0x00181030,
    0x00180024,
)
REPETITION_TIME, ECHO_TIME, INVERSION_TIME, ECHO_NUMBER = (
    0x00180080,
    0x00180081,
    0x00180082,
    0x00180086,
)
SLICE_THICKNESS, SPACING_BETWEEN, TRIGGER_TIME, GANTRY_TILT, B_VALUE = (
    0x00180050,
    0x00180088,
    0x00181060,
    0x00181120,
    0x00189087,
)
STUDY, SERIES, ACQUISITION, INSTANCE = 0x0020000D, 0x0020000E, 0x00200012, 0x00200013
POSITION, ORIENTATION, TEMPORAL_POSITION = 0x00200032, 0x00200037, 0x00200100
SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS, PIXEL_SPACING = (
    0x00280002,
    0x00280004,
    0x00280008,
    0x00280010,
    0x00280011,
    0x00280030,
)
BITS, CORRECTED_IMAGE, INTERCEPT, SLOPE = 0x00280100, 0x00280051, 0x00281052, 0x00281053
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
PLANE_POSITION, PLANE_ORIENTATION, PIXEL_MEASURES, VALUE_TRANSFORMATION = (
    0x00209113,
    0x00209116,
    0x00289110,
    0x00289145,
)
FRAME_CONTENT, TEMPORAL_INDEX, MR_DIFFUSION = 0x00209111, 0x00209128, 0x00189117
FLIP_ANGLE, GRADIENT, GRADIENT_SEQUENCE = 0x00181314, 0x00189089, 0x00189076
ECHO_SEQUENCE, EFFECTIVE_ECHO_TIME = 0x00189114, 0x00189082
PIXELS = 0x7FE00010
"""Set to (offset of the pixels, their length in bytes or None for compressed ones); missing in
files without pixels.
"""

_TEXT, _SHORT, _DOUBLE, _SEQUENCE = "text", "H", "d", "sequence"
_KINDS = {
    **dict.fromkeys((SAMPLES, ROWS, COLUMNS, BITS), _SHORT),
    TEMPORAL_INDEX: "I",
    **dict.fromkeys((B_VALUE, GRADIENT, EFFECTIVE_ECHO_TIME), _DOUBLE),
    **dict.fromkeys(
        (
            SHARED_GROUPS,
            FRAME_GROUPS,
            PLANE_POSITION,
            PLANE_ORIENTATION,
            PIXEL_MEASURES,
            VALUE_TRANSFORMATION,
            FRAME_CONTENT,
            MR_DIFFUSION,
            GRADIENT_SEQUENCE,
            ECHO_SEQUENCE,
        ),
        _SEQUENCE,
    ),
    **dict.fromkeys(
        (
            TRANSFER_SYNTAX,
            IMAGE_TYPE,
            SOP_CLASS,
            SOP_INSTANCE,
            MODALITY,
            SERIES_DESCRIPTION,
            PATIENT_ID,
            CONTRAST_AGENT,
            SCANNING_SEQUENCE,
            PROTOCOL_NAME,
            SEQUENCE_NAME,
            REPETITION_TIME,
            ECHO_TIME,
            INVERSION_TIME,
            ECHO_NUMBER,
            SLICE_THICKNESS,
            SPACING_BETWEEN,
            TRIGGER_TIME,
            GANTRY_TILT,
            STUDY,
            SERIES,
            ACQUISITION,
            INSTANCE,
            POSITION,
            ORIENTATION,
            TEMPORAL_POSITION,
            PHOTOMETRIC,
            FRAMES,
            PIXEL_SPACING,
            CORRECTED_IMAGE,
            INTERCEPT,
            SLOPE,
            FLIP_ANGLE,
        ),
        _TEXT,
    ),
}
_IMPLICIT, _DEFLATED, _BIG_ENDIAN = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
)
_LONG_VRS = {
    b"OB",
    b"OW",
    b"OF",
    b"OD",
    b"OL",
    b"OV",
    b"SQ",
    b"UC",
    b"UR",
    b"UT",
    b"UN",
    b"SV",
    b"UV",
}
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, PIXELS)
_UNKNOWN_LENGTH = 0xFFFFFFFF
_PIECE_BYTES, _MAX_VALUE_BYTES, _MAX_DEPTH, _MAX_INFLATED_BYTES = 1 << 13, 1 << 16, 12, 1 << 24


class NotDicomError(ScanError):
    """A file without the mark of DICOM that does not read as DICOM without it either."""


def parse_tags(stream: IO[bytes]) -> Tags:
    """The wanted tags of one DICOM file, read from its first byte on and no further than its
    pixels.

    Returns:
        Text values as str (several joined by a backslash), numbers as tuples, sequences as lists of
        ``Tags``.

    Raises:
        ScanError: ``unreadable``: a damaged header.
        NotDicomError: ``unreadable``: it is another kind of file.
    """
    tags: Tags = {}
    head = stream.read(_PIECE_BYTES)
    start = 132 if head[128:132] == b"DICM" else 0
    other = NotDicomError(
        "unreadable",
        "not DICOM: the mark at byte 128 is missing; is it another kind of file?"
        if head
        else "the file is empty; copy it again",
    )
    if start == 0 and head[:2] not in (b"\x02\0", b"\x08\0"):
        raise other
    try:
        walker = _Walker(stream, head, explicit=head[start + 4 : start + 6].isalpha(), order="<")
        position = walker.walk(start, None, tags, last_group=2)
        syntax = text(tags, TRANSFER_SYNTAX) or (_IMPLICIT if start else "")
        if syntax == _DEFLATED:
            rest = zlib.decompressobj(-15).decompress(
                walker.rest_from(position), _MAX_INFLATED_BYTES
            )
            walker, position = _Walker(io.BytesIO(), rest, explicit=True, order="<"), 0
        elif syntax:
            walker.explicit, walker.order = (
                syntax != _IMPLICIT,
                ">" if syntax == _BIG_ENDIAN else "<",
            )
        walker.walk(position, None, tags)
    except (struct.error, EOFError, zlib.error) as error:
        damaged = ScanError(
            "unreadable", "its DICOM header is damaged or cut short; copy the file again"
        )
        raise damaged if start else other from error
    if start == 0 and SOP_CLASS not in tags:
        raise other
    return tags


def text(tags: Tags, tag: int) -> str:
    """A text value without padding; "" if it is missing."""
    return str(tags.get(tag, "")).strip()


def numbers(tags: Tags, tag: int) -> tuple[float, ...]:
    """The numbers of a value; () if it is missing or holds anything else."""
    value = tags.get(tag, ())
    try:
        return tuple(float(v) for v in (value.split("\\") if isinstance(value, str) else value))
    except ValueError:
        return ()


def number(tags: Tags, tag: int, default: float) -> float:
    """The first number of a value, or ``default``."""
    return next(iter(numbers(tags, tag)), default)


class _Walker:
    """Steps from element to element of a stream, forwards only, holding little more than one
    element.
    """

    def __init__(self, stream: IO[bytes], head: bytes, explicit: bool, order: str):
        self.stream, self.held, self.base = stream, head, 0
        self.explicit, self.order = explicit, order

    def at(self, position: int, count: int) -> int:
        """The index in ``held`` of ``count`` bytes from ``position`` of the file on."""
        index = position - self.base
        if index + count > len(self.held):
            self._skip(index - len(self.held))
            self.held, self.base = self.held[index:], position
            self.held += self.stream.read(max(count - len(self.held), _PIECE_BYTES))
            if len(self.held) < count:
                raise EOFError
            return 0
        return index

    def _skip(self, count: int) -> None:
        if count > 0 and self.stream.seekable():
            self.stream.seek(count, io.SEEK_CUR)
            return
        while count > 0:
            piece = self.stream.read(min(count, _PIECE_BYTES * 128))
            if not piece:
                raise EOFError
            count -= len(piece)

    def rest_from(self, position: int) -> bytes:
        """All bytes from ``position`` on, up to a limit."""
        return self.held[self.at(position, 1) :] + self.stream.read(_MAX_INFLATED_BYTES)

    def walk(
        self, position: int, end: int | None, tags: Tags, depth: int = 0, last_group: int = 0xFFFF
    ) -> int:
        """Read elements into ``tags`` up to ``end``, a delimiter, the pixels, or the first group
        beyond ``last_group``.
        """
        while end is None or position < end:
            try:
                index = self.at(position, 8)
            except EOFError:
                if depth or last_group == 2:
                    raise
                return position
            group, element = struct.unpack_from(self.order + "HH", self.held, index)
            tag = group << 16 | element
            if group > last_group:
                return position
            if tag in (_ITEM_END, _SEQUENCE_END):
                return position + 8
            vr, length, position = self._length(position)
            if tag in _PIXEL_TAGS and depth == 0:
                tags[PIXELS] = (position, None if length == _UNKNOWN_LENGTH else length)
                return position
            position = self._value(tag, vr, length, position, tags, depth)
        return position

    def _length(self, position: int) -> tuple[bytes, int, int]:
        """(value representation, length of the value, its position) of the element at
        ``position``.
        """
        index = self.at(position, 8)
        if not self.explicit:
            return b"", struct.unpack_from(self.order + "I", self.held, index + 4)[0], position + 8
        vr = bytes(self.held[index + 4 : index + 6])
        if not vr.isalpha():
            raise EOFError
        if vr not in _LONG_VRS:
            return vr, struct.unpack_from(self.order + "H", self.held, index + 6)[0], position + 8
        index = self.at(position, 12)
        return vr, struct.unpack_from(self.order + "I", self.held, index + 8)[0], position + 12

    def _value(
        self, tag: int, vr: bytes, length: int, position: int, tags: Tags, depth: int
    ) -> int:
        """Take a value if it is wanted; returns the position behind it."""
        kind = _KINDS.get(tag)
        if kind == _SEQUENCE or length == _UNKNOWN_LENGTH:
            items: list[Tags] = []
            before = self.explicit
            self.explicit = before and vr != b"UN"
            position = self._sequence(position, length, items, depth)
            self.explicit = before
            if kind == _SEQUENCE:
                tags[tag] = items
            return position
        if kind and length <= _MAX_VALUE_BYTES:
            index = self.at(position, length)
            raw = self.held[index : index + length]
            size = 0 if kind == _TEXT else struct.calcsize(kind)
            tags[tag] = (
                raw.decode("latin-1").rstrip("\0 ")
                if kind == _TEXT
                else struct.unpack(
                    f"{self.order}{length // size}{kind}", raw[: length // size * size]
                )
            )
        return position + length

    def _sequence(self, position: int, length: int, items: list[Tags], depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise EOFError
        end = None if length == _UNKNOWN_LENGTH else position + length
        while end is None or position < end:
            index = self.at(position, 8)
            group, element, size = struct.unpack_from(self.order + "HHI", self.held, index)
            position += 8
            if group << 16 | element == _SEQUENCE_END:
                return position
            if group << 16 | element != _ITEM:
                raise EOFError
            item: Tags = {}
            position = self.walk(
                position, None if size == _UNKNOWN_LENGTH else position + size, item, depth + 1
            )
            items.append(item)
        return position
