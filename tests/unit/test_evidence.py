"""The evidence harness: labels, statistics, slices, and its trainings in miniature."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import evidence
import evidence_augment
import evidence_data
import evidence_finetune
import evidence_pretrain
import evidence_probe
import evidence_score
import evidence_table
from evidence_lines import Deadline, ResultFile

from nnunet_autoreg.benchmark.split import divide
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.card import read_card
from nnunet_autoreg.planning.pool import Pool

CPU = torch.device("cpu")
SHAPE = (20, 18, 24)
NUM_PATIENTS, SCANS_EACH = 12, 2


@pytest.fixture
def data() -> evidence_data.ResidentSet:
    """Twelve patients of two scans each: noise with a bright cube, which is class 1."""
    generator = np.random.default_rng(0)
    scans = []
    images = {}
    labels = {}
    for patient in range(NUM_PATIENTS):
        for phase in range(SCANS_EACH):
            case = f"patient{patient:03d}_{phase}"
            image = generator.normal(size=SHAPE).astype(np.float32)
            truth = np.zeros(SHAPE, dtype=np.uint8)
            truth[4:12, 4:12, 4:12] = 1
            images[case] = image + 3 * truth.astype(np.float32)
            labels[case] = truth
            facts = evidence_data.ScanFacts(case, f"patient{patient:03d}", "MR", "MRI", SHAPE, 1, 0)
            scans.append(facts)

    # Division into pool, development and test patients needs several; spacing and numbers are those
    # of a planned set.
    spacing = (1.0, 1.0, 1.0)
    pool = Pool(16, spacing, SHAPE, 16 * math.prod(SHAPE), None)
    described = evidence_data.SetFacts("ixi", "D", spacing, ("cube",), pool, "", tuple(scans))
    return evidence_data.ResidentSet(described, images, labels)


class Ticks:
    """A clock that moves by one second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def after_reads(count: int) -> Deadline:
    """Return a deadline that has passed when it is asked for the ``count``-th time."""
    # One tick starts the deadline and every question is one more. Half a tick less keeps rounding
    # of minutes from deciding.
    return Deadline((count - 0.5) / 60, Ticks())


def pretraining(seed: int = 0, steps: int = 3) -> evidence_pretrain.PretrainJob:
    return evidence_pretrain.PretrainJob(
        data="ixi",
        arm="ar",
        encoder="resenc_tiny",
        objective="autoregressive",
        seed=seed,
        steps=steps,
        batch=2,
        crop_vox=(16, 16, 16),
    )


def finetuning(init: str, seed: int | None, steps: int = 3) -> evidence_finetune.FinetuneJob:
    return evidence_finetune.FinetuneJob(
        data="ixi",
        init=init,
        pretraining_seed=seed,
        encoder="resenc_tiny",
        labels=1,
        draw=0,
        split="development",
        steps=steps,
        at=(1,),
        batch=2,
        crop_vox=(16, 16, 16),
    )


# Data


def test_labelled_sets_of_one_draw_are_nested_whole_patients(
    data: evidence_data.ResidentSet,
) -> None:
    sets = [set(evidence_data.labelled_patients(data, n, draw=3)) for n in (1, 2, 5)]

    # All scans of a patient are labelled together: 1, 2 and 5 patients are 2, 4 and 10 scans.
    assert sets[0] < sets[1] < sets[2]
    assert [len(cases) for cases in sets] == [2, 4, 10]
    assert sets[2] <= set(data.division.pool)
    assert {data.subject_of[case] for case in sets[0]} == {sorted(sets[0])[0][:10]}


def test_draws_label_different_patients(data: evidence_data.ResidentSet) -> None:
    chosen = {evidence_data.labelled_patients(data, 1, draw) for draw in range(8)}

    assert len(chosen) > 1
    # Development and test patients may not be labelled, so there are fewer than twelve.
    with pytest.raises(UsageError):
        evidence_data.labelled_patients(data, NUM_PATIENTS, 0)


def test_pretraining_sees_only_the_pool(data: evidence_data.ResidentSet) -> None:
    names = {case.name for case in data.pool_cases().values()}

    assert names == set(divide(data.subject_of).pool)
    assert not names & set(data.division.development + data.division.test)


def test_packing_keeps_zero_exactly_and_errs_by_half_a_level() -> None:
    voxels = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    voxels[0] = 0.0

    levels, scale, zero = evidence_data.pack(voxels)
    again = evidence_data.unpack(levels, scale, zero)

    low, high = np.percentile(voxels, evidence_data.OUTSIDE)
    inside = (voxels > low) & (voxels < high)
    # Values beyond the percentiles are cut off, so only those inside have an error of half a level.
    # The step has a lower limit of 1/16, which holds here.
    assert (again[0] == 0).all()
    assert np.abs(again - voxels)[inside].max() <= scale / 2 + 1e-6
    assert scale == pytest.approx(1 / 16)


def test_a_set_is_read_as_it_was_written(tmp_path: Path, data: evidence_data.ResidentSet) -> None:
    cases = [scan.case for scan in data.facts.scans]
    images = [(data.images[case] > 1).astype(np.uint8) * 200 for case in cases]
    labels = [data.labels[case] for case in cases]

    evidence_data.write_set(tmp_path / "ixi.npz", data.facts, images, labels)
    again = evidence_data.load_set(tmp_path, "ixi")

    assert again.facts == data.facts
    assert again.division == data.division
    assert (again.images[cases[5]] == images[5]).all()
    assert (again.labels[cases[5]] == labels[5]).all()


def test_a_crop_beyond_a_scan_is_zero_and_marked(data: evidence_data.ResidentSet) -> None:
    case = next(iter(data.pool_cases().values()))

    crop, inside = case.read_padded((-2, 10, 0), (4, 16, 8))

    # Planes z -2 and -1 lie before the scan, and rows from y 18 on behind it.
    assert inside.sum() == 2 * 8 * 8
    assert (crop[0][~inside] == 0).all()
    assert (crop[0][2:, :8] == case.voxels_ZYX[:2, 10:18, :8]).all()


# Patches


def patch(matrix: np.ndarray, centre: tuple[float, float, float]) -> evidence_augment.PatchDraw:
    # Intensities stay as they are, so that voxels can be compared.
    nothing = evidence_augment.Intensity(None, None, None, None, None)
    return evidence_augment.PatchDraw(0, centre, matrix, nothing)


def test_an_unturned_patch_is_a_plain_crop(data: evidence_data.ResidentSet) -> None:
    scan = data.scans_on(data.division.pool[:1], CPU)[0]
    crop: Size = (6, 8, 4)

    # The middle of voxels 4 to 9 is 4 + 2.5, and so on: between voxels for even sizes.
    drawn = patch(np.eye(3), (4 + 2.5, 3 + 3.5, 10 + 1.5))
    image, labels = evidence_augment.cut(scan, drawn, crop)

    place = (..., slice(4, 10), slice(3, 11), slice(10, 14))
    assert torch.allclose(image, scan.image[place], atol=1e-4)
    assert torch.equal(labels, scan.labels[place].float())


def test_mirroring_and_a_quarter_turn_move_voxels_exactly(data: evidence_data.ResidentSet) -> None:
    scan = data.scans_on(data.division.pool[:1], CPU)[0]
    place = (..., slice(4, 10), slice(3, 9), slice(10, 16))
    centre = (6.5, 5.5, 12.5)

    mirrored, _ = evidence_augment.cut(scan, patch(np.diag([1.0, -1.0, 1.0]), centre), (6, 6, 6))
    quarter = evidence_augment._rotation(0, math.pi / 2)
    turned, _ = evidence_augment.cut(scan, patch(quarter, centre), (6, 6, 6))

    plain = scan.image[place]
    assert torch.allclose(mirrored, plain.flip(3), atol=1e-4)
    # Offset (y, x) of the patch comes from offset (-x, y) of the scan.
    assert torch.allclose(turned, plain.flip(3).transpose(3, 4), atol=1e-4)


def test_thick_slices_are_turned_and_zoomed_only_in_their_plane() -> None:
    for number in range(50):
        matrix = evidence_augment.draw_matrix(np.random.default_rng(number), is_flat=True)

        assert abs(matrix[0, 0]) == 1
        assert (matrix[0, 1:] == 0).all()
        assert (matrix[1:, 0] == 0).all()


def test_patches_depend_only_on_draw_step_and_number(data: evidence_data.ResidentSet) -> None:
    scans = evidence_augment.LabelledScans(
        data.scans_on(data.division.pool[:3], CPU),
        data.facts.spacing_mm,
    )

    first = scans.batch(seed=1, step=7, batch=2, crop_vox=(8, 8, 8))
    # A batch in between would move a generator that is shared.
    scans.batch(seed=1, step=8, batch=2, crop_vox=(8, 8, 8))
    again = scans.batch(seed=1, step=7, batch=2, crop_vox=(8, 8, 8))
    other = scans.batch(seed=2, step=7, batch=2, crop_vox=(8, 8, 8))

    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_last_patch_of_a_batch_holds_foreground(data: evidence_data.ResidentSet) -> None:
    scans = evidence_augment.LabelledScans(
        data.scans_on(data.division.pool[:3], CPU),
        data.facts.spacing_mm,
    )
    held = [
        scans.batch(seed=0, step=step, batch=2, crop_vox=(4, 4, 4))[1].amax((1, 2, 3, 4))
        for step in range(30)
    ]

    table = torch.stack(held)
    # Drawn anywhere, a patch of 4 voxels meets the cube of 8 in 11^3 of 17 x 15 x 21 places, a
    # quarter.
    assert table[:, 1].mean() > 0.95
    assert table[:, 0].mean() < 0.9


# Scores and statistics


def test_dice_has_no_value_if_nothing_is_there_and_nothing_was_found() -> None:
    truth = np.array([[[0, 1, 1, 2]]], dtype=np.uint8)
    predicted = np.array([[[0, 1, 0, 0]]], dtype=np.uint8)

    one, two, three = evidence_score.dice_of_labels(truth, predicted, (1, 2, 3))

    # Class 1: 2 * 1 / (2 + 1). Class 2 was missed, and class 3 is in neither.
    assert (one, two) == (pytest.approx(2 / 3), 0.0)
    assert math.isnan(three)


def line(arm: str, seed: int | None, draw: int, dice: dict[str, list[float | None]]) -> dict:
    return {
        "command": "finetune",
        "set": "ixi",
        "arm": arm,
        "pretraining_seed": seed,
        "draw": draw,
        "dice": dice,
    }


def test_differences_are_paired_by_seed_draw_and_patient() -> None:
    scratch = [
        line("scratch", None, 0, {"a": [0.2, 0.4], "b": [0.5, None]}),
        line("scratch", None, 1, {"a": [0.3, 0.3], "b": [0.6, 0.6]}),
    ]
    ours = [
        line("ar", 0, 0, {"a": [0.4, 0.4], "b": [0.6, 0.6]}),
        line("ar", 0, 1, {"a": [0.3, 0.5], "b": [0.6, 0.6]}),
        line("ar", 1, 0, {"a": [0.3, 0.3], "b": [0.5, 0.5]}),
        line("ar", 1, 1, {"a": [0.5, 0.5], "b": [0.7, 0.7]}),
        # There is no draw 2 of scratch to compare with.
        line("ar", 0, 2, {"a": [0.9, 0.9], "b": [0.9, 0.9]}),
    ]

    found = evidence_table.paired(ours, scratch, evidence_table.patient_means("dice"))

    assert found is not None
    # Runs, draws, patients. Each is a mean over the structures: 0.4 - 0.3 = 0.1 for patient a of
    # the first run and draw. Patient b has one structure in scratch: 0.6 - 0.5 = 0.1.
    expected = [[[0.1, 0.1], [0.1, 0.0]], [[0.0, 0.0], [0.2, 0.1]]]
    assert np.allclose(found, expected)


def test_settings_that_only_pretrained_weights_need_allow_a_comparison() -> None:
    def arm(name: str, objective: str, **settings: Any) -> evidence_table.Arm:
        line = {"settings": {"lr": 0.01, "encoder_lr": None, "recipe": [], **settings}}
        return evidence_table.Arm(name, objective, (line,))

    scratch = arm("scratch", "scratch")
    whole = arm("whole", "autoregressive")
    encoder_alone = arm("encoder", "autoregressive", recipe=["transfer_decoder=false"])
    slow_encoder = arm("slow", "autoregressive", encoder_lr=0.001)
    other_rate = arm("other", "autoregressive", lr=0.003)
    other_recipe = arm("smooth", "autoregressive", recipe=["clip_norm=1"])
    masked = arm("masked", "masked", recipe=["transfer_decoder=false"])
    arms = [scratch, whole, encoder_alone, slow_encoder, other_rate, other_recipe, masked]

    found = {(ours.name, theirs.name) for ours, theirs in evidence_table.contrasts(arms)}

    from_scratch = {(name, "scratch") for name in ("whole", "encoder", "slow", "masked")}
    assert found == from_scratch | {("encoder", "masked")}


def test_arms_differ_by_the_transfer_that_was_done() -> None:
    def line(transferred: bool, recipe: list[str]) -> dict:
        known = {"command": "finetune", "encoder": "resenc_tiny", "pretraining_seed": 0}
        settings = {"lr": 0.01, "recipe": recipe}
        return {**known, "settings": settings, "recipe": {"transfer_decoder": transferred}}

    unnamed = evidence_table.with_transfer_named(line(True, ["clip_norm=1"]))
    named = evidence_table.with_transfer_named(line(False, ["transfer_decoder=false"]))

    assert unnamed["settings"]["recipe"] == ["clip_norm=1", "transfer_decoder=true"]
    assert named["settings"]["recipe"] == ["transfer_decoder=false"]


def test_statistics_of_a_comparison_are_those_worked_out_by_hand() -> None:
    # Two runs and two draws of one patient: pair differences 0.10, 0.06, 0.02 and 0.06.
    difference = np.array([[[0.10], [0.06]], [[0.02], [0.06]]])

    found = evidence_table.compare(difference, wanted=0.02)

    assert found.mean == pytest.approx(0.06)
    # Deviations from the mean: 0.04, 0, -0.04 and 0, with 4 - 1 degrees of freedom.
    sd = math.sqrt((0.04**2 + 0.04**2) / 3)
    assert found.sd == pytest.approx(sd)
    # Both draws average 0.06 over the runs.
    assert found.t_interval == (pytest.approx(0.06), pytest.approx(0.06))
    assert found.needed == math.ceil((1.96 * sd / 0.02) ** 2)
    # The extremes: the same pair drawn every time.
    assert found.bootstrap[0] == pytest.approx(0.02)
    assert found.bootstrap[1] == pytest.approx(0.10)


def test_a_deviation_of_a_twentieth_needs_25_pairs_for_two_hundredths() -> None:
    # Two values at plus and minus s have a standard deviation of sqrt(2) s.
    spread = 0.05 / math.sqrt(2)
    difference = np.array([[[spread], [-spread]]])

    found = evidence_table.compare(difference, wanted=0.02)

    assert found.sd == pytest.approx(0.05)
    # (1.96 * 0.05 / 0.02)^2 = 24.01
    assert found.needed == 25


def test_the_t_interval_is_students_over_draws_and_ends_at_eight() -> None:
    draws = np.array([0.01, 0.03, 0.05])

    few = evidence_table.compare(draws[None, :, None], wanted=0.02)
    many = evidence_table.compare(np.zeros((1, 8, 1)), wanted=0.02)

    # Student's t for 2 degrees of freedom at 97.5 % is 4.3027; the three draws have a standard
    # deviation of 0.02 around 0.03.
    half = 4.3027 * 0.02 / math.sqrt(3)
    low = pytest.approx(0.03 - half, abs=1e-5)
    high = pytest.approx(0.03 + half, abs=1e-5)
    assert few.t_interval == (low, high)
    assert many.t_interval is None


# Slices


def test_a_torn_line_is_left_out_and_the_next_is_whole(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    results.append({"command": "finetune", "draw": 0})
    # The rest of a process that was killed while it wrote.
    with results.path.open("a") as handle:
        handle.write('{"command": "finetune", "dr')

    results.append({"command": "finetune", "draw": 1})

    assert [found["draw"] for found in results.lines()] == [0, 1]
    assert results.has({"command": "finetune", "draw": 1})
    assert not results.has({"command": "finetune", "draw": 2})


@pytest.mark.parametrize("settings", [(), ("objective.num_segments=4",)])
def test_a_pretraining_in_slices_is_the_one_without(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
    settings: tuple[str, ...],
) -> None:
    job = replace(pretraining(), settings=settings)
    whole = ResultFile(tmp_path / "whole.jsonl")
    sliced = ResultFile(tmp_path / "sliced.jsonl")

    assert evidence_pretrain.pretrain(job, data, tmp_path / "a", whole, Deadline(None), CPU)
    # Stopped after the first step, continued to the end, and called once more for nothing.
    assert not evidence_pretrain.pretrain(job, data, tmp_path / "b", sliced, after_reads(1), CPU)
    assert sliced.lines() == []
    assert evidence_pretrain.pretrain(job, data, tmp_path / "b", sliced, Deadline(None), CPU)
    assert evidence_pretrain.pretrain(job, data, tmp_path / "b", sliced, Deadline(None), CPU)

    folders = [evidence_pretrain.run_folder(tmp_path / name, job.name) for name in "ab"]
    cards = [read_card(folder) for folder in folders]
    assert cards[0].sha256 == cards[1].sha256
    (first,) = whole.lines()
    (second,) = sliced.lines()
    assert first["loss"] == second["loss"]
    assert len(first["loss"]) == 3
    # 3 steps of 2 samples.
    assert first["samples"] == 6
    assert first["flops_per_step"] > 0


def test_a_slice_that_ends_prints_where_it_stopped(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evidence, "load_set", lambda work, name: data)
    words = ["pretrain", "--data", "ixi", "--work", str(tmp_path), "--device", "cpu"]
    short = ["--arm", "ar", "--steps", "3", "--batch", "2", "--crop", "16,16,16"]

    # 60 microseconds are over before the first step is.
    assert evidence.main([*words, *short, "--minutes", "1e-6"]) == 0
    stopped = capsys.readouterr().err
    assert evidence.main([*words, *short]) == 0
    finished = capsys.readouterr().err

    assert "ixi-ar-s0: stopped after step 1 of 3" in stopped
    assert "ixi-ar-s0 is finished" in finished
    # Results of one's own do not mix with those of the project.
    (line,) = ResultFile(tmp_path / "evidence.jsonl").lines()
    assert line["command"] == "pretrain"
    assert line["steps"] == 3


def test_pairs_for_alice_are_found_without_labels_between_patients(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    job = replace(pretraining(steps=1), arm="alice", objective="alice")
    plan = evidence_pretrain.plan_of(job, data, CPU)
    results = ResultFile(tmp_path / "lines.jsonl")

    structures = evidence_pretrain.sampling_pool(plan, data).structures
    # If labels were used to find pairs, the comparison would be unfair to the other arms.
    data.labels.clear()
    without_labels = evidence_pretrain.sampling_pool(plan, data).structures

    assert plan.sequence.member_crop_vox == plan.sequence.crop_size_vox == (16, 16, 16)
    assert structures == without_labels
    assert all(len(structure.by_subject()) == 2 for structure in structures)
    assert evidence_pretrain.pretrain(job, data, tmp_path, results, Deadline(None), CPU)
    assert results.lines()[0]["objective"] == "alice"


def test_a_run_whose_plan_changed_is_refused(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    evidence_pretrain.pretrain(pretraining(), data, tmp_path, results, after_reads(1), CPU)

    changed = replace(pretraining(), settings=("optim.lr=0.5",))

    with pytest.raises(UsageError) as raised:
        evidence_pretrain.pretrain(changed, data, tmp_path, results, Deadline(None), CPU)
    assert "optim.lr" in str(raised.value)


def test_both_trainings_in_miniature_leave_lines_that_a_table_compares(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    evidence_pretrain.pretrain(pretraining(steps=2), data, tmp_path, results, Deadline(None), CPU)
    for job in (finetuning("scratch", None, steps=2), finetuning("ar", 0, steps=2)):
        # The second call finds the line of the first and trains nothing.
        assert evidence_finetune.finetune(job, data, tmp_path, results, Deadline(None), CPU)
        assert evidence_finetune.finetune(job, data, tmp_path, results, Deadline(None), CPU)

    assert [found["command"] for found in results.lines()] == ["pretrain", "finetune", "finetune"]
    scratch, ours = results.lines()[1:]
    assert scratch["loaded_share"] == 0.0
    assert scratch["loaded"] == []
    assert ours["loaded_share"] == 1.0
    assert len(ours["loaded"]) > 3
    # Both arms are trained with the labels of the same patient and scored on the same others.
    assert scratch["labelled"] == ours["labelled"]
    assert len(ours["labelled"]) == 1
    patients = {data.subject_of[case] for case in data.division.development}
    assert set(ours["dice"]) == set(ours["surface"]) == set(ours["curve"]["1"]) == patients
    assert scratch["dice"] != ours["dice"]
    shown = evidence_table.table(results.lines(), data="ixi", split=None, wanted=0.02)
    # One run, one draw, and the development patients.
    assert "| ar - scratch | Dice at 1 |" in shown
    assert f"1 x 1 x {len(patients)}" in shown


def test_a_transformer_is_trained_and_scores_scans_by_patches(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    before = replace(pretraining(steps=1), encoder="primus_tiny", objective="masked")
    after = replace(finetuning("ar", 0, steps=1), encoder="primus_tiny")

    assert evidence_pretrain.pretrain(before, data, tmp_path, results, Deadline(None), CPU)
    assert evidence_finetune.finetune(after, data, tmp_path, results, Deadline(None), CPU)

    trained, scored = results.lines()
    assert trained["objective"] == "masked"
    assert scored["loaded_share"] == 1.0
    assert 0 <= scored["dice_mean"] <= 1


def test_patches_that_overlap_make_up_the_whole_scan() -> None:
    class Threshold(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([0.5 - image, image - 0.5], dim=1)

    # Larger than the patch along z and y, smaller along x.
    image = torch.rand(1, 1, 9, 12, 7, generator=torch.Generator().manual_seed(0))

    found = evidence_score.segment(Threshold(), image, (8, 8, 8), num_classes=2)

    assert (found == (image[0, 0] > 0.5).numpy()).all()


def test_the_decoder_is_pretrained_too_if_the_recipe_asks_for_it(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    evidence_pretrain.pretrain(pretraining(steps=1), data, tmp_path, results, Deadline(None), CPU)
    job = finetuning("ar", 0)
    file = evidence_pretrain.weights_file(tmp_path, "ixi", "ar", 0)
    key = "decoder.stages.2.convs.0.conv.weight"

    alone = replace(job, recipe=("transfer_decoder=false",))
    encoder_alone = evidence_finetune.Training(alone, data, tmp_path, CPU)
    whole = replace(job, recipe=("transfer_decoder=true",))
    with_decoder = evidence_finetune.Training(whole, data, tmp_path, CPU)

    kernel = read_tensors(file)[key]
    assert torch.equal(with_decoder.network.state_dict()[key], kernel)
    assert not torch.equal(encoder_alone.network.state_dict()[key], kernel)
    # Two labelled scans are very few: at first only a random decoder is trained.
    assert with_decoder.recipe.decoder_first_fraction == 0.0
    assert encoder_alone.recipe.decoder_first_fraction == 0.1


def test_a_finetuning_in_slices_is_the_one_without(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    job = finetuning("scratch", None)
    whole = ResultFile(tmp_path / "whole.jsonl")
    sliced = ResultFile(tmp_path / "sliced.jsonl")

    assert evidence_finetune.finetune(job, data, tmp_path / "a", whole, Deadline(None), CPU)
    assert not evidence_finetune.finetune(job, data, tmp_path / "b", sliced, after_reads(2), CPU)
    assert evidence_finetune.finetune(job, data, tmp_path / "b", sliced, Deadline(None), CPU)

    (first,), (second,) = whole.lines(), sliced.lines()
    assert first["dice"] == second["dice"]
    assert first["curve"] == second["curve"]
    # The checkpoint of a finished training is removed.
    assert not list((tmp_path / "b" / "finetuning").iterdir())


def test_a_probe_is_of_the_same_draws_and_done_once(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    evidence_pretrain.pretrain(pretraining(steps=1), data, tmp_path, results, Deadline(None), CPU)
    # The pretrained encoder is asked for twice, and gets one line.
    for init, seed in (("random", None), ("ar", 0), ("ar", 0)):
        job = evidence_probe.ProbeJob(
            "ixi",
            init,
            seed,
            "resenc_tiny",
            (1,),
            2,
            "development",
            voxels_per_class=20,
        )
        evidence_probe.probe(job, data, tmp_path, results, CPU)

    _, random, ours = results.lines()
    assert random["command"] == ours["command"] == "probe"
    keys = {(result["labels"], result["draw"]) for result in ours["results"]}
    assert keys == {(1, 0), (1, 1)}
    assert len(results.lines()) == 3
    patients = {data.subject_of[case] for case in data.division.development}
    assert all(set(result["dice"]) == patients for result in ours["results"])
    shown = evidence_table.table(results.lines(), data=None, split=None, wanted=0.02)
    assert "| ar, encoder + decoder | 2 |" in shown


def test_random_weights_can_take_the_architecture_of_an_arm(
    tmp_path: Path,
    data: evidence_data.ResidentSet,
) -> None:
    results = ResultFile(tmp_path / "lines.jsonl")
    evidence_pretrain.pretrain(pretraining(steps=1), data, tmp_path, results, Deadline(None), CPU)
    narrow = replace(finetuning("scratch", None), encoder="primus_tiny", like="ar")
    block = evidence_finetune.block_of(narrow, data, tmp_path, num_cases=1)

    assert block.encoder.name == "resenc_tiny"
    assert block.weights is None
    assert narrow.identity["arm"] == "scratch (like ar)"
    with pytest.raises(UsageError):
        evidence_finetune.block_of(replace(narrow, like="nothing"), data, tmp_path, num_cases=1)


def test_the_encoder_rate_changes_only_the_encoder(data: evidence_data.ResidentSet) -> None:
    # A tenth of the rate in the encoder, at every step of the schedule, here the last.
    job = replace(finetuning("scratch", None), lr=0.01, encoder_lr=0.001)
    training = evidence_finetune.Training(job, data, Path("nowhere"), CPU)
    encoder = {id(p) for p in training.network.encoder.parameters()}

    training.rates.step(0, job.steps - 1)

    rates = {True: set(), False: set()}
    for group in training.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter) in encoder].add(group["lr"])
    (inside,), (outside,) = rates[True], rates[False]
    assert inside == pytest.approx(outside / 10)


def test_the_test_patients_need_a_separate_flag(tmp_path: Path) -> None:
    words = ["finetune", "--data", "ixi", "--work", str(tmp_path), "--score", "test"]
    # The test patients are looked at once, at the end; a slip of --score must not use them up.
    out = ["--out", str(tmp_path / "lines.jsonl"), "--device", "cpu"]

    with pytest.raises(UsageError):
        evidence.finetune_all(evidence.parser().parse_args([*words, *out]))


def test_scratch_is_trained_once_for_all_pretraining_seeds() -> None:
    words = ["finetune", "--data", "ixi", "--init", "scratch", "ar", "--seeds", "0", "1"]
    args = evidence.parser().parse_args([*words, "--draws", "0", "1", "--labels", "5"])

    found = [(job.draw, job.init, job.pretraining_seed) for job in evidence.finetune_jobs(args)]

    # Random weights have no pretraining seed.
    of_draw = [("scratch", None), ("ar", 0), ("ar", 1)]
    assert found == [(draw, *rest) for draw in (0, 1) for rest in of_draw]
    assert json.dumps(next(evidence.finetune_jobs(args)).identity)
