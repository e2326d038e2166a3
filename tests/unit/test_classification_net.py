"""The classifier's network, loss, plan and loader."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch.nn import functional

from nnunet_autoreg.classification.data import ClassLoader
from nnunet_autoreg.classification.net import ClassificationLoss, Classifier, smoothed
from nnunet_autoreg.classification.plan import (
    BLOCK,
    NONE,
    SAMPLING,
    WEIGHTS,
    ClassificationPlan,
    check,
    check_same_table,
    classification_recipe,
    make_plan,
    read_plan,
)
from nnunet_autoreg.classification.table import ClassificationTask, ClassTable
from nnunet_autoreg.classification.validate import patch_scores
from nnunet_autoreg.downstream.plan_block import store
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import CLASS_PATHS, PRIMUS, RESENC, VIT
from nnunet_autoreg.finetune.block import ADAMW, SGD, Recipe
from nnunet_autoreg.finetune.recipe import parameter_groups
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.feature_maps import FeatureEncoder
from nnunet_autoreg.model.sizes import ENCODERS

SEX = ClassificationTask("sex", ("F", "M"))
GRADE = ClassificationTask("grade", ("1", "2", "3"), ordinal=True)
CPU = torch.device("cpu")
# One token of a transformer is 8^3 voxels, so a patch has 2 x 2 x 2 tokens.
PATCH = (16, 16, 16)


def table_of(tasks: tuple[ClassificationTask, ...], rows: list[tuple[int, ...]]) -> ClassTable:
    labels = {f"c{n:02}": row for n, row in enumerate(rows)}
    return ClassTable(tasks, labels, {case: case for case in labels}, "", {})


def plan_of(*tasks: ClassificationTask, **changes: Any) -> ClassificationPlan:
    counts = tuple((1,) * len(task.classes) for task in tasks)
    return replace(ClassificationPlan(tasks, counts, NONE, 10, 2), **changes)


def classifier(encoder: str = "resenc_tiny", tasks: tuple[int, ...] = (2, 3)) -> Classifier:
    size = ENCODERS[encoder]
    torch.manual_seed(0)
    # The number of output channels (2) does not matter: a classifier drops the decoder.
    network = build_network(size.class_path, size.arguments, PATCH, 1, 2)

    made = Classifier(network, size.class_path, size.arguments, PATCH, tasks)
    made.gives_classes = True
    return made.eval()


@pytest.mark.parametrize("encoder", ["resenc_tiny", "primus_tiny", "primus_v2_tiny"])
def test_every_family_gives_the_logits_of_every_task(encoder: str) -> None:
    network = classifier(encoder)

    logits = network(torch.randn(2, 1, *PATCH))

    assert [tuple(values.shape) for values in logits] == [(2, 2), (2, 3)]
    # The decoder of the segmentation network would only be dead weight in the checkpoint.
    assert not any(key.startswith(("decoder", "up_projection")) for key in network.state_dict())


def test_the_form_of_ar_ssl4ms_encoder_gives_logits_and_maps_too() -> None:
    arguments = {"embed_dim": 24, "patch_embed_size": [8, 8, 8], "eva_depth": 3, "eva_numheads": 2}
    vit = build_network(CLASS_PATHS[VIT], arguments, PATCH, 1, 2)
    network = Classifier(vit, CLASS_PATHS[VIT], arguments, PATCH, (2,)).eval()
    network.gives_classes = True
    volume = torch.randn(2, 1, *PATCH)

    maps = FeatureEncoder.forward(network, volume)

    assert [tuple(values.shape) for values in maps] == [(2, 24, 2, 2, 2)] * 4
    # Maps at four depths, each 2 x 2 x 2 tokens; the pooled value is the mean of the tokens.
    expected = vit.encode(volume)[-1].mean(1)  # type: ignore[operator]
    assert torch.allclose(network.pooled(volume), expected, atol=1e-6)
    assert network(volume)[0].shape == (2, 2)


def test_a_segmentation_is_refused_with_the_right_command() -> None:
    network = classifier()
    network.gives_classes = False

    with refused(PlanError, "classification-no-segmentation", "autoreg_classify"):
        network(torch.randn(1, 1, *PATCH))


def test_a_large_scan_is_the_mean_of_its_tiles() -> None:
    network = classifier()
    scan = torch.randn(1, 16, 32, 16)

    found = network.pooled_over_scan(scan, PATCH, CPU)

    # The scan is two patches tall in y, so its tiles do not overlap.
    parts = [network.pooled(scan[None, :, :, low : low + 16])[0] for low in (0, 16)]
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-5)


def test_a_scan_smaller_than_the_patch_lies_in_its_middle() -> None:
    network = classifier()
    scan = torch.randn(1, 8, 16, 12)

    found = network.pooled_over_scan(scan, PATCH, CPU)

    # 16 - 8 = 8 voxels are missing in z and 16 - 12 = 4 in x, half of them on each side.
    padded = functional.pad(scan, (2, 2, 0, 0, 4, 4))
    assert torch.allclose(found, network.pooled(padded[None])[0], atol=1e-5)


def test_heads_read_features_of_mean_0_and_deviation_1_over_the_cases() -> None:
    network = classifier()
    width = network.num_features[-1]
    # As of a CNN: the values hardly differ between scans, and feature 0 not at all.
    pooled = 0.4 + 0.03 * torch.randn(50, width)
    pooled[:, 0] = 0.4

    network.standardise(pooled)

    read = (pooled - network.feature_mean) * network.feature_scale
    assert torch.allclose(read.mean(0), torch.zeros(width), atol=1e-4)
    assert torch.allclose(read[:, 1:].std(0, correction=0), torch.ones(width - 1), atol=1e-3)
    # A constant feature is not divided by a deviation of 0.
    assert read[:, 0].abs().max() < 1e-3
    expected = network.heads[0](read)
    assert torch.allclose(network.logits(pooled)[0], expected)


def test_features_of_a_single_case_are_not_scaled() -> None:
    network = classifier()

    # The deviation of one value is 0.
    network.standardise(torch.full((1, network.num_features[-1]), 0.4))

    assert bool((network.feature_scale == 1).all())


def test_classifiers_of_earlier_releases_give_the_same_logits() -> None:
    network = classifier()
    volume = torch.randn(2, 1, *PATCH)
    before = network(volume)
    state = network.state_dict()
    # Earlier checkpoints have no buffers feature_mean and feature_scale; scaling by 1 is their
    # meaning.
    earlier = {key: value for key, value in state.items() if not key.startswith("feature_")}
    network.standardise(torch.randn(5, network.num_features[-1]))

    network.load_state_dict(earlier)

    for a, b in zip(network(volume), before, strict=True):
        assert torch.equal(a, b)


def test_classes_that_are_not_known_carry_no_loss() -> None:
    logits = [torch.randn(3, 2, requires_grad=True), torch.randn(3, 3, requires_grad=True)]
    loss = ClassificationLoss(plan_of(SEX, GRADE), [(1, 1), (1, 1, 1)])

    # Sex is known of two of three cases, the grade of none.
    found = loss(logits, torch.tensor([[0, -1], [1, -1], [-1, -1]]))
    found.backward()

    expected = functional.cross_entropy(logits[0][:2], torch.tensor([0, 1]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits[1].grad is not None
    assert not logits[1].grad.any()
    assert logits[0].grad is not None
    assert not logits[0].grad[2].any()


def test_with_weights_every_class_has_the_same_share_of_the_loss() -> None:
    loss = ClassificationLoss(plan_of(SEX, GRADE, balance=WEIGHTS), [(3, 1), (1, 1, 1)])
    # With logits of 0 each of the four cases has a loss of ln(2) before it is weighted.
    logits = [torch.zeros(4, 2), torch.zeros(4, 3)]
    labels = torch.tensor([[0, -1], [0, -1], [0, -1], [1, -1]])

    rare = float(loss([logits[0][3:], logits[1][3:]], labels[3:]))
    usual = float(loss([logits[0][:1], logits[1][:1]], labels[:1]))

    # One case of three has a third of the weight of the single case of the other class.
    assert rare == pytest.approx(3 * usual)
    assert float(loss(logits, labels)) == pytest.approx(np.log(2))


def test_the_neighbours_of_an_ordinal_class_share_the_smoothing() -> None:
    labels = torch.tensor([0, 1, 2])

    # 0.2 is taken from the true grade: all of it goes to the only neighbour, or half to each of
    # two.
    found = smoothed(labels, 3, 0.2)

    assert found.tolist() == [
        pytest.approx([0.8, 0.2, 0]),
        pytest.approx([0.1, 0.8, 0.1]),
        pytest.approx([0, 0.2, 0.8]),
    ]
    assert smoothed(labels, 3, 0).tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize(
    ("tasks", "rows", "balance"),
    [
        # 4 and 5 are balanced; 9 is more than twice 4. With two tasks drawing cases evenly by one
        # of them
        # would unbalance the other, so weights are used.
        ((SEX,), [(0,)] * 4 + [(1,)] * 5, NONE),
        ((SEX,), [(0,)] * 4 + [(1,)] * 9, SAMPLING),
        ((SEX, GRADE), [(0, 0)] * 4 + [(1, 1)] * 9, WEIGHTS),
    ],
)
def test_the_balance_is_planned_from_the_counts(
    tasks: tuple[ClassificationTask, ...],
    rows: list[tuple[int, ...]],
    balance: str,
) -> None:

    plan = make_plan(table_of(tasks, rows), 2, CLASS_PATHS[RESENC], 250)

    assert plan.balance == balance
    assert plan.class_counts[0] == (4, len(rows) - 4)
    assert plan.reasons["balance"]
    # Two cases per step, rounded up.
    assert plan.num_iterations_per_epoch == -(-len(rows) // 2)
    assert plan.layer_decay == 1.0


def test_the_recipe_is_adamw_with_layer_decay_for_transformers() -> None:
    rows = [(0,)] * 4 + [(1,)] * 5
    plan = make_plan(table_of((SEX,), rows), 2, CLASS_PATHS[PRIMUS], 250)
    of_segmentation = {"deep_supervision": True, "decoder_first_fraction": 0.1}
    stock = Recipe(150, 1e-3, 1e-2, optimizer=SGD, **of_segmentation)

    recipe = classification_recipe(stock, plan)

    assert (recipe.optimizer, recipe.pretrained_rate, recipe.weight_decay) == (ADAMW, 1e-4, 1e-2)
    assert (recipe.warmup_fraction, recipe.warmup_max_fraction) == (0.1, 0.1)
    # There is no decoder to supervise or to train first.
    assert not recipe.deep_supervision
    assert not recipe.decoder_first_fraction

    groups = parameter_groups(classifier("primus_tiny"), recipe)
    rates = sorted({group["rate_factor"] for group in groups})
    # The heads have the full rate, the last block 0.75 of it, and so on towards the input.
    assert rates[-1] == 1
    assert rates[-2] == pytest.approx(0.75)


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = make_plan(table_of((SEX, GRADE), [(0, 0), (1, 1), (1, 2)]), 2, CLASS_PATHS[RESENC], 9)
    plans: dict[str, Any] = {"configurations": {"3d_fullres": {}}}

    store(plans, "3d_fullres", BLOCK, plan)

    assert read_plan(plans["configurations"]["3d_fullres"], "x") == plan
    assert read_plan({}, "x") is None


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"balance": "even"}, "classification-plan-balance", "even"),
        # Even sampling exists for one task only; this plan has two.
        ({"balance": SAMPLING}, "classification-plan-balance", "2"),
        ({"num_epochs": 0}, "classification-plan-range", "num_epochs=0"),
        ({"ordinal_smoothing": 1.0}, "classification-plan-range", "[0, 1)"),
        ({"tasks": ()}, "classification-plan-incomplete", BLOCK),
    ],
)
def test_impossible_values_of_a_plan_are_refused(
    changes: dict[str, Any],
    code: str,
    named: str,
) -> None:
    with refused(PlanError, code, "plans.json", named):
        check(plan_of(SEX, GRADE, **changes), "plans.json")


def test_a_plan_of_other_classes_is_refused() -> None:
    table = table_of((ClassificationTask("sex", ("F", "X")),), [(0,), (1,)])

    with refused(PlanError, "classification-plan-other-classes", "plans.json", BLOCK):
        check_same_table(plan_of(SEX), table, "plans.json")


class Cases:
    """Stands for nnU-Net's dataset."""

    def __init__(self, names: list[str]):
        self.identifiers = names


class Labels:
    """Stands for nnU-Net's label manager."""

    has_ignore_label = False

    def __init__(self) -> None:
        self.all_labels = [0, 1]


def loader(labels: dict[str, tuple[int, ...]], is_balanced: bool) -> ClassLoader:
    cases = Cases(list(labels))
    return ClassLoader(cases, 4, PATCH, PATCH, Labels(), labels=labels, is_balanced=is_balanced)


def test_balanced_sampling_draws_every_class_equally_often() -> None:
    usual = {f"usual{n}": (0,) for n in range(9)}
    labels = {"rare": (1,), "unknown": (-1,), **usual}
    np.random.seed(0)  # nnU-Net's loader draws from the global generator

    drawn: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for _ in range(500):
        drawn.update(loader(labels, True).get_indices())
        plain.update(loader(labels, False).get_indices())

    # 500 batches of 4. The tolerances are about 4.5 standard deviations: sqrt(p (1 - p) / 2000).

    assert drawn["rare"] / 2000 == pytest.approx(0.5, abs=0.05)
    assert plain["rare"] / 2000 == pytest.approx(0.1, abs=0.03)
    assert "unknown" not in drawn + plain


def test_patches_of_one_case_are_averaged_for_the_score_of_an_epoch() -> None:
    table = table_of((SEX,), [(0,), (1,), (1,)])
    # Case c01 has a patch in both batches; its mean probability of M is (0.1 + 0.9) / 2 = 0.5.
    outputs = [
        {"cases": ["c00", "c01"], "probabilities": [np.array([[0.8, 0.2], [0.9, 0.1]])]},
        {"cases": ["c01", "c02"], "probabilities": [np.array([[0.1, 0.9], [0.9, 0.1]])]},
    ]

    # The score is the AUC. Of the pairs with c00 (F, 0.2), c01 (M, 0.5) is ranked right and c02
    # (M, 0.1) wrong. With the first batch only, c01 has 0.1 and is ranked wrong.
    assert patch_scores(plan_of(SEX), table, outputs) == [0.5]
    assert patch_scores(plan_of(SEX), table, outputs[:1]) == [0.0]
    # Without a case of F there is no AUC: 0.5, as for guessing.
    assert patch_scores(plan_of(SEX), table, outputs[1:]) == [0.5]
