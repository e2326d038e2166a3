"""What one DICOM file contributes: its slices with their geometry, or the reason why it is not part
of a scan.
"""

import math
from dataclasses import dataclass, field, replace
from sys import intern
from typing import Any

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.contrast import contrast_of, has_contrast_agent
from nnunet_autoreg.io.dicom_header import DicomHeader

CLASSES = "1.2.840.10008.5.1.4.1.1."
MODALITY_OF_CLASS = {
    "2": "CT",
    "2.1": "CT",
    "2.2": "CT",
    "4": "MR",
    "4.1": "MR",
    "4.4": "MR",
    "128": "PT",
    "128.1": "PT",
    "130": "PT",
}
# The longest prefix counts.
OTHER_CLASSES = {
    "481.3": ("notimage", "RTSTRUCT (contours), no image"),
    "481.2": ("notimage", "RTDOSE (a dose), no scan"),
    "481.5": ("notimage", "RTPLAN (a treatment plan), no image"),
    "481.8": ("notimage", "RTPLAN (a treatment plan), no image"),
    "481.": ("notimage", "a radiotherapy object, no scan"),
    "66.4": ("labels", "SEG (a segmentation): a label map, not a scan"),
    "66": ("notimage", "raw data or a registration, no image"),
    "88.59": ("notimage", "KO (a key object selection), no image"),
    "88": ("notimage", "SR (a structured report), no image"),
    "11": ("notimage", "PR (a presentation state), no image"),
    "104": ("notimage", "an encapsulated document, no image"),
    "9": ("notimage", "a waveform, no image"),
    "7": ("secondary", "a secondary capture (screenshot or scanned page), not a scan"),
    "30": ("notimage", "a parametric map, not a scan"),
}
MODALITIES_WITHOUT_SCANS = {
    "RTSTRUCT": "481.3",
    "RTDOSE": "481.2",
    "RTPLAN": "481.5",
    "SEG": "66.4",
    "REG": "66",
    "KO": "88.59",
    "SR": "88",
    "PR": "11",
    "DOC": "104",
}
KNOWN_MODALITIES = {
    "CR",
    "DX",
    "MG",
    "US",
    "XA",
    "RF",
    "NM",
    "OT",
    "IO",
    "PX",
    "ES",
    "SM",
    "XC",
    "OP",
    "OCT",
    "IVUS",
    "ECG",
}
POSTPROCESSED = {
    "MPR",
    "REFORMATTED",
    "PROJECTION IMAGE",
    "MIP",
    "MINIP",
    "MIN_IP",
    "MNIP",
    "AVERAGE",
    "CSA MPR",
    "CSA MIP",
    "CSA RESAMPLED",
    "SUBTRACT",
    "SUBTRACTION",
    "ADC",
    "FA",
    "TENSOR",
    "TRACE",
    "TRACEW",
    "PERFUSION",
    "RCBV",
    "RCBF",
    "CBV",
    "CBF",
    "MTT",
    "TTP",
    "SCREEN SAVE",
    "VRT",
}
"""Words of Image Type that mark a derived image: computed from others, not acquired."""
SECONDARY = "DERIVED, SECONDARY"
"""Second word of Image Type: reformatted or computed images, but also originals that a program
wrote as DICOM.
"""
PARTS = {
    "M": "M",
    "MAGNITUDE": "M",
    "P": "P",
    "PHASE": "P",
    "R": "R",
    "REAL": "R",
    "I": "I",
    "IMAGINARY": "I",
    "W": "W",
    "WATER": "W",
    "F": "F",
    "FAT": "F",
    "IP": "IP",
    "IN_PHASE": "IP",
    "OP": "OP",
    "OPP_PHASE": "OP",
    "OUT_PHASE": "OP",
}
"""Words of Image Type that distinguish the images of one acquisition."""


class NotAScanError(Exception):
    """A file that is not part of a scan.

    Attributes:
        status, reason: as in scans.csv.
        what: a word for the id of its row.
        series: the UID of its series.
        subject: as in ``DicomSlice``.
    """

    def __init__(self, status: str, reason: str, what: str, series: str, subject: str = ""):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.what = what
        self.series = series
        self.subject = subject


@dataclass(frozen=True, slots=True)
class DicomSlice:
    """One slice of a DICOM file. Positions and orientations are in LPS, lengths in mm.

    Attributes:
        file: below the series' folder, or within its archive.
        frame: number in a multi-frame file; -1 in a file of one slice.
        shape: (rows, columns); ``spacing`` alike.
        orientation: directions along a row, then along a column.
        parts: magnitude, phase, water, fat ... as Image Type says.
        order: what distinguishes slices of one position, as ``ORDER_NAMES`` names it, and the
            instance number at the end.
        problem: (status, reason) why its series cannot be used; ("", "") mostly.
        thickness: NaN if the file does not say.
        distance: to the next slice, as the file states it; NaN if it does not.
        derived: the words of Image Type that mark a derived image; "" for an original one.
        is_irregular: as of ``DicomHeader``.
    """

    file: str
    frame: int
    series: str
    instance: str
    modality: str
    shape: tuple[int, int]
    spacing: tuple[float, float]
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    slope: float
    intercept: float
    parts: str
    order: tuple[float, ...]
    problem: tuple[str, str]
    tilt: float
    contrast: str
    subject: str = field(repr=False)
    study: str = field(repr=False)
    thickness: float = math.nan
    distance: float = math.nan
    derived: str = ""
    is_irregular: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        """Return the values that two copies of one slice share.

        The SOP instance is not enough: some anonymisers give all files the same.
        """
        return (self.study, self.instance, self.frame, self.position, self.order, self.parts)


ORDER_NAMES = (
    "time",
    "b-value",
    "echo",
    "acquisition",
    "trigger time",
    "inversion time",
    "flip angle",
    "gradient direction",
    "contrast agent",
    "acquisition time",
)
NUM_ORDERS = len(ORDER_NAMES) + 1
NO_PROBLEM = ("", "")


def slices_of(header: DicomHeader, file: str, num_bytes: int) -> list[DicomSlice]:
    """Return the slices of one file of ``num_bytes`` bytes.

    Raises:
        NotAScanError: it is not part of a scan.
        ScanError: ``unreadable``: it names no series.
    """
    modality = _modality(header)
    derived = _derived(header, modality)
    series = header.text("SeriesInstanceUID")
    if not series:
        raise ScanError(
            "unreadable",
            "its DICOM header names no series (0020,000E); export it again",
        )

    problem = _problem_of_file(header, num_bytes)
    shape = (int(header.number("Rows", 0)), int(header.number("Columns", 0)))
    words = [PARTS[word] for word in _image_type(header)[2:] if word in PARTS]
    study = header.text("StudyInstanceUID")
    # Many slices share these texts, so that each is kept in memory once.
    of_file: dict[str, Any] = {
        "file": file,
        "series": intern(series),
        "instance": intern(header.text("SOPInstanceUID")) or file,
        "modality": intern(modality),
        "shape": shape,
        "parts": intern("".join(sorted(set(words)))),
        "contrast": intern(contrast_of(modality, header)),
        "subject": intern(header.text("PatientID") or study),
        "study": intern(study),
        "derived": derived,
        "is_irregular": header.is_irregular,
    }

    num_frames = int(header.number("NumberOfFrames", 1))
    is_multi_frame = num_frames > 1 or "PerFrameFunctionalGroupsSequence" in header
    frames = header.frames() if is_multi_frame else [header]
    found = []
    for index, frame in enumerate(frames):
        # Missing values become NaN, which _problem_of_geometry reports.
        spacing = (*frame.numbers("PixelSpacing"), math.nan, math.nan)
        found.append(
            DicomSlice(
                **of_file,
                frame=index if is_multi_frame else -1,
                spacing=(spacing[0], spacing[1]),
                orientation=frame.numbers("ImageOrientationPatient"),
                position=frame.numbers("ImagePositionPatient"),
                slope=frame.number("RescaleSlope", 1.0),
                intercept=frame.number("RescaleIntercept", 0.0),
                order=_order(frame, index if is_multi_frame else -1),
                problem=problem if problem[0] else _problem_of_geometry(frame, shape),
                tilt=frame.number("GantryDetectorTilt", 0.0),
                thickness=frame.number("SliceThickness", math.nan),
                distance=abs(frame.number("SpacingBetweenSlices", math.nan)),
            ),
        )
    if len(found) == num_frames:
        return found
    return _without_all_frames(found, num_frames, of_file)


def _without_all_frames(
    found: list[DicomSlice],
    num_frames: int,
    of_file: dict[str, Any],
) -> list[DicomSlice]:
    """Return slices that say why a file of ``num_frames`` frames cannot be used.

    Args:
        found: the frames that have a position.
        of_file: what all slices of the file share.
    """
    # The file has more frames than positions, so that the volume cannot be put together.
    reason = (
        f"a multi-frame file of {num_frames} frames that gives positions for {len(found)}; "
        "export it again"
    )
    if found:
        problem = ("slices", reason)
        return [one if one.problem[0] else replace(one, problem=problem) for one in found]
    reason = (
        f"a multi-frame file of {num_frames} frames without the position of each; export it as "
        "single slices"
    )
    without_geometry = DicomSlice(
        **of_file | {"parts": "", "contrast": "", "derived": ""},
        frame=0,
        spacing=(math.nan, math.nan),
        orientation=(),
        position=(),
        slope=1.0,
        intercept=0.0,
        order=(0.0,) * NUM_ORDERS,
        problem=("slices", reason),
        tilt=0.0,
    )
    return [without_geometry]


def _modality(header: DicomHeader) -> str:
    """Return CT, MR or PT.

    Raises:
        NotAScanError: it is another kind of object, a localiser or a mosaic.
    """
    series = header.text("SeriesInstanceUID")
    uid = header.text("SOPClassUID")
    claimed = header.text("Modality").upper()
    short = uid.removeprefix(CLASSES) if uid.startswith(CLASSES) else ""
    if claimed in MODALITIES_WITHOUT_SCANS and short not in MODALITY_OF_CLASS:
        short = short or MODALITIES_WITHOUT_SCANS[claimed]

    without_class = claimed if not uid and claimed in ("CT", "MR", "PT") else ""
    modality = MODALITY_OF_CLASS.get(short, without_class)
    if not modality:
        # Only known words are repeated: the tag may hold any text.
        known = claimed if claimed in KNOWN_MODALITIES else ""
        status = "notimage"
        reason = f"a DICOM object of {known or 'another kind'}; CT, MR and PET are read"
        longest = ""
        for prefix, described in OTHER_CLASSES.items():
            is_of_class = short == prefix or short.startswith(prefix.rstrip(".") + ".")
            if is_of_class and len(prefix) > len(longest):
                longest = prefix
                status, reason = described
        # Reasons begin with the kind's name, such as RTSTRUCT, if it has one.
        name = reason.split(" ")[0]
        name = name if name.isupper() else known or "DICOM"
        subject = header.text("PatientID") or header.text("StudyInstanceUID")
        raise NotAScanError(status, reason, name, series, subject)

    words = set(_image_type(header))
    if "LOCALIZER" in words:
        raise NotAScanError(
            "localizer",
            "a localiser (scout): planning slices, not a scan",
            modality,
            series,
        )
    if "MOSAIC" in words:
        raise NotAScanError(
            "mosaic",
            "a Siemens mosaic, which tiles all slices of a volume into one image; convert it with "
            "dcm2niix, and give the result",
            modality,
            series,
        )
    return modality


def _derived(header: DicomHeader, modality: str) -> str:
    """Return the words of Image Type by which an image is a derived one; "" for an original."""
    words = _image_type(header)
    made = sorted(set(words) & POSTPROCESSED)
    if made:
        return made[0]
    # PET is always computed, so the word says nothing there.
    is_secondary = words[1:2] == ["SECONDARY"] and modality != "PT"
    return SECONDARY if is_secondary else ""


def _image_type(header: DicomHeader) -> list[str]:
    return [word.strip().upper() for word in header.text("ImageType").split("\\")]


def _problem_of_file(header: DicomHeader, num_bytes: int) -> tuple[str, str]:
    """Return what is wrong with a file as a whole: (status, reason), or ``NO_PROBLEM``."""
    samples = int(header.number("SamplesPerPixel", 1))
    colours = ("RGB", "YBR", "PALETTE")
    is_coloured = header.text("PhotometricInterpretation").startswith(colours)
    if header.pixels is not None and (samples > 1 or is_coloured):
        return (
            "rgb",
            f"colour images ({samples} values per pixel): a screenshot or overlay, not a scan",
        )
    return problem_of_pixels(header, num_bytes)


def problem_of_pixels(header: DicomHeader, num_bytes: int) -> tuple[str, str]:
    """Return whether pixels lack in a file of ``num_bytes`` bytes, as ``_problem_of_file`` does."""
    pixels = header.pixels
    if pixels is None:
        return "unreadable", "a slice has no pixels; copy or export the series again"
    if pixels.length is None:
        return NO_PROBLEM

    samples = int(header.number("SamplesPerPixel", 1))
    num_values = samples * max(1, int(header.number("NumberOfFrames", 1)))
    for keyword in ("Rows", "Columns"):
        num_values *= int(header.number(keyword, 0))
    needed = num_values * int(header.number("BitsAllocated", 16)) // 8
    present = min(pixels.length, num_bytes - pixels.offset)
    if present < needed:
        return (
            "unreadable",
            f"truncated: a file holds {present} of {needed} bytes of pixels; copy the series again",
        )
    return NO_PROBLEM


def _problem_of_geometry(frame: DicomHeader, shape: tuple[int, int]) -> tuple[str, str]:
    """Return why it is not known where a slice lies: (status, reason), or ``NO_PROBLEM``."""
    if min(shape) < 1:
        return (
            "unreadable",
            f"a slice of {shape[0]} rows and {shape[1]} columns; export the series again",
        )

    position = frame.numbers("ImagePositionPatient")
    orientation = frame.numbers("ImageOrientationPatient")
    is_complete = len(position) == 3 and len(orientation) == 6
    is_finite = all(map(math.isfinite, (*position, *orientation)))
    if not is_complete or not is_finite:
        return (
            "slices",
            "a slice does not say where it lies (Image Position and Orientation (Patient)); export "
            "the series again",
        )

    spacing = frame.numbers("PixelSpacing")
    are_positive = all(math.isfinite(step) and step > 0 for step in spacing)
    if len(spacing) != 2 or not are_positive:
        listed = ", ".join(f"{s:g}" for s in spacing) or "none"
        return (
            "spacing",
            f"pixel spacing {listed} mm (rows, columns); two positive numbers are needed: correct "
            "the header",
        )
    return NO_PROBLEM


def _order(frame: DicomHeader, index: int) -> tuple[float, ...]:
    """Return the values that ``ORDER_NAMES`` names, and the instance number."""
    time = frame.number("TemporalPositionIdentifier", frame.number("TemporalPositionIndex", 0.0))
    # What is missing in a header is replaced by the next best field with the same information.
    echo_number = frame.number("EchoNumbers", 0.0)
    echo = frame.number("EchoTime", frame.number("EffectiveEchoTime", echo_number))

    # One number for a gradient direction, the same for directions that agree to two decimals.
    gradient = 0.0
    direction = frame.numbers("DiffusionGradientOrientation")
    if len(direction) == 3 and all(map(math.isfinite, direction)):
        x, y, z = (round(100 * (value + 2)) for value in direction)
        gradient = float((x * 1000 + y) * 1000 + z)

    return (
        time,
        frame.number("DiffusionBValue", 0.0),
        echo,
        frame.number("AcquisitionNumber", 0.0),
        frame.number("TriggerTime", 0.0),
        frame.number("InversionTime", 0.0),
        frame.number("FlipAngle", 0.0),
        gradient,
        float(has_contrast_agent(frame)),
        # As it is written, such as 101530.5: only whether two times differ counts.
        frame.number("AcquisitionTime", 0.0),
        frame.number("InstanceNumber", 0.0) if index < 0 else float(index),
    )
