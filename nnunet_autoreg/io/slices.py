"""What one DICOM file contributes: its slices with their geometry, or the reason why it is no part
of a scan.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from sys import intern

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io import tags as t
from nnunet_autoreg.io.contrast import contrast_of
from nnunet_autoreg.io.tags import Tags, number, numbers, text

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
"""Words of Image Type that tell the images of one acquisition apart."""


class Leave(Exception):  # noqa: N818
    """A file that is no part of a scan; ``what`` is a word for its row's id, ``series`` the UID of
    its series.
    """

    def __init__(self, status: str, reason: str, what: str, series: str):
        super().__init__(reason)
        self.status, self.reason, self.what, self.series = status, reason, what, series


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a DICOM file. Positions and orientations are in LPS, lengths in mm.

    Attributes:
        file: below the series' folder, or within its archive.
        frame: number in a multi-frame file; -1 in a file of one slice.
        shape: (rows, columns); ``spacing`` alike.
        orientation: directions along a row, then along a column.
        parts: magnitude, phase, water, fat ... as Image Type says.
        order: what tells slices of one position apart, as ``ORDER_NAMES`` names it, and the
            instance number at the end.
        problem: why its series cannot be used; "" mostly.
        thickness: NaN where the file does not say.
        derived: the words of Image Type that mark a derived image; "" for an original one.
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
    derived: str = ""

    @property
    def identity(self) -> tuple[object, ...]:
        """What two copies of one slice share.

        The SOP instance is not enough: some anonymisers give all files the same.
        """
        return (self.instance, self.frame, self.position, self.order, self.parts)


ORDER_NAMES = (
    "time",
    "b-value",
    "echo",
    "acquisition",
    "trigger time",
    "inversion time",
    "flip angle",
    "gradient direction",
)
NUM_ORDERS = len(ORDER_NAMES) + 1


def slices_of(tags: Tags, file: str, num_bytes: int) -> list[Slice]:
    """The slices of one file of ``num_bytes`` bytes.

    Raises:
        Leave: it is no part of a scan.
        ScanError: ``unreadable``: it names no series.
    """
    modality = _modality(tags)
    derived = _derived(tags, modality)
    if not text(tags, t.SERIES):
        raise ScanError(
            "unreadable", "its DICOM header names no series (0020,000E); export it again"
        )
    problem = _problem(tags, num_bytes)
    shape = (int(number(tags, t.ROWS, 0)), int(number(tags, t.COLUMNS, 0)))
    num_frames = int(number(tags, t.FRAMES, 1))
    frames = _frames(tags) if num_frames > 1 or t.FRAME_GROUPS in tags else iter([(-1, tags)])
    common = (
        intern(text(tags, t.SERIES)),
        intern(text(tags, t.SOP_INSTANCE)) or file,
        intern(modality),
    )
    parts = "".join(sorted({PARTS[word] for word in _image_type(tags)[2:] if word in PARTS}))
    contrast = intern(contrast_of(modality, tags))
    subject = intern(text(tags, t.PATIENT_ID) or text(tags, t.STUDY))
    found = []
    for number_, frame in frames:
        spacing = (*numbers(frame, t.PIXEL_SPACING), math.nan, math.nan)
        wrong = problem if problem[0] else _geometry_problem(frame, shape)
        found.append(
            Slice(
                file,
                number_,
                *common,
                shape,
                (spacing[0], spacing[1]),
                numbers(frame, t.ORIENTATION),
                numbers(frame, t.POSITION),
                number(frame, t.SLOPE, 1.0),
                number(frame, t.INTERCEPT, 0.0),
                intern(parts),
                _order(frame, number_),
                wrong,
                number(frame, t.GANTRY_TILT, 0.0),
                contrast,
                subject,
                intern(text(tags, t.STUDY)),
                number(frame, t.SLICE_THICKNESS, math.nan),
                derived,
            )
        )
    if len(found) != num_frames:
        reason = (
            f"a multi-frame file of {num_frames} frames that gives positions for {len(found)}; "
            "export it again"
        )
        return [_with_problem(s, ("slices", reason)) for s in found] or _no_geometry(
            tags, file, common, shape, num_frames
        )
    return found


def _no_geometry(
    tags: Tags, file: str, common: tuple[str, str, str], shape: tuple[int, int], num_frames: int
) -> list[Slice]:
    reason = (
        f"a multi-frame file of {num_frames} frames without the position of each; export it as "
        "single slices"
    )
    subject = intern(text(tags, t.PATIENT_ID) or text(tags, t.STUDY))
    nowhere = (math.nan, math.nan)
    return [
        Slice(
            file,
            0,
            *common,
            shape,
            nowhere,
            (),
            (),
            1.0,
            0.0,
            "",
            (0.0,) * NUM_ORDERS,
            ("slices", reason),
            0.0,
            "",
            subject,
            intern(text(tags, t.STUDY)),
        )
    ]


def _with_problem(one: Slice, problem: tuple[str, str]) -> Slice:
    return one if one.problem[0] else replace(one, problem=problem)


def _modality(tags: Tags) -> str:
    """CT, MR or PT; other kinds of objects, localisers and mosaics are left."""
    series = text(tags, t.SERIES)
    uid, claimed = text(tags, t.SOP_CLASS), text(tags, t.MODALITY).upper()
    short = uid.removeprefix(CLASSES) if uid.startswith(CLASSES) else ""
    if claimed in MODALITIES_WITHOUT_SCANS and short not in MODALITY_OF_CLASS:
        short = short or MODALITIES_WITHOUT_SCANS[claimed]
    modality = MODALITY_OF_CLASS.get(
        short, claimed if not uid and claimed in ("CT", "MR", "PT") else ""
    )
    if not modality:
        prefix = max(
            (p for p in OTHER_CLASSES if short == p or short.startswith(p.rstrip(".") + ".")),
            key=len,
            default="",
        )
        shown = claimed if claimed in KNOWN_MODALITIES else "another kind"
        status, reason = OTHER_CLASSES.get(
            prefix, ("notimage", f"a DICOM object of {shown}; CT, MR and PET are read")
        )
        what = (
            reason.split(" ")[0]
            if reason.split(" ")[0].isupper()
            else claimed
            if claimed in KNOWN_MODALITIES
            else "DICOM"
        )
        raise Leave(status, reason, what, series)
    words = set(_image_type(tags))
    if "LOCALIZER" in words:
        raise Leave(
            "localizer", "a localiser (scout): planning slices, not a scan", modality, series
        )
    if "MOSAIC" in words:
        raise Leave(
            "mosaic",
            "a Siemens mosaic, which tiles all slices of a volume into one image; convert it with "
            "dcm2niix, "
            "and give the result",
            modality,
            series,
        )
    return modality


def _derived(tags: Tags, modality: str) -> str:
    """Return the words of Image Type by which an image is a derived one; "" for an original."""
    words = _image_type(tags)
    made = sorted(set(words) & POSTPROCESSED)
    if made:
        return made[0]
    # PET is always computed, so the word says nothing there.
    return SECONDARY if words[1:2] == ["SECONDARY"] and modality != "PT" else ""


def _image_type(tags: Tags) -> list[str]:
    return [word.strip().upper() for word in text(tags, t.IMAGE_TYPE).split("\\")]


def _problem(tags: Tags, num_bytes: int) -> tuple[str, str]:
    """What is wrong with a file as a whole: (status, reason); ("", "") if nothing is."""
    if t.PIXELS not in tags:
        return "unreadable", "a slice has no pixels; copy or export the series again"
    samples = int(number(tags, t.SAMPLES, 1))
    if samples > 1 or text(tags, t.PHOTOMETRIC).startswith(("RGB", "YBR", "PALETTE")):
        return (
            "rgb",
            f"colour images ({samples} values per pixel): a screenshot or overlay, not a scan",
        )
    offset, length = tags[t.PIXELS]
    if length is None or text(tags, t.TRANSFER_SYNTAX) == "1.2.840.10008.1.2.1.99":
        return "", ""
    frames = max(1, int(number(tags, t.FRAMES, 1)))
    wanted = (
        int(number(tags, t.ROWS, 0))
        * int(number(tags, t.COLUMNS, 0))
        * samples
        * frames
        * int(number(tags, t.BITS, 16))
        // 8
    )
    there = min(length, num_bytes - offset)
    if there < wanted:
        return (
            "unreadable",
            f"truncated: a file holds {there} of {wanted} bytes of pixels; copy the series again",
        )
    return "", ""


def _geometry_problem(frame: Tags, shape: tuple[int, int]) -> tuple[str, str]:
    spacing, orientation, position = (
        numbers(frame, tag) for tag in (t.PIXEL_SPACING, t.ORIENTATION, t.POSITION)
    )
    if min(shape) < 1:
        return (
            "unreadable",
            f"a slice of {shape[0]} rows and {shape[1]} columns; export the series again",
        )
    if (
        len(position) != 3
        or len(orientation) != 6
        or not all(map(math.isfinite, (*position, *orientation)))
    ):
        return (
            "slices",
            "a slice does not say where it lies (Image Position and Orientation (Patient)); export "
            "the series again",
        )
    if len(spacing) != 2 or not all(math.isfinite(s) and s > 0 for s in spacing):
        listed = ", ".join(f"{s:g}" for s in spacing) or "none"
        return (
            "spacing",
            f"pixel spacing {listed} mm (rows, columns); two positive numbers are needed: correct "
            "the header",
        )
    return "", ""


def _order(frame: Tags, number_: int) -> tuple[float, ...]:
    """Return the values that ``ORDER_NAMES`` names, and the instance number."""
    temporal = number(frame, t.TEMPORAL_POSITION, number(frame, t.TEMPORAL_INDEX, 0.0))
    echo_number = number(frame, t.ECHO_NUMBER, 0.0)
    echo = number(frame, t.ECHO_TIME, number(frame, t.EFFECTIVE_ECHO_TIME, echo_number))
    instance = number(frame, t.INSTANCE, 0.0) if number_ < 0 else float(number_)
    return (
        temporal,
        number(frame, t.B_VALUE, 0.0),
        echo,
        number(frame, t.ACQUISITION, 0.0),
        number(frame, t.TRIGGER_TIME, 0.0),
        number(frame, t.INVERSION_TIME, 0.0),
        number(frame, t.FLIP_ANGLE, 0.0),
        _direction_number(numbers(frame, t.GRADIENT)),
        instance,
    )


def _direction_number(direction: tuple[float, ...]) -> float:
    """Return one number for a gradient direction, equal for directions that agree to two decimals;
    0 for none.
    """
    if len(direction) != 3 or not all(map(math.isfinite, direction)):
        return 0.0
    x, y, z = (round(100 * (value + 2)) for value in direction)
    return float((x * 1000 + y) * 1000 + z)


def _frames(tags: Tags) -> Iterator[tuple[int, Tags]]:
    """The frames of a multi-frame file as if each were a file: its own groups over the shared ones
    over the file's tags.
    """
    shared = _flattened(next(iter(tags.get(t.SHARED_GROUPS, [])), {}))
    base = {
        k: v
        for k, v in tags.items()
        if k
        in (t.PIXEL_SPACING, t.ORIENTATION, t.SLOPE, t.INTERCEPT, t.GANTRY_TILT, t.SLICE_THICKNESS)
    }
    for index, item in enumerate(tags.get(t.FRAME_GROUPS, [])):
        yield index, {**base, **shared, **_flattened(item)}


def _flattened(item: Tags) -> Tags:
    """The tags of a functional group item and of the sequences within it."""
    flat: Tags = {}
    for tag, value in item.items():
        if isinstance(value, list):
            for inner in value:
                flat.update(_flattened(inner))
        else:
            flat[tag] = value
    return flat
