"""2D images: found and read for objectives that learn from them, left out with a reason else."""

import operator
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dicom_files
import numpy as np
import pytest
import SimpleITK
from odd_dicom import ODDITIES
from refusals import refused

from nnunet_autoreg.corpus import images
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.images import header_of_scan_or_image, load_scan_or_image
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.read import information, load_scan
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.store.store import Store

RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.1"


def picture(path: Path, seed: int = 0, colours: int = 1) -> np.ndarray:
    shape = (40, 50) if colours == 1 else (40, 50, colours)
    array = np.random.default_rng(seed).integers(1, 250, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array, isVector=colours > 1)
    SimpleITK.WriteImage(image, str(path))
    return array


def scan(path: Path, shape: tuple[int, ...] = (8, 40, 50), seed: int = 9) -> Path:
    array = np.random.default_rng(seed).normal(500, 100, shape).astype(np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A folder with a volume, a PNG, a colour JPEG, a flat NIfTI file and two kinds of DICOM."""
    folder = tmp_path / "pool"
    picture(folder / "grey.png", 1)
    picture(folder / "colour.jpeg", 2, colours=3)
    scan(folder / "volume.nii.gz")
    scan(folder / "flat.nii.gz", (1, 40, 50), 3)
    # A single slice of an MR series with a place in the patient.
    pixels = np.random.default_rng(4).integers(0, 900, (18, 20), dtype=np.int16)
    one = dicom_files.slice_values(0, sop_class=dicom_files.MR, t00080060=("CS", "MR"))
    dicom_files.write(folder / "slice" / "a.dcm", one, pixels)
    # A radiograph: a projection has no place and no orientation.
    without_place = {tag: None for tag in (0x00200032, 0x00200037)}
    projection = dicom_files.slice_values(0, "1.2.4", RADIOGRAPH, t00080060=("CS", "CR"))
    other = np.random.default_rng(5).integers(0, 900, (18, 20), dtype=np.int16)
    dicom_files.write(folder / "projection" / "b.dcm", {**projection, **without_place}, other)
    return folder


def test_all_kinds_of_2d_images_are_found_and_read_beside_volumes(pool: Path) -> None:
    found = find_scans([], [pool], images=True, salt="pepper")

    index = index_scans(found, set(), 1, salt="pepper", images=True)

    usable = {Path(row.source).name: row for row in index.usable}
    shapes = {name: row.shape_vox for name, row in usable.items()}
    assert shapes == {
        "grey.png": (1, 40, 50),
        "colour.jpeg": (1, 40, 50),
        "flat.nii.gz": (1, 40, 50),
        "slice": (1, 18, 20),
        "b.dcm": (1, 18, 20),
        "volume.nii.gz": (8, 40, 50),
    }
    assert [name for name, row in usable.items() if not row.is_image] == ["volume.nii.gz"]
    modalities = {name: row.modality for name, row in usable.items()}
    assert (modalities["grey.png"], modalities["slice"], modalities["b.dcm"]) == ("2D", "MR", "CR")
    # Radiographs of one patient have to come to one side of the split.
    assert usable["b.dcm"].subject == usable["slice"].subject != ""


def test_2d_images_are_left_out_with_the_reason_for_other_objectives(pool: Path) -> None:
    index = index_scans(find_scans([], [pool]), set(), 1)

    assert [Path(row.source).name for row in index.usable] == ["volume.nii.gz"]
    flat = [row.reason for row in index.rows if row.status == "not3d"]
    # The flat NIfTI file, the slice and the row that counts the pictures.
    assert len(flat) == 3
    assert all("--objective joint" in reason for reason in flat)
    assert any("1 .jpeg" in reason and "1 .png" in reason for reason in flat)

    with refused(ScanError, "scan-not3d", "50 x 40 x 1"):
        load_scan(pool / "flat.nii.gz")


def test_grey_values_are_kept_exactly_and_colours_become_luminance(tmp_path: Path) -> None:
    grey = picture(tmp_path / "grey.png")
    colour = picture(tmp_path / "colour.png", colours=3)

    read = load_scan_or_image(tmp_path / "grey.png")
    mixed = load_scan_or_image(tmp_path / "colour.png")

    assert read.array_CZYX.shape == (1, 1, 40, 50)
    assert read.array_CZYX.dtype == np.float32
    assert np.array_equal(read.array_CZYX[0, 0], grey)
    assert read.spacing_mm == (1.0, 1.0, 1.0)
    # The weights of ITU-R BT.601 for red, green and blue.
    expected = colour @ np.array([0.299, 0.587, 0.114])
    assert np.allclose(mixed.array_CZYX[0, 0], expected, atol=1e-3)


def test_an_image_with_three_equal_colours_keeps_its_values(tmp_path: Path) -> None:
    grey = picture(tmp_path / "grey.png")
    three = np.repeat(grey[:, :, None], 3, axis=2)
    image = SimpleITK.GetImageFromArray(three, isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "three.png"))

    read = load_scan_or_image(tmp_path / "three.png")

    # 0.299 + 0.587 + 0.114 = 1 only without rounding errors, so this case is handled by itself.
    assert np.array_equal(read.array_CZYX[0, 0], grey)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_of_one_voxel_comes_first(tmp_path: Path, axis: int) -> None:
    shape = [20, 30]
    shape.insert(axis, 1)
    image = SimpleITK.ReadImage(str(scan(tmp_path / "a.nii.gz", tuple(shape))))
    steps = [0.5, 0.8]
    steps.insert(axis, 3.0)
    image.SetSpacing(steps[::-1])
    SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))

    header = header_of_scan_or_image(tmp_path / "a.nii.gz")

    assert header.shape_vox == (1, 20, 30)
    # The thickness of 3 mm says nothing in 2D: it is replaced by the coarser of the two others.
    assert header.spacing_mm == pytest.approx((0.8, 0.5, 0.8))


@pytest.mark.parametrize(
    ("values", "code", "value"),
    [
        # One value, four values (a label map), and sides of 3 and 1 voxels.
        (np.full((20, 20), 7, np.uint8), "scan-constant", "7"),
        (np.arange(400, dtype=np.uint8).reshape(20, 20) % 4, "scan-labelmap", "4 distinct"),
        (np.arange(60, dtype=np.uint8).reshape(3, 20), "scan-tiny", "20 x 3"),
        (np.arange(60, dtype=np.uint8).reshape(1, 60), "scan-tiny", "60 x 1"),
        (np.full((1, 1), 7, np.uint8), "scan-tiny", "1 x 1"),
    ],
)
def test_pictures_that_show_nothing_are_refused(
    tmp_path: Path,
    values: np.ndarray,
    code: str,
    value: str,
) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / "a.png"))

    with refused(ScanError, code, value):
        load_scan_or_image(tmp_path / "a.png")


def test_a_jpeg_cut_short_is_refused_and_prints_nothing(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    # The decoder returns the upper half and a warning, which would be taken for a scan.
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])

    load_scan_or_image(tmp_path / "whole.jpg")
    with refused(ScanError, "scan-unreadable", "truncated"):
        load_scan_or_image(tmp_path / "cut.jpg")

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("read", [header_of_scan_or_image, load_scan_or_image])
def test_the_header_of_an_image_is_read_once(
    pool: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any],
) -> None:
    opened = []

    def noted(path: Path) -> Any:
        opened.append(path.name)
        return information(path)

    # Opening a file costs a round trip on a network drive.
    monkeypatch.setattr(images, "information", noted)

    read(pool / "grey.png")
    read(pool / "flat.nii.gz")

    assert opened == ["grey.png", "flat.nii.gz"]


def test_grey_with_opacity_is_refused_with_the_true_reason(tmp_path: Path) -> None:
    from PIL import Image

    values = np.random.default_rng(0).integers(1, 250, (40, 50, 2), dtype=np.uint8)
    Image.fromarray(values, "LA").save(tmp_path / "a.png")

    with refused(ScanError, "scan-rgb", "opacity"):
        load_scan_or_image(tmp_path / "a.png")


def test_images_are_stored_as_one_slice_and_pictures_in_archives_are_read(pool: Path) -> None:
    import zipfile

    with zipfile.ZipFile(pool / "more.zip", "w") as archive:
        archive.write(pool / "grey.png", "inside/other.png")
    (pool / "grey.png").unlink()
    found = find_scans([], [pool], images=True)
    rows = [row for row in index_scans(found, set(), 1, images=True).usable if row.is_image]
    assert any(row.part == "member=inside/other.png" for row in rows)
    store = Store(pool.parent / "store")
    spacing_of: Any = operator.attrgetter("spacing_mm")

    keys = store.ensure(rows, spacing_of, None, 1)

    assert len(keys) == len(rows) == 5
    assert not store.failures
    for row in rows:
        case = store.open(keys[row.id])
        assert case.shape_vox == row.shape_vox
        # Stored normalised to a mean of 0 and a standard deviation of 1.
        voxels = case.read((0, 0, 0), case.shape_vox)
        assert abs(float(voxels.mean())) < 0.05
        assert 0.9 < float(voxels.std()) < 1.1


def radiograph(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    """Write a projection: no place in the patient, the spacing at the detector."""
    without = {f"t{tag}": None for tag in ("00200032", "00200037", "00280030")}
    values = dicom_files.slice_values(
        0,
        sop_class=RADIOGRAPH,
        t00080060=("CS", "CR"),
        t00181164=("DS", (0.2, 0.1)),
        **without,
    )
    return dicom_files.write(path, values, pixels, **how)


@pytest.mark.parametrize("name", ODDITIES)
def test_a_radiograph_with_an_odd_header_is_read(tmp_path: Path, name: str) -> None:
    how, change = ODDITIES[name]
    pixels = dicom_files.volume(1)[0]
    path = radiograph(tmp_path / "pool" / "a.dcm", pixels, **how)
    path.write_bytes(change(path.read_bytes()))

    (found,) = find_scans([], [path.parent], images=True)
    image = load_scan_or_image(found.path, found.part)

    np.testing.assert_array_equal(image.array_CZYX[0, 0], pixels)
    # Rows 0.2 mm and columns 0.1 mm at the detector; the thickness is the coarser of both.
    assert image.spacing_mm == (0.2, 0.2, 0.1)


def without_end(content: bytes) -> bytes:
    """Cut off the last quarter."""
    return content[: -len(content) // 4]


def with_rows(number: int) -> Callable[[bytes], bytes]:
    """Return a change of the element Rows (0028,0010) from 18 to another number."""

    def change(content: bytes) -> bytes:
        rows = struct.pack("<HH", 0x28, 0x10) + b"US" + struct.pack("<HH", 2, 18)
        return content.replace(rows, rows[:-2] + struct.pack("<H", number))

    return change


@pytest.mark.parametrize(
    ("change", "status", "value"),
    [
        (without_end, "scan-unreadable", "truncated"),
        (with_rows(0), "scan-tiny", "20 x 0"),
        # 60 000 rows of 20 columns with 2 bytes are 2.4 MB, far more than the file has.
        (with_rows(60_000), "scan-unreadable", "2400000 bytes"),
    ],
)
def test_a_damaged_radiograph_gets_the_true_reason(
    tmp_path: Path,
    change: Callable[[bytes], bytes],
    status: str,
    value: str,
) -> None:
    path = radiograph(tmp_path / "pool" / "a.dcm", dicom_files.volume(1)[0])
    path.write_bytes(change(path.read_bytes()))

    (found,) = find_scans([], [path.parent], images=True)

    with refused(ScanError, status, value):
        load_scan_or_image(found.path, found.part)
