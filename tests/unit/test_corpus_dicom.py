"""DICOM: headers, series, stacks, volumes, pixels; one orientation for all formats; BIDS names and
contrast words.
"""

import zipfile
from pathlib import Path
from typing import Any

import dicom_files as d
import numpy as np
import pydicom
import pytest
import SimpleITK
from refusals import refused

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.read import load_scan, read_header
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.contrast import contrast_of
from nnunet_autoreg.io.dicom_header import DicomHeader
from nnunet_autoreg.io.names import bids_names, is_label_name
from nnunet_autoreg.io.orientation import turn_of, turned
from nnunet_autoreg.io.parts import ScanPart, parse_part


def found(folder: Path, **settings: Any) -> list[Candidate]:
    return find_scans([], [folder], **settings)


def only(folder: Path, **settings: Any) -> Candidate:
    (one,) = found(folder, **settings)
    assert one.status == "", one.reason
    return one


def array_of(candidate: Candidate) -> Any:
    scan = load_scan(candidate.path, candidate.part)
    header = read_header(candidate.path, candidate.part)
    assert (header.shape_vox, header.spacing_mm) == (scan.array_CZYX.shape[1:], scan.spacing_mm)
    return scan.array_CZYX[0]


def ras(array_LPS: Any) -> Any:
    """Turn an axial LPS array (z, y, x) to RAS, as reading does: y and x are mirrored."""
    return array_LPS[:, ::-1, ::-1].astype(np.float32)


@pytest.mark.parametrize("syntax", [d.EXPLICIT, d.IMPLICIT, d.BIG_ENDIAN])
def test_a_series_is_one_scan_in_every_uncompressed_syntax(tmp_path: Path, syntax: str) -> None:
    d.write_series(tmp_path / "pool", syntax=syntax)

    one = only(tmp_path / "pool")

    assert (one.part, one.modality) == ("series=1.2.3", "CT")
    assert (one.subject, one.session) == ("P1", "1.2.77")
    assert one.path == tmp_path / "pool"
    np.testing.assert_array_equal(array_of(one), ras(d.volume()))
    # Slices 2 mm apart, rows 1.5 mm, columns 1 mm: the order of the axes z, y, x.
    assert read_header(one.path, one.part).spacing_mm == (2.0, 1.5, 1.0)


def test_files_without_preamble_and_without_ending_are_read(tmp_path: Path) -> None:
    # Names as scanners export them. Every second file lacks the 128 bytes before the mark DICM.
    for number, pixels in enumerate(d.volume()):
        path = tmp_path / "pool" / f"1.2.840.{number}"
        d.write(path, d.slice_values(number), pixels, preamble=number % 2 == 0)

    assert array_of(only(tmp_path / "pool")).shape == (8, 18, 20)


def test_slices_are_sorted_by_position_not_by_name_or_number(tmp_path: Path) -> None:
    array = d.volume()
    # 3 and 5 have no factor in common with 8, so both make another order of the 8 slices.
    for number, pixels in enumerate(array):
        path = tmp_path / "pool" / f"{(number * 3) % 8}.dcm"
        changes = {"t00200013": ("IS", str((number * 5) % 8))}
        d.write(path, d.slice_values(number, **changes), pixels)

    np.testing.assert_array_equal(array_of(only(tmp_path / "pool")), ras(array))


def test_slope_and_intercept_are_applied_slice_by_slice(tmp_path: Path) -> None:
    array = d.volume()
    # PET scanners choose a slope per slice.
    for number, pixels in enumerate(array):
        changes = {"t00281052": ("DS", "-3"), "t00281053": ("DS", f"{0.25 * (number + 1)}")}
        values = d.slice_values(number, sop_class=d.PET, **changes)
        d.write(tmp_path / "pool" / f"{number}.dcm", values, pixels)
    expected = array * (0.25 * np.arange(1, 9))[:, None, None] - 3

    np.testing.assert_allclose(array_of(only(tmp_path / "pool")), ras(expected), rtol=1e-6)


def write_compressed(folder: Path, array: Any) -> None:
    """The series as GDCM itself writes it, losslessly compressed."""
    folder.mkdir()
    for number, pixels in enumerate(array):
        image = SimpleITK.GetImageFromArray(pixels)
        values = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0060": "CT",
            "0008|0016": d.CT,
            "0020|000d": "1.2.77",
            "0020|000e": "1.2.3",
            "0008|0018": f"1.2.3.9.{number}",
            "0020|0013": str(number),
            "0020|0032": f"-10\\-20\\{2 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": "1.5\\1",
        }
        for key, value in values.items():
            image.SetMetaData(key, value)
        writer: Any = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(image)


def test_a_compressed_series_is_read_and_a_truncated_one_is_noticed(tmp_path: Path) -> None:
    write_compressed(tmp_path / "pool", d.volume())
    path = tmp_path / "pool" / "3.dcm"

    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed

    one = only(tmp_path / "pool")
    np.testing.assert_array_equal(array_of(one), ras(d.volume()))

    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(ScanError) as caught:
        load_scan(one.path, one.part)
    assert caught.value.status == "unreadable"


def test_series_of_one_folder_are_separated_in_nested_folders_too(
    tmp_path: Path,
) -> None:
    d.write_series(tmp_path / "pool" / "x" / "y", series="1.1", prefix="a")
    d.write_series(tmp_path / "pool" / "x" / "y", d.volume(seed=1), series="1.2", prefix="b")

    first, second = found(tmp_path / "pool")

    np.testing.assert_array_equal(array_of(first), ras(d.volume()))
    np.testing.assert_array_equal(array_of(second), ras(d.volume(seed=1)))


def test_a_series_spread_over_folders_is_one_scan(tmp_path: Path) -> None:
    # Three slices per folder, as exports with a limited number of files per folder have them.
    for number, pixels in enumerate(d.volume()):
        path = tmp_path / "pool" / "A" / str(number // 3) / f"{number}.dcm"
        d.write(path, d.slice_values(number), pixels)

    one = only(tmp_path / "pool")

    assert one.path == tmp_path / "pool" / "A"
    assert one.part == "series=1.2.3;below=yes"
    # Candidates are compared later by their voxels; here both are only found.
    np.testing.assert_array_equal(array_of(one), ras(d.volume()))


def test_copies_of_a_series_in_two_folders_are_two_candidates(tmp_path: Path) -> None:
    for name in ("A", "B"):
        d.write_series(tmp_path / "pool" / name)

    assert [c.path.name for c in found(tmp_path / "pool")] == ["A", "B"]


def test_a_file_that_lies_there_twice_is_read_once_and_counted(tmp_path: Path) -> None:
    d.write_series(tmp_path / "pool")
    original = tmp_path / "pool" / "003.dcm"
    (tmp_path / "pool" / "copy of 3.dcm").write_bytes(original.read_bytes())

    scan, copies = found(tmp_path / "pool")

    np.testing.assert_array_equal(array_of(scan), ras(d.volume()))
    assert copies.status == "duplicate"
    assert copies.reason.startswith("1 of 9 files")


def test_ids_hold_a_salted_hash_and_are_stable(tmp_path: Path) -> None:
    d.write_series(tmp_path / "pool")
    ids = [found(tmp_path / "pool", salt=salt)[0].id for salt in ("a", "a", "b")]

    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("pool/CT-")
    assert "1.2.3" not in ids[0]


def time_series(folder: Path, **tag_of_time: Any) -> Any:
    """Two volumes of one series at the same positions."""
    arrays = np.stack([d.volume(), d.volume(seed=1)])
    for time in range(2):
        for z in range(8):
            changes = {name: (vr, values[time]) for name, (vr, values) in tag_of_time.items()}
            changes["t00080018"] = ("UI", f"1.2.9.{time}.{z}")
            changes["t00200013"] = ("IS", str(2 * z + time))
            values = d.slice_values(z, sop_class=d.MR, **changes)
            d.write(folder / f"{z}_{time}.dcm", values, arrays[time][z])
    return arrays


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        # Each header element that separates volumes at the same positions.
        ({"t00200100": ("IS", ("1", "2"))}, "time"),
        ({"t00189087": ("FD", ([0.0], [800.0]))}, "b-value"),
        ({"t00180081": ("DS", ("10", "80"))}, "echo"),
        ({"t00200012": ("IS", ("1", "2"))}, "acquisition"),
    ],
)
def test_a_4d_series_is_refused_with_the_flag_and_split_when_asked(
    tmp_path: Path,
    tag: dict[str, Any],
    name: str,
) -> None:
    arrays = time_series(tmp_path / "pool", **tag)

    (whole,) = found(tmp_path / "pool")

    assert whole.status == "4d"
    for value in ("2 volumes", "20 x 18 x 8", name, "--split-4d"):
        assert value in whole.reason

    both = found(tmp_path / "pool", split_4d=True)
    assert [c.part for c in both] == ["series=1.2.3;t=0", "series=1.2.3;t=1"]
    for one, array in zip(both, arrays, strict=True):
        np.testing.assert_array_equal(array_of(one), ras(array))


def test_a_4d_nifti_is_split_when_asked(tmp_path: Path) -> None:
    arrays = np.stack([d.volume(), d.volume(seed=1), d.volume(seed=2)])
    (tmp_path / "pool").mkdir()
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(a) for a in arrays])
    SimpleITK.WriteImage(image, str(tmp_path / "pool" / "sub-1_bold.nii.gz"))

    (whole,) = found(tmp_path / "pool")

    with refused(ScanError, "scan-4d", 3, "--split-4d"):
        load_scan(whole.path, whole.part)

    parts = found(tmp_path / "pool", split_4d=True)

    ids = [(c.id, c.part) for c in parts]
    assert ids == [(f"pool/sub-1_bold/t{k}", f"t={k}") for k in range(3)]
    assert {c.contrast for c in parts} == {"bold"}
    for one, array in zip(parts, arrays, strict=True):
        np.testing.assert_array_equal(array_of(one), ras(array))


def test_stacks_of_other_orientation_in_one_series_are_separate_scans(tmp_path: Path) -> None:
    d.write_series(tmp_path / "pool")
    # Sagittal: rows run along y, columns against z, and the slices are 3 mm apart along x.
    for number, pixels in enumerate(d.volume(6, seed=3)):
        changes = {
            "t00080018": ("UI", f"1.2.8.{number}"),
            "t00200037": ("DS", (0, 1, 0, 0, 0, -1)),
            "t00200032": ("DS", (3.0 * number, 0.0, 0.0)),
        }
        d.write(tmp_path / "pool" / f"sag{number}.dcm", d.slice_values(number, **changes), pixels)

    axial, sagittal = found(tmp_path / "pool")

    assert [axial.part, sagittal.part] == ["series=1.2.3;stack=0", "series=1.2.3;stack=1"]
    assert array_of(axial).shape == (8, 18, 20)
    # After turning to (z, y, x): 18 rows of 1.5 mm, 20 columns of 1 mm, 6 slices of 3 mm.
    assert array_of(sagittal).shape == (18, 20, 6)
    assert load_scan(sagittal.path, sagittal.part).spacing_mm == (1.5, 1.0, 3.0)


def test_an_enhanced_file_is_a_scan_of_sorted_and_rescaled_frames(
    tmp_path: Path,
) -> None:
    array = d.volume(6)
    # Frame i of the file is slice order[i] of the volume, with a slope of its own.
    order = [3, 0, 5, 1, 4, 2]
    places = [(0.0, 0.0, 2.5 * slice_index) for slice_index in order]
    slopes = [1.0 + slice_index for slice_index in order]
    values = d.multiframe_values(places, slopes=slopes)
    d.write(tmp_path / "pool" / "enhanced.dcm", values, array[order])

    one = only(tmp_path / "pool")

    assert one.part == "series=1.2.3;instance=1.2.3.9.0"
    assert read_header(one.path, one.part).spacing_mm == (2.5, 1.5, 1.0)
    rescaled = array * (1.0 + np.arange(6))[:, None, None] - 1000
    np.testing.assert_allclose(array_of(one), ras(rescaled), rtol=1e-5)
    # The file may also be given instead of its folder.
    np.testing.assert_array_equal(array_of(only(tmp_path / "pool" / "enhanced.dcm")), array_of(one))


def test_an_enhanced_file_of_two_volumes_is_split(tmp_path: Path) -> None:
    arrays = np.stack([d.volume(5), d.volume(5, seed=1)])
    # Temporal position 1 for the first five frames, 2 for the others at the same places.
    extra: list[d.Values] = [{0x00209128: ("UL", [i // 5 + 1])} for i in range(10)]
    places = [(0.0, 0.0, 2.0 * (i % 5)) for i in range(10)]
    values = d.multiframe_values(places, d.ENHANCED_MR, extra=extra)

    d.write(tmp_path / "pool" / "x.dcm", values, arrays.reshape(10, 18, 20))

    assert found(tmp_path / "pool")[0].status == "4d"
    for one, array in zip(found(tmp_path / "pool", split_4d=True), arrays, strict=True):
        np.testing.assert_array_equal(array_of(one), ras(array))


def zipped(folder: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return target


def test_zipped_dicom_and_nifti_are_read_in_place(tmp_path: Path) -> None:
    d.write_series(tmp_path / "export" / "DOE^JOHN")
    image = SimpleITK.GetImageFromArray(d.volume(seed=1))
    SimpleITK.WriteImage(image, str(tmp_path / "export" / "scan one.nii.gz"))
    (tmp_path / "export" / "notes.txt").write_text("x")
    zipped(tmp_path / "export", tmp_path / "pool" / "export.zip")
    before = sorted(tmp_path.rglob("*"))

    rows = found(tmp_path / "pool")

    assert len(rows) == 3
    by_part = {row.part: row for row in rows}
    nifti = by_part["member=scan one.nii.gz"]
    dicom = by_part["series=1.2.3"]
    assert [row.status for row in rows if row not in (nifti, dicom)] == ["ignored"]
    # The patient's name is in the name of a folder inside the archive.
    assert "DOE" not in repr(dicom)
    assert dicom.path.name == "export.zip"
    np.testing.assert_array_equal(array_of(nifti), ras(d.volume(seed=1)))
    np.testing.assert_array_equal(array_of(dicom), ras(d.volume()))
    # Nothing was unpacked beside the archive.
    assert sorted(tmp_path.rglob("*")) == before


def as_nifti(
    candidate: Candidate,
    target: Path,
    axes: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
) -> Path:
    """The series through SimpleITK's own series reader, its axes permuted and flipped (the geometry
    with them).
    """
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(
        str(candidate.path),
        candidate.part.removeprefix("series="),
    )
    reader: Any = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(names)
    image = SimpleITK.Flip(SimpleITK.PermuteAxes(reader.Execute(), axes), flips)
    SimpleITK.WriteImage(image, str(target))
    return target


@pytest.mark.parametrize(
    ("axes", "flips"),
    [
        ((0, 1, 2), (False, False, False)),
        ((0, 1, 2), (True, False, True)),
        ((2, 0, 1), (False, True, False)),
        ((1, 2, 0), (True, True, True)),
    ],
)
def test_the_same_scan_as_dicom_and_as_nifti_gives_the_same_voxels(
    tmp_path: Path,
    axes: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
) -> None:
    # A gantry tilted by 11.5 degrees: cos = 0.98, sin = 0.198997.
    for number, pixels in enumerate(d.volume()):
        place = np.array([-10, -20, 30]) + 2.0 * number * np.array([0.198997, 0, 0.98])
        changes = {
            "t00200037": ("DS", (0.98, 0.0, -0.198997, 0, 1, 0)),
            "t00200032": ("DS", tuple(map(float, place))),
            "t00281053": ("DS", "0.5"),
            "t00281052": ("DS", "-1000"),
        }
        path = tmp_path / "dicom" / f"{number}.dcm"
        d.write(path, d.slice_values(number, **changes), pixels)
    one = only(tmp_path / "dicom")

    scan = load_scan(one.path, one.part)
    other = load_scan(as_nifti(one, tmp_path / "x.nii.gz", axes, flips))

    np.testing.assert_allclose(scan.array_CZYX, other.array_CZYX, atol=1e-3)
    np.testing.assert_allclose(scan.spacing_mm, other.spacing_mm, atol=1e-4)


def test_real_series_equal_their_nifti_copies(shared_data: Path, tmp_path: Path) -> None:
    scans = [c for c in found(shared_data / "dicom") if not c.status]

    assert len(scans) == 8

    for number, one in enumerate(scans):
        copy = as_nifti(one, tmp_path / f"{number}.nii.gz", (1, 2, 0), (True, False, False))
        scan = load_scan(one.path, one.part)
        other = load_scan(copy)
        np.testing.assert_allclose(scan.array_CZYX, other.array_CZYX, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(scan.spacing_mm, other.spacing_mm, atol=1e-4)


def test_every_real_file_is_accounted_for(shared_data: Path) -> None:
    rows = found(shared_data / "dicom")
    covered = {c.path for c in rows if c.path != shared_data / "dicom"}
    files = [p for p in (shared_data / "dicom").rglob("*") if p.is_file() and p.suffix == ".dcm"]

    # A file is covered if its folder has a row, be it a scan or a reason.
    assert files
    assert all(p.parent in covered for p in files)
    assert sorted(c.status for c in rows if c.status) == [
        "derived",
        "ignored",
        "notimage",
        "notimage",
        "notimage",
    ]


@pytest.mark.parametrize(
    ("direction", "stored", "expected"),
    [
        # The columns of a direction are x, y and z of the array in LPS. The first one is RAS
        # already.
        (np.diag([-1.0, -1.0, 1.0]), (0, 1, 2), (False, False, False)),
        (np.eye(3), (0, 1, 2), (False, True, True)),
        # Sagittal: array x runs along +y, y along -z and z along +x.
        (np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]), (1, 2, 0), (True, True, True)),
    ],
)
def test_axes_are_turned_to_superior_anterior_right(
    direction: Any,
    stored: tuple[int, ...],
    expected: tuple[bool, ...],
) -> None:
    assert turn_of(direction) == (stored, expected)


def test_turning_agrees_with_simpleitk() -> None:
    image = SimpleITK.GetImageFromArray(d.volume())
    image.SetDirection((0.0, 0, 1, 1, 0, 0, 0, -1, 0))
    # SimpleITK names an orientation by where axes point: RAS is (x to R, y to A, z to S).
    wanted = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "RAS"))

    direction = np.array(image.GetDirection()).reshape(3, 3)

    np.testing.assert_array_equal(turned(d.volume(), turn_of(direction)), wanted)


def test_at_45_degrees_the_last_digits_do_not_turn_a_scan() -> None:
    # x and y have equal shares in both axes, so the last digits could decide either way.
    for noise in (-1e-6, 0.0, 1e-6):
        c = np.cos(np.pi / 4 + noise)
        s = np.sin(np.pi / 4 + noise)
        direction = np.array([[-c, s, 0], [-s, -c, 0], [0, 0, 1]])

        order, _ = turn_of(direction)

        assert order == (0, 1, 2)


def test_parts_survive_being_written() -> None:
    # The name holds the signs that separate the parts.
    part = ScanPart(member="a;b=c/ü.nii.gz", series="1.2", t="3")

    assert parse_part(str(part)) == part
    assert str(ScanPart(series="1.2.3", t="0")) == "series=1.2.3;t=0"
    with refused(ScanError, "scan-unreadable", "nonsense", "scans.csv"):
        parse_part("nonsense=1")


@pytest.mark.parametrize(
    ("modality", "tags", "word"),
    [
        # A name of a patient in the description must not become a word.
        ("MR", {"SeriesDescription": "DOE JOHN Ax T2 FLAIR"}, "FLAIR"),
        ("MR", {"SeriesDescription": "t1_mprage_sag post Gd"}, "T1w-ce"),
        ("MR", {"ProtocolName": "ep2d_diff_3scan_trace"}, "DWI"),
        ("MR", {"SeriesDescription": "PD tse"}, "PDw"),
        ("MR", {"SeriesDescription": "JOHN"}, ""),
        # Without words, the times of the pulse sequence decide.
        ("MR", {"EchoTime": "90", "RepetitionTime": "9000", "InversionTime": "2500"}, "FLAIR"),
        (
            "MR",
            {
                "EchoTime": "10",
                "RepetitionTime": "500",
                "ScanningSequence": "SE",
                "ContrastBolusAgent": "Gadovist",
            },
            "T1w-ce",
        ),
        ("CT", {"ContrastBolusAgent": "Ultravist 370"}, "CT-ce"),
        # PET whose list of corrections lacks attenuation (ATTN).
        ("PT", {"CorrectedImage": "DECY\\RAN"}, "PTnac"),
    ],
)
def test_contrast_words_come_from_a_fixed_list(
    modality: str,
    tags: dict[str, str],
    word: str,
) -> None:
    dataset = pydicom.Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)

    assert contrast_of(modality, DicomHeader(dataset)) == word


def test_bids_names_give_subject_session_and_contrast(tmp_path: Path) -> None:
    full = "ds1/sub-01/ses-02/anat/sub-01_ses-02_ce-gadolinium_T1w"
    assert bids_names(full) == ("ds1/sub-01", "ses-02", "T1w-ce")
    assert bids_names("sub-9_FLAIR") == ("sub-9", "", "FLAIR")
    # Without "sub-" it is not a BIDS name, and a word that BIDS does not know is not a contrast.
    assert bids_names("patient_T1w") == ("", "", "")
    assert bids_names("sub-9_Doe") == ("sub-9", "", "")


def test_label_maps_of_bids_and_nnunet_are_counted_by_folder(tmp_path: Path) -> None:

    names = ("anat/sub-1_T2w", "anat/sub-1_dseg", "anat/sub-1_desc-brain_mask", "labelsTr/x")
    for name in names:
        path = tmp_path / "pool" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    rows = found(tmp_path / "pool")

    (scan,) = [c for c in rows if not c.status]
    assert (scan.id, scan.subject) == ("pool/anat/sub-1_T2w", "pool/anat/sub-1")
    assert (scan.contrast, scan.modality) == ("T2w", "MR")
    assert [(c.id, c.status, c.reason[:12]) for c in rows if c.status] == [
        ("pool/anat/(label maps)", "labels", "2 label maps"),
        ("pool/labelsTr/(label maps)", "labels", "1 label map "),
    ]


def test_label_names_are_those_of_bids_and_nnunet_only() -> None:
    assert is_label_name("a/sub-1_dseg")
    assert is_label_name("pool/labelsTr/x")
    # "mask" or "seg" somewhere in another name may be a scan ("masked" against recognition).
    assert not is_label_name("pool/masked/x_T1w")
    assert not is_label_name("mask")
    assert not is_label_name("pool/scan_seg")


def test_subject_and_session_do_not_show_when_a_candidate_is_printed(tmp_path: Path) -> None:
    d.write_series(
        tmp_path / "pool",
        t00100020=("LO", "Dumbledore-1881"),
        t0020000D=("UI", "1.2.123456789"),
    )

    one = only(tmp_path / "pool")

    assert one.subject == "Dumbledore-1881"
    # Logs and tracebacks print the repr of values.
    assert "Dumbledore" not in repr(one)
    assert "123456789" not in repr(one)
