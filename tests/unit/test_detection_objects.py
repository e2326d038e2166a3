"""Where objects come from, and their maps beside the preprocessed cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import logged, refused

from nnunet_autoreg.detection.data import (
    CaseBoxes,
    IdMapMaker,
    InstanceIndex,
    instances_folder,
    prepare_instances,
)
from nnunet_autoreg.detection.instances import ObjectClass, Rules
from nnunet_autoreg.detection.objects import ObjectSource, sizes_of
from nnunet_autoreg.detection.training import absent_classes
from nnunet_autoreg.errors import ObjectsError

LESION = ObjectClass("lesion", 1, (1,))
DATASET: dict[str, Any] = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}


class ArrayReader:
    """Reads label maps that lie as .npy under the name of an image."""

    def read_seg(self, file: str) -> tuple[Any, dict[str, Any]]:
        with Path(file).open("rb") as handle:
            return np.load(handle)[None], {"spacing": [2.0, 1.0, 1.0]}


def write(file: Path, array: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as handle:
        np.save(handle, array)

    """Return where the objects of a dataset below ``root`` come from."""


def source(root: Path) -> ObjectSource:
    return ObjectSource(root / "labelsTr", root, DATASET, ArrayReader)


def cube() -> Any:
    """A label map with one lesion of 2 x 4 x 4 voxels."""
    labels = np.zeros((8, 10, 12), np.uint8)
    labels[2:4, 3:7, 5:9] = 1
    return labels


def cube_in_halves() -> Any:
    """An instance map: the lesion of ``cube``, cut in two along x."""
    halves = cube().astype(np.int32)
    halves[2:4, 3:7, 7:9] = 2
    return halves


def test_objects_come_from_the_instance_map_else_boxes_else_the_labels(
    tmp_path: Path,
) -> None:
    write(tmp_path / "labelsTr" / "a.nii.gz", cube())

    def boxes_found() -> tuple[list[Any], Any]:
        found = source(tmp_path).read("a")
        return [o.box_zyx for o in found.instances.objects], found

    boxes, found = boxes_found()
    assert boxes == [(2, 3, 5, 4, 7, 9)]
    assert found.has_masks

    # Boxes overrule the labels. An ellipsoid is drawn for each.
    (tmp_path / "boxesTr").mkdir()
    (tmp_path / "boxesTr" / "a.json").write_text(
        '{"boxes": [{"box_zyx": [0, 0, 0, 4, 4, 4], "label": 1}]}',
    )
    boxes, found = boxes_found()
    assert boxes == [(0, 0, 0, 4, 4, 4)]
    assert not found.has_masks
    assert found.instances.ids_ZYX is not None
    assert found.instances.ids_ZYX[1, 1, 1] == 1

    # An instance map overrules both.
    write(tmp_path / "instancesTr" / "a.nii.gz", cube_in_halves())
    (tmp_path / "instancesTr" / "a.json").write_text('{"instances": {"1": 1, "2": 1}}')
    boxes, found = boxes_found()
    assert boxes == [(2, 3, 5, 4, 7, 7), (2, 3, 7, 4, 7, 9)]
    assert found.has_masks


def test_without_the_raw_dataset_the_copied_objects_are_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = tmp_path / "raw" / "Dataset900_X"
    labels = tmp_path / "preprocessed" / "Dataset900_X" / "gt_segmentations"
    write(labels / "a.nii.gz", cube())
    write(raw / "instancesTr" / "a.nii.gz", cube_in_halves())
    (raw / "instancesTr" / "a.json").write_text('{"instances": {"1": 1, "2": 1}}')
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    there = ObjectSource.of_dataset(labels, raw.name, DATASET, ArrayReader)

    there.keep()

    # A machine that has the preprocessed data only.
    monkeypatch.delenv("nnUNet_raw")
    elsewhere = ObjectSource.of_dataset(labels, raw.name, DATASET, ArrayReader)

    assert len(elsewhere.read("a").instances.objects) == 2

    facts = []
    for known in (there, elsewhere):
        stats = [(file.name, file.stat()) for file in known.files("a")]
        facts.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    # Copies keep size and time, so that an index made with the raw dataset is valid without it.
    # Three
    # files: the labels, the map and its JSON file.
    assert facts[0] == facts[1]
    assert len(facts[0]) == 3

    # What is gone from the raw dataset goes here too.
    (raw / "instancesTr" / "a.nii.gz").unlink()
    there.keep()

    assert len(elsewhere.read("a").instances.objects) == 1


def test_a_map_of_too_many_components_is_named(tmp_path: Path) -> None:
    # Every second voxel of every axis: 50^3 objects that do not touch, more than 16 bits can
    # number.
    dots = np.zeros((100, 100, 100), np.uint8)
    dots[::2, ::2, ::2] = 1
    write(tmp_path / "labelsTr" / "a.nii.gz", dots)

    with refused(ObjectsError, "objects-too-many", "a.nii.gz", 125000):
        source(tmp_path).read("a")


def test_objects_that_contradict_the_image_or_each_other_are_named(tmp_path: Path) -> None:
    write(tmp_path / "labelsTr" / "a.nii.gz", cube())
    (tmp_path / "boxesTr").mkdir()
    # x ends at 40 of 12.
    (tmp_path / "boxesTr" / "a.json").write_text(
        '{"boxes": [{"box_zyx": [0, 0, 0, 4, 4, 40], "label": 1}]}',
    )

    with refused(ObjectsError, "box-outside", "a.json", "8 x 10 x 12"):
        source(tmp_path).read("a")

    write(tmp_path / "instancesTr" / "a.nii.gz", cube())
    (tmp_path / "instancesTr" / "a.json").write_text('{"instances": {"2": 1}}')

    with refused(ObjectsError, "objects-unlisted", "a.nii.gz", "id 1"):
        source(tmp_path).read("a")

    write(tmp_path / "instancesTr" / "a.nii.gz", cube()[:4])

    with refused(ObjectsError, "objects-map-size", "(4, 10, 12)", "(8, 10, 12)"):
        source(tmp_path).read("a")
    with refused(ObjectsError, "objects-unreadable", "b.nii.gz"):
        source(tmp_path).read("b")


def test_sizes_are_transposed_and_resampled(tmp_path: Path) -> None:
    write(tmp_path / "labelsTr" / "a.nii.gz", cube())

    sizes = sizes_of(source(tmp_path).read("a"), 1, (1.0, 2.0, 0.5), (1, 0, 2))

    # 2 x 4 x 4 voxels of 2 x 1 x 1 mm, axes y, z, x, at 1 x 2 x 0.5 mm: 4 / 1, 4 / 2 and 4 / 0.5.
    assert sizes == [[(4.0, 2.0, 8.0)]]


def halved(array: Any, shape: Any, *_: Any) -> Any:
    """Stands for nnU-Net's resampling of label maps: every second slice."""
    assert tuple(shape) == (array.shape[1], array.shape[2] // 2, array.shape[3])
    return array[:, :, ::2]


@pytest.fixture
def maker(tmp_path: Path) -> IdMapMaker:
    """A case of 8 x 10 x 12 voxels, axes y, z, x, cropped by one slice in front and resampled to
    half the slices.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    write(tmp_path / "raw" / "labelsTr" / "a.nii.gz", cube())
    folder = tmp_path / "preprocessed"
    folder.mkdir()
    properties = {
        "bbox_used_for_cropping": [[1, 10], [0, 8], [0, 12]],
        "shape_after_cropping_and_before_resampling": (9, 8, 12),
    }
    shape = (9, 4, 12)
    options = {"chunks": (1, *shape), "blocks": (1, *shape)}
    image = np.zeros((1, *shape), np.float32)
    labels = np.zeros((1, *shape), np.int8)
    nnUNetDatasetBlosc2.save_case(image, labels, properties, str(folder / "a"), **options)
    raw = source(tmp_path / "raw")
    return IdMapMaker(folder, raw, (1, 0, 2), (1.0, 4.0, 1.0), (8, 8, 8), halved)


def test_id_maps_are_transposed_cropped_and_resampled_once(maker: IdMapMaker) -> None:
    import blosc2

    index = prepare_instances(maker, ["a"])
    (item,) = index.cases["a"].objects

    # z 2-4, y 3-7, x 5-9 of the original: y less one, z halved.
    assert item.box_zyx == (2.0, 1.0, 5.0, 6.0, 2.0, 9.0)
    assert item.num_voxels == 4 * 1 * 4

    folder = instances_folder(maker.preprocessed)
    ids = blosc2.open(str(folder / "a.b2nd"))[:]

    assert ids.shape == (9, 4, 12)
    assert np.argwhere(ids == 1).min(0).tolist() == [2, 1, 5]
    assert not list(maker.preprocessed.glob("*instances*"))

    # Nothing has changed, so the file is not written again.
    before = (folder / "a.b2nd").stat().st_mtime_ns
    assert prepare_instances(maker, ["a"]) == index
    assert (folder / "a.b2nd").stat().st_mtime_ns == before

    # The label map loses one plane of x, so the box begins at 6.
    changed = cube()
    changed[2:4, 3:7, 5:6] = 0
    write(maker.source.labels / "a.nii.gz", changed)
    (item,) = prepare_instances(maker, ["a"]).cases["a"].objects
    assert item.box_zyx == (2.0, 1.0, 6.0, 6.0, 2.0, 9.0)


def test_a_scan_without_objects_is_fine_and_an_absent_class_is_named(
    maker: IdMapMaker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(maker.source.labels / "a.nii.gz", np.zeros((8, 10, 12), np.uint8))

    with caplog.at_level("INFO", "nnunet_autoreg"):
        index = prepare_instances(maker, ["a"])

    assert index.cases["a"].objects == ()
    assert logged(caplog, "1 cases, 1 of them", "0 lesion")
    assert absent_classes(index, ["a"]) == ["lesion"]


def test_an_index_of_other_rules_is_not_used(
    maker: IdMapMaker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = instances_folder(maker.preprocessed)
    prepare_instances(maker, ["a"])
    # Made with another smallest object, and without the lesion.
    old = InstanceIndex(Rules(min_voxels=9), (LESION,), {"a": CaseBoxes("x", (), True)})
    from nnunet_autoreg.records import write_json

    write_json(folder / "boxes.json", old)

    assert len(prepare_instances(maker, ["a"]).cases["a"].objects) == 1

    (folder / "boxes.json").write_text("{")

    assert len(prepare_instances(maker, ["a"]).cases["a"].objects) == 1
    assert logged(caplog, "boxes.json")
