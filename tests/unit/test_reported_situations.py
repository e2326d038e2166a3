"""Twenty situations that users of other tools have reported in public.

Each test makes the situation as a small input and holds the right outcome.
"""

import bz2
import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dicom_files as d
import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.corpus.dataset_json import read_dataset_json
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.index import Index, index_scans
from nnunet_autoreg.corpus.rows import ScanRow

Make = Callable[[Path], None]
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def index_of(folder: Path) -> Index:
    return index_scans(find_scans([], [folder]), set(), 1, None)


def rows_of(folder: Path) -> list[tuple[str, Any]]:
    """Return (status, shape) of every row."""
    return sorted((row.status, row.shape_vox) for row in index_of(folder).rows)


def only_row(folder: Path) -> ScanRow:
    (row,) = index_of(folder).rows
    return row


def save_nifti(path: Path, affine: Any = AFFINE, dtype: str = "int16", seed: int = 0) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    array_XYZ = d.volume(8, seed=seed).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(array_XYZ.astype(dtype), affine, dtype=np.dtype(dtype))
    nibabel.save(image, path)
    return image


def series_with(folder: Path, number_to_changes: Callable[[int], dict[str, Any]]) -> None:
    """Write a series of 8 slices; the function gives the tags in which each slice differs."""
    for number, pixels in enumerate(d.volume()):
        values = d.slice_values(number, **number_to_changes(number))
        d.write(folder / f"{number:03d}.dcm", values, pixels)


def test_slices_of_varying_exposure_stay_one_stack(tmp_path: Path) -> None:
    # Exposure (0018,1152) follows the dose modulation of the scanner.
    series_with(tmp_path, lambda n: {"t00181152": ("IS", str(14 + n % 3))})

    assert rows_of(tmp_path) == [("ok", (8, 18, 20))]


def test_an_acquisition_number_per_slice_is_one_stack(tmp_path: Path) -> None:
    series_with(tmp_path, lambda n: {"t00200012": ("IS", str(n + 1))})

    assert rows_of(tmp_path) == [("ok", (8, 18, 20))]


def test_two_studies_under_one_series_uid_are_not_mixed(tmp_path: Path) -> None:
    for study in (1, 2):
        for number, pixels in enumerate(d.volume(seed=study)):
            changes = {
                "t0020000D": ("UI", f"1.2.{study}"),
                "t00080018": ("UI", f"1.2.9.{study}.{number}"),
            }
            values = d.slice_values(number, **changes)
            d.write(tmp_path / f"{study}_{number}.dcm", values, pixels)

    assert rows_of(tmp_path) == [("ok", (8, 18, 20))] * 2


def test_an_integer_string_with_a_fraction_does_no_harm(tmp_path: Path) -> None:
    series_with(tmp_path, lambda n: {"t00181152": ("IS", "14.5")})

    assert rows_of(tmp_path) == [("ok", (8, 18, 20))]


def test_decimal_strings_longer_than_the_standard_are_read(tmp_path: Path) -> None:
    position = "-10.000000000000004\\-20.000000000000004\\{}.0000000000000004"
    series_with(tmp_path, lambda n: {"t00200032": ("DS", position.format(2 * n))})

    row = only_row(tmp_path)

    assert row.status == "ok"
    assert row.spacing_mm == pytest.approx((2.0, 1.5, 1.0))


def test_a_tilted_gantry_is_named_although_its_field_says_zero(tmp_path: Path) -> None:
    def tilted(number: int) -> dict[str, Any]:
        # Each slice lies 0.5 mm higher than the one 2 mm before it: atan(0.5 / 2) = 14.0 degrees.
        return {
            "t00200032": ("DS", (0.0, 0.5 * number, 2.0 * number)),
            "t00181120": ("DS", "0"),
        }

    series_with(tmp_path, tilted)

    row = only_row(tmp_path)

    assert row.status == "direction"
    assert "14.0 degrees" in row.reason


def test_files_without_ending_are_sorted_by_position(tmp_path: Path) -> None:
    array = d.volume(12)
    for number, pixels in enumerate(array):
        # image_10 comes before image_2 by name, and no position begins at the first name.
        d.write(tmp_path / f"image_{number}", d.slice_values(number), pixels)

    row = only_row(tmp_path)

    assert (row.status, row.shape_vox) == ("ok", (12, 18, 20))
    assert row.spacing_mm == pytest.approx((2.0, 1.5, 1.0))


def test_one_series_in_legacy_and_enhanced_files_is_two_or_named(tmp_path: Path) -> None:
    # A scanner update writes each volume of a series as one multi-frame file.
    for volume in range(2):
        positions = [(-10.0, -20.0, 2.0 * number) for number in range(8)]
        values = d.multiframe_values(positions, t00080018=("UI", f"1.2.9.{volume}"))
        d.write(tmp_path / f"{volume}.dcm", values, d.volume(seed=volume))

    assert rows_of(tmp_path) == [("ok", (8, 18, 20))] * 2


def test_a_localiser_in_the_series_does_not_cost_the_scan(tmp_path: Path) -> None:
    d.write_series(tmp_path)
    # A scout view shows the whole patient from the side, in another plane than the slices.
    for number in range(3):
        values = d.slice_values(
            20 + number,
            t00200037=("DS", (0, 1, 0, 0, 0, -1)),
            t00080008=("CS", "ORIGINAL\\PRIMARY\\LOCALIZER"),
        )
        d.write(tmp_path / f"scout_{number}.dcm", values, d.volume(3)[number])

    assert ("ok", (8, 18, 20)) in rows_of(tmp_path)


def test_an_uncompressed_file_that_is_called_gz_is_read(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    (tmp_path / "a.nii").rename(tmp_path / "a.nii.gz")

    row = only_row(tmp_path)

    # SimpleITK reads it, and so do we; whoever cannot has to say what it is.
    assert (row.status, row.shape_vox) == ("ok", (8, 18, 20))


def test_a_compressed_file_without_gz_in_its_name_is_named(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(gzip.compress(data))

    row = only_row(tmp_path)

    assert row.status == "unreadable"
    assert ".nii.gz" in row.reason


@pytest.mark.parametrize(
    "text",
    [
        # Pointers of Git LFS and git-annex: text of a few lines instead of the file.
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "/annex/objects/MD5E-s100--00.nii.gz\n",
    ],
)
def test_a_pointer_in_the_place_of_a_scan_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.nii.gz").write_text(text)

    row = only_row(tmp_path)

    assert row.status == "unreadable"
    assert "pointer" in row.reason


def test_shadow_files_of_macos_are_not_scans(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz")
    # AppleDouble files hold the metadata of a file of the same name.
    (tmp_path / "._a.nii.gz").write_bytes(b"\0\5\x16\7" + bytes(4096))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.nii.gz").write_bytes(b"\0\5\x16\7" + bytes(4096))

    statuses = [status for status, _ in rows_of(tmp_path)]

    # They are counted, and not read.
    assert statuses == ["hidden", "hidden", "ok"]


def test_voxels_of_a_few_micrometres_are_read_or_named(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", np.diag([0.02, 0.02, 0.02, 1.0]))
    save_nifti(tmp_path / "b.nii.gz", np.diag([0.002, 0.002, 0.002, 1.0]), seed=1)

    assert sorted(status for status, _ in rows_of(tmp_path)) == ["ok", "spacing"]


def test_a_sheared_affine_is_named(tmp_path: Path) -> None:
    # An axis that is not at right angles to the others, which no spacing and direction can express.
    affine = AFFINE.copy()
    affine[0, 2] = 0.4
    image = nibabel.Nifti1Image(d.volume().transpose(2, 1, 0), affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "a.nii.gz")

    row = only_row(tmp_path)

    assert row.status == "direction"


def test_an_affine_of_zeros_is_named_with_the_voxel_size(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    # qform_code 0, sform_code 1, and twelve zeros in the place of the sform.
    struct.pack_into("<2h", data, 252, 0, 1)
    struct.pack_into("<12f", data, 280, *([0.0] * 12))
    (tmp_path / "a.nii").write_bytes(bytes(data))

    row = only_row(tmp_path)

    assert row.status == "direction"
    for sizes in ("1, 1.5, 2 mm", "0, 0, 0 mm"):
        assert sizes in row.reason


def test_a_ct_stored_without_its_offset_is_not_a_ct_by_values(tmp_path: Path) -> None:
    # Air is 0 and water 1000, as a converter without rescaling leaves them.
    array_ZYX = np.zeros((16, 32, 32), np.int16)
    array_ZYX[:, 6:26, 6:26] = np.random.default_rng(0).normal(1040, 20, (16, 20, 20))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array_ZYX), str(tmp_path / "a.nii.gz"))

    row = only_row(tmp_path)

    assert row.status == "ok"
    assert row.modality != "CT"


def test_padding_far_below_air_leaves_a_ct_a_ct(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Air at -1000 and tissue at 40, with a strip outside the field of view and one bright voxel.
    array_ZYX = rng.normal(-1000, 5, (12, 40, 40))
    array_ZYX[:, 8:32, 8:32] = rng.normal(40, 5, (12, 24, 24))
    array_ZYX[:, :, :4] = -2000
    array_ZYX[6, 20, 20] = 4095
    image = SimpleITK.GetImageFromArray(array_ZYX.astype(np.int16))
    SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))

    row = only_row(tmp_path)

    assert (row.status, row.modality) == ("ok", "CT")


def test_a_report_that_is_called_dcm_is_named(tmp_path: Path) -> None:
    d.write_series(tmp_path)
    (tmp_path / "report.dcm").write_text("<html><body>The report</body></html>" * 20)

    statuses = [status for status, _ in rows_of(tmp_path)]

    assert sorted(statuses) == ["ok", "unreadable"]


def test_labels_of_the_first_version_of_the_format_name_nothing(tmp_path: Path) -> None:
    # The first version mapped numbers to names, the second maps names to numbers.
    (tmp_path / "dataset.json").write_text(
        '{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "edema"}}',
    )

    described = read_dataset_json(tmp_path)

    assert described.channels == ("MRI",)
    assert described.structures == {}


def test_slices_stored_as_time_points_get_advice_that_works(tmp_path: Path) -> None:
    # A volume whose third axis was lost: eight time points of one slice.
    array_XYT = d.volume(8).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(array_XYT[:, :, None, :], AFFINE)
    nibabel.save(image, tmp_path / "a.nii.gz")

    row = only_row(tmp_path)

    assert row.status == "not3d"
    assert "--split-4d" not in row.reason


def test_a_pair_of_header_and_voxels_is_one_scan(tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "single" / "a.nii")
    (tmp_path / "pairs").mkdir()
    nibabel.save(
        nibabel.Nifti1Pair(np.asarray(image.dataobj), AFFINE),
        tmp_path / "pairs" / "a.hdr",
    )
    (tmp_path / "pairs" / "rest.img").write_bytes(b"voxels without header")

    ignored, pair = sorted(index_of(tmp_path / "pairs").rows, key=lambda row: row.status)
    single = only_row(tmp_path / "single")

    assert pair.status == "ok"
    assert (pair.shape_vox, pair.spacing_mm) == (single.shape_vox, single.spacing_mm)
    assert pair.content_hash == single.content_hash
    # The .img of the pair is not another scan; one without a header belongs to nothing.
    assert ignored.status == "ignored"
    assert "1 .img" in ignored.reason


def test_a_scan_packed_by_bzip2_is_named(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").unlink()
    (tmp_path / "a.nii.bz2").write_bytes(bz2.compress(data))

    row = only_row(tmp_path)

    assert row.status == "ignored"
    assert "bz2" in row.reason
