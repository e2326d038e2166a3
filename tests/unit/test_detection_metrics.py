"""Matching, average precision, FROC and all that is reported of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory import peak_bytes
from refusals import refused

from nnunet_autoreg.detection import metrics as mt
from nnunet_autoreg.detection.evaluate import EvaluationSettings, evaluate
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import (
    ANY_CLASS,
    HitRule,
    ScanBoxes,
    mask_overlaps,
    match_scan,
    parse_hit_rule,
    scan_boxes,
)
from nnunet_autoreg.downstream.bootstrap import interval
from nnunet_autoreg.errors import ObjectsError, UsageError

A = ObjectClass("a", 1, (1,))
B = ObjectClass("b", 2, (2,))
C = ObjectClass("c", 3, (3,))
WHY_MONAI = "MONAI is the oracle of this test; pip install 'nnunet-autoreg[test]'"


def scan(true=(), found=(), ignored=(), name="s", spacing=(1.0, 1.0, 1.0)):
    """Return a scan with these true objects and detections.

    ``true``: (box, class); ``found``: (box, class, score); ``ignored``: numbers of true objects.
    """
    true_boxes = np.array([box for box, _ in true], dtype=float).reshape(-1, 6)
    boxes = np.array([box for box, _, _ in found], dtype=float).reshape(-1, 6)
    # Which detection has its centre in which true object.
    middle = (boxes[:, None, :3] + boxes[:, None, 3:]) / 2
    inside = ((middle >= true_boxes[None, :, :3]) & (middle < true_boxes[None, :, 3:])).all(-1)
    true_classes = np.array([class_index for _, class_index in true], dtype=np.int64)
    classes = np.array([class_index for _, class_index, _ in found], dtype=np.int64)
    scores = np.array([score for _, _, score in found], dtype=float)
    is_ignored = np.isin(np.arange(len(true)), list(ignored))
    return ScanBoxes(
        name,
        spacing,
        true_boxes,
        true_classes,
        is_ignored,
        boxes,
        classes,
        scores,
        inside,
    )


def cube(start, side=4):
    """Return a box of ``side`` voxels that begins at ``start`` in z and at 0 in y and x."""
    return (start, 0, 0, start + side, side, side)


def pooled(scans, class_index=0, rule=HitRule(), **options):  # noqa: B008
    """Match every scan and pool what is counted."""
    return mt.pool([match_scan(s, class_index, rule, **options) for s in scans])


def test_the_highest_score_takes_the_best_object_and_a_second_one_is_false():
    # The second true cube is the first one, two voxels further in z; a detection lies between.
    one = scan(
        [(cube(0), 0), (cube(2), 0)],
        [(cube(1), 0, 0.5), (cube(0), 0, 0.9), (cube(0), 0, 0.4)],
    )
    rule = HitRule("iou", 0.1)

    matched = match_scan(one, 0, rule)

    # The middle one overlaps both alike and gets what is left; then nothing is left.
    assert matched.detections.tolist() == [1, 0, 2]
    assert matched.object_of.tolist() == [0, 1, -1]
    assert not matched.ignored.any()
    assert matched.objects.tolist() == [0, 1]
    without_duplicates = match_scan(one, 0, rule, duplicates="ignored")
    assert without_duplicates.ignored.tolist() == [False, False, True]
    assert match_scan(one, 0, rule, max_detections=1).detections.tolist() == [1]


def test_classes_do_not_match_each_other():
    one = scan([(cube(0), 0)], [(cube(0), 1, 0.9)])

    assert match_scan(one, 0, HitRule()).detections.tolist() == []
    assert match_scan(one, 1, HitRule()).object_of.tolist() == [-1]


def test_ignored_objects_and_regions_take_any_number_of_detections():
    # Two detections of the ignored object, one inside the ignored region, and one elsewhere.
    found = [(cube(0), 0, 0.9), (cube(1), 0, 0.8), (cube(24), 0, 0.7), (cube(50), 0, 0.6)]
    one = scan([(cube(0), 0), (cube(20, 12), ANY_CLASS)], found, [0, 1])

    matched = match_scan(one, 0, HitRule("iou", 0.5))

    assert matched.ignored.tolist() == [True, True, True, False]
    assert len(matched.objects) == 0
    assert one.is_empty


def test_a_region_ignores_only_what_has_its_centre_in_it():
    # A shell of one voxel around the image: its box is the image's own, with the detection in the
    # middle of it.
    shell = np.ones((12, 12, 12), dtype=bool)
    shell[1:-1, 1:-1, 1:-1] = False
    found = (
        [(4, 4, 4, 8, 8, 8), (0, 0, 0, 12, 12, 12), (0, 0, 0, 1, 4, 4)],
        [0, 0, 0],
        [0.9, 0.8, 0.7],
    )
    one = scan_boxes("s", (1.0, 1.0, 1.0), ([], [], []), found, uncounted_ZYX=shell)
    for rule in ("iou:0.1", "centre", "radius", "radius:20"):
        assert match_scan(one, 0, parse_hit_rule(rule)).ignored.tolist() == [False, False, True]

    # Masks of detections could overlap the shell, but regions count by the centre.
    with_masks = replace(one, mask_overlap_DG=np.ones((3, 1)))
    matched = match_scan(with_masks, 0, parse_hit_rule("mask:0.2"))
    assert matched.ignored.tolist() == [False, False, True]


def test_hit_rules_by_hand():
    # Centres 3 mm apart in z (1.5 voxels of 2 mm); the object's largest side is 8 mm.
    true = [((0, 0, 0, 4, 4, 4), 0)]
    one = scan(true, [((1.5, 0, 0, 5.5, 4, 4), 0, 0.9)], spacing=(2.0, 1.0, 1.0))

    def is_hit(text):
        return match_scan(one, 0, parse_hit_rule(text)).object_of.tolist() == [0]

    # In z 2.5 of 5.5 voxels are common; y and x are equal.
    overlap = 2.5 / 5.5

    assert is_hit(f"iou:{overlap - 0.01}")
    assert not is_hit(f"iou:{overlap + 0.01}")
    assert is_hit("centre")
    assert is_hit("radius")
    assert is_hit("radius:3")
    assert not is_hit("radius:2.9")

    # The centre at z 4.5 is outside of the object, and 5 mm are more than half of its 8 mm.
    far = scan(true, [((2.5, 0, 0, 6.5, 4, 4), 0, 0.9)], spacing=(2.0, 1.0, 1.0))
    for rule in (HitRule("centre", 0), HitRule("radius", 0)):
        assert match_scan(far, 0, rule).object_of.tolist() == [-1]


def test_masks_overlap_by_their_voxels_which_boxes_do_not_have():
    # Ids 1 and 2 were found, 3 and 7 are there: 1 shares 2 of 2 + 4 - 2 voxels with 3, 2 has none,
    # 7 is not met.
    found = np.array([[[1, 1, 0, 0, 0, 2]]])
    true = np.array([[[3, 3, 3, 3, 7, 0]]])
    overlap = mask_overlaps(found, [2, 1, 9], true, [3, 7])

    assert overlap.tolist() == [[0, 0], [0.5, 0], [0, 0]]
    nothing_found = mask_overlaps(found * 0, [1], true, [3, 7])
    nothing_there = mask_overlaps(found, [1], true * 0, [3, 7])
    assert nothing_found.tolist() == nothing_there.tolist() == [[0, 0]]

    one = scan([(cube(0), 0)], [(cube(10), 0, 0.9)])
    rule = parse_hit_rule("mask:0.2")

    assert str(rule) == "mask:0.2"
    for overlap_of_one, hit in ((0.2, 0), (0.19, -1)):
        with_masks = replace(one, mask_overlap_DG=np.array([[overlap_of_one]]))
        assert match_scan(with_masks, 0, rule).object_of.tolist() == [hit]
    with refused(UsageError, "hit-rule-without-voxels", "mask:0.2", "iou:T"):
        match_scan(one, 0, rule)


def test_masks_of_few_voxels_are_counted_without_copies_of_the_whole_image():
    found = np.zeros((128, 128, 128), np.uint16)
    found[3:9, 3:9, 3:9] = 500
    # The slices 3 to 5 of 6 belong to the true object: half of the detection.
    true = np.zeros_like(found)
    true[3:6, 3:9, 3:9] = 9

    most = peak_bytes(lambda: mask_overlaps(found, [500], true, [9]))

    # A mask takes 2 MB, a copy of 64-bit numbers 16.
    assert mask_overlaps(found, [500], true, [9]).tolist() == [[0.5]]
    assert most < 8e6


def test_the_threshold_of_several_curves_is_that_of_their_scans_together():
    # Curve a: 4 scans, 1 false positive at 0.9, 4 at 0.5. Curve b: 1 scan, 1 at 0.7, 2 at 0.4.
    a = mt.Froc(np.array([0, 0.25, 1.0]), np.array([0, 0.5, 1]), np.array([np.inf, 0.9, 0.5]))
    b = mt.Froc(np.array([0, 1.0, 2.0]), np.array([0, 0.5, 1]), np.array([np.inf, 0.7, 0.4]))
    together = [(a, 4), (b, 1)]

    # In 5 scans: 1 down to 0.9, 2 to 0.7, 5 to 0.5, 6 to 0.4.
    wanted = (0.1, 0.2, 0.4, 0.9, 1.0, 1.2)
    thresholds = [mt.threshold_at(together, n) for n in wanted]
    assert thresholds == [np.inf, 0.9, 0.7, 0.7, 0.5, 0.4]
    # False positives per scan, so the number of scans by itself changes nothing.
    assert mt.threshold_at([(a, 4)], 0.5) == mt.threshold_at([(a, 1)], 0.5) == 0.9


@pytest.mark.parametrize(
    "text",
    ["iou", "iou:0", "iou:2", "centre:1", "radius:-1", "mask", "mask:1.5", "iou:x", "radius:inf"],
)
def test_unknown_hit_rules_are_refused(text):
    with refused(UsageError, "hit-rule", f"'{text}'", "iou:0.1"):
        parse_hit_rule(text)


# The average is over 101 recalls from 0 to 1.
def test_average_precision_by_hand():
    # Hit, false, hit of 2 objects: precision 1 up to recall 1/2 (51 recalls), then 2/3 (50
    # recalls).
    one = scan(
        [(cube(0), 0), (cube(10), 0)],
        [(cube(0), 0, 0.9), (cube(30), 0, 0.8), (cube(10), 0, 0.7)],
    )

    assert mt.average_precision(pooled([one])) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Objects that nothing finds have 0; without objects there is no precision.
    assert mt.average_precision(pooled([scan([(cube(0), 0)])])) == 0
    assert np.isnan(mt.average_precision(pooled([scan([], [(cube(0), 0, 0.9)])])))


def test_a_scan_drawn_twice_weighs_as_much_as_two_scans():
    scans = random_scans(np.random.default_rng(0), 4, classes=1)
    weights = np.array([2.0, 0.0, 1.0, 1.0])
    twice = [scans[0], scans[0], scans[2], scans[3]]

    precision = mt.average_precision(pooled(scans), weights)

    # Equal scores of the two copies are sorted one after the other, which moves the precision a
    # little at those recalls.
    assert precision == pytest.approx(mt.average_precision(pooled(twice)), abs=0.02)
    assert mt.cpm(pooled(scans), weights) == pytest.approx(mt.cpm(pooled(twice)), abs=1e-9)


def random_box(random):
    """Return a box with sides of 4 to 14 voxels, whose lower corner lies within 60 voxels."""
    low = random.uniform(0, 60, 3)
    return np.concatenate([low, low + random.uniform(4, 14, 3)])


def random_scans(random, number, classes=3):
    """Return scans with up to 4 objects of each class, most of them found, and false detections."""
    scans = []
    for n in range(number):
        true, found = [], []
        for class_index in range(classes):
            # The first scan has an object of every class.
            for _ in range(int(random.integers(0, 4)) + (n == 0)):
                box = random_box(random)
                true.append((box, class_index))
                if random.random() < 0.8:
                    moved = box + random.normal(0, 1.2, 6)
                    found.append((moved, class_index, random.uniform(0.3, 1)))
            for _ in range(int(random.integers(0, 5))):
                wrong = random_box(random)
                found.append((wrong, class_index, random.uniform(0, 0.8)))
        scans.append(scan(true, found, name=f"s{n}"))
    return scans


def test_average_precision_equals_monais():
    coco = pytest.importorskip("monai.apps.detection.metrics.coco", reason=WHY_MONAI)
    matching = pytest.importorskip("monai.apps.detection.metrics.matching", reason=WHY_MONAI)
    box_iou = pytest.importorskip("monai.data.box_utils", reason=WHY_MONAI).box_iou
    for seed in range(3):
        scans = random_scans(np.random.default_rng(seed), 12)
        limits = {"iou_list": [0.1, 0.5], "max_detection": [100], "verbose": False}
        metric = coco.COCOMetric(["a", "b", "c"], **limits)
        matched = matching.matching_batch(
            box_iou,
            metric.iou_thresholds,
            [s.boxes_D6 for s in scans],
            [s.classes_D for s in scans],
            [s.scores_D for s in scans],
            [s.true_boxes_G6 for s in scans],
            [s.true_classes_G for s in scans],
        )
        theirs, _ = metric(matched)

        ours = evaluate(scans, [A, B, C], EvaluationSettings(num_resamples=0))

        for iou in ("0.1", "0.5"):
            figure = ours["ap"][iou]
            expected = theirs[f"AP_IoU_0.{iou[2:]}0_MaxDet_100"]
            assert figure["mean"] == pytest.approx(expected, abs=1e-4)
            for name in "abc":
                expected = theirs[f"{name}_AP_IoU_{iou}0_MaxDet_100"]
                assert figure["per_class"][name] == pytest.approx(expected, abs=1e-4)
        expected = theirs["mAP_IoU_0.10_0.50_0.05_MaxDet_100"]
        assert ours["map"]["0.1:0.5:0.05"]["mean"] == pytest.approx(expected, abs=1e-4)
        # Neither all right nor all wrong, where any two implementations would agree.
        assert 0.2 < ours["ap"]["0.5"]["mean"] < 0.95


def test_froc_by_hand_with_tied_scores_and_empty_scans():
    one = scan(
        [(cube(0), 0), (cube(10), 0)],
        [(cube(0), 0, 0.9), (cube(30), 0, 0.5), (cube(10), 0, 0.5)],
    )
    empty = scan([], [(cube(0), 0, 0.7)])

    curve = mt.froc(pooled([one, empty]))

    # In two scans: the hit of 0.9; the false one of 0.7; then a hit and a false one of 0.5, which
    # come in together.
    assert curve.threshold.tolist() == [np.inf, 0.9, 0.7, 0.5]
    assert curve.fp_per_scan.tolist() == [0, 0, 0.5, 1]
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5, 1]
    # Between 0.5 and 1 the curve is a straight line: 0.75 at 0.75.
    assert mt.sensitivity_at(curve, [0.125, 0.5, 0.75, 1, 8]).tolist() == [0.5, 0.5, 0.75, 1, 1]
    assert [mt.threshold_at([(curve, 1)], n) for n in (0.5, 0.1, 8)] == [0.7, 0.9, 0.5]
    # The mean at 1/8, 1/4 and 1/2 (0.5 each) and at 1, 2, 4 and 8 (1 each).
    assert mt.cpm(pooled([one, empty])) == pytest.approx((0.5 * 3 + 1 * 4) / 7)


def true_objects(one):
    """Return the (box, class) of all true objects of a scan."""
    return list(zip(one.true_boxes_G6, one.true_classes_G, strict=True))


def perfect(scans, score=0.9):
    """Return the scans with exactly their true objects found."""
    found = []
    for s in scans:
        boxes = [(box, kind, score) for box, kind in true_objects(s)]
        found.append(scan(true_objects(s), boxes, name=s.name))
    return found


def test_perfect_detections_score_1_and_no_detections_score_0():
    scans = [*random_scans(np.random.default_rng(1), 6, classes=2), scan(name="empty")]
    blind = [scan(true_objects(s), name=s.name) for s in scans]
    settings = EvaluationSettings(num_resamples=50)

    best = evaluate(perfect(scans), [A, B, C], settings)
    worst = evaluate(blind, [A, B, C], settings)

    assert best["absent_classes"] == ["c"]
    assert set(best["ap"]["0.1"]["per_class"]) == {"a", "b"}
    averages = [best["ap"]["0.1"], best["ap"]["0.5"], best["map"]["0.1:0.5:0.05"]]
    for figure in (*averages, best["froc"]["cpm"]):
        # Every resample is perfect too, so the interval has no width.
        assert figure["mean"] == 1
        assert figure["ci95"] == [1, 1]
        assert set(figure["per_class"].values()) == {1}
    for figure in (worst["ap"]["0.1"], worst["map"]["0.1:0.5:0.05"], worst["froc"]["cpm"]):
        assert figure["mean"] == 0
        assert figure["ci95"] == [0, 0]

    assert worst["froc"]["sensitivity"]["mean"] == [0] * 7
    assert (worst["scans"]["positive"], worst["scans"]["empty"]) == (6, 1)


def test_scans_without_any_object_give_no_figure_and_no_nan():
    results = evaluate([scan([], [(cube(0), 0, 0.9)])], [A], EvaluationSettings())

    assert results["ap"]["0.1"]["mean"] is None
    assert results["froc"]["cpm"]["mean"] is None
    assert results["absent_classes"] == ["a"]
    assert results["classes"]["a"]["false_per_scan"] == 1
    # JSON knows neither of these words, though Python writes them.
    assert "NaN" not in json.dumps(results)
    assert "Infinity" not in json.dumps(results)
    with refused(ObjectsError, "evaluation-no-scan"):
        evaluate([], [A], EvaluationSettings())


def test_false_positives_are_split_into_scans_with_and_without_objects():
    scans = [
        scan([(cube(0), 0)], [(cube(0), 0, 0.9), (cube(30), 0, 0.8)], name="p"),
        scan([], [(cube(0), 0, 0.8)] * 3, name="e"),
    ]
    settings = EvaluationSettings(fp_per_scan=(0.5, 2.0), num_resamples=0)

    figures = evaluate(scans, [A], settings)

    few, many = figures["froc"]["operating_points"]["a"]
    assert few == {
        "fp_per_scan_at_most": 0.5,
        "threshold": 0.9,
        "sensitivity": 1,
        "fp_per_scan": 0,
        "fp_per_positive_scan": 0,
        "fp_per_empty_scan": 0,
    }
    # At 0.8: one false box in the scan with the object, three in the empty one, 4 in 2 scans.
    assert many["fp_per_scan"] == 2
    assert (many["fp_per_positive_scan"], many["fp_per_empty_scan"]) == (1, 3)


def test_sizes_ignore_objects_and_false_positives_of_other_sizes():
    # Sides of 2 and 10 mm; the small one is found, and a false box has 12 mm.
    small = cube(0, 2)
    large = cube(20, 10)
    found = [(small, 0, 0.9), (cube(50, 12), 0, 0.8)]
    scans = [scan([(small, 0), (large, 0)], found, spacing=(1.0, 1.0, 1.0))]

    def strata_of(*edges_mm):
        settings = EvaluationSettings(size_edges_mm=edges_mm, num_resamples=0)
        return evaluate(scans, [A], settings)["sizes"]["strata"]

    strata = strata_of(5.0)

    assert [(s["from_mm"], s["to_mm"], s["objects"]) for s in strata] == [(0, 5, 1), (5, None, 1)]
    assert strata[0]["per_class"]["a"] == {"objects": 1, "ap": 1, "sensitivity": 1}
    assert strata[1]["per_class"]["a"] == {"objects": 1, "ap": 0, "sensitivity": 0}
    assert strata_of() == []


def test_intervals_are_the_same_every_time_and_hold_the_value():
    scans = random_scans(np.random.default_rng(2), 10, classes=2)
    settings = EvaluationSettings(num_resamples=200, seed=3)

    first, again = (evaluate(scans, [A, B], settings) for _ in range(2))

    assert first == again
    low, high = first["ap"]["0.5"]["ci95"]
    assert low < first["ap"]["0.5"]["mean"] < high
    # One number has no spread. Of 0.2 and 0.4, the 2.5 % point is 0.2 + 0.025 x 0.2.
    assert interval([float("nan"), 0.5]) is None
    assert interval([0.2, float("nan"), 0.4]) == pytest.approx((0.205, 0.395))


@pytest.mark.parametrize(
    ("change", "code", "value"),
    [
        ({"ious": (0.0,)}, "evaluation-iou", 0),
        ({"duplicates": "x"}, "evaluation-duplicates", "'x'"),
        ({"max_detections": 0}, "evaluation-max-detections", 0),
        ({"num_resamples": -1}, "evaluation-resamples", -1),
        ({"fp_per_scan": (0.0,)}, "evaluation-fp-per-scan", 0),
        ({"size_edges_mm": (5.0, 3.0)}, "evaluation-sizes", "5, 3"),
    ],
)
def test_impossible_settings_are_refused(change, code, value):
    with refused(UsageError, code, value):
        evaluate([scan()], [A], EvaluationSettings(**change))


def test_the_results_are_plain_json():
    scans = random_scans(np.random.default_rng(4), 3)

    results = evaluate(scans, [A, B, C], EvaluationSettings(num_resamples=10))

    assert json.loads(json.dumps(results, allow_nan=False)) == results
    # A float64 of numpy is a float for json, but not for the reader of a type.
    for value in results["ap"]["0.1"]["per_class"].values():
        assert not isinstance(value, (np.generic, torch.Tensor))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("iou:0.1", "box IoU of 0.1"),
        ("mask:0.2", "mask IoU of 0.2"),
        ("centre", "centre"),
        ("radius", "half its size"),
        ("radius:5", "5 mm"),
    ],
)
def test_pictures_state_the_hit_rule_in_words(text, part):
    assert part in parse_hit_rule(text).meaning()
