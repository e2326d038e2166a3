"""The command autoreg_evaluate_detection: folders in, figures and pictures out."""

import csv
import gc
import json
import tracemalloc

import numpy as np
import pytest
import SimpleITK
from refusals import logged, refused

from nnunet_autoreg.cli.evaluate_detection import main
from nnunet_autoreg.detection import evaluation_files
from nnunet_autoreg.detection.evaluation_files import (
    LABEL_SIZE,
    Background,
    BoxLabel,
    background,
    pick_scans,
    pick_slices,
)
from nnunet_autoreg.detection.folders import read_found
from nnunet_autoreg.detection.geometry import frame_of_affine, frame_of_itk
from nnunet_autoreg.detection.matching import ScanBoxes
from nnunet_autoreg.detection.scanfile import Detection, make_scan_file, write_scan_file
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.report.palette import BOXES

# (Z, Y, X) in voxels of 2 x 1 x 1 mm. Boxes are (z0, y0, x0, z1, y1, x1): the lesion has 4 x 6 x 6
# voxels, the cyst 4 x 4 x 6, and the tiny one 2. Objects of fewer than 3 voxels are ignored.
SHAPE = (8, 16, 20)
CLASSES = {"lesion": 1, "cyst": 2}
FRAME = frame_of_itk(SHAPE, (1, 1, 2), (0, 0, 0), np.eye(3).ravel().tolist())
LESION, CYST, TINY = (1, 2, 3, 5, 8, 9), (2, 10, 12, 6, 14, 18), (7, 0, 0, 8, 1, 2)


def write_map(file, boxes, shape=SHAPE, spacing=(1.0, 1.0, 2.0)):
    array = np.zeros(shape, np.uint8)
    for value, (z0, y0, x0, z1, y1, x1) in boxes:
        array[z0:z1, y0:y1, x0:x1] = value
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def write_found(folder, name, found):
    """``found``: (box, class, score)."""
    detections = [Detection(box, CLASSES[kind], kind, score) for box, kind, score in found]
    write_scan_file(folder / f"{name}.json", make_scan_file(name, FRAME, detections, CLASSES))


@pytest.fixture
def folders(tmp_path):
    """Three scans: a lesion and a cyst, both found with a false one; a lesion missed; nothing."""
    truth = tmp_path / "Dataset999_X" / "labelsTr"
    write_map(truth / "a.nii.gz", [(1, LESION), (2, CYST), (1, TINY)])
    write_map(truth / "b.nii.gz", [(1, LESION)])
    write_map(truth / "c.nii.gz", [])
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **CLASSES}}))
    found = tmp_path / "found"
    write_found(
        found,
        "a",
        [(LESION, "lesion", 0.9), (CYST, "cyst", 0.8), ((0, 12, 0, 4, 16, 4), "lesion", 0.3)],
    )
    write_found(found, "b", [])
    write_found(found, "c", [((0, 0, 0, 4, 4, 4), "cyst", 0.1)])
    return truth, found, tmp_path / "out" / "scores.json"


def run(truth, found, out, *more):
    return main(["-p", str(found), "-g", str(truth), "-o", str(out), "--bootstrap", "20", *more])


def results_of(out):
    return json.loads(out.read_text())


def rows_of(out, **values):
    """Return the rows of the table of boxes in which these columns have these values."""
    with out.with_suffix(".csv").open() as handle:
        rows = list(csv.DictReader(handle))
    for column, value in values.items():
        rows = [row for row in rows if row[column] == value]
    return rows


def test_label_maps_are_scored_drawn_and_listed(folders, capsys):
    out = folders[2]

    assert run(*folders) == 0

    results = results_of(out)

    # Lesions: one hit at 0.9, one false at 0.3, two objects: precision 1 up to recall 0.5, which
    # are 51 of the 101 recall levels.
    assert results["ap"]["0.1"]["per_class"] == {"lesion": pytest.approx(51 / 101), "cyst": 1}
    assert results["ap"]["0.1"]["mean"] == pytest.approx((51 / 101 + 1) / 2)
    lesions = results["classes"]["lesion"]
    assert lesions["objects"] == 2
    assert lesions["ignored_objects"] == 1
    assert results["scans"]["number"] == 3
    # Scan c is the empty one, with one false cyst.
    assert results["scans"]["empty"] == 1
    assert results["froc"]["operating_points"]["cyst"][-1]["fp_per_empty_scan"] == 1

    rows = rows_of(out)

    assert [(r["scan"], r["class"], r["what"], r["score"]) for r in rows] == [
        ("a", "lesion", "hit", "0.9"),
        ("a", "lesion", "false", "0.3"),
        ("a", "lesion", "ignored", ""),
        ("a", "cyst", "hit", "0.8"),
        ("b", "lesion", "missed", ""),
        ("c", "cyst", "false", "0.1"),
    ]
    # The lesion is 4 voxels of 2 mm high and 6 mm wide.
    assert rows[0]["iou"] == "1.0000"
    assert rows[0]["largest_side_mm"] == "8.000"

    for end in ("_froc.png", "_scans.png"):
        assert out.with_name("scores" + end).read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()

    assert lines[0].startswith("3 scans, 1 ")
    assert lines[-1].startswith("next: ")


def test_no_spreadsheet_takes_a_scans_name_for_a_formula(folders):
    truth, found, out = folders
    for folder, end in ((truth, ".nii.gz"), (found, ".json")):
        (folder / f"a{end}").rename(folder / f"=a{end}")

    assert run(truth, found, out) == 0

    # A spreadsheet runs a cell that begins with "=". Only the table for spreadsheets is changed.
    rows = rows_of(out)
    assert {row["scan"] for row in rows} == {"'=a", "b", "c"}
    assert results_of(out)["scans"]["names"] == ["=a", "b", "c"]


def test_a_hit_rule_and_classes_can_be_chosen(folders):
    more = ("--hit", "centre", "--classes", "cyst", "--iou", "0.3", "--sizes", "5")

    assert run(*folders, *more) == 0

    results = results_of(folders[2])

    assert list(results["classes"]) == ["cyst"]
    assert results["froc"]["hit"] == "centre"
    assert "0.3" in results["ap"]
    # The cyst is 4 voxels of 2 mm high: 8 mm, above the limit of 5 mm.
    assert [s["objects"] for s in results["sizes"]["strata"]] == [0, 1]


def test_voxels_can_decide_what_a_hit_is(folders, caplog):
    truth, found, out = folders
    # The lesion of scan a has 4 x 6 x 6 = 144 voxels. With 28 of them drawn as number 1 the IoU is
    # 28 / 144 = 0.194, below 0.2; with 29 it is 0.201.
    for number, sensitivity in ((28, 0.0), (29, 0.5)):
        drawn = np.zeros(SHAPE, np.uint8)
        inside = np.zeros(4 * 6 * 6, np.uint8)
        inside[:number] = 1
        drawn[1:5, 2:8, 3:9] = inside.reshape(4, 6, 6)
        drawn[2:6, 10:14, 12:18] = 2
        image = SimpleITK.GetImageFromArray(drawn)
        image.SetSpacing((1.0, 1.0, 2.0))
        for name in ("a", "c"):
            SimpleITK.WriteImage(image, str(found / f"{name}_instances.nii.gz"))
        assert run(truth, found, out, "--hit", "mask:0.2") == 0
        results = results_of(out)
        assert results["froc"]["hit"] == "mask:0.2"
        # Of two lesions one was looked for, and the other missed.
        assert results["froc"]["sensitivity"]["per_class"]["lesion"][-1] == sensitivity
        assert results["froc"]["sensitivity"]["per_class"]["cyst"][-1] == 1.0

    assert logged(caplog, "a: 1 of 3", "a_instances.nii.gz")

    (found / "a_instances.nii.gz").unlink()
    fails(UsageError, "mask-no-instances", ["a_instances"], truth, found, out, "--hit", "mask:0.2")


def test_instance_maps_may_touch_and_take_their_labels_from_the_json(folders):
    truth, found, out = folders
    # The lesion in two halves that touch: as voxels without numbers they would be one object.
    halves = [(3, (1, 2, 3, 5, 8, 6)), (4, (1, 2, 6, 5, 8, 9))]
    write_map(truth / "a.nii.gz", halves)
    (truth / "a.json").write_text('{"instances": {"3": 1, "4": 2}}')
    write_found(found, "a", [(halves[0][1], "lesion", 0.9), (halves[1][1], "cyst", 0.9)])

    assert run(truth, found, out) == 0
    # Both halves are found. The lesion of scan b is missed: recall 0.5, 51 of 101 levels.
    assert results_of(out)["ap"]["0.5"]["per_class"] == {
        "lesion": pytest.approx(51 / 101),
        "cyst": 1,
    }


def test_truth_may_consist_of_boxes_which_are_drawn_on_images(folders, tmp_path, caplog):
    _, found, out = folders
    truth = tmp_path / "boxes"
    truth.mkdir()
    (truth / "a.json").write_text(
        json.dumps({"boxes": [{"box_zyx": LESION, "label": 1}, {"box_zyx": CYST, "label": 2}]}),
    )

    assert run(truth, found, out) == 0
    # Only scan a has boxes as truth; the false lesion comes after recall 1 and costs nothing.
    assert results_of(out)["ap"]["0.1"]["mean"] == 1
    # Without --images there is no picture, and the log names the option.
    assert logged(caplog, "--images")
    assert not out.with_name("scores_scans.png").exists()

    write_map(tmp_path / "images" / "a_0000.nii.gz", [(7, LESION)])

    assert run(truth, found, out, "--images", str(tmp_path / "images")) == 0
    assert out.with_name("scores_scans.png").exists()


def test_a_file_of_detections_can_itself_be_the_truth(folders):
    _, found, out = folders

    assert run(found, found, out) == 0
    assert results_of(out)["froc"]["cpm"]["mean"] == 1


def test_detections_in_the_ignore_label_do_not_count(folders):
    truth, found, out = folders
    (truth.parent / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **CLASSES, "ignore": 3}}),
    )
    # The false lesion at 0.3 lies within the region of the ignore label.
    write_map(truth / "a.nii.gz", [(1, LESION), (3, (0, 10, 0, 6, 16, 6))])

    assert run(truth, found, out) == 0

    assert [row["what"] for row in rows_of(out, scan="a", score="0.3")] == ["excused"]


def test_the_ignore_label_has_no_meaning_in_an_instance_map(folders):
    truth, found, out = folders
    (truth.parent / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **CLASSES, "ignore": 3}}),
    )
    # In a map of instances 3 is the number of an object, a lesion, and not the ignore label 3.
    write_map(truth / "a.nii.gz", [(3, LESION)])
    (truth / "a.json").write_text('{"instances": {"3": 1}}')
    write_found(found, "a", [(LESION, "cyst", 0.7)])

    assert run(truth, found, out) == 0

    assert [row["what"] for row in rows_of(out, scan="a", score="0.7")] == ["false"]


def test_scans_without_detections_are_named_and_counted_on_request(folders, caplog):
    truth, found, out = folders
    (found / "b.json").unlink()
    write_found(found, "d", [])

    assert run(truth, found, out) == 0
    assert logged(caplog, "1 scans", "(b)", "--all-scans")
    assert logged(caplog, "1 scans", "(d)")

    scans = results_of(out)["scans"]

    assert scans["without_detections"] == ["b"]
    assert scans["without_truth"] == ["d"]
    # Without scan b its lesion is not missed. With --all-scans it is: recall 0.5 of two lesions.
    assert results_of(out)["ap"]["0.1"]["per_class"]["lesion"] == 1
    assert run(truth, found, out, "--all-scans") == 0
    assert results_of(out)["ap"]["0.1"]["per_class"]["lesion"] == pytest.approx(51 / 101)


def test_truth_without_any_object_is_warned_about_and_gives_no_figure(folders, caplog):
    truth, found, out = folders
    for name in "abc":
        write_map(truth / f"{name}.nii.gz", [])

    assert run(truth, found, out) == 0
    assert logged(caplog, "-g", "--min-voxels", "--classes")
    results = results_of(out)
    # An average precision of 0 would say that the detector is bad; there is nothing to measure.
    assert results["ap"]["0.1"]["mean"] is None
    assert results["absent_classes"] == ["lesion", "cyst"]


def test_other_json_files_beside_the_detections_are_named_and_left_out(folders, caplog):
    truth, found, out = folders
    (found / "plans.json").write_text("{}")

    assert run(truth, found, out) == 0
    assert logged(caplog, "1 JSON files", "plans.json")
    assert results_of(out)["scans"]["number"] == 3


def rewrite(file, change):
    """The file's image changed: its location in the world stays that of the voxels."""
    SimpleITK.WriteImage(change(SimpleITK.ReadImage(str(file))), str(file))


def flipped(*axes):
    """The same image in the world, its axes stored the other way round; the identity would move
    it.
    """
    return lambda image: SimpleITK.Flip(image, [axis in axes for axis in range(3)])


def swapped(image):
    return flipped(0)(SimpleITK.PermuteAxes(image, [2, 0, 1]))


@pytest.mark.parametrize("change", [flipped(1), flipped(0, 2), swapped])
def test_truth_stored_with_other_axes_is_turned_onto_the_detections(folders, change):
    truth, found, out = folders
    write_map(truth.parent / "imagesTr" / "a_0000.nii.gz", [(7, LESION)])

    assert run(truth, found, out, "--hit", "centre") == 0

    before = results_of(out)
    picture = out.with_name("scores_scans.png").read_bytes()
    for file in (
        truth / "a.nii.gz",
        truth / "b.nii.gz",
        truth.parent / "imagesTr" / "a_0000.nii.gz",
    ):
        rewrite(file, change)

    # The turn must have reached the file, or the comparison below would compare equal inputs.
    identity = (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert SimpleITK.ReadImage(str(truth / "a.nii.gz")).GetDirection() != identity
    assert run(truth, found, out, "--hit", "centre") == 0
    assert results_of(out) == before
    assert out.with_name("scores_scans.png").read_bytes() == picture


def test_maps_of_detections_are_turned_too(folders):
    truth, found, out = folders
    for name in "abc":
        file = found / f"{name}_instances.nii.gz"
        write_map(file, [(1, LESION), (2, CYST)] if name == "a" else [])
        rewrite(file, flipped(1))

    assert run(truth, found, out, "--hit", "mask:0.9") == 0
    # Seven operating points; of the two lesions that of scan b was not found.
    assert results_of(out)["froc"]["sensitivity"]["per_class"] == {
        "lesion": [0.5] * 7,
        "cyst": [1.0] * 7,
    }


def test_truth_at_another_location_is_refused_with_both(folders, tmp_path):
    truth, found, out = folders

    def moved(by):
        def change(image):
            image.SetOrigin((by, 0, 0))
            return image

        return change

    # Voxels are 1 mm wide along x: less than half a voxel is rounding, more is another location.
    rewrite(truth / "a.nii.gz", moved(0.4))

    assert run(truth, found, out) == 0

    rewrite(truth / "a.nii.gz", moved(0.6))
    # In RAS, where x points the other way than in SimpleITK's LPS.
    axes = "(-1, 0, 0), (0, -1, 0), (0, 0, 1)"
    values = ["a.nii.gz", f"{axes} from (-0.6, 0, 0)", f"{axes} from (0, 0, 0)"]
    fails(ObjectsError, "objects-other-location", values, truth, found, out)
    # Boxes that say where their image lies are held against it, and those that do not are taken as
    # they are.
    boxes = tmp_path / "boxes"
    turned = make_scan_file(
        "a",
        frame_of_itk(SHAPE, (1, 1, 2), (0, 15, 0), (1, 0, 0, 0, -1, 0, 0, 0, 1)),
        [],
        CLASSES,
    )
    write_scan_file(boxes / "a.json", turned)
    fails(ObjectsError, "truth-other-axes", ["a.json"], boxes, found, out)
    (boxes / "a.json").write_text(json.dumps({"boxes": [], "affine_ras": [1], "shape_zyx": SHAPE}))
    fails(ObjectsError, "truth-affine", ["a.json", "affine_ras"], boxes, found, out)
    (boxes / "a.json").write_text('{"boxes": []}')

    assert run(boxes, found, out) == 0


def test_an_image_that_cannot_be_drawn_costs_no_figure(folders, caplog):
    truth, found, out = folders
    images = truth.parent / "imagesTr"
    # One slice more than the truth, a text file, and an image of three colours.
    write_map(images / "a_0000.nii.gz", [], shape=(9, 16, 20))
    (images / "b_0000.nii.gz").write_text("no image")
    write_map(images / "b_0000.nrrd", [])
    SimpleITK.WriteImage(
        SimpleITK.Compose([SimpleITK.ReadImage(str(truth / "c.nii.gz"))] * 3),
        str(images / "c_0000.nii.gz"),
    )

    assert run(truth, found, out) == 0
    assert logged(caplog, "a is", "a_0000.nii.gz", "9 x 16 x 20")
    assert logged(caplog, "b is", "b_0000.nii.gz")
    assert logged(caplog, "c is", "c_0000.nii.gz")
    assert out.exists()
    assert out.with_suffix(".csv").exists()
    assert out.with_name("scores_scans.png").exists()


def test_images_with_holes_are_drawn(folders):
    truth, found, out = folders
    # First an image of NaN only, then one with five numbers.
    holes = np.full(SHAPE, np.nan, np.float32)
    for name in "ab":
        image = SimpleITK.GetImageFromArray(holes)
        image.SetSpacing((1.0, 1.0, 2.0))
        (truth.parent / "imagesTr").mkdir(exist_ok=True)
        SimpleITK.WriteImage(image, str(truth.parent / "imagesTr" / f"{name}_0000.nii.gz"))
        holes[0, 0, :5] = range(5)

    assert run(truth, found, out) == 0


def test_a_folder_of_detections_as_truth_has_one_scan_per_json_file(folders, caplog):
    _, found, out = folders
    for name in "abc":
        (found / f"{name}.mrk.json").write_text('{"markups": []}')
        for kind in ("boxes", "instances"):
            write_map(found / f"{name}_{kind}.nii.gz", [(1, LESION)])
    caplog.set_level("INFO")

    assert run(found, found, out) == 0
    scans = results_of(out)["scans"]
    # Each scan has three more files that are not detections: 3 x 3 = 9.
    assert scans["names"] == ["a", "b", "c"]
    assert scans["without_detections"] == []
    assert logged(caplog, "-g", "9 files")

    # Scans that are called so are scans, where no file of detections says otherwise.
    other = found.parent / "other" / "labels"
    write_map(other / "a_boxes.nii.gz", [(1, LESION)])
    write_found(found.parent / "of_other", "a_boxes", [(LESION, "lesion", 0.9)])

    assert run(other, found.parent / "of_other", out) == 0
    assert results_of(out)["scans"]["names"] == ["a_boxes"]


def test_no_more_of_the_detections_is_kept_than_is_scored(tmp_path):
    for number in range(20):
        write_found(tmp_path, f"s{number}", [(LESION, "lesion", i / 100) for i in range(100)])
    # What is cached at the first call does not count.
    read_found(tmp_path)
    tracemalloc.start()
    kept = read_found(tmp_path)
    gc.collect()
    bytes_per_scan = tracemalloc.get_traced_memory()[0] / 20
    tracemalloc.stop()

    # Six coordinates, a label, a score and a number are 72 bytes a box; the records of the files
    # were 2200.
    assert len(kept[0]["s7"].boxes_N6) == 100
    assert bytes_per_scan < 12_000


def fails(error_class, code, values, truth, found, out, *more):
    """Run the command's function without what turns errors into lines, and expect an error."""
    line = ["-p", str(found), "-g", str(truth), "-o", str(out), "--bootstrap", "20", *more]
    with refused(error_class, code, *values):
        main.__wrapped__(line)


def test_an_error_is_one_line_and_an_exit_code(folders, tmp_path, capsys):
    truth, found, out = folders
    # 7 is not the label of a class.
    write_map(truth / "a.nii.gz", [(7, LESION)])

    assert run(truth, tmp_path / "none", out) == 2

    usage = capsys.readouterr().err.strip().splitlines()

    assert run(truth, found, out) == 1

    objects = capsys.readouterr().err.strip().splitlines()

    # The second run logs before it fails, so that its error is the last line.
    assert len(usage) == 1
    assert usage[0].startswith("autoreg_evaluate_detection: ")
    assert objects[-1].startswith("autoreg_evaluate_detection: ")
    assert "a.nii.gz" in objects[-1]


def test_what_cannot_be_scored_is_refused(folders, tmp_path):
    truth, found, out = folders
    (tmp_path / "nothing").mkdir()
    fails(UsageError, "detections-no-folder", ["none"], truth, tmp_path / "none", out)
    fails(UsageError, "detections-none", ["nothing"], truth, tmp_path / "nothing", out)
    fails(UsageError, "truth-empty", ["nothing"], tmp_path / "nothing", found, out)
    for code, values, more in (
        ("evaluation-unknown-class", ["--classes cist", "'cyst'"], ["--classes", "cist"]),
        ("hit-rule", ["'mask'"], ["--hit", "mask"]),
        ("evaluation-min-voxels", ["--min-voxels 0"], ["--min-voxels", "0"]),
        ("evaluation-no-images", ["none"], ["--images", str(tmp_path / "none")]),
    ):
        fails(UsageError, code, values, truth, found, out, *more)
    fails(UsageError, "evaluation-output-is-folder", ["scores.json"], truth, found, tmp_path)

    # Every refusal comes before the first file is written.
    assert not out.exists()


def test_truth_and_detections_that_contradict_each_other_are_refused(folders, tmp_path):
    truth, found, out = folders
    other = tmp_path / "other"
    # Truth that does not belong to the scans that were predicted.
    write_map(other / "x.nii.gz", [(1, LESION)])
    fails(UsageError, "evaluation-no-common-scan", [other, "x"], other, found, out)

    write_map(other / "a.nii.gz", [(7, LESION)])
    fails(ObjectsError, "truth-unknown-values", ["a.nii.gz", 7], other, found, out)
    write_map(other / "a.nii.gz", [(1, LESION)], shape=(9, 16, 20))
    sizes = ["a.nii.gz", "9 x 16 x 20", "8 x 16 x 20"]
    fails(ObjectsError, "objects-other-size", sizes, other, found, out)
    write_map(other / "a.nii.gz", [(1, LESION)], spacing=(1.0, 1.5, 2.0))
    spacings = ["a.nii.gz", "2, 1.5, 1 mm", "2, 1, 1 mm"]
    fails(ObjectsError, "objects-other-spacing", spacings, other, found, out)
    (other / "a.nii.gz").write_text("no image")
    fails(ObjectsError, "objects-image-unreadable", ["a.nii.gz"], other, found, out)
    # Sizes in millimetres need a spacing. Nothing states that of scan z: it has no detections, and
    # its boxes do not say it either.
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    for name in ("a", "z"):
        (boxes / f"{name}.json").write_text('{"boxes": []}')
    fails(ObjectsError, "truth-without-spacing", ["z.json"], boxes, found, out, "--all-scans")

    # The detector was trained with other numbers, or other names, than this dataset.json has.
    (truth.parent / "dataset.json").write_text(
        '{"labels": {"background": 0, "lesion": 2, "cyst": 1}}',
    )
    fails(ObjectsError, "detections-other-label", ["'lesion'", 2, 1], truth, found, out)
    (truth.parent / "dataset.json").write_text(
        '{"labels": {"background": 0, "lesions": 1, "cyst": 2}}',
    )
    fails(ObjectsError, "detections-unknown-class", ["'lesion'"], truth, found, out)


def test_a_class_the_detector_does_not_know_counts_as_missed(folders, caplog):
    truth, found, out = folders
    (truth.parent / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **CLASSES, "node": 3}}),
    )
    write_map(truth / "b.nii.gz", [(3, LESION)])

    assert run(truth, found, out) == 0
    assert logged(caplog, "node", "--classes")
    assert results_of(out)["ap"]["0.1"]["per_class"]["node"] == 0


def test_in_nndetections_convention_every_box_is_a_voxel_longer(folders):
    truth, found, out = folders
    # Beside the lesion of 4 x 6 x 6 voxels by one on x: 4 x 6 x 5 = 120 in common of 2 x 144 - 120
    # = 168, an IoU of 0.714. One voxel longer, 5 x 7 x 6 = 210 of 2 x 245 - 210 = 280: 0.75.
    write_found(found, "b", [((1, 2, 4, 5, 8, 10), "lesion", 0.9)])

    assert run(truth, found, out, "--iou", "0.72") == 0

    usual = results_of(out)

    assert run(truth, found, out, "--iou", "0.72", "--box-convention", "nndet") == 0

    longer = results_of(out)

    usual_ap = usual["ap"]["0.72"]["per_class"]["lesion"]
    longer_ap = longer["ap"]["0.72"]["per_class"]["lesion"]
    (hit,) = rows_of(out, scan="b", what="hit")

    assert usual["inputs"]["box_convention"] == "edges"
    assert longer["inputs"]["box_convention"] == "nndet"
    assert usual_ap < 1
    assert longer_ap == pytest.approx(1)
    assert float(hit["iou"]) == pytest.approx(0.75)
    # Every box begins one voxel earlier and ends where it did.
    assert [float(hit[c]) for c in ("z0", "y0", "x0", "z1")] == [0, 1, 3, 5]


def test_pictures_show_scans_from_all_over_and_slices_through_objects():
    def with_objects(*boxes):
        true = np.array(boxes, dtype=float).reshape(-1, 6)
        none = np.zeros((0, 6))
        return ScanBoxes(
            "s",
            (1, 1, 1),
            true,
            np.zeros(len(true), dtype=np.int64),
            np.zeros(len(true), dtype=bool),
            none,
            np.zeros(0, dtype=np.int64),
            np.zeros(0),
            np.zeros((0, len(true)), dtype=bool),
        )

    full = [with_objects((z, 0, 0, z + 1, 1, 1)) for z in range(10)]
    empty = [with_objects(), with_objects()]
    five = with_objects(*[(z, 0, 0, z + 1, 1, 1) for z in (1, 5, 9, 13, 17)])

    # Four of ten, spread evenly; of the empty ones at most one, at the end.
    assert [scan.true_boxes_G6[0, 0] for scan in pick_scans(full)] == [0, 3, 6, 9]
    assert len(pick_scans(full[:2])) == 2
    assert [len(scan.true_boxes_G6) for scan in pick_scans([*empty, *full])] == [1, 1, 1, 0]
    # Slices 2 to 10 are cut at their quarters; a single slice is shown three times.
    assert pick_slices(with_objects((2, 0, 0, 10, 1, 1)), 20) == [4, 6, 8]
    assert pick_slices(with_objects((2, 0, 0, 3, 1, 1)), 20) == [2, 2, 2]
    # Of five objects those in the middle, and without objects the quarters of 20 slices.
    assert pick_slices(five, 20) == [5, 9, 13]
    assert pick_slices(with_objects(), 20) == [5, 10, 15]


def test_axial_slices_are_drawn_anterior_up_and_patient_right_on_the_left():
    array = np.zeros((2, 3, 4))
    # In RAS (an identity) indices grow towards the left-hand side of the picture and upwards; in
    # LPS they grow as pixels do. The third stores sagittal slices, whose directions differ.
    ras = frame_of_affine(np.eye(4), (2, 3, 4))
    lps = frame_of_affine(np.diag([-1, -1, 1, 1]), (2, 3, 4))
    turned = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    sagittal = frame_of_affine(turned, (2, 3, 4))

    assert background(array, ras) == Background(array, flip_y=True, flip_x=True)
    assert background(array, lps) == Background(array)
    assert background(array, sagittal) == Background(array)


def texts_of_labels(labels):
    """Return text -> (left, lower edge) in points of the labels that are drawn."""
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    axis.set(xlim=(0, 100), ylim=(100, 0))
    evaluation_files._draw_labels(axis, labels, points_per_voxel=3.0, stretch=1.0)
    return {
        text.get_text(): (3.0 * text.xy[0], text.xyann[1] - 3.0 * text.xy[1]) for text in axis.texts
    }


def test_labels_of_neighbouring_boxes_do_not_cover_each_other():
    style = BOXES["found"]
    # The second begins 4 voxels, 12 points, to the right: its text would cover the first.
    boxes = [np.array([0.0, 20, 10, 5, 40, 20]), np.array([0.0, 20, 14, 5, 40, 24])]
    labels = [BoxLabel(box, f"lesion 0.{n}", style, False) for n, box in enumerate(boxes)]

    (_, first), (_, second) = texts_of_labels(labels).values()

    assert second - first >= LABEL_SIZE


def test_labels_far_from_each_other_stay_at_their_boxes():
    style = BOXES["false"]
    boxes = [np.array([0.0, 20, 10, 5, 40, 20]), np.array([0.0, 70, 70, 5, 90, 90])]
    labels = [BoxLabel(box, f"lesion 0.{n}", style, False) for n, box in enumerate(boxes)]

    found = texts_of_labels(labels)

    # 3 points per voxel: x 10 is at 30 points and x 70 at 210; texts lie 3 points above y 20 and y
    # 70.
    assert found == {"lesion 0.0": (30.0, 3 - 60.0), "lesion 0.1": (210.0, 3 - 210.0)}
