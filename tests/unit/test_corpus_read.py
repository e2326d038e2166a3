"""Every kind of bad input gets its status and a reason that says what to do."""

import gzip
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from refusals import refused

from nnunet_autoreg.corpus import read
from nnunet_autoreg.errors import ScanError


def noise(shape: tuple[int, ...] = (16, 18, 20), seed: int = 0) -> Any:
    values = np.random.default_rng(seed).integers(0, 1000, shape)
    return values.astype(np.int16)


def save(
    path: Path,
    array: Any,
    spacing: tuple[float, ...] = (1.0, 1.0, 2.0),
    vector: bool = False,
) -> Path:
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    if image.GetDimension() == len(spacing):
        image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))
    return path


def patch(path: Path, *changes: tuple[int, str, tuple[float, ...]]) -> Path:
    """Overwrite fields of an uncompressed NIfTI-1 header: (offset, struct format, values)."""
    content = bytearray(path.read_bytes())
    for offset, kind, values in changes:
        struct.pack_into("<" + kind, content, offset, *values)
    path.write_bytes(bytes(content))
    return path


def status_of(path: Path) -> tuple[str, str]:
    """Return status and reason of a scan that has to be refused."""
    with pytest.raises(ScanError) as caught:
        read.load_scan(path)
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".hdr"])
def test_every_format_is_read_in_zyx_order_and_turned_to_ras(tmp_path: Path, ending: str) -> None:
    scan = read.load_scan(save(tmp_path / f"scan{ending}", noise()))

    # SimpleITK writes LPS: in RAS the axes y and x run the other way.
    expected = noise().astype(np.float32)[None, :, ::-1, ::-1]
    assert scan.spacing_mm == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(scan.array_CZYX, expected)


def test_names_with_spaces_and_umlauts_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "Präparat ä ö"
    folder.mkdir()

    scan = read.load_scan(save(folder / "Schädel 1 größer.nii.gz", noise()))

    assert scan.array_CZYX.shape == (1, 16, 18, 20)


def test_a_truncated_gzip_is_noticed_though_itk_fills_it_with_zeros(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    path.write_bytes(path.read_bytes()[:5000])

    status, reason = status_of(path)

    assert status == "unreadable"
    assert "truncated" in reason


def test_a_gzip_of_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    # The stream is whole and its checksum is right; only the content is too short.
    path = save(tmp_path / "a.nii.gz", noise())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))

    status, reason = status_of(path)

    # A header of 352 bytes and 16 x 18 x 20 voxels of 2 bytes.
    assert status == "unreadable"
    assert "11772 of 11872 bytes" in reason


def test_flipped_bytes_in_a_gzip_are_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    content = bytearray(path.read_bytes())
    # The last 8 bytes are the checksum (4) and the length (4).
    content[-6] ^= 0xFF

    path.write_bytes(bytes(content))

    assert status_of(path)[0] == "unreadable"


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_truncated_files_of_other_formats_are_noticed(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a{ending}", noise())
    path.write_bytes(path.read_bytes()[:-3000])

    status, reason = status_of(path)

    assert status == "unreadable"
    assert "truncated" in reason


def test_an_empty_file_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"")

    assert status_of(path) == ("unreadable", "the file is empty; copy it again")


def test_text_named_as_an_image_is_unreadable(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nii", "a.mha", "a.nrrd"):
        (tmp_path / name).write_text("hello, I am a letter\n" * 40)
        assert status_of(tmp_path / name)[0] == "unreadable"


def test_a_vanished_file_a_broken_link_and_a_folder_are_distinguished(tmp_path: Path) -> None:
    assert "vanished" in status_of(tmp_path / "gone.nii.gz")[1]

    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    assert "a link" in status_of(tmp_path / "link.nii.gz")[1]

    (tmp_path / "folder.nii.gz").mkdir()
    assert "not a file" in status_of(tmp_path / "folder.nii.gz")[1]


def test_a_forbidden_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii.gz", noise())

    # A real file without permission would be readable for root, who often runs tests in containers.
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)

    status, reason = status_of(path)
    assert status == "unreadable"
    assert "permission denied" in reason


def test_the_data_file_of_a_header_must_be_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mhd", noise())
    # The .mhd file is a header in text that names the file with the voxels.
    (tmp_path / "a.raw").unlink()

    assert "missing" in status_of(path)[1]


def test_a_slice_is_not_3d(tmp_path: Path) -> None:
    assert status_of(save(tmp_path / "a.nii.gz", noise()[0]))[0] == "not3d"
    assert status_of(save(tmp_path / "b.nii.gz", noise((1, 18, 20))))[0] == "not3d"


def test_a_series_is_4d_but_one_volume_with_a_fourth_axis_is_a_scan(tmp_path: Path) -> None:
    series = noise((3, 16, 18, 20)).astype(np.float32)

    status, reason = status_of(save(tmp_path / "a.nii.gz", series))

    assert status == "4d"
    assert "3 volumes" in reason

    one_volume = noise((1, 16, 18, 20)).astype(np.float32)
    for name in ("b.nii.gz", "b.mha"):
        scan = read.load_scan(save(tmp_path / name, one_volume, (1.0, 1.0, 2.0, 1.0)))
        assert scan.array_CZYX.shape == (1, 16, 18, 20)
        assert scan.spacing_mm == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_several_values_per_voxel_are_rgb(tmp_path: Path, ending: str) -> None:
    array = np.stack([noise().astype(np.uint8)] * 3, axis=-1)
    path = save(tmp_path / f"a{ending}", array, vector=True)

    assert status_of(path)[0] == "rgb"


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise().astype(np.float64))
    # Datatype 32 is complex64: two float32 take the 64 bits of the float64 that were written.
    patch(path, (70, "2h", (32, 64)))

    assert status_of(path)[0] == "complex"


def test_nan_and_inf_are_counted(tmp_path: Path) -> None:
    array = noise().astype(np.float32)
    array[0, 0, :3] = np.nan
    array[1, 0, 0] = np.inf
    for name in ("a.nii.gz", "b.nii", "c.mha"):
        status, reason = status_of(save(tmp_path / name, array))
        # Three NaN and one infinite value of 16 x 18 x 20.
        assert status == "nonfinite"
        assert reason.startswith("4 of 5760 voxels")


def test_a_constant_scan_is_refused_with_its_value(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.full((16, 16, 16), 7, np.int16))
    assert status_of(path) == ("constant", "every voxel has the value 7")


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_voxel_sizes_are_noticed_though_itk_replaces_them(
    tmp_path: Path,
    size: float,
) -> None:
    # pixdim[1..3] of NIfTI-1 are at byte 80.
    path = patch(save(tmp_path / "a.nii", noise()), (80, "3f", (size, 1, 2)))

    assert status_of(path)[0] == "spacing"


def test_a_zero_voxel_size_in_other_formats_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", noise())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ElementSpacing = 1 1 2", b"ElementSpacing = 0 1 2"))

    assert status_of(path)[0] == "spacing"


# Micrometres instead of millimetres, 60 mm between slices, and slices 40 times as thick as wide.
@pytest.mark.parametrize(
    "spacing",
    [
        (0.001, 0.001, 0.001),
        (60.0, 1.0, 1.0),
        (0.5, 0.5, 20.0),
    ],
)
def test_wild_voxel_sizes_are_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ScanError) as caught:
        read.check_spacing(spacing)
    assert caught.value.status == "spacing"


def test_ordinary_anisotropy_passes() -> None:
    # Cine MRI of the heart, and fine pixels in thick slices (a ratio of 23).
    read.check_spacing((10.0, 1.5, 1.5))
    read.check_spacing((8.0, 0.35, 0.35))


def test_sheared_axes_are_refused_in_every_format(tmp_path: Path) -> None:
    nrrd = save(tmp_path / "a.nrrd", noise())

    nrrd.write_bytes(nrrd.read_bytes().replace(b"(1,0,0)", b"(1,.5,0)"))

    assert status_of(nrrd)[0] == "direction"

    # Two axes of length 1 (0.9^2 + 0.43589^2) that are not at right angles, in the sform at byte
    # 280. The codes at byte 252 say that only the sform counts.
    rows = [
        (280, "4f", (0.9, 0.43589, 0, 0)),
        (296, "4f", (0.43589, 0.9, 0, 0)),
        (312, "4f", (0, 0, 2, 0)),
    ]
    nifti = patch(save(tmp_path / "b.nii", noise()), (252, "2h", (0, 1)), *rows)

    assert status_of(nifti)[0] == "direction"


def test_qform_and_sform_must_agree_unless_the_sform_is_a_registration(
    tmp_path: Path,
) -> None:
    # The sform scales by 3 mm on every axis, the qform has the true 1, 1 and 2 mm.
    rows = [(280, "4f", (3, 0, 0, 0)), (296, "4f", (0, 3, 0, 0)), (312, "4f", (0, 0, 3, 0))]
    contradicting = patch(save(tmp_path / "a.nii", noise()), (252, "2h", (1, 1)), *rows)

    status, reason = status_of(contradicting)

    assert status == "direction"
    assert "1, 1, 2 mm against 3, 3, 3 mm" in reason

    # Code 4 is MNI space: such an sform describes the place in an atlas, not the scan.
    registered = patch(save(tmp_path / "b.nii", noise()), (252, "2h", (1, 4)), *rows)

    assert read.load_scan(registered).spacing_mm == (2.0, 1.0, 1.0)


def test_few_slices_pass_and_fewer_than_four_do_not(tmp_path: Path) -> None:
    six = read.load_scan(save(tmp_path / "a.nii.gz", noise((6, 20, 20))))

    assert six.array_CZYX.shape == (1, 6, 20, 20)
    assert status_of(save(tmp_path / "b.nii.gz", noise((3, 20, 20))))[0] == "tiny"

    # Sixteen slices, of which two are left after cropping.

    nearly_empty = np.zeros((16, 16, 16), np.int16)
    nearly_empty[5:7, 2:12, 2:12] = noise((2, 10, 10)) + 1

    assert status_of(save(tmp_path / "c.nii.gz", nearly_empty))[0] == "tiny"


def test_a_volume_beyond_memory_is_refused_with_the_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read, "memory_bytes", lambda: 8 * 2**30)

    read.check_memory((512, 512, 500))
    # 2^30 voxels at 12 bytes each while a scan is read and turned.
    with refused(ScanError, "scan-huge", "48 GiB", 8):
        read.check_memory((1024, 1024, 1024))


def test_a_label_map_is_recognised_by_few_whole_numbers(tmp_path: Path) -> None:
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[4:10, 4:10, 4:10] = 1

    assert status_of(save(tmp_path / "a.nii.gz", labels))[0] == "labelmap"


def test_a_map_of_many_organs_is_recognised_by_its_areas(tmp_path: Path) -> None:
    # 27 organs, each a cube of 8 voxels: many numbers, but hardly a neighbour differs.
    organs = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    for axis in range(3):
        organs = np.repeat(organs, 8, axis)

    assert status_of(save(tmp_path / "organs.nii.gz", organs))[0] == "labelmap"


def test_an_8_bit_scan_is_not_a_label_map_for_any_name(tmp_path: Path) -> None:
    array = (noise() % 120).astype(np.uint8)

    scan = read.load_scan(save(tmp_path / "scan_seg.nii.gz", array))

    assert scan.array_CZYX.max() > 100


def test_label_names_are_words_not_parts_of_words() -> None:
    assert read.LABEL_NAME.search("case_seg.nii.gz")
    assert read.LABEL_NAME.search("mask.nii")
    assert not read.LABEL_NAME.search("damasked_segovia.nii.gz")


def test_real_scans_pass_and_real_label_maps_do_not(shared_data: Path) -> None:
    for dataset in sorted((shared_data / "nnUNet_raw").iterdir()):
        read.load_scan(min((dataset / "imagesTr").iterdir()))
        assert status_of(min((dataset / "labelsTr").iterdir()))[0] == "labelmap"
    assert status_of(shared_data / "nifti" / "example_seg.nii.gz")[0] == "labelmap"


def test_output_of_libraries_is_caught_and_both_streams_come_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with read.quiet_readers() as caught:
        # Written to the file descriptors, past Python's own sys.stdout and sys.stderr.
        os.write(2, b"noise from C++\n")
        os.write(1, b"noise from libjpeg\n")
        assert "noise from C++" in caught()
        assert "libjpeg" in caught()
    os.write(2, b"after\n")
    os.write(1, b"result\n")

    assert capfd.readouterr() == ("result\n", "after\n")


def test_a_nifti_2_header_is_understood(tmp_path: Path) -> None:
    from nnunet_autoreg.io.nifti import parse_header

    # Size of the header, 3 axes of 20 x 18 x 16 voxels, int16, voxel sizes, offset of the voxels,
    # codes
    # of qform and sform, and the three rows of the sform.
    head = bytearray(540)
    struct.pack_into("<i", head, 0, 540)
    struct.pack_into("<8q", head, 16, 3, 20, 18, 16, 1, 1, 1, 1)
    struct.pack_into("<2h", head, 12, 4, 16)
    struct.pack_into("<8d", head, 104, 1, 1, 1, 2, 0, 0, 0, 0)
    struct.pack_into("<q", head, 168, 544)
    struct.pack_into("<2i", head, 344, 1, 1)
    struct.pack_into("<12d", head, 400, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0)

    header = parse_header(bytes(head))

    assert (header.dims, header.bits, header.offset) == ((20, 18, 16), 16, 544)
    assert header.pixdim == header.sform_scales == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
# bitpix repeats what the datatype says already; some programs leave it 0 or wrong.
@pytest.mark.parametrize("bits", [0, 8, 32])
def test_the_datatype_counts_and_not_bitpix(tmp_path: Path, bits: int, ending: str) -> None:
    # Byte 72.
    path = patch(save(tmp_path / "a.nii", noise()), (72, "h", (bits,)))
    if ending == ".nii.gz":
        path = Path(f"{path}.gz")
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))

    found = read.load_scan(path)

    right = read.load_scan(save(tmp_path / "right.nii", noise()))
    np.testing.assert_array_equal(found.array_CZYX, right.array_CZYX)


# Zeros are padding of tape archives and of some file systems.
@pytest.mark.parametrize(
    "rest",
    [b"x", b"garbage at the end of the file", b"\0" * 512, b"\0" * 5 + b"rest"],
)
def test_bytes_after_a_gzip_stream_are_ignored(tmp_path: Path, rest: bytes) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    path.write_bytes(path.read_bytes() + rest)

    found = read.load_scan(path)

    expected = noise().astype(np.float32)[None, :, ::-1, ::-1]
    np.testing.assert_array_equal(found.array_CZYX, expected)


def test_a_truncated_image_with_a_rest_is_still_truncated(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    # 100 bytes are missing and 4 others follow.
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]) + b"rest")

    assert status_of(path)[0] == "unreadable"


def test_a_pair_is_checked_in_both_of_its_files(tmp_path: Path) -> None:
    header = save(tmp_path / "a.hdr", noise().astype(np.float32))
    voxels = tmp_path / "a.img"
    data = (tmp_path / "a.img").read_bytes()
    expected = read.load_scan(header).array_CZYX

    # Names may be in capitals.
    for file in (header, voxels):
        shutil.copy(file, tmp_path / file.name.upper())
    np.testing.assert_array_equal(read.load_scan(tmp_path / "A.HDR").array_CZYX, expected)

    # Packed voxels are read as well.
    voxels.unlink()
    (tmp_path / "a.img.gz").write_bytes(gzip.compress(data))
    np.testing.assert_array_equal(read.load_scan(header).array_CZYX, expected)

    # Then the voxels are missing, too few, or no numbers.
    (tmp_path / "a.img.gz").unlink()
    assert status_of(header)[0] == "unreadable"
    voxels.write_bytes(data[:-4])
    assert status_of(header)[0] == "unreadable"
    voxels.write_bytes(data[:-4] + struct.pack("<f", math.nan))
    assert status_of(header)[0] == "nonfinite"


def test_an_analyze_image_is_refused_because_its_sides_are_unknown(tmp_path: Path) -> None:
    header = save(tmp_path / "a.hdr", noise())
    # Analyze 7.5 has the same layout without the word that makes it NIfTI, and no affine.
    patch(header, (344, "4s", (b"",)))
    other = tmp_path / "b.hdr"
    other.write_text("ENVI\nsamples = 18\n")

    assert status_of(header)[0] == "direction"
    assert ".nii.gz" in status_of(header)[1]
    assert status_of(other)[0] == "unreadable"


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_beyond_32_bits_are_called_so(tmp_path: Path) -> None:
    # 1e40 becomes infinite in float32, whose largest number is 3.4e38.
    status, reason = status_of(save(tmp_path / "a.nii.gz", noise().astype(np.float64) * 1e40))

    assert status == "nonfinite"
    assert "too large" in reason
