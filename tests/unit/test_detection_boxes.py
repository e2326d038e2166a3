"""Boxes, anchors and the detection loss: by hand, and against MONAI's."""

import math

import numpy as np
import pytest
import torch
from refusals import logged, refused

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.detection.anchors import AnchorPlan, choose_levels, lay_out, match, plan_anchors
from nnunet_autoreg.detection.loss import (
    PatchObjects,
    anchor_losses,
    box_loss,
    focal,
    sample_hard_negatives,
    segmentation_loss,
)
from nnunet_autoreg.errors import PlanError

WHY_MONAI = "MONAI is the oracle of this test; pip install 'nnunet-autoreg[test]'"


def some_boxes(number, seed, extent=60.0, largest=24.0):
    """Boxes with sides of 1 to ``largest``, whose lower corners lie within ``extent``."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, extent, (number, 3))
    high = low + random.uniform(1, largest, (number, 3))
    return torch.tensor(np.concatenate([low, high], 1), dtype=torch.float32)


CUBE = torch.tensor([[0.0, 0, 0, 2, 2, 2]])


def test_iou_counts_voxels_of_half_open_boxes():
    # Half a cube further in z, beside it, the same, and an empty box.
    others = torch.tensor(
        [[1.0, 0, 0, 3, 2, 2], [2.0, 0, 0, 4, 2, 2], [0.0, 0, 0, 2, 2, 2], [0.0, 0, 0, 0, 2, 2]],
    )

    # The first has 1 x 2 x 2 voxels in common: 4 / (8 + 8 - 4).
    assert bx.iou(CUBE, others)[0].tolist() == pytest.approx([4 / 12, 0, 1, 0])
    assert bx.iou(others[3:], others[3:]).item() == 0
    assert bx.pair_iou(CUBE.expand(4, -1), others).tolist() == pytest.approx([4 / 12, 0, 1, 0])
    # Touching: no common voxel, and the hull is as large as the union; 2 apart: the hull has 24
    # voxels, 8 of them in neither.
    assert bx.pair_giou(CUBE, others[1:2]).item() == 0
    assert bx.pair_giou(CUBE, torch.tensor([[4.0, 0, 0, 6, 2, 2]])).item() == pytest.approx(-8 / 24)


def test_half_precision_boxes_are_measured_in_float32():
    # 300^3 = 27 000 000 is far beyond the largest number of float16, 65 504.
    large = torch.tensor([[0.0, 0, 0, 300, 300, 300]]).half()

    assert bx.volumes(large).item() == 300**3
    assert bx.iou(large, large).item() == 1


def test_iou_and_giou_equal_monais():
    oracle = pytest.importorskip("monai.data.box_utils", reason=WHY_MONAI)
    a = some_boxes(80, 1)
    b = some_boxes(80, 2)

    assert (bx.iou(a, b) - oracle.box_iou(a, b)).abs().max() < 1e-6
    assert (bx.pair_giou(a, b) - oracle.box_pair_giou(a, b)).abs().max() < 1e-6


def test_deltas_decode_to_the_boxes_they_were_made_of():
    boxes = some_boxes(50, 3)
    anchors = some_boxes(50, 4)
    # Sides of 3 and more, so that no ratio of sides amplifies the rounding of float32.
    anchors[:, 3:] += 2
    boxes[:, 3:] += 2

    assert (bx.decode(bx.encode(boxes, anchors), anchors) - boxes).abs().max() < 1e-4

    anchor = torch.tensor([[0.0, 0, 0, 4, 8, 2]])
    # The middle moves from (2, 4, 1) to (4, 8, 1), by half a side of the anchor; the y side
    # doubles.
    code = bx.encode(torch.tensor([[2.0, 0, 0, 6, 16, 2]]), anchor)[0]

    assert code.tolist() == pytest.approx([0.5, 0.5, 0, 0, np.log(2), 0])
    # A delta of 1e4 would be exp(1e4) without a limit.
    assert torch.isfinite(bx.decode(torch.full((1, 6), 1e4), anchor)).all()


def plain_nms(boxes, scores, threshold):
    """Suppress by the definition: the best first, and each that overlaps no better one too much."""
    kept = []
    overlap = bx.iou(boxes, boxes).tolist()
    for i in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        if all(overlap[i][j] <= threshold for j in kept):
            kept.append(i)
    return kept


def test_nms_keeps_what_the_definition_keeps_over_several_blocks():
    boxes = some_boxes(300, 5, extent=30)
    scores = torch.rand(300, generator=torch.Generator().manual_seed(0))
    kept = plain_nms(boxes, scores, 0.2)
    assert bx.nms(boxes, scores, 0.2).tolist() == kept
    assert bx.nms(boxes, scores, 0.2, max_kept=3).tolist() == kept[:3]
    assert bx.nms(boxes, scores, 0.2, max_kept=0).tolist() == []
    assert bx.nms(boxes[:0], scores[:0], 0.2).tolist() == []


def test_labels_keep_boxes_from_suppressing_each_other():
    # Three equal boxes of two labels: one box of each label stays, the better one first.
    boxes = CUBE.repeat(3, 1)
    labels = torch.tensor([0, 1, 0])
    scores = torch.tensor([0.1, 0.9, 0.5])

    assert bx.nms(boxes, scores, 0.5, labels).tolist() == [1, 2]


def test_nms_of_5000_boxes_compares_each_pair_once_in_a_few_large_steps(monkeypatch):
    boxes = some_boxes(5000, 6, extent=300)
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    plain = bx.iou
    pairs = []

    def counted(a, b):
        pairs.append(len(a) * len(b))
        return plain(a, b)

    monkeypatch.setattr(bx, "iou", counted)

    assert len(bx.nms(boxes, scores, 0.5)) > 4000
    # A block is compared with itself and once with all that follow: a little more than half of all
    # pairs in two calls per block.
    num_blocks = math.ceil(5000 / bx.CHUNK)
    assert len(pairs) == 2 * num_blocks
    assert sum(pairs) < 0.55 * 5000**2


def test_clusters_weigh_boxes_by_votes_and_punish_missing_ones():
    boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0.0, 0, 0, 4, 4, 2], [20.0, 20, 20, 24, 24, 24]])
    scores = torch.tensor([0.8, 0.4, 0.6])
    labels = torch.zeros(3, dtype=torch.long)
    expected = torch.full((3,), 3.0)

    merged, score, labels, votes = bx.cluster(boxes, scores, labels, 0.4, expected_N=expected)

    # First cluster: weights 1 and IoU 1/2, votes .8 and .2; one of three is missing: 1.0 / (1.5 +
    # 0.75).
    assert votes.tolist() == [2, 1]
    assert labels.tolist() == [0, 0]
    assert score.tolist() == pytest.approx([1.0 / 2.25, 0.6 / 3])
    assert merged[0].tolist() == pytest.approx([0, 0, 0, 4, 4, 0.8 * 4 + 0.2 * 2])


def test_clusters_do_not_mix_labels_and_may_be_empty():
    boxes = CUBE.repeat(2, 1)

    _, score, labels, votes = bx.cluster(boxes, torch.tensor([0.2, 0.7]), torch.tensor([3, 1]), 0.1)

    assert labels.tolist() == [1, 3]
    assert votes.tolist() == [1, 1]
    assert score.tolist() == pytest.approx([0.7, 0.2])

    no_labels = torch.zeros(0, dtype=torch.long)
    empty = bx.cluster(boxes[:0], torch.zeros(0), no_labels, 0.1)
    assert [len(part) for part in empty] == [0, 0, 0, 0]


STRIDES = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32))


def test_levels_start_at_stride_4_and_at_2_for_small_objects_only():
    def levels(side):
        return choose_levels(np.full((10, 3), side), STRIDES)

    assert levels(16.0) == [2, 3]
    assert levels(3.0) == [1, 2]
    assert levels(64.0) == [2, 3, 4]
    # Coarse slices: z is not shrunk at first, so the stage with stride 4 in the plane counts.
    coarse = [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8)]
    assert choose_levels(np.full((10, 3), 9.0), coarse) == [2, 3]


def test_one_shape_is_enough_for_objects_of_one_shape_on_two_levels():
    plan = plan_anchors({"a": [(16, 16, 16)] * 5, "b": [(32, 32, 32)] * 5}, STRIDES)

    # A shape is doubled from level to level, so the objects of 32 have their anchor as well.
    assert plan.shapes_vox == ((16.0, 16.0, 16.0),)
    assert plan.mean_iou == 1.0
    assert plan.strides_vox == ((4, 4, 4), (8, 8, 8))
    assert plan.unreachable == {"a": 0.0, "b": 0.0}


def test_shapes_are_as_few_as_reach_the_mean_iou_and_the_same_every_time():
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(np.log([8, 16, 16]), 0.3, (200, 3)))

    plan, again = (plan_anchors({"x": sizes.tolist()}, STRIDES) for _ in range(2))

    assert plan == again
    assert plan.mean_iou >= 0.7
    assert 1 < plan.num_shapes <= 12

    # One shape for all of them, their geometric mean, is not enough.
    middle = np.exp(np.log(sizes).mean(0))
    common = np.minimum(sizes, middle).prod(1)
    union = sizes.prod(1) + middle.prod() - common
    assert (common / union).mean() < 0.7


def test_objects_out_of_reach_are_warned_about_with_their_share(caplog):
    # Without the levels of the strides 1 and 2 the smallest anchors are far larger than one voxel.
    plan = plan_anchors({"big": [(12, 12, 12)] * 30, "speck": [(1, 1, 1)] * 2}, STRIDES[2:])

    assert plan.unreachable == {"big": 0.0, "speck": 1.0}
    assert logged(caplog, "100.0 %", "'speck'")
    assert not logged(caplog, "'big'")


def test_impossible_anchor_plans_are_refused():
    with refused(PlanError, "detection-no-objects", "min_voxels", "detect_labels"):
        plan_anchors({"a": []}, STRIDES)
    with refused(PlanError, "detection-object-without-extent", "(3.0, 0.0, 3.0)"):
        plan_anchors({"a": [(3, 0, 3)]}, STRIDES)
    with refused(PlanError, "detection-no-stage"):
        plan_anchors({"a": [(3, 3, 3)]}, [])
    with refused(PlanError, "detection-levels", 1, 2):
        lay_out(plan_of(((4, 4, 4),)), [(2, 2, 2)])


# Two levels: cells of 4 and of 8 voxels.
def plan_of(shapes, strides=((4, 4, 4), (8, 8, 8))):
    return AnchorPlan(tuple(range(len(strides))), strides, shapes, 1.0, {})


def test_anchors_lie_level_by_level_cell_by_cell_around_the_cells_centres():
    grid = lay_out(plan_of(((4, 4, 4), (2, 2, 8))), [(2, 2, 3), (1, 1, 2)])

    # 12 cells and 2 cells with two shapes each.
    assert grid.boxes_A6.shape == ((12 + 2) * 2, 6)
    assert grid.boxes_A6[0].tolist() == [0, 0, 0, 4, 4, 4]
    # The second shape in the cell (0, 0, 1), whose centre is (2, 2, 6).
    assert grid.boxes_A6[3].tolist() == [1, 1, 2, 3, 3, 10]
    # The first shape, twice as large, in the last cell of the second level: centre (4, 4, 12).
    assert grid.boxes_A6[-2].tolist() == [0, 0, 8, 8, 8, 16]


def test_an_object_gets_the_anchors_that_overlap_it_most():
    grid = lay_out(plan_of(((4, 4, 4),), ((4, 4, 4),)), [(4, 4, 4)])

    matched = match(torch.tensor([[4.0, 4, 4, 8, 8, 8]]), grid)

    # The object is the anchor of the cell (1, 1, 1) of 4 x 4 x 4 cells.
    assert (matched >= 0).nonzero().tolist() == [[1 * 16 + 1 * 4 + 1]]
    assert match(torch.zeros(0, 6), grid).tolist() == [-1] * 64


def test_an_object_that_touches_no_candidate_still_gets_one():
    # Anchors are 1 voxel in the middle of cells of 4; the object is in a corner of the first cell.
    grid = lay_out(plan_of(((1, 1, 1),), ((4, 4, 4),)), [(2, 2, 2)])

    matched = match(torch.tensor([[0.0, 0, 0, 0.5, 0.5, 0.5]]), grid)

    assert matched.tolist() == [0] + [-1] * 7


def test_an_anchor_wanted_twice_goes_to_the_object_it_overlaps_most():
    grid = lay_out(plan_of(((8, 8, 8),), ((4, 4, 4),)), [(4, 4, 4)])
    # The anchor of cell (1, 1, 1) is the second object and has IoU 3/4 with the first, whose next
    # best is that of (1, 1, 0).
    objects = torch.tensor([[2.0, 2, 2, 10, 10, 8], [2.0, 2, 2, 10, 10, 10]])

    matched = match(objects, grid)

    assert matched[21] == 1
    assert matched[20] == 0
    assert (matched >= 0).sum() == 2


@pytest.mark.parametrize("centre_inside", [False, True])
def test_atss_positives_contain_monais(centre_inside):
    oracle = pytest.importorskip("monai.apps.detection.utils.ATSS_matcher", reason=WHY_MONAI)
    # Every level has cells enough for MONAI's candidates, which it caps by cells.
    # Every level has cells enough for MONAI's candidates, which it caps by cells.
    shapes = ((7, 8, 9), (9, 14, 14), (12, 20, 11))
    grid = lay_out(plan_of(shapes, ((4, 4, 4), (8, 8, 8))), [(20, 20, 20), (10, 10, 10)])
    matcher = oracle.ATSSMatcher(4, center_in_gt=centre_inside)
    theirs_all, common = 0, 0
    for seed in range(6):
        objects = some_boxes(12, 10 + seed, extent=52, largest=26)
        objects[:, 3:] = torch.maximum(objects[:, 3:], objects[:, :3] + 6)

        # 20^3 and 10^3 cells with three anchors each.
        _, theirs = matcher(objects, grid.boxes_A6, [8000, 1000], 3)
        ours = match(objects, grid, centre_inside=centre_inside)
        theirs_all += int((theirs >= 0).sum())
        common += int(((theirs >= 0) & (ours == theirs)).sum())

    # Ours has positives of its own: every object gets an anchor. Ties may be decided differently.
    assert theirs_all > 100
    assert common >= 0.999 * theirs_all


def batch(objects, grid, classes=2):
    """Random logits and deltas of 0 for every anchor; both want a gradient."""
    random = torch.Generator().manual_seed(0)
    anchors = len(grid.boxes_A6)
    logits = torch.randn(len(objects), anchors, classes, generator=random, requires_grad=True)
    deltas = torch.zeros(len(objects), anchors, 6, requires_grad=True)
    return logits, deltas


# 4 x 4 x 4 cells with one anchor each; ONE is exactly the anchor 21 of the cell (1, 1, 1).
GRID = lay_out(plan_of(((4, 4, 4),), ((4, 4, 4),)), [(4, 4, 4)])
NOTHING = PatchObjects(
    torch.zeros(0, 6),
    torch.zeros(0, dtype=torch.long),
    torch.zeros(0, dtype=torch.bool),
)
ONE = PatchObjects(torch.tensor([[4.0, 4, 4, 8, 8, 8]]), torch.tensor([1]), torch.tensor([False]))


@pytest.mark.parametrize("classification", ["hard_negatives", "focal"])
def test_a_batch_without_objects_has_a_loss_and_all_gradients(classification):

    logits, deltas = batch([NOTHING, NOTHING], GRID)

    loss = anchor_losses(logits, deltas, GRID, [NOTHING, NOTHING], classification=classification)

    (loss.classification + loss.regression).backward()

    assert loss.num_positive == 0
    assert loss.regression.item() == 0
    assert loss.classification.item() > 0
    assert deltas.grad.abs().max() == 0
    assert logits.grad.abs().max() > 0


def test_a_perfect_detector_has_no_loss_and_a_wrong_class_costs():
    logits = torch.full((1, 64, 2), -30.0)
    deltas = torch.zeros(1, 64, 6)

    logits[0, 21, 1] = 30.0

    right = anchor_losses(logits, deltas, GRID, [ONE])

    assert right.num_positive == 1
    assert right.classification.item() < 1e-6
    assert right.regression.item() == pytest.approx(0, abs=1e-6)

    wrong = anchor_losses(logits.flip(-1), deltas, GRID, [ONE])

    # One positive and two negatives with two classes each; both entries of the positive are wrong
    # by 30.
    assert wrong.classification.item() == pytest.approx(60 / 6)


def test_an_ignored_object_is_neither_found_nor_background():
    ignored = PatchObjects(ONE.boxes_G6, ONE.labels_G, torch.tensor([True]))
    logits = torch.full((1, 64, 2), -30.0)
    logits[0, 21] = 30.0
    deltas = torch.zeros(1, 64, 6)

    def classification(objects, **kind):
        return anchor_losses(logits, deltas, GRID, [objects], **kind).classification.item()

    # Focal: it takes every anchor, and not a drawn few.
    assert classification(ignored, classification="focal") < 1e-6
    # Without the object the same logits are a false detection.
    assert classification(NOTHING, classification="focal") > 1
    assert classification(ignored) < 1e-6


def test_negatives_are_the_hardest_and_shared_by_the_whole_batch():
    # Three positives in the first image, one ignored anchor in the second, which has all the
    # hard negatives.
    state = torch.zeros(2, 1000, dtype=torch.long)
    state[0, :3], state[1, 5] = 1, -1
    hardness = torch.zeros(2, 1000)
    hardness[1, :130] = 1.0

    chosen = sample_hard_negatives(state, hardness, torch.Generator().manual_seed(0))

    assert chosen[0, :3].all()
    assert chosen.sum() == 3 + 6
    # The pool of 6 x 20 hardest lies in the second image; its left-out anchor is never drawn.
    assert chosen[1, :130].sum() == 6
    assert not chosen[1, 5]

    many = torch.ones(2, 100, dtype=torch.long)

    # At most a third of 2 x 32 anchors may be positive: 21 (and here there are no negatives).
    # Without
    # any positive, two negatives are drawn.
    assert sample_hard_negatives(many, torch.zeros(2, 100)).sum() == 21
    none = torch.zeros(1, 50, dtype=torch.long)
    assert sample_hard_negatives(none, torch.zeros(1, 50)).sum() == 2


def test_focal_loss_and_box_loss_by_hand():
    logits = torch.zeros(1, 2, 1)
    target = torch.tensor([[[1.0], [0.0]]])

    # ln 2 x 0.5 x (0.75 + 0.25), over one positive.
    found = focal(logits, target, torch.ones(1, 2, dtype=torch.bool), 1)
    assert found.item() == pytest.approx(np.log(2) / 2)

    # The box moved by half its side: IoU 4 / 12, and the hull has no other voxels, so the loss is
    # 1 - 1/3.
    anchors = CUBE[None]
    wanted = torch.tensor([[[1.0, 0, 0, 3, 2, 2]]])
    is_positive = torch.ones(1, 1, dtype=torch.bool)
    found = box_loss(torch.zeros(1, 1, 6), anchors, wanted, is_positive)
    assert found.item() == pytest.approx(2 / 3)


def test_half_precision_outputs_give_a_float32_loss():
    logits, deltas = batch([ONE], GRID)

    loss = anchor_losses(logits.half(), deltas.half(), GRID, [ONE])

    assert loss.classification.dtype == loss.regression.dtype == torch.float32
    with refused(PlanError, "detection-classification-loss", "focl", "focal"):
        anchor_losses(logits, deltas, GRID, [ONE], classification="focl")


def test_the_segmentation_loss_is_half_cross_entropy_and_half_dice():
    logits = torch.zeros(2, 2, 4, 4, 4)
    target = torch.zeros(2, 1, 4, 4, 4)
    target[0, 0, :2] = 1

    # Half of 128 voxels' probability 0.5 against 32 voxels: Dice = 2 x 16 / (64 + 32), negated by
    # nnU-Net.
    expected = 0.5 * np.log(2) - 0.5 * 32 / 96
    assert segmentation_loss()(logits, target).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_matches_and_scores_as_the_cpu_does():
    boxes = some_boxes(500, 7)
    scores = torch.rand(500, generator=torch.Generator().manual_seed(2))

    assert bx.nms(boxes.cuda(), scores.cuda(), 0.3).tolist() == bx.nms(boxes, scores, 0.3).tolist()

    plan = plan_of(((7, 8, 9), (12, 20, 11)))
    here, there = (lay_out(plan, [(10, 10, 10), (5, 5, 5)], device) for device in ("cpu", "cuda"))
    objects = PatchObjects(
        some_boxes(6, 8, extent=30),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        torch.tensor([False] * 5 + [True]),
    )

    assert match(objects.boxes_G6.cuda(), there).tolist() == match(objects.boxes_G6, here).tolist()

    logits, deltas = batch([objects, NOTHING], here)
    losses = []
    for device, grid in (("cpu", here), ("cuda", there)):
        # The draw of negatives comes from a generator on the CPU, so it is the same.
        generator = torch.Generator().manual_seed(0)
        both = [objects, NOTHING]
        loss = anchor_losses(logits.to(device), deltas.to(device), grid, both, generator=generator)
        losses.append(loss)

    on_cpu, on_gpu = losses
    assert on_cpu.regression.item() == pytest.approx(on_gpu.regression.item(), rel=1e-4)
    assert on_cpu.classification.item() == pytest.approx(on_gpu.classification.item(), rel=1e-4)
