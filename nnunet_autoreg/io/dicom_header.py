"""The header of a DICOM file, read by pydicom up to the pixels: the values that finding and sorting
need, and no others.

pydicom reads what SimpleITK's GDCM does not: nested sequences, in which multi-frame files keep
their geometry, and files without an image, such as RTSTRUCT. Pixels are read by GDCM
(io/dicom.py). Source of the format: DICOM PS3.5, chapter 7 and annex A.
"""

import io
import logging
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from nnunet_autoreg.errors import ScanError

SEQUENCES = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "MRDiffusionSequence",
    "DiffusionGradientDirectionSequence",
    "MREchoSequence",
)
VALUES = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesDescription",
    "PatientID",
    "ContrastBolusAgent",
    "ScanningSequence",
    "SequenceName",
    "ProtocolName",
    "RepetitionTime",
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "InversionTime",
    "TriggerTime",
    "FlipAngle",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "SliceThickness",
    "SpacingBetweenSlices",
    "GantryDetectorTilt",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "AcquisitionNumber",
    "AcquisitionTime",
    "InstanceNumber",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "BitsAllocated",
    "CorrectedImage",
    "RescaleIntercept",
    "RescaleSlope",
)


def _tag(keyword: str) -> BaseTag:
    return BaseTag(cast(int, tag_for_keyword(keyword)))


TAGS = {keyword: _tag(keyword) for keyword in (*SEQUENCES, *VALUES)}
TRANSFER_SYNTAX = _tag("TransferSyntaxUID")
PIXEL_TAGS = frozenset(map(_tag, ("FloatPixelData", "DoubleFloatPixelData", "PixelData")))
UNKNOWN_LENGTH = 0xFFFFFFFF
# ISO 2022 switches character sets by this byte. Without it, ASCII is the same in all of them.
ESCAPE = b"\x1b"

PREAMBLE_BYTES, MARK = 128, b"DICM"
# A file without preamble begins with an element of group 2 or 8, in either byte order.
FIRST_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x08")
FIRST_BYTES = 2048
DEFLATED = b"1.2.840.10008.1.2.1.99"
# The class of a DICOMDIR.
DIRECTORY = "1.2.840.10008.1.3.10"
# A small deflated file can grow to any size, so that no more than this of it is unpacked.
MAX_INFLATED_BYTES = 1 << 24


class NotDicomError(ScanError):
    """A file without the mark of DICOM that does not read as DICOM without it either."""


@dataclass(frozen=True)
class PixelBytes:
    """Where the pixels of a file lie.

    Attributes:
        offset: position of their first byte.
        length: number of bytes; None if they are compressed, because any length is possible then.
    """

    offset: int
    length: int | None


class DicomHeader:
    """Values of a DICOM header by keyword, such as ``header.number("Rows", 0)``.

    A frame of a multi-frame file has its values in several nested data sets: the first one that has
    a value counts. A value that cannot be decoded counts as missing, because one bad value is not
    a reason to refuse a file.

    Attributes:
        pixels: None in files without any.
        is_irregular: whether the header is encoded in another way than the file says, or an element
            has a kind of value that does not exist. GDCM loses its way in such a file.
    """

    def __init__(self, *datasets: Dataset, pixels: PixelBytes | None = None):
        self.datasets = datasets
        self.pixels = pixels
        self.is_irregular = False

    def __contains__(self, keyword: str) -> bool:
        return self._find(TAGS[keyword]) is not None

    def _find(self, tag: BaseTag) -> tuple[Dataset, Any] | None:
        """Return the data set that has an element, and the element as stored."""
        for dataset in self.datasets:
            element = dataset.get_item(tag, keep_deferred=True)
            if element is not None:
                return dataset, element
        return None

    def text(self, keyword: str) -> str:
        """Return a value as text without padding, several joined by a backslash; "" if missing."""
        tag = TAGS[keyword]
        found = self._find(tag)
        if found is None:
            return ""
        dataset, element = found

        # Nearly all values are ASCII. Decoding these directly takes a tenth of pydicom's time.
        stored = element.value
        if isinstance(stored, bytes) and stored.isascii() and ESCAPE not in stored:
            return stored.decode("ascii").strip("\0 ")

        value = _decoded(dataset, tag)
        if value is None:
            return ""
        if isinstance(value, MultiValue):
            return "\\".join(str(item) for item in value).strip("\0 ")
        return str(value).strip("\0 ")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Return the numbers of a value; () if it is missing or holds anything else."""
        tag = TAGS[keyword]
        found = self._find(tag)
        if found is None:
            return ()

        dataset, element = found
        values: Any
        is_coded = element.VR not in (None, "UN")
        vr = element.VR if is_coded else dictionary_VR(tag)
        if vr in ("DS", "IS") and isinstance(element.value, bytes):
            # Some writers end a list of numbers by a separator.
            text = self.text(keyword).rstrip("\\ ")
            values = text.split("\\") if text else ()
        else:
            value = _decoded(dataset, tag)
            is_list = isinstance(value, MultiValue | list | tuple)
            values = value if is_list else (value,)
        try:
            return tuple(float(value) for value in values)
        except (TypeError, ValueError):
            return ()

    def number(self, keyword: str, default: float) -> float:
        """Return the first number of a value, or ``default``."""
        values = self.numbers(keyword)
        return values[0] if values else default

    def items(self, keyword: str) -> list[Dataset]:
        """Return the items of a sequence; none if it is missing."""
        found = self._find(TAGS[keyword])
        value = _decoded(found[0], TAGS[keyword]) if found else None
        return list(value) if isinstance(value, Sequence) else []

    def frames(self) -> list["DicomHeader"]:
        """Return one header per frame of a multi-frame file.

        A frame's own functional groups come before the shared ones, and these before what the file
        says for all frames.
        """
        for_all = Dataset()
        for keyword in (
            "PixelSpacing",
            "ImageOrientationPatient",
            "RescaleSlope",
            "RescaleIntercept",
            "GantryDetectorTilt",
            "SliceThickness",
            "SpacingBetweenSlices",
        ):
            found = self._find(TAGS[keyword])
            if found is not None:
                for_all[TAGS[keyword]] = found[1]

        shared: list[Dataset] = []
        for item in self.items("SharedFunctionalGroupsSequence")[:1]:
            shared += _nested(item)
        own = [_nested(item) for item in self.items("PerFrameFunctionalGroupsSequence")]
        return [DicomHeader(*groups, *shared, for_all) for groups in own]


def _decoded(dataset: Dataset, tag: BaseTag) -> Any:
    """Return a value as pydicom decodes it; None if it cannot."""
    try:
        return dataset[tag].value
    except Exception:
        return None


def _nested(item: Dataset) -> list[Dataset]:
    """Return a functional group item and the wanted items of the sequences within it."""
    found = [item]
    header = DicomHeader(item)
    for keyword in SEQUENCES:
        for inner in header.items(keyword):
            found += _nested(inner)
    return found


class _StopAtPixels:
    """Makes pydicom stop at the pixels, and keeps their number of bytes by the header."""

    def __init__(self) -> None:
        self.length: int | None = None
        self.num_bytes_before = 8
        self.is_implicit = False

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag not in PIXEL_TAGS:
            return False
        self.length = length
        self.is_implicit = vr is None
        # The element begins with tag, kind of value and length; kinds of long values take 12 bytes.
        self.num_bytes_before = 12 if vr in EXPLICIT_VR_LENGTH_32 else 8
        return True


def read_dicom_header(stream: IO[bytes], num_bytes: int) -> DicomHeader:
    """Read the header of one DICOM file of ``num_bytes`` bytes, no further than its pixels.

    Raises:
        ScanError: ``unreadable``: the header cannot be parsed.
        NotDicomError: ``unreadable``: it is another kind of file.
    """
    first = stream.read(FIRST_BYTES)
    stream.seek(0)
    has_mark = first[PREAMBLE_BYTES : PREAMBLE_BYTES + len(MARK)] == MARK
    if not first:
        raise NotDicomError("unreadable", "the file is empty; copy it again")
    other_kind = NotDicomError(
        "unreadable",
        "not DICOM: the mark at byte 128 is missing; is it another kind of file?",
    )
    if not has_mark and first[:2] not in FIRST_GROUPS:
        raise other_kind
    damaged = ScanError(
        "unreadable",
        "its DICOM header cannot be parsed: it is damaged, cut short, or does not say what it is "
        "(0008,0016); copy or export the file again",
    )
    try:
        deflated = is_deflated(stream)
        header, is_whole = _parse(stream, num_bytes, deflated)
        if not is_whole:
            # Some writers give private elements a kind that is none, such as "??". pydicom takes
            # such an element for one without a kind, and loses its way.
            stream.seek(0)
            with unknown_kinds_are_explicit():
                header, is_whole = _parse(stream, num_bytes, deflated)
            header.is_irregular = True
    except (OSError, zipfile.BadZipFile):
        # The file itself could not be read, of which the caller knows more.
        raise
    except Exception as error:
        raise damaged if has_mark else other_kind from error

    if not has_mark and "SOPClassUID" not in header:
        raise other_kind
    if not is_whole:
        raise damaged
    return header


def is_deflated(stream: IO[bytes]) -> bool:
    """Return whether a file says that it is deflated. pydicom would unpack all of it at once."""
    meta = _read_meta(stream)
    stream.seek(0)
    syntax = meta.get_item(TRANSFER_SYNTAX)
    return syntax is not None and DEFLATED in bytes(syntax.value or b"")


def _read_meta(stream: IO[bytes]) -> Dataset:
    """Return the elements of group 2, which describe the file, and stop behind them."""
    read_preamble(cast(Any, stream), force=True)
    return read_dataset(cast(Any, stream), False, True, stop_when=lambda tag, *_: tag.group != 2)


def _parse(stream: IO[bytes], num_bytes: int, deflated: bool) -> tuple[DicomHeader, bool]:
    """Return the header, and whether it was read to its end."""
    stop = _StopAtPixels()
    tags: list[Any] = list(TAGS.values())
    if deflated:
        # As pydicom does it, but for the limit.
        _read_meta(stream)
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated = unpacker.decompress(stream.read(MAX_INFLATED_BYTES), MAX_INFLATED_BYTES)
        dataset = read_dataset(
            io.BytesIO(inflated),
            False,
            True,
            stop_when=stop,
            specific_tags=tags,
        )
    else:
        dataset = read_partial(cast(Any, stream), cast(Any, stop), force=True, specific_tags=tags)

    pixels = None
    if stop.length is not None:
        is_compressed = deflated or stop.length == UNKNOWN_LENGTH
        offset = stream.tell() + stop.num_bytes_before
        pixels = PixelBytes(offset, None if is_compressed else stop.length)
    meta = getattr(dataset, "file_meta", {})
    kind = meta.get("MediaStorageSOPClassUID")
    header = DicomHeader(dataset, pixels=pixels)
    names_its_kind = "SOPClassUID" in header or "Modality" in header or kind == DIRECTORY
    if kind and "SOPClassUID" not in header:
        # Some files, such as directories of a medium, state their kind in front only.
        dataset.SOPClassUID = str(kind)
    if pixels is not None:
        syntax = meta.get("TransferSyntaxUID")
        if syntax is not None:
            header.is_irregular = stop.is_implicit != (syntax == ImplicitVRLittleEndian)
        return header, True

    # pydicom skips what is not wanted without a look, so it may have skipped past the end. Or the
    # file ends within the last value that was read.
    elements = list(dataset.keys())
    last = dataset.get_item(elements[-1], keep_deferred=True) if elements else None
    stored, length = getattr(last, "value", None), getattr(last, "length", 0)
    is_torn = isinstance(stored, bytes) and length != UNKNOWN_LENGTH and len(stored) < length
    is_cut_short = not elements or is_torn or stream.tell() > num_bytes
    return header, names_its_kind and not is_cut_short


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom from checking values and from warning of them.

    Its warnings quote values of the header, which may be names of patients.
    """
    logger = logging.getLogger("pydicom")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


@contextmanager
def unknown_kinds_are_explicit() -> Iterator[None]:
    """Let pydicom read an element of an unknown kind as one with a kind and a short length."""
    before = config.assume_implicit_vr_switch
    config.assume_implicit_vr_switch = False
    try:
        yield
    finally:
        config.assume_implicit_vr_switch = before
