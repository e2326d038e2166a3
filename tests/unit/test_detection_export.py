"""Files of what was found, scans of a folder, and label maps made from boxes."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import logged, refused

from nnunet_autoreg.cli.pretrain import fine_tuning
from nnunet_autoreg.detection.geometry import frame_of_affine
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.objects import has_only_boxes, labelled_cases, write_box_labels
from nnunet_autoreg.detection.scanfile import (
    Detection,
    draw_boxes,
    draw_instances,
    make_scan_file,
    write_markup,
    write_table,
)
from nnunet_autoreg.downstream.scans import facts_of, find, ready
from nnunet_autoreg.errors import ObjectsError, ScanError, UsageError

CLASSES = {"solid": 1, "holed": 2}
# Index (i, j, k) to mm: x runs backwards, y along z, z along y: an oblique image would only be
# turned by less.
AFFINE = [[-2.0, 0, 0, 10], [0, 0, 3.0, 20], [0, 1.0, 0, 30], [0, 0, 0, 1]]


def record() -> Any:
    """Return the record of a scan with two boxes that overlap; the second has the higher score."""
    low = Detection((0, 0, 0, 4, 4, 4), 1, "solid", 0.4)
    high = Detection((2, 2, 2, 6, 5, 8), 2, "holed", 0.9, votes=3)
    return make_scan_file("brain", frame_of_affine(AFFINE, (8, 8, 8)), [low, high], CLASSES)


def test_frames_are_one_voxel_thick_and_the_higher_score_is_on_top() -> None:
    drawn = draw_boxes(record().boxes, (8, 8, 8))

    # Inside the higher box, on two sides of its frame, and on the frame of the lower box.
    assert drawn[4, 3, 4] == 0
    assert drawn[2, 3, 4] == 1
    assert drawn[5, 3, 4] == 1
    assert drawn[0, 1, 1] == 2
    # z 2-6, y 2-5, x 2-8: 4 x 3 x 6 voxels around 2 x 1 x 4.
    assert (drawn == 1).sum() == 4 * 3 * 6 - 2 * 1 * 4

    filled = draw_boxes(record().boxes, (8, 8, 8), filled=True)

    # The higher box is whole; the lower one lacks the 2 x 2 x 2 voxels that both have.
    assert (filled == 1).sum() == 72
    assert (filled == 2).sum() == 64 - 2 * 2 * 2


def test_instances_are_the_segmentation_inside_the_boxes() -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:4, :4, :4] = 1
    labels[3:6, 3:5, 3:8] = 2
    labels[7, 7, 7] = 2
    classes = [ObjectClass("solid", 1, (1,)), ObjectClass("holed", 2, (2,))]

    drawn = draw_instances(record().boxes, labels, classes)

    # All of label 2 except for the voxel outside of the box; one voxel of label 1 was overwritten.
    assert (drawn == 1).sum() == 3 * 2 * 5
    assert (drawn == 2).sum() == 64 - 1
    assert drawn[7, 7, 7] == 0


def test_slicers_markup_has_the_box_in_lps_mm_with_its_own_axes(tmp_path: Path) -> None:
    write_markup(tmp_path / "a.mrk.json", "brain", record().boxes[:1], record().frame)

    (roi,) = json.loads((tmp_path / "a.mrk.json").read_text())["markups"]

    # Middle of the box by hand: z 4, y 3.5, x 5 as edges, so index i 4.5, j 3, k 3.5: RAS (-2 * 4.5
    # + 10, 3 * 3.5 + 20, 3 + 30).
    assert roi["center"] == [-1.0, -30.5, 33.0]
    assert (roi["coordinateSystem"], roi["roiType"]) == ("LPS", "Box")
    # Sides along i, j, k: 6 voxels of 2 mm, 3 of 1, 4 of 3.
    assert roi["size"] == [12.0, 3.0, 12.0]
    # Columns: i runs towards left (+L), j towards superior, k towards anterior (-P).
    axes = np.array(roi["orientation"]).reshape(3, 3).T
    assert axes.tolist() == [[1, 0, 0], [0, 0, 1], [0, -1, 0]]


def test_the_table_begins_with_luna16s_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [record()], lowest_score=0.5)

    with (tmp_path / "t.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))

    # Only the box of 0.9; its middle in mm was computed above.
    (row,) = rows
    columns = ["coordX", "coordY", "coordZ", "probability"]
    assert list(row)[:5] == ["seriesuid", *columns]
    assert [float(row[column]) for column in columns] == [-1.0, -30.5, 33.0, 0.9]
    assert row["class"] == "holed"
    assert row["votes"] == "3"


@pytest.mark.parametrize("mark", ["=", "+", "-", "@"])
def test_no_spreadsheet_takes_a_name_in_the_table_for_a_formula(tmp_path: Path, mark: str) -> None:
    name = f"{mark}cmd|x"
    box = Detection((0, 0, 0, 4, 4, 4), 1, name, 0.9)
    frame = frame_of_affine(AFFINE, (8, 8, 8))
    write_table(tmp_path / "t.csv", [make_scan_file(name, frame, [box], {name: 1})], 0.5)

    with (tmp_path / "t.csv").open(newline="") as handle:
        (row,) = csv.DictReader(handle)

    assert row["seriesuid"] == row["class"] == f"'{name}"
    # A negative coordinate stays a number: the index of the middle is 1.5, so x is -(10 - 3) mm.
    assert row["coordX"] == "-7.0"
    assert row["probability"] == "0.9"


def write_image(file: Path, array: Any) -> None:
    import SimpleITK

    image: Any = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((5.0, 6.0, 7.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def test_cases_named_as_nnunet_does_come_with_all_their_channels(tmp_path: Path) -> None:
    for name in ("b_10_0000", "b_2_0000", "b_2_0001", "b_10_0001"):
        (tmp_path / f"{name}.nii.gz").touch()

    scans = find(tmp_path, ".nii.gz", 2)

    assert [s.name for s in scans] == ["b_2", "b_10"]
    assert [f.name for f in scans[0].files] == ["b_2_0000.nii.gz", "b_2_0001.nii.gz"]

    with refused(UsageError, "scans-missing-channel", "b_2", "0002", 3):
        find(tmp_path, ".nii.gz", 3)
    with refused(UsageError, "scans-need-channels", tmp_path, "case_0000.nrrd", 2):
        find(tmp_path, ".nrrd", 2)
    with refused(UsageError, "scans-no-folder", tmp_path / "nothing"):
        find(tmp_path / "nothing", ".nii.gz", 1)


def test_other_formats_are_brought_to_the_reader_with_their_geometry(tmp_path: Path) -> None:
    import SimpleITK

    array = np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    write_image(tmp_path / "in" / "deep" / "scan one.nrrd", array)
    write_image(tmp_path / "in" / "plain.nii.gz", array)
    scans = {scan.name: scan for scan in find(tmp_path / "in", ".nii.gz", 1)}

    assert set(scans) == {"deep_scan_one", "plain"}

    # A NIfTI file is read where it is.
    with ready(scans["plain"]) as files:
        assert files == [str(tmp_path / "in" / "plain.nii.gz")]

    with ready(scans["deep_scan_one"]) as files:
        read = SimpleITK.ReadImage(files[0])
        assert read.GetSpacing() == (1.0, 2.0, 3.0)
        assert read.GetOrigin() == pytest.approx((5.0, 6.0, 7.0))
        assert np.array_equal(SimpleITK.GetArrayFromImage(read), array)

    # The copy that nnU-Net can read was temporary.

    assert not Path(files[0]).exists()


def test_scans_whose_results_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    # A folder and an underscore, a space and an underscore, and capitals (macOS, Windows).
    for folder, first, second in (
        ("one", "p1/t1.nrrd", "p1_t1.nrrd"),
        ("two", "p1 t1.mha", "p1_t1.nrrd"),
        ("three", "A.mha", "a.mha"),
    ):
        write_image(tmp_path / folder / first, array)
        write_image(tmp_path / folder / second, array + 1)
        origins = [f"{folder}/{file.rpartition('.')[0]} " for file in (first, second)]
        with refused(UsageError, "scans-same-name", *origins):
            find(tmp_path / folder, ".nii.gz", 1)

    for name in ("Case", "case"):
        (tmp_path / f"{name}_0000.nii.gz").touch()

    with refused(UsageError, "scans-same-name", "case_0000.nii.gz", "Case_0000.nii.gz"):
        find(tmp_path, ".nii.gz", 1)


def test_scans_that_are_not_named_as_cases_are_left_out_with_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "sub").mkdir()
    cases = ("a_0000.nii.gz", "a_0001.nii.gz")
    others = ("b.nii.gz", "sub/c.nrrd", "sub/d.dcm", "notes.txt", ".hidden.nii.gz")
    for name in (*cases, *others):
        (tmp_path / name).touch()

    assert [s.name for s in find(tmp_path, ".nii.gz", 1)] == ["a"]
    # a_0001 is a second channel, which the model does not have.
    first_of_4 = "(a_0001.nii.gz, b.nii.gz, sub/c.nrrd and 1 more)"
    assert logged(caplog, "4 files", first_of_4, "case_0000.nii.gz")

    caplog.clear()
    for name in ("b.nii.gz", "sub/c.nrrd", "sub/d.dcm"):
        (tmp_path / name).unlink()

    assert [s.name for s in find(tmp_path, ".nii.gz", 2)] == ["a"]
    assert not caplog.text


def test_results_of_an_earlier_run_below_the_scans_are_not_scans(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    array = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    for name in ("scan.nii.gz", "found/scan_boxes.nii.gz"):
        write_image(tmp_path / name, array)

    found = find(tmp_path, ".nii.gz", 1, output=tmp_path / "found")

    assert [s.name for s in found] == ["scan"]
    assert not caplog.text
    # Results around the scans hide none of them.
    assert len(find(tmp_path, ".nii.gz", 1, output=tmp_path.parent)) == 2
    with refused(UsageError, "scans-output-is-input", tmp_path):
        find(tmp_path, ".nii.gz", 1, output=tmp_path)

    # One file is named as a case now, so the others are not taken for scans.
    write_image(tmp_path / "case_0000.nii.gz", array)
    find(tmp_path, ".nii.gz", 1, output=tmp_path / "found")

    assert logged(caplog, "1 files", "(scan.nii.gz)")


def test_inputs_are_described_by_their_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "a_0000.nii.gz").write_bytes(b"12345")
    os.utime(tmp_path / "a_0000.nii.gz", (3, 3))
    (scan,) = find(tmp_path, ".nii.gz", 1)

    assert scan.inputs() == ({"bytes": 5, "modified_ns": 3_000_000_000},)


def test_inputs_name_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "Doe^Jane"
    folder.mkdir()
    (facts,), (other,) = facts_of([folder]), facts_of([tmp_path])

    assert "Doe" not in str(facts)
    assert facts != other
    assert list(facts) == ["folder_sha256"]


def test_a_dicom_series_keeps_its_place_in_the_world(shared_data: Path) -> None:
    import SimpleITK

    scans = find(shared_data / "dicom" / "chest_ct_A0002", ".nii.gz", 1)

    assert len(scans) == 1

    with ready(scans[0]) as files:
        read = SimpleITK.ReadImage(files[0])
    candidate: Any = scans[0].candidate
    folder = next(candidate.path.rglob("*.dcm")).parent
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    expected = SimpleITK.ReadImage(names)

    assert read.GetSize() == expected.GetSize()

    # The first and the last voxel: origin, direction and spacing are right if both are.
    for corner in ((0, 0, 0), tuple(n - 1 for n in read.GetSize())):
        place = expected.TransformIndexToPhysicalPoint(corner)
        assert read.TransformIndexToPhysicalPoint(corner) == pytest.approx(place, abs=1e-2)
        assert read[corner] == pytest.approx(expected[corner])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a_0000.nii.gz").touch()
    (scan,) = find(tmp_path, ".nii.gz", 1)

    with refused(ScanError, "scan-unreadable"), ready(scan):
        pass


@pytest.fixture
def boxed(tmp_path: Path) -> Path:
    """A raw dataset of two images and boxes of one of them."""
    for case in ("a", "b"):
        write_image(tmp_path / "imagesTr" / f"{case}_0000.nii.gz", np.zeros((6, 7, 8), np.float32))
    described = {"labels": {"background": 0, "x": 1, "y": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    (tmp_path / "boxesTr").mkdir()
    boxes = {"boxes": [{"box_zyx": [1, 1, 1, 4, 4, 4], "label": 2}]}
    (tmp_path / "boxesTr" / "a.json").write_text(json.dumps(boxes))
    return tmp_path


def test_boxes_become_ellipsoids_of_their_label_in_the_image(boxed: Path) -> None:
    import SimpleITK

    assert has_only_boxes(boxed)
    with refused(UsageError, "boxes-missing", "1 cases", "boxesTr/b.json"):
        write_box_labels(boxed)

    (boxed / "boxesTr" / "b.json").write_text('{"boxes": []}')

    assert write_box_labels(boxed) == ["a", "b"]
    assert not has_only_boxes(boxed)

    image = SimpleITK.ReadImage(str(boxed / "labelsTr" / "a.nii.gz"))
    array = SimpleITK.GetArrayFromImage(image)

    assert image.GetSpacing() == (1.0, 2.0, 3.0)
    assert array[2, 2, 2] == 2
    assert array[0].max() == 0
    # The ellipsoid touches all sides of the box from 1 to 4 (half-open, so up to index 3).
    inside = np.argwhere(array == 2)
    assert inside.min(0).tolist() == [1, 1, 1]
    assert inside.max(0).tolist() == [3, 3, 3]
    # Nothing is left to do.
    assert write_box_labels(boxed) == []


def test_boxes_that_training_leaves_out_are_not_drawn(boxed: Path) -> None:
    import SimpleITK

    described = json.loads((boxed / "dataset.json").read_text())
    # Case a has a box of label y, which is not detected; case b one that is marked as ignored.
    rules = {"detect_labels": ["x"]}
    (boxed / "dataset.json").write_text(json.dumps({**described, "autoreg_detection": rules}))
    ignored = {"box_zyx": [0, 0, 0, 1, 1, 1], "label": 1, "ignore": True}
    boxes = {"boxes": [ignored, {"box_zyx": [2, 2, 2, 4, 4, 4], "label": 1}]}
    (boxed / "boxesTr" / "b.json").write_text(json.dumps(boxes))
    # What macOS leaves on other file systems is no image.
    (boxed / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"x")

    assert write_box_labels(boxed) == ["a", "b"]

    arrays = []
    for case in ("a", "b"):
        image = SimpleITK.ReadImage(str(boxed / "labelsTr" / f"{case}.nii.gz"))
        arrays.append(SimpleITK.GetArrayFromImage(image))
    a, b = arrays
    assert a.max() == 0
    # An ellipsoid in a box of 2^3 voxels fills it.
    assert b[0, 0, 0] == 0
    assert b[2:4, 2:4, 2:4].min() == 1
    assert b.sum() == 8


def test_a_label_map_that_is_not_whole_yet_is_not_counted(
    boxed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    copied = shutil.copyfile

    def killed(source: Path, target: Path) -> None:
        # Killed after the bytes were copied and before the file got its name.
        copied(source, target)
        (boxed / "left").write_text("\n".join(f.name for f in (boxed / "labelsTr").iterdir()))
        raise KeyboardInterrupt

    (boxed / "boxesTr" / "b.json").write_text('{"boxes": []}')
    monkeypatch.setattr(shutil, "copyfile", killed)

    with pytest.raises(KeyboardInterrupt):
        write_box_labels(boxed)

    left = boxed / "labelsTr" / (boxed / "left").read_text()

    assert left.name.startswith(".a.nii.gz.")
    assert not left.name.endswith(".nii.gz")

    # A kill by the system cannot be handled, so the file stays; "._b" is one of macOS.

    left.touch()
    (boxed / "labelsTr" / "._b.nii.gz").touch()

    assert labelled_cases(boxed / "labelsTr", ".nii.gz") == []

    monkeypatch.setattr(shutil, "copyfile", copied)

    assert write_box_labels(boxed) == ["a", "b"]
    assert not left.exists()
    assert labelled_cases(boxed / "labelsTr", ".nii.gz") == ["a", "b"]


def test_pretraining_on_boxes_only_says_that_label_maps_come_first(
    boxed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = boxed.parent / "raw"
    raw.mkdir()
    boxed.rename(raw / "Dataset905_Boxes")
    monkeypatch.setenv("nnUNet_raw", str(raw))

    assert fine_tuning("905").startswith("autoreg_boxes_to_labels -d 905 ")

    (raw / "Dataset905_Boxes" / "labelsTr").mkdir()

    assert fine_tuning("905") == "nnUNetv2_plan_and_preprocess -d 905 -pl AutoregPlanner"


def test_a_box_outside_of_its_image_is_named(boxed: Path) -> None:
    # x ends at 9 in an image of 8.
    boxes = {"boxes": [{"box_zyx": [1, 1, 1, 4, 4, 9], "label": 2}]}
    (boxed / "boxesTr" / "b.json").write_text(json.dumps(boxes))

    with refused(ObjectsError, "box-outside", "b.json: boxes[0]", "6 x 7 x 8"):
        write_box_labels(boxed)
