"""Features, probe and labels: values by hand, and warnings about a collapse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from narrow_cnn import batch_of, objective_of, plan_of

from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.downstream.probe import (
    LabelledCrop,
    Probe,
    around_labels,
    balanced_accuracy,
    choose_scans,
    evenly_spread,
    fit_and_score,
    nearest_index,
    stored_labels,
    token_labels,
)
from nnunet_autoreg.model.verdict import LEARNT, NOT_LEARNT, UNKNOWN, Verdict
from nnunet_autoreg.objective_kinds import FigureOfMerit, figure_of_merit
from nnunet_autoreg.objectives.base import Objective, TokenFeatures, one_term
from nnunet_autoreg.plan import RunPlan
from nnunet_autoreg.pretrain.validation import (
    Health,
    Validation,
    content_part,
    effective_rank,
    health_warnings,
    token_variance,
    verdict_of,
)
from nnunet_autoreg.sampling.sample import Sample, collate

RUN = RunPlan(0, 1, 1)


def test_equal_directions_count_whole_and_unequal_ones_by_their_entropy():
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])

    assert effective_rank(square) == pytest.approx(2)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))) == pytest.approx(3)
    # shares 3/4 and 1/4: exp(3/4 ln 4/3 + 1/4 ln 4) = 4 / 3^(3/4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


def test_one_direction_is_rank_1_in_spite_of_rounding():
    # One direction with a length for each of 2000 tokens; float32 rounds every product.
    lengths = torch.linspace(-1, 1, 2000)[:, None]
    direction = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))

    assert effective_rank(lengths * direction) == pytest.approx(1, abs=0.01)


def test_constant_and_nan_features_have_no_rank_and_no_variance():
    constant = torch.full((12, 4), 3.0)
    # Three crops of four positions.
    content = content_part(constant, torch.arange(4).repeat(3))

    assert (effective_rank(content), token_variance(content, constant)) == (0, 0)

    broken = torch.full((4, 4), torch.nan)

    assert (effective_rank(broken), token_variance(broken, broken)) == (0, 0)


def test_features_that_only_give_the_position_have_collapsed():
    # The features are the position, in five crops: without its mean nothing is left.
    where = torch.eye(4).repeat(5, 1)
    content = content_part(where, torch.arange(4).repeat(5))

    assert token_variance(content, where) == 0

    what = torch.tensor([[1.0], [-1.0], [3.0], [5.0]])
    content = content_part(what, torch.tensor([0, 0, 1, 1]))

    # The means of the two positions are 0 and 4. Squares of what is left are 4 of 1 + 1 + 9 + 25.
    assert content[:, 0].tolist() == [1, -1, -1, 1]
    assert token_variance(content, what) == pytest.approx(4 / 36)


def test_evenly_spread_takes_all_or_equally_spaced_ones():
    assert evenly_spread(3, 5).tolist() == [0, 1, 2]
    assert evenly_spread(9, 3).tolist() == [0, 4, 8]


GOOD = Health(
    {"error": 0.5, "mean": 1.0, "copy": 1.8},
    0.8,
    90.0,
    {"features": 0.7, "voxels": 0.5, "chance": 0.33},
)

NAMED = {"copy": "copying the previous block", "mean": "predicting the mean"}


def test_a_healthy_model_gives_no_warning_and_a_young_one_not_yet():
    assert health_warnings(GOOD, RUN, warm=True) == []

    young = replace(
        GOOD,
        errors={"error": 1.2, "mean": 1.0, "copy": 1.8},
        probe={"features": 0.4, "voxels": 0.5, "chance": 0.33},
    )

    assert health_warnings(young, RUN, warm=False) == []
    # Worse than predicting the mean, and worse than raw voxels.
    assert len(health_warnings(young, RUN, warm=True)) == 2


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"token_variance": 0.002}, ["collapse", "token variance 0.002", "0.01"]),
        ({"effective_rank": 1.4}, ["collapse", "1.4 directions", "limit 3"]),
        (
            {"errors": {"error": 1.0, "mean": 1.0, "copy": 1.8}},
            ["error 1.0000", "'mean' (1.0000)"],
        ),
        ({"errors": {"error": float("nan"), "mean": 1.0, "copy": 1.8}}, ["error nan"]),
        (
            {"probe": {"features": 0.5, "voxels": 0.5, "chance": 0.33}},
            ["0.500 against 0.500", "train longer"],
        ),
    ],
)
def test_a_health_warning_names_value_and_limit_in_one_line(changes, values):
    [message] = health_warnings(replace(GOOD, **changes), RUN, warm=True)

    for value in values:
        assert value in message
    assert "\n" not in message


def judged(health: Health | None, by_probe: bool = False) -> Verdict:
    if health is not None:
        figure = FigureOfMerit("error", "1", "", NAMED, ranks_by_probe=by_probe)
        health = replace(health, figure=figure)
    return verdict_of(health, num_scans=20, num_validation_scans=2, min_scans=10)


@pytest.mark.parametrize(("left", "named"), [(0, "no scan was left"), (1, "1 scan left")])
def test_a_run_without_a_validation_error_names_the_missing_scans(left, named):
    verdict = verdict_of(None, num_scans=20, num_validation_scans=left, min_scans=10)

    assert verdict.outcome == UNKNOWN
    assert named in verdict.message
    assert "20 scans" in verdict.message


def test_a_run_has_learnt_if_it_beats_all_references_and_raw_voxels():
    verdict = judged(GOOD)

    assert verdict.outcome == LEARNT
    assert verdict.errors == {"error": 0.5, "mean": 1.0, "copy": 1.8}
    assert verdict.probe == {"features": 0.7, "voxels": 0.5, "chance": 0.33}
    assert (verdict.num_validation_scans, verdict.min_scans) == (2, 10)
    figures = ["0.5000", "'predicting the mean' (1.0000)", "(1.8000)", "0.700", "20 scans"]
    for figure in figures:
        assert figure in verdict.message


@pytest.mark.parametrize("reference", ["mean", "copy"])
def test_a_run_that_misses_one_reference_has_not_learnt(reference):
    errors = {**GOOD.errors, reference: 0.5}

    verdict = judged(replace(GOOD, errors=errors))

    assert verdict.outcome == NOT_LEARNT
    assert f"'{NAMED[reference]}' (0.5000)" in verdict.reason


def test_without_validation_or_with_a_probe_against_it_it_is_unknown():
    no_better_than_voxels = {"features": 0.5, "voxels": 0.5, "chance": 0.33}

    assert judged(None).outcome == UNKNOWN
    # The error says that it learnt, and the probe says that it did not.
    assert judged(replace(GOOD, probe=no_better_than_voxels)).outcome == UNKNOWN
    assert judged(replace(GOOD, probe=None)).outcome == LEARNT
    # An error without a reference cannot be judged.
    assert judged(replace(GOOD, errors={"error": 0.5})).outcome == UNKNOWN


def test_an_objective_without_references_may_be_judged_by_the_probe():
    alone = replace(GOOD, errors={"error": 0.5})
    worse = replace(alone, probe={"features": 0.4, "voxels": 0.5, "chance": 0.33})

    assert judged(alone, by_probe=True).outcome == LEARNT
    assert judged(worse, by_probe=True).outcome == NOT_LEARNT
    assert judged(replace(alone, probe=None), by_probe=True).outcome == UNKNOWN


def test_every_objective_names_the_references_that_it_computes():
    plans = [plan_of(), plan_of(prefix="fixed", name="masked")]

    for plan in plans:
        objective = objective_of(plan)
        terms = objective.loss(batch_of(plan), references=True)
        assert set(terms.references) == set(figure_of_merit(plan).references)


def test_every_number_of_health_has_a_metric_that_the_report_knows():
    assert set(GOOD.metrics()) == {
        "heldout_error",
        "heldout_mean",
        "heldout_copy",
        "token_variance",
        "effective_rank",
        "probe_features",
        "probe_voxels",
        "probe_chance",
    }
    probed = "0.700 from features, 0.500 from raw voxels, 0.330 by chance"
    assert f"effective rank 90.0; probe: balanced accuracy {probed}" in GOOD.message()


def test_balanced_accuracy_counts_classes_equally():
    truth = torch.tensor([0, 0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0])

    # Three of four and one of two are right; counted by voxels it would be 4 / 6.
    assert balanced_accuracy(predicted, truth) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_the_probe_finds_linear_labels_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=generator)
    labels = (inputs[:, 2] > 0.5).long()

    found = fit_and_score((inputs[:200], labels[:200]), (inputs[200:], labels[200:]))

    assert found > 0.95

    other = torch.randn(400, 5, generator=generator)

    found = fit_and_score((other[:200], labels[:200]), (other[200:], labels[200:]))

    # Labels that have nothing to do with the inputs: half are right, give or take the spread of
    # some sixty samples of the rarer class.
    assert abs(found - 0.5) < 0.15


def crop(value, labels, is_test):
    sample = Sample(
        np.full((1, 1, 2, 2, 2), value, np.float32),
        np.ones((1, 2, 2, 2), bool),
        np.zeros(len(labels), np.int64),
        1,
    )
    return LabelledCrop(collate([sample]), torch.tensor(labels), is_test)


def test_the_probe_fits_on_no_test_subject_and_no_unknown_token():
    seen = []

    def read(batch):
        seen.append(float(batch.voxels.mean()))
        return torch.tensor([[0.0], [1.0], [9.0]])

    train = crop(1, [0, 1, -1], False)
    held_out = crop(2, [1, 0, -1], True)
    probe = Probe([train, held_out, crop(3, [0, 1, -1], False)])

    assert probe.works
    assert probe.chance == 0.5
    # Fitted on crops 1 and 3, where the label is the input; in crop 2 it is the opposite.
    assert probe.score(read) == 0
    assert sorted(seen) == [1, 2, 3]
    assert probe.score(lambda batch: torch.full((3, 1), torch.nan)) == 0
    # One class in the test crop, and no crop at all.
    assert not Probe([crop(1, [0, 1], False), crop(2, [1, 1], True)]).works
    assert not Probe([]).works


def test_a_label_that_fills_a_quarter_of_a_token_is_its_label():
    # Three tokens of 2 x 2 x 2 voxels along x.
    labels = np.zeros((2, 2, 6), dtype=np.int64)
    # The first has 1 labelled voxel of 8, less than a quarter: background.
    labels[0, 0, 0] = 3
    # The second has 2 of 8 with label 2 and 3 of 8 with label 5, which wins.
    labels[0, :, 2] = 2
    labels[1, :, 2] = 5
    labels[1, 0, 3] = 5
    # Nothing is known about the third.
    labels[:, :, 4:] = -1

    assert token_labels(labels, (2, 2, 2)).tolist() == [0, 5, -1]

    # One known voxel says more than seven unknown ones.
    labels[0, 0, 4] = 7

    assert token_labels(labels, (2, 2, 2)).tolist() == [0, 5, 7]
    assert token_labels(np.zeros((2, 2, 2), dtype=np.int64), (2, 2, 2)).tolist() == [0]


def test_nearest_voxels_of_a_longer_and_a_shorter_grid():
    # Middles of voxels: that of voxel 0 of 4 lies at 1.0 of 8, on the edge of voxels 0 and 1.
    assert nearest_index(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_index(8, 4).tolist() == [1, 3, 5, 7]


def test_a_crop_around_a_label_holds_it_and_stays_in_the_case():
    labels = np.zeros((40, 8, 16), dtype=np.int64)
    labels[38, 3, 2] = 1

    start = around_labels(labels, (16, 16, 16), np.random.default_rng(0))

    # z ends at 40, so it starts at 24 at most. y is shorter than the crop: 8 voxels are missing,
    # half of them on either side. x would begin at 2 - 8 and is moved to 0.
    assert start == (24, -4, 0)


@pytest.fixture
def dataset(tmp_path):
    """Eight labelled subjects of one channel each but the first, which has two."""
    root = tmp_path / "Dataset900_X"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    (root / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "ignore": 2}}')
    labels = np.zeros((6, 8, 10), np.uint8)
    labels[0, 1, 2] = 1
    labels[5, 6, 7] = 2
    for number in range(8):
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(labels),
            str(root / "labelsTr" / f"c{number}.nii.gz"),
        )
        for channel in range(2 if number == 0 else 1):
            (root / "imagesTr" / f"c{number}_{channel:04d}.nii.gz").touch()
    return root


def row(root: Path, number: int, channel: int = 0) -> ScanRow:
    name = f"c{number}_{channel:04d}"
    return ScanRow(
        id=f"{root.name}/{name}",
        dataset=root.name,
        case=f"c{number}",
        channel=str(channel),
        modality="MR",
        source=str(root / "imagesTr" / f"{name}.nii.gz"),
        shape_vox=(6, 8, 10),
        spacing_mm=(1.0, 1.0, 1.0),
        cropped_shape_vox=(6, 8, 10),
        content_hash="",
        status="ok",
        reason="",
    )


def test_each_subject_gives_one_scan_and_held_out_ones_are_for_testing(dataset):
    # Subject 0 has a second channel, and must not count twice.
    rows = [row(dataset, number) for number in range(8)] + [row(dataset, 0, 1)]
    validation = {rows[3].id, rows[5].id}

    chosen = choose_scans(rows, validation, seed=0)

    assert {r.case for r in chosen} == {f"c{n}" for n in range(8)}
    assert len(chosen) == 8
    assert {r.id for r in chosen[:2]} == validation
    # Three subjects are too few to fit and to test.
    assert choose_scans(rows[:3], set(), 0) == []


def test_labels_lie_on_the_stored_voxels_and_unnamed_ones_are_unknown(dataset):
    found = stored_labels(row(dataset, 1), (12, 8, 10))

    # Twice as many voxels along z as in the label map: each label is two voxels high.
    assert found.shape == (12, 8, 10)
    for value in (1, -1):
        assert np.ptp(np.argwhere(found == value), axis=0).tolist() == [1, 0, 0]

    distance = np.abs(np.argwhere(found == 1)[0] - np.argwhere(found == -1)[0])

    # (5, 5, 5) voxels of the map, with z doubled.
    assert distance.tolist() == [10, 5, 5]


class OfKinds(Objective):
    """Gives a total and a count per batch, which is a pair of them; two tokens that differ."""

    module = torch.nn.Linear(1, 1)
    figure = FigureOfMerit("error", "squared error", "", {"mean": "predicting the mean"})

    def loss(self, batch, references=False):
        total, count = batch.numbers
        return one_term(torch.tensor(total), torch.tensor(count), {"mean": torch.tensor(2 * total)})

    def describe(self, batch):
        tokens = torch.eye(2)[None]
        place = torch.zeros(1, 2, dtype=torch.int64)
        return TokenFeatures(tokens, tokens, place, place == 0)


class Numbers:
    def __init__(self, *numbers):
        self.numbers = numbers

    def to(self, device):
        return self


def test_validation_errors_are_given_by_kind_if_there_are_several():
    batches = {"spatial": [Numbers(2.0, 4.0), Numbers(1.0, 2.0)], "contrast": [Numbers(9.0, 3.0)]}

    health = Validation(OfKinds(), batches, (), torch.device("cpu")).measure()

    # (2 + 1 + 9) / (4 + 2 + 3) over all, (2 + 1) / (4 + 2) of spatial and 9 / 3 of contrast.
    assert health.errors == {"error": 12 / 9, "mean": 24 / 9}
    assert health.kinds == {"spatial": 0.5, "contrast": 3.0}

    metrics = health.metrics()

    assert metrics["heldout_error_contrast"] == (3.0, "squared error")
    assert metrics["heldout_error"] == (12 / 9, "squared error")
    assert "0.5000 of spatial and 3.0000 of contrast sequences" in health.message()
    warnings = health_warnings(health, RUN, warm=True)
    assert not any("nothing learnt" in warning for warning in warnings)

    one_kind = {"spatial": batches["spatial"]}

    health = Validation(OfKinds(), one_kind, (), torch.device("cpu")).measure()

    assert health.kinds == {}
    assert "heldout_error_spatial" not in health.metrics()
