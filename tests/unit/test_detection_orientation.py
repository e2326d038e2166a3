"""Boxes count in the stored array, for every orientation in which nnU-Net's reader returns it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.detection.geometry import AS_STORED, frame_of_itk, reader_turn, stored_array
from nnunet_autoreg.detection.objects import ObjectSource, write_box_labels

# Three different sides and a box that is not symmetric: a swapped or mirrored axis is noticed.
SHAPE = (16, 20, 24)
BOX = (3, 4, 5, 7, 9, 11)
DIRECTIONS = {
    "LPS": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "RAS": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "permuted": (0, 0, 1, 1, 0, 0, 0, -1, 0),
    "oblique": (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1),
}


def readers() -> dict[str, Any]:
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

    kinds = (NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient)
    return {kind.__name__: kind for kind in kinds}


def make_dataset(root: Path, direction: tuple[float, ...]) -> tuple[Path, Any]:
    """One image with a bright box near the low corner of every stored axis, and a JSON file with
    its box.
    """
    array = np.zeros(SHAPE, np.float32)
    array[BOX[0] : BOX[3], BOX[1] : BOX[4], BOX[2] : BOX[5]] = 100
    image: Any = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((11.0, -7.0, 5.0))
    image.SetDirection(direction)
    for name in ("imagesTr", "boxesTr"):
        (root / name).mkdir(parents=True)
    SimpleITK.WriteImage(image, str(root / "imagesTr" / "a_0000.nii.gz"))
    (root / "boxesTr" / "a.json").write_text(json.dumps({"boxes": [{"box_zyx": BOX, "label": 1}]}))
    described = {
        "labels": {"background": 0, "cube": 1},
        "file_ending": ".nii.gz",
        "channel_names": {"0": "MRI"},
    }
    (root / "dataset.json").write_text(json.dumps(described))
    write_box_labels(root)
    return root, image


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reader", sorted(readers()))
def test_boxes_hold_the_object_in_the_array_that_is_trained_on(
    tmp_path: Path,
    reader: str,
    direction: str,
) -> None:
    root, _ = make_dataset(tmp_path / "Dataset001_A", DIRECTIONS[direction])
    kind = readers()[reader]
    described = json.loads((root / "dataset.json").read_text())
    source = ObjectSource(root / "labelsTr", root, described, kind)

    image = kind().read_images([str(root / "imagesTr" / "a_0000.nii.gz")])[0][0]
    (found,) = source.read("a").instances.objects

    bright = np.argwhere(image > 50)

    assert list(found.box_zyx) == [*bright.min(0), *(bright.max(0) + 1)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reader", sorted(readers()))
def test_boxes_come_back_to_the_stored_array_and_its_place(
    tmp_path: Path,
    reader: str,
    direction: str,
) -> None:
    root, image = make_dataset(tmp_path / "Dataset001_A", DIRECTIONS[direction])
    file = root / "imagesTr" / "a_0000.nii.gz"
    array, properties = readers()[reader]().read_images([str(file)])

    stored = stored_array(properties, array.shape[1:])

    bright = np.argwhere(array[0] > 50)

    assert stored.to_stored([*bright.min(0), *(bright.max(0) + 1)]).tolist() == list(BOX)
    assert stored.to_reader(stored.to_stored(BOX)).tolist() == list(BOX)

    true = frame_of_itk(SHAPE, image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    assert stored.frame.shape_vox == SHAPE
    assert np.allclose(stored.frame.affine_ras, true.affine_ras, atol=1e-4)
    # Only readers that reorient turn an image, except for one that is RAS already.
    is_turned = "Reorient" in reader and direction != "RAS"
    assert (reader_turn(properties) != AS_STORED) == is_turned
