"""What a detector is trained with: plan, patches around objects, losses, averaged weights, merged
boxes.
"""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from refusals import logged, refused

from nnunet_autoreg.detection.anchors import AnchorPlan, lay_out
from nnunet_autoreg.detection.data import objects_of_patch, patch_start
from nnunet_autoreg.detection.evaluate import quick_scores
from nnunet_autoreg.detection.infer import (
    Candidates,
    ScanDetector,
    boxes_of_output,
    ends_between_tiles,
    merge,
    mirrored,
    tile_weights,
)
from nnunet_autoreg.detection.instances import BLOCK, Instance, ObjectClass, Rules
from nnunet_autoreg.detection.matching import HitRule, match_scan, scan_boxes
from nnunet_autoreg.detection.net import Output
from nnunet_autoreg.detection.plan import (
    DetectionPlan,
    check_same_dataset,
    make_plan,
    read_plan,
)
from nnunet_autoreg.detection.training import (
    WEIGHTS_KEY,
    DetectionLoss,
    MovingAverage,
    make_segmentation_loss,
    mean_dice,
    patches_scored,
    without_decay_on_norms,
)
from nnunet_autoreg.downstream.plan_block import store
from nnunet_autoreg.downstream.training import keep_thread_limit
from nnunet_autoreg.errors import PlanError

LESION = ObjectClass("lesion", 1, (1,))
DATASET: dict[str, Any] = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
# One level with cells of 4 voxels, and one anchor of the size of a cell.
ANCHORS = AnchorPlan((0,), ((4, 4, 4),), ((4.0, 4.0, 4.0),), 1.0, {})
PLAN = DetectionPlan((LESION,), Rules(), ANCHORS, 64, True)


def test_a_plan_is_read_as_written_and_impossible_values_are_refused() -> None:
    plans: dict[str, Any] = {"configurations": {"3d_fullres": {}}}

    assert read_plan(plans["configurations"]["3d_fullres"], "p") is None

    store(plans, "3d_fullres", BLOCK, PLAN)
    block = json.loads(json.dumps(plans))["configurations"]["3d_fullres"]

    assert read_plan(block, "p") == PLAN

    for key, value, code, named in [
        ("average_decay", 1.0, "detection-plan-range", "average_decay=1.0"),
        ("num_epochs", 0, "detection-plan-range", "num_epochs=0"),
        ("classification", "focl", "detection-plan-classification", "focal"),
    ]:
        wrong = {**block["autoreg_detection"], key: value}
        with refused(PlanError, code, "p: autoreg_detection", named):
            read_plan({"autoreg_detection": wrong}, "p")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("version", 2, "2"), ("nonsense", 1, "'nonsense'")],
)
def test_a_plan_of_another_format_is_refused(key: str, value: int, named: str) -> None:
    plans: dict[str, Any] = {"configurations": {"3d_fullres": {}}}
    store(plans, "3d_fullres", BLOCK, PLAN)
    block = plans["configurations"]["3d_fullres"]["autoreg_detection"]

    with pytest.raises(PlanError) as caught:
        read_plan({"autoreg_detection": {**block, key: value}}, "p")

    assert "p: autoreg_detection" in str(caught.value)
    assert named in str(caught.value)


def test_a_plan_made_for_other_classes_than_the_dataset_has_now_is_refused() -> None:
    check_same_dataset(PLAN, DATASET, "p")

    with refused(PlanError, "detection-plan-other-dataset", "p ", "classes"):
        check_same_dataset(PLAN, {**DATASET, "labels": {"background": 0, "tumour": 1}}, "p")
    with refused(PlanError, "detection-plan-other-dataset", "min_voxels: 3 -> 9"):
        check_same_dataset(PLAN, {**DATASET, "autoreg_detection": {"min_voxels": 9}}, "p")


def test_planning_takes_stride_4_and_says_how_well_the_anchors_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # One object is longer than the patch.
    sizes = {"lesion": [(8.0, 8.0, 8.0)] * 3 + [(70.0, 8.0, 8.0)]}
    strides = [(2, 2, 2), (4, 4, 4), (8, 8, 8)]

    plan = make_plan(DATASET, sizes, strides, (64, 64, 64), is_tiny=True, has_masks=False)

    assert plan.anchors.stages == (1, 2)
    assert plan.head_channels == 64
    assert not plan.has_masks
    assert "4 objects" in plan.reasons["anchors"]
    assert "boxesTr" in plan.reasons["has_masks"]
    assert logged(caplog, "1 of 4", "64 x 64 x 64")


def test_a_dataset_without_any_object_cannot_be_planned() -> None:
    with refused(PlanError, "detection-no-objects"):
        make_plan(DATASET, {"lesion": []}, [(4, 4, 4)], (32, 32, 32), is_tiny=True, has_masks=True)


def test_the_object_is_whole_in_what_augmentation_leaves_of_a_patch() -> None:
    np.random.seed(0)  # nnU-Net's loader draws from the global generator
    box = (20.0, 2.5, 30.0, 28.0, 7.5, 36.0)
    for _ in range(50):
        starts = patch_start(box, (40, 40, 40), (24, 24, 24), (16, 16, 16))

        for axis in range(3):
            # A patch of 24 is loaded, of which augmentation keeps the 16 in the middle, from 4 on.
            start = starts[axis] + 4
            assert 0 <= start <= 24
            assert start <= box[axis]
            assert start + 16 >= box[axis + 3]


def test_a_large_object_fills_the_patch_and_a_small_scan_is_centred() -> None:
    np.random.seed(0)
    # The object has 30 voxels in z, from 5 to 35, the scan has 10 in y, and the patch 16.
    box = (5.0, 0.0, 0.0, 35.0, 4.0, 4.0)
    starts = [patch_start(box, (40, 10, 40), (16, 16, 16), (16, 16, 16)) for _ in range(50)]

    in_z = [start[0] for start in starts]
    # From 5 to 35 - 16: the patch lies inside the object, at places that differ.
    assert min(in_z) >= 5
    assert max(in_z) <= 19
    assert len(set(in_z)) > 5
    # (10 - 16) / 2: three voxels of padding on either side.
    assert {start[1] for start in starts} == {-3}


def test_boxes_of_a_patch_fit_the_voxels_left_and_remains_are_ignored() -> None:
    # -1 is padding. Object 7 has 2 x 2 x 2 voxels left of its 50, object 9 only two.
    ids = np.full((6, 6, 6), -1, np.int16)
    ids[1:6] = 0
    ids[1:3, 0:2, 0:2] = 7
    ids[5, 5, 4:6] = 9
    known = {7: Instance(7, 1, (0, 0, 0, 9, 9, 9), 50), 9: Instance(9, 0, (0, 0, 0, 9, 9, 9), 50)}

    found = objects_of_patch(ids, known, min_voxels=3)

    assert found["boxes"].tolist() == [[1, 0, 0, 3, 2, 2], [5, 5, 4, 6, 6, 6]]
    assert found["labels"].tolist() == [1, 0]
    assert found["ignored"].tolist() == [False, True]


def output_of(logit: float, anchor: int, deltas: Any = None) -> tuple[Output, Any]:
    """An output over 8^3 voxels with cells of 4; all anchors but one have a score near 0."""
    grid = lay_out(ANCHORS, [(2, 2, 2)])
    scores = torch.full((1, 8, 1), -20.0)
    scores[0, anchor, 0] = logit
    segmentation = torch.zeros(1, 2, 8, 8, 8)
    if deltas is None:
        deltas = torch.zeros(1, 8, 6)
    return Output(segmentation, scores, deltas, ((2, 2, 2),)), grid


def test_a_confident_anchor_becomes_its_box_clipped_to_the_patch() -> None:
    deltas = torch.zeros(1, 8, 6)
    # Half an anchor towards -x: x from -2 to 2.
    deltas[0, 0, 2] = -0.5
    output, grid = output_of(3.0, 0, deltas)

    (found,) = boxes_of_output(output, grid)

    assert found.boxes_N6.tolist() == [[0.0, 0.0, 0.0, 4.0, 4.0, 2.0]]
    assert found.scores_N.item() == pytest.approx(1 / (1 + np.exp(-3.0)))


def test_tile_weights_fall_to_the_border_and_mirroring_twice_is_neutral() -> None:
    # Centres in the middle of the tile, at the border of z, and half-way between both.
    boxes = torch.tensor(
        [
            [3.0, 3.0, 3.0, 5.0, 5.0, 5.0],
            [0.0, 3.0, 3.0, 0.0, 5.0, 5.0],
            [1.0, 3.0, 3.0, 3.0, 5.0, 5.0],
        ],
    )

    assert tile_weights(boxes, (8, 8, 8)).tolist() == [1.0, 0.5, 0.75]

    once = mirrored(boxes, (0, 2), (8, 8, 8))

    # z: from 1..3 to 8 - 3..8 - 1; x: 3..5 is symmetric.
    assert once[2].tolist() == [5.0, 3.0, 3.0, 7.0, 5.0, 5.0]
    assert torch.equal(mirrored(once, (0, 2), (8, 8, 8)), boxes)


def test_boxes_of_one_member_are_suppressed_and_of_two_members_merged() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [20, 20, 20, 24, 24, 24]])
    scores = torch.tensor([0.8, 0.9, 0.5])
    labels = torch.zeros(3, dtype=torch.long)
    one_member = torch.zeros(3, dtype=torch.long)
    # The first has the lower score, but the second was cut by its tile.
    tiles = torch.tensor([1.0, 0.5, 1.0])

    one = merge(Candidates(boxes, scores, labels, tiles, one_member), num_members=1)

    assert one.boxes_N6.tolist() == boxes[[0, 2]].tolist()
    assert one.votes_N.tolist() == [1, 1]

    two_members = torch.tensor([0, 1, 0])
    two = merge(Candidates(boxes, scores, labels, torch.ones(3), two_members), num_members=2)

    assert two.votes_N.tolist() == [2, 1]
    # The third box lacks a vote: half its score.
    assert two.scores_N[1].item() == pytest.approx(0.25)


class BrightIsObject(torch.nn.Module):
    """Says, for every anchor of 4^3 voxels, that there is an object if its voxels are bright."""

    def forward(self, image: torch.Tensor) -> Output:
        bright = torch.nn.functional.avg_pool3d(image, 4)
        scores = (bright * 20 - 10).flatten()[None, :, None]
        cells = (bright.shape[2], bright.shape[3], bright.shape[4])
        segmentation = torch.cat([-image, image], 1)
        deltas = torch.zeros(1, scores.shape[1], 6)
        return Output(segmentation, scores, deltas, (cells,))


@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_tiles_and_mirrorings_find_an_object_and_average_the_logits(
    axes: tuple[int, ...],
) -> None:
    image = torch.zeros(1, 12, 6, 16)
    image[0, 4:8, 0:4, 8:12] = 1
    network: Any = BrightIsObject()
    # Two tiles along x, at 0 and 4: the second has the object whole, at the border of the first it
    # is cut.
    detector = ScanDetector(network, ANCHORS, (12, 8, 12), torch.device("cpu"), mirror_axes=axes)

    candidates, logits = detector.candidates(image, with_logits=True)
    found = merge(candidates, detector.num_members)

    # The scan is padded from 6 to 8 voxels, one on either side, so that a cell holds three quarters
    # of the object.
    z_low, _, x_low, z_high, _, x_high = found.boxes_N6[0].tolist()
    assert (z_low, x_low, z_high, x_high) == (4.0, 8.0, 8.0, 12.0)
    # 20 x 0.75 - 10 = 5.
    assert found.scores_N[0].item() == pytest.approx(1 / (1 + np.exp(-5.0)), abs=1e-4)
    assert logits is not None
    assert logits.shape == (2, 12, 6, 16)
    torch.testing.assert_close(logits[1], image[0], atol=1e-5, rtol=1e-5)


def test_the_average_forgets_slowly_and_checkpoints_hold_both() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    average = MovingAverage(network, decay=0.9)
    average.attach(optimizer)
    torch.nn.init.ones_(network.weight)
    average.update(step=0)

    # Early: factor (1 + 0) / (10 + 0), so 0.1 x 0 + 0.9 x 1.
    assert average.values[0].item() == pytest.approx(0.9)

    # Later: the decay of 0.9, so 0.9 x 0.9 + 0.1 x 1.
    average.update(step=1000)

    assert average.values[0].item() == pytest.approx(0.91)

    # A checkpoint has the average as the network, which nnU-Net loads, and the trained weights
    # beside.
    with average.saved():
        saved = {
            "network": {k: v.clone() for k, v in network.state_dict().items()},
            "optimizer": optimizer.state_dict(),
        }

    assert network.weight.item() == 1
    assert saved["network"]["weight"].item() == pytest.approx(0.91)
    assert WEIGHTS_KEY not in optimizer.state_dict()

    # A run that continues gets both back.
    other = torch.nn.Linear(1, 1, bias=False)
    again = torch.optim.SGD(other.parameters(), lr=1.0)
    continued = MovingAverage(other, decay=0.9)
    continued.attach(again)
    other.load_state_dict(saved["network"])
    again.load_state_dict(saved["optimizer"])
    continued.restore()

    assert other.weight.item() == 1
    assert continued.values[0].item() == pytest.approx(0.91)


def objects(*boxes: Any) -> dict[str, Any]:
    number = len(boxes)
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 6),
        "labels": np.zeros(number, np.int64),
        "ignored": np.zeros(number, bool),
    }


@pytest.mark.parametrize("has_masks", [True, False])
def test_losses_have_all_gradients_with_and_without_objects_and_masks(
    has_masks: bool,
) -> None:
    plan = replace(PLAN, has_masks=has_masks)
    of_labels = make_segmentation_loss(False, None, False)
    detection_loss = DetectionLoss(plan, of_labels, None, None)
    labels = torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16)
    labels[..., :4, :4, :4] = 1
    for there in (objects([0, 0, 0, 4, 4, 4]), objects()):
        parts = [torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 8, 1), torch.zeros(1, 8, 6)]
        for part in parts:
            part.requires_grad_(True)

        losses = detection_loss.losses(Output(*parts, ((2, 2, 2),)), labels, [there])
        losses.total.backward()

        assert all(part.grad is not None for part in parts)
        # Masks drawn from boxes are not trained on.
        assert (losses.segmentation.item() != 0) is has_masks
        # The only object is an anchor, so deltas of 0 are right.
        assert losses.regression.item() == pytest.approx(0.0, abs=1e-6)


def test_regions_and_the_ignore_label_become_channels_on_the_device() -> None:
    detection_loss = DetectionLoss(PLAN, make_segmentation_loss(True, 3, False), [(1, 2), 2], 3)
    # Voxels of the values 0 to 3; the regions are (1, 2) and 2, and 3 is to be ignored.
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.int16).reshape(1, 1, 4, 1, 1)

    assert detection_loss.target(labels)[0, :, :, 0, 0].int().tolist() == [
        [0, 1, 1, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]

    # Every voxel is predicted as both regions. Of the three that count, (1, 2) is right in two and
    # 2 in one.
    logits = torch.ones(1, 2, 4, 1, 1)
    everything = Output(logits, torch.zeros(1, 0, 1), torch.zeros(1, 0, 6), ())
    found = detection_loss.confusion(everything, labels)

    counts = [found[name].tolist() for name in ("tp_hard", "fp_hard", "fn_hard")]
    assert counts == [[2, 1], [1, 2], [0, 0]]
    # 2 x 2 / (2 x 2 + 1) and 2 x 1 / (2 x 1 + 2).
    assert mean_dice([found]) == [pytest.approx(4 / 5), pytest.approx(2 / 4)]


def test_anchors_and_boxes_in_voxels_of_the_ignore_label_do_not_count() -> None:
    plan = replace(PLAN, classification="focal")
    of_labels = make_segmentation_loss(False, 2, False)
    detection_loss = DetectionLoss(plan, of_labels, None, 2)
    labels = torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16)
    there = [objects([0, 0, 0, 4, 4, 4])]
    logits = torch.full((1, 8, 1), -4.0)
    # Anchor 7 lies around (6, 6, 6), and is sure of an object that nobody labelled.
    logits[0, 7] = 4.0
    output = Output(torch.zeros(1, 2, 8, 8, 8), logits, torch.zeros(1, 8, 6), ((2, 2, 2),))

    wrong = detection_loss.losses(output, labels, there).classification.item()
    labels[..., 5:, 5:, 5:] = 2
    uncounted = detection_loss.losses(output, labels, there).classification.item()

    # Focal loss by hand: one positive that is missed, six negatives that are not, and the one that
    # is wrong.
    score = 1 / (1 + math.exp(4))
    large = math.log1p(math.exp(4))
    small = math.log1p(math.exp(-4))
    missed = 0.75 * (1 - score) * large
    right = 6 * 0.25 * score * small
    assert uncounted == pytest.approx(missed + right, rel=1e-5)
    assert wrong - uncounted == pytest.approx(0.25 * (1 - score) * large, rel=1e-5)

    # The score of an epoch leaves out the same box.
    grid = detection_loss.grid(output)
    region = detection_loss.uncounted(labels)
    (scan,) = patches_scored(output, grid, there, 0, region)
    assert match_scan(scan, 0, HitRule()).ignored.tolist()[:1] == [True]

    (scan,) = patches_scored(output, grid, there, 0)
    assert not match_scan(scan, 0, HitRule()).ignored.any()


def test_the_number_of_threads_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", limits.append)
    # Only "3" is a number of threads; the others are as if nothing was set.
    for value in ("3", "", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        keep_thread_limit()
    monkeypatch.delenv("OMP_NUM_THREADS")
    keep_thread_limit()

    assert limits == [3]


def test_norms_and_biases_are_not_decayed_even_by_sgd() -> None:
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.InstanceNorm3d(2, affine=True))
    group = {"params": list(network.parameters()), "rate_factor": 1.0, "weight_decay": 0.1}

    groups = without_decay_on_norms([group], network)

    # The kernel of the convolution; its bias, and weight and bias of the norm.
    found = [(g["weight_decay"], len(g["params"]), g["rate_factor"]) for g in groups]
    assert found == [(0.1, 1, 1.0), (0.0, 3, 1.0)]


def test_scores_of_patches_leave_out_absent_classes() -> None:
    box = [0, 0, 0, 4, 4, 4]
    # Class 1 is found; a box of class 0, which no patch has, does not count.
    perfect = scan_boxes("a", (1, 1, 1), ([box], [1], [False]), ([box, box], [1, 0], [0.9, 0.8]))

    assert quick_scores([perfect], 3) == {"ap_0.1": 1.0, "ap_0.5": 1.0, "map_0.1:0.5:0.05": 1.0}

    empty = scan_boxes("b", (1, 1, 1), ([], [], []), ([], [], []))

    assert quick_scores([empty], 3) == {"ap_0.1": 0.0, "ap_0.5": 0.0, "map_0.1:0.5:0.05": 0.0}


# Boxes that end at z 0, at z 8, at x 8, and inside.
def test_boxes_are_cut_between_tiles_and_not_at_the_borders_of_the_image() -> None:
    boxes = torch.tensor(
        [[0.0, 2, 2, 4, 4, 4], [2, 2, 2, 8, 4, 4], [2, 2, 2, 4, 4, 8], [1, 2, 2, 7, 4, 4]],
    )

    # A tile of 8 at z 0 of 12, y and x filling the image: only z 8 is between tiles.
    first = ends_between_tiles(boxes, (0, 0, 0), (8, 8, 8), (12, 8, 8))
    assert first.tolist() == [False, True, False, False]
    # A tile at z 4: only its lower end is.
    second = ends_between_tiles(boxes, (4, 0, 0), (8, 8, 8), (12, 8, 8))
    assert second.tolist() == [True, False, False, False]
