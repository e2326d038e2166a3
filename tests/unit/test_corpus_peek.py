"""The quick look at headers: the same as SimpleITK's for plain files, and no answer for others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.corpus.peek import peek
from nnunet_autoreg.corpus.read import ScanHeader


def save(
    path: Path,
    array: Any,
    spacing: tuple[float, ...] = (1.5, 1.25, 2.0),
    vector: bool = False,
) -> Path:
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    image.SetSpacing(spacing)
    is_compressed = path.name.startswith("small")
    SimpleITK.WriteImage(image, str(path), useCompression=is_compressed)
    return path


PLAIN = np.zeros((8, 9, 10), np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "small.mha", "a.mhd", "A.NII"])
def test_a_plain_file_gives_size_and_spacing_in_array_order(tmp_path: Path, name: str) -> None:
    # SimpleITK chooses the format by an ending in lower case, so the file is renamed afterwards.
    path = save(tmp_path / name.lower(), PLAIN).rename(tmp_path / name)

    assert peek(path) == ScanHeader((8, 9, 10), (2.0, 1.25, 1.5))


def test_a_trailing_axis_of_one_volume_does_not_count(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", PLAIN[None], (1.5, 1.25, 2.0, 1.0))

    assert peek(path) == ScanHeader((8, 9, 10), (2.0, 1.25, 1.5))


def test_files_that_are_not_plain_get_no_answer(tmp_path: Path) -> None:
    # Byte 123 of NIfTI-1 holds the units: 3 are micrometres.
    micrometres = bytearray(save(tmp_path / "m.nii", PLAIN).read_bytes())
    micrometres[123] = 3
    (tmp_path / "m.nii").write_bytes(micrometres)
    (tmp_path / "text.nii").write_text("text")
    (tmp_path / "text.nii.gz").write_bytes(b"\x1f\x8b nonsense")
    (tmp_path / "empty.mha").touch()

    odd = [
        tmp_path / "m.nii",
        tmp_path / "text.nii",
        tmp_path / "text.nii.gz",
        tmp_path / "empty.mha",
        tmp_path / "gone.nii",
        save(tmp_path / "a.nrrd", PLAIN),
        save(tmp_path / "4d.nii", np.zeros((3, 8, 9, 10), np.int16), (1.0, 1.0, 1.0, 1.0)),
        save(tmp_path / "thin.mha", PLAIN[:2]),
        save(tmp_path / "coarse.mha", PLAIN, (60.0, 1.0, 1.0)),
        save(tmp_path / "rgb.nii", np.zeros((8, 9, 10, 3), np.uint8), vector=True),
        save(tmp_path / "rgb.mha", np.zeros((8, 9, 10, 3), np.uint8), vector=True),
    ]

    assert [peek(path) for path in odd] == [None] * len(odd)
    assert peek(save(tmp_path / "b.nii", PLAIN), "t=1") is None


def test_real_scans_are_seen_as_simpleitk_sees_them(shared_data: Path) -> None:
    datasets = sorted((shared_data / "nnUNet_raw").iterdir())
    for path in [min((folder / "imagesTr").iterdir()) for folder in datasets]:
        reader: Any = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()

        found = peek(path)

        assert found is not None
        assert found.shape_vox == reader.GetSize()[::-1]
        np.testing.assert_allclose(found.spacing_mm, reader.GetSpacing()[::-1], rtol=1e-6)
