"""Malformed inputs of every format: the one row that the user sees in scans.csv, through the same
search and reading as the command.
"""

import csv
import gzip
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dicom_files as d
import numpy as np
import pytest
import SimpleITK
from nnunet_folders import environment_below, make_folders

from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.private import PRIVATE_NAME
from nnunet_autoreg.corpus.read import load_scan
from nnunet_autoreg.corpus.rows import read_index
from nnunet_autoreg.errors import ScanError

pytestmark = pytest.mark.integration

Make = Callable[[Path], object]


def seen(folder: Path) -> list[tuple[str, str]]:
    """(status, reason) of every row that is not a usable scan."""
    rows = []
    for one in find_scans([], [folder]):
        # A candidate without a status may still turn out to be bad when it is read.
        status = one.status
        reason = one.reason
        if not status:
            try:
                load_scan(one.path, one.part)
                continue
            except ScanError as error:
                status = error.status
                reason = str(error)
        rows.append((status, reason))
    return rows


def series(**settings: Any) -> Make:
    return lambda folder: d.write_series(folder, **settings)


def changed(number: int, **changes: Any) -> Make:
    """A series whose slice ``number`` has other tags."""

    def make(folder: Path) -> None:
        d.write_series(folder, skip=(number,))
        d.write(folder / "changed.dcm", d.slice_values(number, **changes), d.volume()[number])

    return make


def one_object(sop_class: str, modality: str, **changes: Any) -> Make:
    """A single file of another kind of DICOM object, which has no pixels."""
    values = {"t00080060": ("CS", modality), **changes}
    tags = d.slice_values(0, sop_class=f"1.2.840.10008.5.1.4.1.1.{sop_class}", **values)
    return lambda folder: d.write(folder / "x.dcm", tags)


def at(*heights_mm: float) -> Make:
    """A series with slices at these heights."""

    def make(folder: Path) -> None:
        array = d.volume(len(heights_mm))
        for number, height in enumerate(heights_mm):
            values = d.slice_values(number, z_mm=height)
            d.write(folder / f"{number}.dcm", values, array[number])

    return make


def cut(name: str, keep: int, make: Make) -> Make:
    """What ``make`` writes, with one file cut after ``keep`` bytes."""

    def made(folder: Path) -> None:
        make(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return made


def tilted(folder: Path) -> None:
    """A CT with a tilted gantry: each slice is 0.5 mm further in y, and 2 mm in z."""
    for number, pixels in enumerate(d.volume()):
        # atan(0.5 / 2) = 14 degrees, which the field of the tilt says too.
        changes = {
            "t00200032": ("DS", (0.0, 0.5 * number, 2.0 * number)),
            "t00181120": ("DS", "14"),
        }
        d.write(folder / f"{number}.dcm", d.slice_values(number, **changes), pixels)


def doubled(folder: Path) -> None:
    d.write_series(folder)
    # A second slice at the height of slice 3, with another id.
    again = d.slice_values(3, t00080018=("UI", "1.2.999"))
    d.write(folder / "again.dcm", again, d.volume(seed=2)[3])


def all_doubled(folder: Path) -> None:
    for again in range(2):
        for number, pixels in enumerate(d.volume()):
            values = d.slice_values(number, t00080018=("UI", f"1.2.{again}.{number}"))
            d.write(folder / f"{again}_{number}.dcm", values, pixels)


def radial(folder: Path) -> None:
    """Slices that turn around an axis, as in radial acquisitions."""
    for number, pixels in enumerate(d.volume()):
        angle = np.pi * number / 8
        direction = (float(np.cos(angle)), float(np.sin(angle)), 0, 0, 0, 1)
        values = d.slice_values(number, t00200037=("DS", direction))
        d.write(folder / f"{number}.dcm", values, pixels)


def colour(folder: Path) -> None:
    # Three samples per pixel: 20 columns of red, green and blue.
    for number in range(8):
        values = d.slice_values(
            number,
            t00280002=("US", [3]),
            t00280004=("CS", "RGB"),
            t00280006=("US", [0]),
        )
        d.write(folder / f"{number}.dcm", values, np.zeros((18, 60), np.uint16))


def compressed(folder: Path) -> None:
    """A JPEG 2000 syntax with bytes that are not a stream of it."""
    # An empty table of offsets, one fragment of 8 bytes, and the end of the sequence.
    table = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    fragment = struct.pack("<HHI", 0xFFFE, 0xE000, 8) + b"nonsense"
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    for number in range(8):
        values = d.slice_values(number) | {0x7FE00010: ("OB", table + fragment + end)}

        path = d.write(folder / f"{number}.dcm", values, syntax="1.2.840.10008.1.2.4.90")
        # Compressed pixels have an undefined length, which the writer of the tests cannot write.
        content = bytearray(path.read_bytes())
        place = content.index(b"\xe0\x7f\x10\x00OB")
        content[place + 8 : place + 12] = b"\xff" * 4
        path.write_bytes(bytes(content))


def overlong_length(folder: Path) -> None:
    path = d.write(folder / "x.dcm", d.slice_values(0), d.volume(1)[0])
    content = bytearray(path.read_bytes())
    # The study's identifier claims to have 65 535 bytes.
    place = content.index(b"\x20\x00\x0d\x00UI")
    content[place + 6 : place + 8] = b"\xff\xff"
    path.write_bytes(bytes(content))


def nested_forever(folder: Path) -> None:
    # A sequence and an item of undefined length, again and again without an end.
    sequence = struct.pack("<HH", 0x0008, 0x1140) + b"SQ\0\0\xff\xff\xff\xff"
    deep = sequence + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    path = d.write(folder / "x.dcm", {0x00080016: ("UI", d.CT)})
    path.write_bytes(path.read_bytes() + deep * 5000)


def enhanced(positions: int, frames: int, **changes: Any) -> Make:
    """An enhanced file whose number of frames may differ from its number of positions."""
    places = [(0.0, 0.0, 2.0 * i) for i in range(positions)]
    values = d.multiframe_values(places, **changes)
    values[0x00280008] = ("IS", str(frames))
    return lambda folder: d.write(folder / "x.dcm", values, d.volume(frames))


def zip_of(*entries: tuple[str, bytes], name: str = "x.zip") -> Make:
    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in entries:
                archive.writestr(entry, content)

    return make


def encrypted(folder: Path) -> None:
    zip_of(("a.nii.gz", b"x"))(folder)
    content = bytearray((folder / "x.zip").read_bytes())
    # The flag of encryption, in the header of the member and in the table at the end.
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (folder / "x.zip").write_bytes(bytes(content))


def damaged_member(folder: Path) -> None:
    zip_of(("a.nii.gz", os.urandom(5000)))(folder)
    content = bytearray((folder / "x.zip").read_bytes())
    # In the middle of the compressed data.
    content[2000] ^= 0xFF
    (folder / "x.zip").write_bytes(bytes(content))


def image(
    name: str,
    array: Any,
    spacing: tuple[float, ...] = (1.0, 1.0, 2.0),
    vector: bool = False,
) -> Make:
    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        made = SimpleITK.GetImageFromArray(array, isVector=vector)
        if made.GetDimension() == len(spacing):
            made.SetSpacing(spacing)
        SimpleITK.WriteImage(made, str(folder / name))

    return make


def content(name: str, data: bytes) -> Make:
    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def nifti(*changes: tuple[int, str, tuple[float, ...]]) -> Make:
    """An uncompressed NIfTI-1 file with fields overwritten: (offset, format, values)."""

    def make(folder: Path) -> None:
        image("a.nii", d.volume().astype(np.float32))(folder)
        data = bytearray((folder / "a.nii").read_bytes())
        for offset, kind, values in changes:
            struct.pack_into("<" + kind, data, offset, *values)
        (folder / "a.nii").write_bytes(bytes(data))

    return make


def text_header(name: str, old: str, new: str) -> Make:
    """An NRRD or MetaImage file with one line of its header changed."""

    def make(folder: Path) -> None:
        image(name, d.volume())(folder)
        data = (folder / name).read_bytes()
        assert old.encode() in data
        (folder / name).write_bytes(data.replace(old.encode(), new.encode(), 1))

    return make


# One NaN, and blocks of 4 x 8 x 8 voxels with the labels 0 to 7.
NAN = d.volume().astype(np.float32)
NAN[2, 3, 4] = np.nan
LABELS = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
for axis, times in enumerate((4, 8, 8)):
    LABELS = np.repeat(LABELS, times, axis)
# The kind "secondary capture": a picture of a screen.
SHOT = "1.2.840.10008.5.1.4.1.1.7"
IMAGE_TYPE = "t00080008"

# Name -> what makes the folder, the status of its row, and the values that the reason must name.
DICOM: dict[str, tuple[Make, str, tuple[str, ...]]] = {
    "slice_missing": (
        series(skip=(4,)),
        "slices",
        ("1 of 8", "4.00 mm", "6.00", "10.00 mm", "2.00 mm"),
    ),
    "three_missing": (
        series(skip=(2, 3, 5)),
        "slices",
        ("3 of 8", "6.00 mm"),
    ),
    "uneven": (
        at(0, 2, 4, 6, 8.5, 10.5, 12.5, 14.5),
        "slices",
        ("2.00", "2.50 mm", "6.00", "8.50 mm"),
    ),
    "one_doubled": (
        doubled,
        "slices",
        ("1 of 8", "2 times", "6.00 mm"),
    ),
    "all_doubled": (
        all_doubled,
        "slices",
        ("8 slice", "2 times"),
    ),
    "tilted": (tilted, "direction", ("14.0 degrees",)),
    "radial": (radial, "slices", ("8 slices", "8 orientations")),
    "one_slice": (at(0), "not3d", ("20 x 18 x 1",)),
    "three_slices": (at(0, 2, 4), "tiny", ("20 x 18 x 3",)),
    "two_patients": (changed(3, t00100020=("LO", "P2")), "slices", ("2", "patients")),
    "no_position": (changed(3, t00200032=None), "slices", ()),
    "position_of_two_numbers": (
        changed(3, t00200032=("DS", "1\\2")),
        "slices",
        (),
    ),
    "position_in_words": (
        changed(3, t00200032=("DS", "left\\up\\far")),
        "slices",
        (),
    ),
    "position_nan": (
        changed(3, t00200032=("DS", "nan\\0\\0")),
        "slices",
        (),
    ),
    "no_orientation": (series(t00200037=None), "slices", ()),
    "sheared_axes": (
        series(t00200037=("DS", (1, 0, 0, 0.5, 0.866, 0))),
        "direction",
        ("right angles",),
    ),
    "null_axes": (series(t00200037=("DS", (0, 0, 0, 0, 0, 0))), "direction", ("right angles",)),
    "no_pixel_spacing": (series(t00280030=None), "spacing", ("none mm",)),
    "zero_pixel_spacing": (series(spacing=(0.0, 1.0)), "spacing", ("0, 1 mm",)),
    "negative_pixel_spacing": (series(spacing=(-1.0, 1.0)), "spacing", ("-1, 1 mm",)),
    "huge_pixel_spacing": (series(spacing=(900.0, 900.0)), "spacing", ("0.01 .. 50 mm",)),
    "spacing_in_metres": (series(spacing=(0.001, 0.001)), "spacing", ("0.01 .. 50 mm",)),
    "anisotropic": (series(step_mm=45.0), "spacing", ("45",)),
    "constant": (
        series(array=np.full((8, 18, 20), 5, np.int16)),
        "constant",
        ("5",),
    ),
    "label_map": (series(array=LABELS.astype(np.int16)), "labelmap", ("8",)),
    "truncated_pixels": (
        cut("003.dcm", -300, series()),
        "unreadable",
        ("420 of 720 bytes",),
    ),
    "truncated_header": (
        cut("x.dcm", 400, one_object("2", "CT")),
        "unreadable",
        ("DICOM header",),
    ),
    "no_pixels": (one_object("2", "CT"), "unreadable", ("no pixels",)),
    "wrong_bytes_in_jpeg2000": (compressed, "unreadable", ("pixels",)),
    "overlong_element": (overlong_length, "unreadable", ("DICOM header",)),
    "nested_forever": (nested_forever, "unreadable", ("DICOM header",)),
    "empty_file": (content("x.dcm", b""), "unreadable", ("empty",)),
    "text_as_dicom": (
        content("x.dcm", b"a letter " * 100),
        "unreadable",
        ("not DICOM", "128"),
    ),
    "preamble_alone": (
        content("IM0001", b"\0" * 128 + b"DICM"),
        "unreadable",
        ("DICOM header",),
    ),
    "no_series_uid": (series(t0020000E=None), "unreadable", ("(0020,000E)",)),
    "no_rows": (series(t00280010=None), "unreadable", ("0 rows", "20 columns")),
    "colour": (colour, "rgb", ("3",)),
    "localiser": (
        series(**{IMAGE_TYPE: ("CS", "ORIGINAL\\PRIMARY\\LOCALIZER")}),
        "localizer",
        (),
    ),
    "mosaic": (
        series(sop_class=d.MR, **{IMAGE_TYPE: ("CS", "ORIGINAL\\PRIMARY\\M\\MOSAIC")}),
        "mosaic",
        ("dcm2niix",),
    ),
    "reformatted_ct": (
        series(**{IMAGE_TYPE: ("CS", "DERIVED\\PRIMARY\\MPR")}),
        "derived",
        ("MPR",),
    ),
    "adc_map": (
        series(sop_class=d.MR, **{IMAGE_TYPE: ("CS", "DERIVED\\PRIMARY\\DIFFUSION\\ADC")}),
        "derived",
        ("ADC",),
    ),
    "secondary_capture": (series(sop_class=SHOT), "secondary", ()),
    "rtstruct": (
        one_object("481.3", "RTSTRUCT"),
        "notimage",
        ("RTSTRUCT", "1 file"),
    ),
    "rtdose": (one_object("481.2", "RTDOSE"), "notimage", ("RTDOSE",)),
    "rtplan": (one_object("481.5", "RTPLAN"), "notimage", ("RTPLAN",)),
    "seg": (one_object("66.4", "SEG"), "labels", ("SEG",)),
    "sr": (one_object("88.33", "SR"), "notimage", ("SR",)),
    "pr": (one_object("11.1", "PR"), "notimage", ("PR",)),
    "ko": (one_object("88.59", "KO"), "notimage", ("KO",)),
    "pdf": (one_object("104.1", "DOC"), "notimage", ("document",)),
    "ultrasound": (one_object("6.1", "US"), "notimage", ("US",)),
    "unknown_modality": (
        one_object("999", "DOE JOHN"),
        "notimage",
        (),
    ),
    "enhanced_without_positions": (
        enhanced(8, 8, t52009230=None),
        "slices",
        ("8 frames",),
    ),
    "enhanced_with_too_few_positions": (
        enhanced(6, 8),
        "slices",
        ("8 frames", "6"),
    ),
}

# The same for other formats. Offsets of NIfTI-1: 40 for dimensions, 76 for voxel sizes.
FILES: dict[str, tuple[Make, str, tuple[str, ...]]] = {
    "zip_slip": (zip_of(("../../evil.nii.gz", b"x")), "unreadable", ("/ or ..",)),
    "zip_absolute": (zip_of(("/etc/evil.nii.gz", b"x")), "unreadable", ("/ or ..",)),
    "zip_bomb": (zip_of(("bomb.nii", bytes(80 << 20))), "unreadable", ("zip bomb",)),
    "zip_text": (content("x.zip", b"no archive " * 50), "unreadable", ("zip archive",)),
    "zip_cut": (
        cut("x.zip", -40, zip_of(("a.nii.gz", b"x" * 500))),
        "unreadable",
        ("zip archive",),
    ),
    "zip_encrypted": (encrypted, "unreadable", ("password",)),
    "zip_damaged_member": (damaged_member, "unreadable", ("archive",)),
    "zip_empty_scan": (zip_of(("a.nii.gz", b"")), "unreadable", ("empty",)),
    "zip_text_scan": (zip_of(("a.nii.gz", b"a letter")), "unreadable", ("gzip",)),
    "zip_nothing": (zip_of(("a.txt", b"x")), "ignored", ("1 .txt",)),
    "zip_in_zip": (zip_of(("inner.zip", b"x")), "ignored", ("1 .zip",)),
    "zip_mhd": (zip_of(("a.mhd", b"x")), "ignored", ()),
    "nifti_dims": (
        nifti((40, "8h", (3, 20, 0, 8, 1, 1, 1, 1))),
        "unreadable",
        ("dimensions",),
    ),
    "nifti_negative_dims": (
        nifti((40, "8h", (3, 20, -18, 8, 1, 1, 1, 1))),
        "unreadable",
        ("dimensions",),
    ),
    "nifti_dims_beyond_file": (
        nifti((40, "8h", (3, 20, 18, 800, 1, 1, 1, 1))),
        "unreadable",
        ("truncated",),
    ),
    "nifti_nan_spacing": (
        nifti((76, "4f", (1, 1, float("nan"), 2))),
        "spacing",
        ("nan",),
    ),
    "nifti_wrong_mark": (nifti((0, "i", (999,))), "unreadable", ("NIfTI",)),
    "nifti_gz_of_text": (
        content("a.nii.gz", gzip.compress(b"a letter " * 99)),
        "unreadable",
        ("NIfTI",),
    ),
    "nifti_4d": (
        image("a.nii.gz", np.stack([d.volume()] * 3).astype(np.float32)),
        "4d",
        ("20 x 18 x 8 x 3", "--split-4d"),
    ),
    "nifti_nan": (image("a.nii.gz", NAN), "nonfinite", ("1 of 2880",)),
    "nifti_labels": (image("a.nii.gz", LABELS), "labelmap", ("8",)),
    "nifti_dseg": (image("sub-1_dseg.nii.gz", d.volume()), "labels", ()),
    "nrrd_nan": (image("a.nrrd", NAN), "nonfinite", ("1 of 2880",)),
    "nrrd_rgb": (
        image("a.nrrd", np.stack([d.volume()] * 3, -1), vector=True),
        "rgb",
        ("3",),
    ),
    "nrrd_no_such_type": (
        text_header("a.nrrd", "type: short", "type: stone"),
        "unreadable",
        ("NRRD",),
    ),
    "nrrd_cut_header": (
        cut("a.nrrd", 60, image("a.nrrd", d.volume())),
        "unreadable",
        ("NRRD",),
    ),
    "mha_constant": (
        image("a.mha", np.zeros((8, 18, 20), np.int16)),
        "constant",
        ("0",),
    ),
    "mha_zero_spacing": (
        text_header("a.mha", "ElementSpacing = 1 1 2", "ElementSpacing = 0 1 2"),
        "spacing",
        ("2, 1, 0 mm",),
    ),
    "mha_unknown_type": (
        text_header("a.mha", "MET_SHORT", "MET_STONE"),
        "unreadable",
        ("SimpleITK",),
    ),
    "mha_slice": (image("a.mha", d.volume(1)), "not3d", ()),
    "mhd_no_data": (
        content(
            "a.mhd",
            b"NDims = 3\nDimSize = 8 8 8\nElementType = MET_SHORT\nElementDataFile = gone.raw\n",
        ),
        "unreadable",
        ("data file",),
    ),
}


def check_row(pool: Path, status: str, named: tuple[str, ...]) -> None:
    """Expect one row of this status, whose reason is one line and names all the values."""
    rows = seen(pool)
    assert len(rows) == 1, rows

    found_status, reason = rows[0]
    assert found_status == status, rows
    assert "\n" not in reason
    missing = [value for value in named if value not in reason]
    assert not missing, f"{missing} are not named in: {reason}"


@pytest.mark.parametrize("case", DICOM)
def test_malformed_dicom_gets_one_row_with_its_reason(tmp_path: Path, case: str) -> None:
    make, status, named = DICOM[case]
    make(tmp_path / "pool")

    check_row(tmp_path / "pool", status, named)


@pytest.mark.parametrize("case", FILES)
def test_malformed_files_and_archives_get_one_row_with_their_reason(
    tmp_path: Path,
    case: str,
) -> None:
    make, status, named = FILES[case]
    make(tmp_path / "pool")

    check_row(tmp_path / "pool", status, named)
    # "zip_slip" and "zip_absolute" try to write this file outside of the pool.
    assert not list(tmp_path.parent.rglob("evil*"))


# The values of the tags below, each of which names or dates the patient.
PLANTED = (
    "Dumbledore",
    "Albus",
    "ID-481516",
    "19010203",
    "Hogwarts",
    "ACC-2342",
    "Dr Snape",
    "cough since Tuesday",
    "Slytherin",
)


def planted(**changes: Any) -> dict[str, Any]:
    """Tags with names, dates and free text in every place that usually holds some."""
    return {
        "t00100010": ("PN", "Dumbledore^Albus"),
        "t00100020": ("LO", "ID-481516"),
        "t00100030": ("DA", "19010203"),
        "t00080080": ("LO", "Hogwarts"),
        "t00080050": ("SH", "ACC-2342"),
        "t00080090": ("PN", "Dr Snape"),
        "t0008103E": ("LO", "T1 Dumbledore"),
        "t00081030": ("LO", "Slytherin"),
        "t001021B0": ("LT", "cough since Tuesday"),
        "t00080020": ("DA", "19010203"),
        "t00181030": ("LO", "Albus protocol"),
        "t00180010": ("LO", "Dr Snape potion"),
        **changes,
    }


def plant(pool: Path) -> None:
    """Good and bad series, archives and objects, all with planted names."""
    series = "export/Dumbledore"
    d.write_series(pool / series / "good", series="1.1", **planted())
    d.write_series(pool / series / "gap", series="1.2", skip=(3,), **planted())
    d.write_series(pool / series / "shot", series="1.3", sop_class=SHOT, **planted())
    words = {IMAGE_TYPE: ("CS", "DERIVED\\SECONDARY\\Dumbledore")}
    d.write_series(pool / series / "derived", series="1.4", **planted(**words))
    # An RTSTRUCT, an object of an unknown kind, text, and a file that is cut short.
    contours = d.slice_values(0, "1.5", "1.2.840.10008.5.1.4.1.1.481.3", **planted())
    d.write(pool / series / "rs" / "Dumbledore.dcm", contours)
    unknown = planted(t00080060=("CS", "Dumbledore"))
    d.write(pool / series / "odd" / "Albus.dcm", d.slice_values(0, "1.6", "1.2.3.4", **unknown))
    (pool / series / "odd" / "Dumbledore.dcm").write_bytes(b"Dumbledore" * 50)
    (pool / series / "cut.dcm").write_bytes((pool / series / "good" / "003.dcm").read_bytes()[:-50])
    with zipfile.ZipFile(pool / "export.zip", "w") as archive:
        for number, pixels in enumerate(d.volume(seed=4)):
            values = d.slice_values(number, "1.7", **planted())
            path = d.write(pool.parent / "x.dcm", values, pixels)
            archive.write(path, f"Dumbledore^Albus/{number}.dcm")


def files_to_search(root: Path) -> list[Path]:
    """Return all files below a folder but the scans and the file that must not be shared."""
    found = []
    for path in root.rglob("*"):
        is_input = "pool" in path.parts or path.name == "x.dcm"
        if path.is_file() and not is_input and path.name != PRIVATE_NAME:
            found.append(path)
    return found


def test_planted_names_and_dates_reach_no_output_of_the_command(tmp_path: Path) -> None:
    make_folders(tmp_path)
    plant(tmp_path / "pool")
    command = [
        str(Path(sys.executable).with_name("autoreg_pretrain")),
        "-i",
        str(tmp_path / "pool"),
        "--name",
        "private",
        "--dry-run",
        "--device",
        "cpu",
    ]

    environment = environment_below(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr

    folder = tmp_path / "nnUNet_results/autoreg_pretraining/private"
    with (folder / "scans.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    # One row for each series and for each kind of bad file.
    statuses = sorted(row["status"] for row in rows)
    assert statuses == [
        "derived",
        "notimage",
        "notimage",
        "ok",
        "ok",
        "secondary",
        "slices",
        "unreadable",
        "unreadable",
    ]

    # The column of paths names the user's own folders, which are theirs to choose.
    texts = [",".join({**row, "source": ""}.values()) for row in rows]
    others = files_to_search(tmp_path)
    assert {"plan.json", "fingerprint.json"} <= {p.name for p in others}

    texts += [p.read_bytes().decode("latin-1") for p in others] + [done.stdout, done.stderr]
    for word in PLANTED:
        assert not [text for text in texts if word.lower() in text.lower()], word

    # The private file has the user's own paths, as typed and found.
    sources = {row.source for row in read_index(folder / "scans.csv")}
    assert all(Path(source).exists() for source in sources)
