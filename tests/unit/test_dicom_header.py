"""Headers of DICOM files: what pydicom or GDCM reads is read, and the rest has a true reason."""

import io
import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import dicom_files as d
import numpy as np
import pydicom
import pytest
import SimpleITK
from memory import peak_bytes
from odd_dicom import DEFLATED, ODDITIES, element, meta_of, with_meta
from refusals import refused

from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.read import load_scan
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.dicom_header import (
    MAX_INFLATED_BYTES,
    DicomHeader,
    NotDicomError,
    read_dicom_header,
)

SERIES, SOP_CLASS, PIXELS = 0x0020000E, 0x00080016, 0x7FE00010


def header_of(content: bytes) -> DicomHeader:
    return read_dicom_header(io.BytesIO(content), len(content))


def content_of(tmp_path: Path, changes: d.Values | None = None, **how: Any) -> bytes:
    """Return a file of slice 3 of the usual series, with some elements changed."""
    values = d.slice_values(3) | (changes or {})
    return d.write(tmp_path / "x.dcm", values, d.volume(1)[0], **how).read_bytes()


def series_element() -> bytes:
    return element(0x20, 0xE, b"UI", b"1.2.3\0")


@pytest.mark.parametrize("name", ODDITIES)
def test_an_odd_header_gives_the_values_of_a_plain_one(tmp_path: Path, name: str) -> None:
    how, change = ODDITIES[name]

    header = header_of(change(content_of(tmp_path, **how)))

    assert header.text("SeriesInstanceUID") == "1.2.3"
    assert header.text("SOPClassUID") == d.CT
    assert header.number("Rows", 0) == 18
    assert header.numbers("PixelSpacing") == (1.5, 1.0)
    assert header.numbers("ImagePositionPatient") == (-10.0, -20.0, 6.0)
    assert header.pixels is not None
    # A deflated file has no offset at which the pixels could be read. 18 x 20 voxels of 2 bytes.
    assert header.pixels.length == (None if name == "deflated" else 18 * 20 * 2)


@pytest.mark.parametrize("name", ODDITIES)
def test_a_series_of_odd_files_is_read_with_its_voxels(tmp_path: Path, name: str) -> None:
    how, change = ODDITIES[name]
    array = d.volume()
    folder = d.write_series(tmp_path / "pool")
    for number, path in enumerate(sorted(folder.iterdir())):
        d.write(path, d.slice_values(number), array[number], **how)
        path.write_bytes(change(path.read_bytes()))

    (scan,) = find_scans([], [folder])

    assert scan.status == ""
    voxels = load_scan(scan.path, scan.part).array_CZYX[0]
    np.testing.assert_array_equal(voxels, array[:, ::-1, ::-1].astype(np.float32))


def test_the_pixels_offset_points_at_the_pixels(tmp_path: Path) -> None:
    # Images are read past pydicom, at this offset.
    for name, (how, change) in ODDITIES.items():
        content = change(content_of(tmp_path, **how))
        pixels = header_of(content).pixels
        assert pixels is not None
        if pixels.length is None:
            continue

        stored = content[pixels.offset : pixels.offset + pixels.length]

        order = ">" if name == "big endian" else "<"
        expected = d.volume(1)[0].astype(f"{order}i2")
        assert stored == expected.tobytes(), name


def test_values_that_are_not_numbers_count_as_missing(tmp_path: Path) -> None:
    changes: d.Values = {
        0x00280030: ("DS", "1.5\\wide"),
        0x00180050: ("DS", ""),
        0x00200013: ("IS", "three"),
        0x00281053: ("DS", "2\\3"),
        0x00180088: ("DS", "1.0"),
    }
    header = header_of(content_of(tmp_path, changes))

    # Of "2\3" the first number counts. 0018,0088 is not asked for.
    assert header.numbers("PixelSpacing") == ()
    assert header.number("SliceThickness", -1) == -1
    assert header.number("InstanceNumber", -1) == -1
    assert header.number("RescaleSlope", 1) == 2


def test_a_list_that_ends_in_a_separator_is_read(tmp_path: Path) -> None:
    # Written by some scanners; it is not an empty third number.
    header = header_of(content_of(tmp_path, {0x00280030: ("DS", "1.5\\1.0\\")}))

    assert header.numbers("PixelSpacing") == (1.5, 1.0)


def test_values_of_kind_un_are_read_by_the_dictionary(tmp_path: Path) -> None:
    # "Unknown": what anonymisers write for elements that they do not know.
    changes: d.Values = {
        0x00280030: ("UN", b"1.5\\1.0 "),
        0x00280010: ("UN", struct.pack("<H", 18)),
    }
    header = header_of(content_of(tmp_path, changes))

    assert header.numbers("PixelSpacing") == (1.5, 1.0)
    assert header.number("Rows", 0) == 18


@pytest.mark.parametrize(
    ("character_set", "stored", "expected"),
    [
        ("ISO_IR 192", "T1 für Größe".encode(), "T1 für Größe"),
        ("ISO_IR 100", "T1 für Größe".encode("latin-1"), "T1 für Größe"),
        ("ISO_IR 144", "мозг".encode("iso8859_5"), "мозг"),
        ("GB18030", "T1 头部".encode("gb18030"), "T1 头部"),
        ("\\ISO 2022 IR 87", b"T1 \x1b$B;3ED\x1b(B", "T1 山田"),
    ],
)
def test_text_is_decoded_by_the_files_character_set(
    tmp_path: Path,
    character_set: str,
    stored: bytes,
    expected: str,
) -> None:
    changes: d.Values = {0x00080005: ("CS", character_set), 0x0008103E: ("LO", stored)}

    header = header_of(content_of(tmp_path, changes))

    assert header.text("SeriesDescription") == expected


def test_a_file_with_an_unknown_character_set_is_read(tmp_path: Path) -> None:
    changes: d.Values = {0x00080005: ("CS", "KLINGON"), 0x0008103E: ("LO", b"T1 \xff\xfe axial")}

    header = header_of(content_of(tmp_path, changes))

    assert header.text("SeriesInstanceUID") == "1.2.3"
    assert header.text("SeriesDescription").startswith("T1")


def test_private_sequences_and_icons_are_passed_over(tmp_path: Path) -> None:
    # An icon has rows and pixels of its own, which must not be taken for those of the scan.
    icon: d.Values = {0x00280010: ("US", [2]), PIXELS: ("OW", b"\1\2\3\4")}
    changes: d.Values = {
        0x00091001: ("SQ", [{0x00091002: ("LO", "DOE^JOHN")}]),
        0x00880200: ("SQ", [icon]),
    }

    header = header_of(content_of(tmp_path, changes))

    assert header.number("Rows", 0) == 18
    assert header.pixels is not None
    assert header.pixels.length == 18 * 20 * 2


def test_a_header_cut_short_anywhere_is_refused_or_lacks_pixels(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    pixels = header_of(content).pixels
    assert pixels is not None

    causes = set()
    # From the end of the mark DICM to the element of the pixels, every fifth length.
    for length in range(132, pixels.offset - 12, 5):
        try:
            header = header_of(content[:length])
        except ScanError as error:
            causes.add(error.code)
        else:
            assert header.pixels is None

    assert causes == {"scan-unreadable"}


def test_any_damaged_byte_gives_a_header_or_a_scan_error(tmp_path: Path) -> None:
    frames = d.multiframe_values([(0.0, 0.0, 2.0 * i) for i in range(3)])
    enhanced = d.write(tmp_path / "e.dcm", frames, d.volume(3)).read_bytes()
    generator = np.random.default_rng(0)
    for content in (content_of(tmp_path), content_of(tmp_path, syntax=d.IMPLICIT), enhanced):
        pixels = header_of(content).pixels
        assert pixels is not None
        # Three bytes at a time, 150 times for each way of writing.
        for _ in range(150):
            changed = bytearray(content)
            for position in generator.integers(128, pixels.offset, 3):
                changed[position] = generator.integers(256)
            try:
                header = header_of(bytes(changed))
            except ScanError as error:
                assert error.status == "unreadable"
            else:
                assert all(isinstance(frame, DicomHeader) for frame in header.frames())


def test_another_kind_of_file_is_distinguished_from_a_damaged_one(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    # Nothing, a PNG, and bytes that begin like an element of group 8.
    for other in (b"", b"\x89PNG\r\n" + b"x" * 500, b"\x08\0" + b"x" * 500):
        with refused(NotDicomError, "scan-unreadable"):
            header_of(other)

    # The mark and the meta group are right, and the data set is not.
    with refused(ScanError, "scan-unreadable") as caught:
        header_of(meta_of(content) + b"\xff" * 300)

    assert not isinstance(caught.value, NotDicomError)


def test_a_kind_stated_only_in_front_of_the_data_is_known(tmp_path: Path) -> None:
    whole = content_of(tmp_path, {SOP_CLASS: None})
    (tmp_path / "x.dcm").write_bytes(whole)
    # A directory of a medium: nothing in its data set says what it is.
    directory = element(2, 2, b"UI", b"1.2.840.10008.1.3.10")
    length = element(2, 0, b"UL", struct.pack("<I", len(directory)))
    entries = element(4, 0x1130, b"CS", b"MEDIUM") + element(4, 0x1212, b"US", b"\0\0")
    content = b"\0" * 128 + b"DICM" + length + directory + entries
    (tmp_path / "DICOMDIR-copy.dcm").write_bytes(content)

    rows = {one.path.name: one for one in find_scans([], [tmp_path])}

    assert header_of(whole).text("SOPClassUID") == d.CT
    kinds = [one.reason for one in rows.values() if one.status == "notimage"]
    assert len(kinds) == 1
    assert "another kind" in kinds[0]


@pytest.mark.parametrize("num_bytes", [2, 4000])
def test_a_small_deflated_file_does_not_fill_the_memory(tmp_path: Path, num_bytes: int) -> None:
    long = element(8, 8, b"CS", b"ORIGINAL") + series_element()
    # A private element of 64 MiB of zeros, which deflate packs into some kB.
    zeros = struct.pack("<HH", 0x21, 0x10) + b"OB\0\0" + struct.pack("<I", 1 << 26)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = packer.compress(long + zeros)
    for _ in range(1 << 6):
        body += packer.compress(b"\0" * (1 << 20))
    content = with_meta(DEFLATED, body + packer.flush())
    # The transfer syntax may come after any number of other bytes.
    # The number of other bytes decides whether the beginning of the file shows it.
    syntax = struct.pack("<HH", 2, 0x10)
    content = content.replace(syntax, element(2, 3, b"UI", b"1" * num_bytes) + syntax)

    def read() -> None:
        with refused(ScanError, "scan-unreadable"):
            header_of(content)

    assert peak_bytes(read) < 3 * MAX_INFLATED_BYTES


def test_nothing_of_a_header_reaches_a_log_or_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes: d.Values = {
        0x00080060: ("CS", "ct of Dumbledore"),
        0x00100020: ("LO", "Dumbledore" * 30),
        0x00200013: ("IS", "Dumbledore"),
    }
    path = d.write(tmp_path / "pool" / "x.dcm", d.slice_values(3) | changes, d.volume(1)[0])

    # A warning of pydicom would quote the value; here it would be an error.
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        find_scans([], [path.parent])

    assert "Dumbledore" not in caplog.text
    assert not logging.getLogger("pydicom").disabled


def test_real_headers_are_as_gdcm_reads_them(shared_data: Path) -> None:
    keywords = (
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "SOPClassUID",
        "Modality",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "PatientID",
    )
    for folder in sorted({p.parent for p in (shared_data / "dicom").rglob("*.dcm")}):
        path = min(folder.glob("*.dcm"))
        header = header_of(path.read_bytes())
        if header.text("Modality") == "RTSTRUCT":
            continue

        reader: Any = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()

        for keyword in keywords:
            tag = pydicom.tag.Tag(keyword)
            key = f"{tag.group:04x}|{tag.element:04x}"
            assert header.text(keyword) == reader.GetMetaData(key).strip()
        size = (header.number("Columns", 0), header.number("Rows", 0))
        assert size == reader.GetSize()[:2]
