"""What counts as one object."""

import json

import numpy as np
import pytest
from refusals import refused

from nnunet_autoreg.detection.instances import (
    Instance,
    Instances,
    ObjectClass,
    Rules,
    boxes_of_ids,
    find_instances,
    ignore_value,
    known_instances,
    labels_of_instances,
    object_classes,
    read_rules,
    read_true_boxes,
    with_ellipsoids,
)
from nnunet_autoreg.errors import ObjectsError, PlanError
from nnunet_autoreg.records import MEND_YOURS

LESION = ObjectClass("lesion", 1, (1,))
CYST = ObjectClass("cyst", 2, (2,))


def labels():
    """Two lesions, the first with a voxel at its corner, and a cyst that touches the second."""
    array = np.zeros((8, 10, 12), np.uint8)
    array[0:2, 0:3, 0:4] = 1
    array[2, 3, 4] = 1
    array[5:7, 5:8, 5:9] = 1
    array[5:7, 5:8, 9] = 2
    return array


def test_components_are_objects_with_boxes_of_voxel_edges():

    found = find_instances(labels(), [LESION, CYST], Rules())

    # 2 x 3 x 4 voxels and the one at the corner; 2 x 3 x 4; 2 x 3 x 1. Boxes are half-open.
    assert found.objects == (
        Instance(1, 0, (0, 0, 0, 3, 4, 5), 25),
        Instance(2, 0, (5, 5, 5, 7, 8, 9), 24),
        Instance(3, 1, (5, 5, 9, 7, 8, 10), 6),
    )
    assert found.ids_ZYX.dtype == np.uint16
    assert found.ids_ZYX[5, 5].tolist() == [0] * 5 + [2] * 4 + [3] + [0] * 2


def test_corners_join_with_26_neighbours_and_small_objects_are_ignored():
    found = find_instances(labels(), [LESION], Rules(connectivity=6, min_voxels=2))

    # With 6 neighbours the voxel at the corner is an object by itself.
    sizes = [(o.num_voxels, o.ignored) for o in found.objects]
    assert sizes == [(24, False), (1, True), (24, False)]
    assert found.ids_ZYX[2, 3, 4] == found.objects[1].id


def test_a_merged_class_is_one_object_across_its_labels():
    found = find_instances(labels(), [ObjectClass("all", 1, (1, 2))], Rules())

    assert [o.box_zyx for o in found.objects] == [(0, 0, 0, 3, 4, 5), (5, 5, 5, 7, 8, 10)]


def test_a_scan_without_objects_is_fine():
    found = find_instances(np.zeros((4, 4, 4)), [LESION], Rules())

    assert found.objects == ()
    assert not found.ids_ZYX.any()


def test_boxes_of_any_ids():
    ids = np.zeros((3, 4, 5), np.int64)
    # Ids with large gaps, as instance maps of other tools have them.
    ids[1, 1:3, 4], ids[2, 0, 0] = 60_000, 7

    assert boxes_of_ids(ids) == {7: ((2, 0, 0, 3, 1, 1), 1), 60_000: ((1, 1, 4, 2, 3, 5), 2)}
    assert boxes_of_ids(np.full((2, 2, 2), 9)) == {9: ((0, 0, 0, 2, 2, 2), 8)}
    assert boxes_of_ids(ids.transpose(2, 0, 1))[60_000] == ((4, 1, 1, 5, 2, 3), 2)


DATASET = {"labels": {"background": 0, "edema": 1, "core": 2, "cyst": 3, "ignore": 4}}


def test_every_label_is_a_class_unless_the_dataset_says_otherwise():
    def names(**block):
        dataset = {**DATASET, "autoreg_detection": block}
        return [(c.name, c.label, c.values) for c in object_classes(dataset, read_rules(dataset))]

    assert names() == [("edema", 1, (1,)), ("core", 2, (2,)), ("cyst", 3, (3,))]
    assert names(detect_labels=["cyst"]) == [("cyst", 3, (3,))]
    assert names(merge={"tumour": ["core", "edema"]}) == [("tumour", 1, (1, 2)), ("cyst", 3, (3,))]
    only_tumour = names(merge={"tumour": ["core", "edema"]}, detect_labels=["tumour"])
    assert only_tumour == [("tumour", 1, (1, 2))]
    assert ignore_value(DATASET) == 4
    assert ignore_value({"labels": {"background": 0}}) is None


@pytest.mark.parametrize(
    ("labels", "block", "code", "values"),
    [
        (DATASET["labels"], {"detect_labels": ["cist"]}, "unknown-label", ["'cist'", "'cyst'"]),
        (DATASET["labels"], {"merge": {"t": ["corre"]}}, "unknown-label", ["'corre'", "'core'"]),
        (DATASET["labels"], {"connectivity": 8}, "connectivity", ["connectivity=8"]),
        (DATASET["labels"], {"min_voxels": 0}, "min-voxels", ["min_voxels=0"]),
        ({"background": 0}, {}, "no-label", ["autoreg_detection"]),
        # Voxels of value 2 would belong to two objects.
        (
            {"background": 0, "whole": [1, 2], "core": [2]},
            {},
            "shared-label",
            ["'whole'", "'core'", 2],
        ),
    ],
)
def test_impossible_rules_and_labels_are_refused(labels, block, code, values):
    dataset = {"labels": labels, "autoreg_detection": block}

    with refused(PlanError, f"detection-{code}", "dataset.json", *values):
        object_classes(dataset, read_rules(dataset))


def test_a_misspelt_rule_is_refused_by_name():
    with pytest.raises(PlanError) as caught:
        read_rules({"autoreg_detection": {"min_voxel": 3}})

    assert "'min_voxel'" in str(caught.value)


def test_regions_are_classes_if_they_do_not_overlap():
    # "core" overlaps "whole" and is not detected.
    dataset = {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": 2},
        "autoreg_detection": {"detect_labels": ["whole"]},
    }

    assert object_classes(dataset, read_rules(dataset)) == (ObjectClass("whole", 1, (1, 2, 3)),)


def ids():
    """Object 1 has two parts, 2 x 2 x 2 voxels and one far away; object 7 has three voxels."""
    array = np.zeros((4, 6, 6), np.uint16)
    array[0:2, 0:2, 0:2], array[3, 5, 5], array[2, 2:5, 3] = 1, 1, 7
    return array


def test_an_instance_map_keeps_its_ids_and_an_object_may_have_parts(tmp_path):
    (tmp_path / "a.json").write_text('{"instances": {"1": 2, "7": 1}}')
    label_of = labels_of_instances(tmp_path / "a.json")

    found = known_instances(ids(), label_of, [LESION, CYST], Rules(min_voxels=4), "a")

    assert found.objects == (
        Instance(1, 1, (0, 0, 0, 4, 6, 6), 9),
        Instance(7, 0, (2, 2, 3, 3, 5, 4), 3, True),
    )


def test_objects_of_labels_that_are_not_detected_leave_the_map():
    found = known_instances(ids(), {1: 2, 7: 1}, [LESION], Rules(), "a", other_labels=[2])

    assert [o.id for o in found.objects] == [7]
    assert set(np.unique(found.ids_ZYX)) == {0, 7}


# The map has the ids 1 and 7.
@pytest.mark.parametrize(
    ("label_of", "code", "values"),
    [
        ({1: 1}, "objects-unlisted", ["id 7"]),
        ({1: 1, 7: 1, 8: 1, 9: 1}, "objects-without-voxels", ["ids 8, 9"]),
        ({1: 1, 7: 5}, "objects-unknown-label", [7, "label 5", "1 (lesion), 2 (cyst)"]),
    ],
)
def test_a_map_and_a_json_that_disagree_are_refused(label_of, code, values):
    with refused(ObjectsError, code, "case_3", *values):
        known_instances(ids(), label_of, [LESION, CYST], Rules(), "case_3")


def test_a_map_of_fractions_or_negative_numbers_is_refused():
    for value in (0.5, -1):
        with refused(ObjectsError, "objects-map-values", f"{value:g}", 65535):
            known_instances(np.full((2, 2, 2), value), {1: 1}, [LESION], Rules(), "a")


@pytest.mark.parametrize("text", ["[]", '{"instances": [1]}', '{"instances": {"a": 1}}', "{"])
def test_a_json_without_valid_instances_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    code = "objects-unreadable" if text == "{" else "objects-format"

    with refused(ObjectsError, code, "a.json"):
        labels_of_instances(tmp_path / "a.json")


def boxes_file(tmp_path, *boxes):
    (tmp_path / "a.json").write_text(json.dumps({"boxes": boxes, "seen_by": "me"}))
    return tmp_path / "a.json"


def test_boxes_are_objects_without_a_map(tmp_path):
    # Numbers of voxels may be fractions, and other keys of a box are passed over.
    first = {"box_zyx": [0, 1, 2, 3.5, 4, 5], "label": 2, "score": 1}
    second = {"box_zyx": [0, 0, 0, 1, 1, 1], "label": 1, "ignore": True}
    file = boxes_file(tmp_path, first, second)

    found = read_true_boxes(file, [LESION, CYST], (4, 8, 8))

    assert found.objects == (
        Instance(1, 1, (0, 1, 2, 3.5, 4, 5), 0),
        Instance(2, 0, (0, 0, 0, 1, 1, 1), 0, True),
    )
    assert found.ids_ZYX is None
    of_lesions = read_true_boxes(file, [LESION], (4, 8, 8), other_labels=[2])
    assert [o.class_index for o in of_lesions.objects] == [0]


@pytest.mark.parametrize(
    ("box", "code", "value"),
    [
        # z ends at 5 of 4; a label that does not exist; five numbers; no box; a number in quotes.
        ({"box_zyx": [0, 1, 2, 5, 4, 5], "label": 2}, "box-outside", "4 x 8 x 8"),
        ({"box_zyx": [0, 1, 2, 3, 4, 5], "label": 9}, "objects-unknown-label", "label 9"),
        ({"box_zyx": [0, 1, 2, 3, 4], "label": 1}, "objects-unreadable", "box_zyx"),
        ({"label": 1}, "objects-unreadable", "'box_zyx'"),
        ({"box_zyx": [0, 1, 2, 3, 4, "5"], "label": 1}, "objects-unreadable", "'5'"),
    ],
)
def test_wrong_boxes_are_refused(tmp_path, box, code, value):
    with refused(ObjectsError, code, "a.json: boxes[0]", value):
        read_true_boxes(boxes_file(tmp_path, box), [LESION, CYST], (4, 8, 8))


def test_a_file_that_holds_no_boxes_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"instances": {}}')

    with refused(ObjectsError, "objects-format", "a.json", '{"boxes"'):
        read_true_boxes(tmp_path / "a.json", [LESION], None)


# Files of results may be removed and made again, but these are the user's work.
def test_nobody_is_advised_to_remove_a_damaged_file_of_true_objects(tmp_path):
    (tmp_path / "a.json").write_text('{"boxes": [')
    for read in (labels_of_instances, lambda file: read_true_boxes(file, [LESION], None)):
        with refused(ObjectsError, "objects-unreadable", "a.json", MEND_YOURS):
            read(tmp_path / "a.json")


def test_ellipsoids_have_the_boxes_they_were_made_of():
    # The second is inside the first, so it is drawn on top; the third is one voxel.
    boxes = (
        Instance(1, 0, (0, 0, 0, 8, 2, 16), 0),
        Instance(2, 0, (3, 0, 7, 5, 2, 9), 0),
        Instance(3, 0, (9, 3, 0, 10, 4, 1), 0),
    )

    drawn = with_ellipsoids(Instances(boxes, None), (10, 4, 16))

    found = boxes_of_ids(drawn.ids_ZYX)

    assert {i: box for i, (box, _) in found.items()} == {b.id: b.box_zyx for b in boxes}
    assert found[2][1] == 8
    assert drawn.objects[1].num_voxels == 8
    # The corners of the large box are free: it is an ellipsoid.
    assert drawn.ids_ZYX[0, 0, 0] == 0
    assert found[1][1] < 8 * 2 * 16 - 8


def test_a_box_hidden_by_smaller_ones_keeps_its_place_for_any_number():
    # Numbers have gaps if boxes of other labels lie between.
    # Box 7 has two voxels, which the boxes 2 and 3 fill.
    boxes = (
        Instance(7, 0, (0, 0, 0, 2, 1, 1), 0),
        Instance(2, 0, (0, 0, 0, 1, 1, 1), 0),
        Instance(3, 0, (1, 0, 0, 2, 1, 1), 0),
    )

    drawn = with_ellipsoids(Instances(boxes, None), (2, 1, 1))

    assert [(o.id, o.num_voxels) for o in drawn.objects] == [(7, 0), (2, 1), (3, 1)]
