"""What autoreg_benchmark makes of its lines: patients, pairs, intervals, tables, pictures."""

import json
import math
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from refusals import refused

from nnunet_autoreg.benchmark import picture
from nnunet_autoreg.benchmark.folds import merged_folds, unfinished_folds
from nnunet_autoreg.benchmark.picture import draw, draw_curve
from nnunet_autoreg.benchmark.results import key_of, read_results
from nnunet_autoreg.benchmark.split import (
    divide,
    find_patients,
    labelled,
    read_subjects,
)
from nnunet_autoreg.benchmark.statistics import interval, mean_dice, mean_interval, paired
from nnunet_autoreg.benchmark.table import markdown, rows_of, summary, unequal_pretrainings
from nnunet_autoreg.benchmark.worker import read_dice, surface_dice_of_summary
from nnunet_autoreg.downstream.patients import subjects_by_name
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.records import append_json_line

DATASET = "Dataset900_Heads"
CASES = [f"head_{n:03d}" for n in range(20)]


def test_patients_are_separated_by_the_first_number_that_differs() -> None:
    assert subjects_by_name(["patient001_ED", "patient001_ES", "patient002_ED"]) == {
        "patient001_ED": "patient001",
        "patient001_ES": "patient001",
        "patient002_ED": "patient002",
    }
    assert set(subjects_by_name(CASES).values()) == set(CASES)

    # "22" is the same in all names, so it does not separate patients.
    flare = [f"FLARE22_Tr_{n:04d}" for n in range(50)]
    assert set(subjects_by_name(flare).values()) == set(flare)

    # The number of the site does not separate patients either, but it is part of who a patient is.
    sites = [f"site{s}_{n:03d}_scan{k}" for s in (1, 2) for n in range(10) for k in (1, 2)]
    assert subjects_by_name(sites)["site2_004_scan1"] == "site2_004"
    assert subjects_by_name(["left", "right"]) == {"left": "left", "right": "right"}


def test_both_phases_of_a_patient_always_go_together() -> None:
    cases = [f"patient{n:03d}_{phase}" for n in range(1, 26) for phase in ("ED", "ES")]
    subjects = subjects_by_name(cases)

    division = divide(subjects)

    sizes, patients = [], []
    for part in (division.pool, division.development, division.test):
        sizes.append(len(part))
        patients.append({subjects[case] for case in part})

    # Of 25 patients, 20 % are for the test (5), 20 % of the rest for development (4).
    assert [len(part) for part in patients] == [16, 4, 5]
    assert not set.intersection(*patients)
    assert len(set.union(*patients)) == 25
    assert sizes == [32, 8, 10]
    assert len(labelled(division, subjects, 5, seed=0)) == 10

    # Counted in cases: five cases are rounded up to three whole patients.
    five = labelled(division, subjects, 5, seed=0, unit="cases")
    both_phases = {case[:-3] + phase for case in five for phase in ("_ED", "_ES")}
    assert len(five) == 6
    assert set(five) == both_phases


def test_the_division_never_changes_and_labels_of_a_seed_are_nested() -> None:
    subjects = subjects_by_name(CASES)
    division = divide(subjects)

    assert division == divide(dict(reversed(subjects.items())))
    assert (len(division.pool), len(division.development), len(division.test)) == (13, 3, 4)
    three, eight = (set(labelled(division, subjects, count, 0)) for count in (3, 8))
    assert three < eight < set(division.pool)
    assert labelled(division, subjects, 3, 0) != labelled(division, subjects, 3, 1)

    with refused(UsageError, "benchmark-too-many-labels", "--labels 14", "13"):
        labelled(division, subjects, 14, 0)
    with refused(UsageError, "benchmark-too-few-patients", "2 patients"):
        divide({"a": "a", "b": "b", "c": "b"})


def test_subjects_come_from_a_file_that_has_to_name_every_case(tmp_path: Path) -> None:
    file = tmp_path / "subjects.csv"
    file.write_text("case,subject\na_1,x\na_2,x\nb_1,y\n")

    assert read_subjects(file, ["a_1", "a_2", "b_1"]) == {"a_1": "x", "a_2": "x", "b_1": "y"}
    with refused(UsageError, "subjects-missing-case", "1 of 2", "b_2", "'b_1'"):
        read_subjects(file, ["a_1", "b_2"])

    file.write_text("name,patient\na_1,x\n")

    with refused(UsageError, "subjects-unreadable", "case and subject"):
        read_subjects(file, ["a_1"])


def line(
    arm: str = "pretrained",
    seed: int = 0,
    dice: dict[str, list[float | None]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """One line of runs.jsonl; ``dice`` gives the values of the labels 1, 2, ... of each case."""
    dice = {"a": [0.5, 0.7], "b": [0.4, 0.4]} if dice is None else dice
    dice_per_case = {}
    for case, values in dice.items():
        dice_per_case[case] = {str(i + 1): value for i, value in enumerate(values)}
    return {
        "arm": arm,
        "encoder": "-" if arm == "stock" else "brain",
        "labels": 2,
        "seed": seed,
        "split": "test",
        "steps": 50,
        "batch": 2,
        "recipe": "",
        "num_labelled": 2,
        "steps_per_epoch": 25,
        "curve": [0.1, 0.3],
        "train_s": 60.0,
        "validate_s": 6.0,
        "seconds_per_step": 1.2,
        "subjects": {case: case for case in dice},
        "pretraining": None,
        "dice_per_case": dice_per_case,
        **changes,
    }


def test_dice_is_the_mean_over_cases_of_the_mean_over_labels_that_have_one() -> None:
    # Case a: (0.5 + 0.7) / 2 = 0.6, case b: 0.4.
    assert mean_dice(line()) == pytest.approx((0.6 + 0.4) / 2)
    # None: neither truth nor prediction has the label. Case b then has no Dice at all.
    partly = line(dice={"a": [None, 0.8], "b": [None, None], "c": [0.2, 0.4]})
    assert mean_dice(partly) == pytest.approx((0.8 + 0.3) / 2)
    assert math.isnan(mean_dice(line(dice={"a": [None]})))


def test_pairs_are_of_one_seed_and_case() -> None:
    # Seed 2 has no partner, and case c of seed 0 no Dice: c is left out for both seeds.
    ours = {
        0: line(dice={"a": [0.5], "b": [0.6], "c": [None]}),
        1: line(dice={"a": [0.7], "b": [0.6], "c": [0.1]}),
        2: line(),
    }
    theirs = {
        0: line(dice={"a": [0.4], "b": [0.6], "c": [0.1]}),
        1: line(dice={"a": [0.4], "b": [0.5], "c": [0.1]}),
    }

    found = paired(ours, theirs)

    assert found is not None
    assert found.mean == pytest.approx((0.1 + 0.0 + 0.3 + 0.1) / 4)
    assert (found.num_seeds, found.num_cases, found.num_left_out) == (2, 2, 1)
    assert paired({0: line()}, {1: line()}) is None


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = interval(np.full((3, 4), 0.25), list("abcd"))

    assert found.mean == 0.25
    assert found.over_both == pytest.approx((0.25, 0.25))
    assert found.over_cases == pytest.approx((0.25, 0.25))


def test_two_patients_and_one_seed_give_the_exact_bootstrap() -> None:
    # Draws of two from {0, 1}: mean 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4, so 2.5 % and
    # 97.5 % lie at 0 and 1.
    found = interval(np.array([[0.0, 1.0]]), ["a", "b"])
    assert found.over_cases == (0.0, 1.0)
    assert found.mean == 0.5

    # Both scans of one patient come and go together: without that, a mean of 0 (all four draws from
    # the first patient's) would be rarer than 1 in 16.
    grouped = interval(np.array([[0.0, 0.0, 1.0, 1.0]]), ["a", "a", "b", "b"])
    assert grouped.over_cases == (0.0, 1.0)

    # Twenty patients, half of them 1: the 2.5 % point of a binomial (20, 1/2) is 6 of 20, the
    # 97.5 % point 14 of 20. The draws are random, so one patient (0.05) more or less is allowed.
    twenty = interval(np.array([[0.0] * 10 + [1.0] * 10]), [str(n) for n in range(20)])
    assert twenty.over_cases == pytest.approx((0.3, 0.7), abs=0.051)


def test_the_spread_between_seeds_is_in_the_interval_over_both_only() -> None:
    # Every patient has 0 with seed 0 and 1 with seed 1: no spread between patients. Of two drawn
    # seeds, both are the first, or both the second, in a quarter of the draws each.
    differences = np.array([[0.0] * 30, [1.0] * 30])

    found = interval(differences, [str(n) for n in range(30)])

    assert found.over_cases == pytest.approx((0.5, 0.5))
    assert found.over_both == (0.0, 1.0)


def test_a_patient_counts_once_however_many_scans_there_are() -> None:
    # Patient b has two scans. By scans the mean would be 2/3.
    assert interval(np.array([[0.0, 1.0, 1.0]]), ["a", "b", "b"]).mean == pytest.approx(1 / 2)

    scores = {"a": [0.1], "b1": [0.5], "b2": [0.7]}
    run = line(dice=scores, subjects={"a": "a", "b1": "b", "b2": "b"})

    assert mean_dice(run) == pytest.approx((0.1 + 0.6) / 2)


def test_lines_come_back_and_a_torn_last_one_is_dropped_and_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert read_results(file) == []

    # A run that was killed while it wrote its line.
    append_json_line(file, line(seed=0))
    with file.open("a") as handle:
        handle.write('{"arm": "scra')
    assert [key_of(x).seed for x in read_results(file)] == [0]

    append_json_line(file, line(seed=1))
    assert [key_of(x).seed for x in read_results(file)] == [0, 1]

    # Damage before the last line is not a kill, so it is not dropped.
    file.write_text("nonsense\n" + file.read_text())
    with refused(AutoregError, "benchmark-damaged-line", "line 1"):
        read_results(file)


def test_the_table_pairs_each_arm_with_its_twin_and_with_stock() -> None:
    lines = [line("pretrained", s, {"a": [0.5 + 0.1 * s], "b": [0.5]}) for s in (0, 1)]
    lines += [line("scratch", s, {"a": [0.4], "b": [0.4]}) for s in (0, 1)]
    lines += [line("stock", 0, {"a": [0.8], "b": [0.7]})]

    rows = {row.key.arm: row for row in rows_of(lines)}

    assert list(rows) == ["pretrained", "scratch", "stock"]

    ours = rows["pretrained"]
    # Differences of a and b: 0.1 and 0.1 for seed 0, 0.2 and 0.1 for seed 1.
    assert ours.to_scratch is not None
    assert ours.to_scratch.mean == pytest.approx((0.1 + 0.1 + 0.2 + 0.1) / 4)
    # Stock has seed 0 only: -0.3 and -0.2.
    assert ours.to_stock is not None
    assert ours.to_stock.mean == pytest.approx(-0.25)
    assert ours.to_stock.num_seeds == 1
    assert rows["scratch"].to_scratch is None
    assert rows["stock"].to_stock is None

    text = markdown(lines)
    # Seeds have 0.5 and 0.55: mean 0.525, standard deviation 0.05 / sqrt(2) = 0.035.
    assert "| test | 50 x 2 | 2 | brain | pretrained | 2 | 0.525 (0.035) | +0.125 [" in text
    assert ", 1 seed |" in text
    assert "another pretraining" in " ".join(text.split())


def test_the_summary_says_in_words_what_is_shown_and_fits_a_terminal() -> None:
    cases = [f"case{number}" for number in range(8)]
    better, same = [], []
    for seed in (0, 1):
        dice = {case: [0.5] for case in cases}
        higher = {case: [0.6] for case in cases}
        # Half of the cases are 0.1 better, half 0.1 worse: mean 0.
        mixed = {case: [0.4 + 0.2 * (number % 2)] for number, case in enumerate(cases)}
        better += [line("pretrained", seed, higher), line("scratch", seed, dice)]
        same += [line("pretrained", seed, mixed), line("scratch", seed, dice)]

    answers = [summary(lines).splitlines()[:2] for lines in (better, same, better[:2])]

    # The third has one seed only, so the spread between seeds is unknown.
    assert answers[0][0] == "better: +0.100 [+0.100, +0.100]"
    assert answers[1][0].startswith("no difference shown: +0.000 [")
    assert answers[2][0] == "not known from 1 seed: +0.100 [+0.100, +0.100]"
    compared = "pretrained (brain) minus scratch, 2 labelled patients, 50 steps"
    assert [answer[1].strip() for answer in answers] == [compared] * 3


@pytest.mark.parametrize("encoder", ["benchmark_resenc_tiny", "a_run_of_a_longer_name_than_most"])
def test_the_summary_fits_a_terminal_of_80_columns(encoder: str) -> None:
    recipe = "optimizer=adamw pretrained_rate=1e-3 scratch_rate=1e-3 weight_decay=0.05"
    lines = []
    for arm in ("pretrained", "masked", "scratch"):
        lines += [line(arm, seed, encoder=encoder, recipe=recipe, labels=20) for seed in (0, 1)]
    lines += [line("stock", seed, labels=20) for seed in (0, 1)]

    shown = summary(lines).splitlines()

    assert max(map(len, shown)) <= 80
    assert [text.split()[1] for text in shown[-4:]] == ["pretrained", "masked", "scratch", "stock"]


def test_the_summary_shows_all_lengths_that_were_asked_for() -> None:
    lines = []
    for steps in (50, 100, 200):
        lines += [line(arm, steps=steps) for arm in ("pretrained", "scratch")]

    shown = summary(lines, steps=(50, 200))

    compared = [text for text in shown.splitlines() if "minus scratch, " in text]
    assert [text.split(", ")[-1] for text in compared] == ["50 steps", "200 steps"]
    # Without --steps the longest one is shown.
    assert summary(lines) == summary(lines, steps=(200,))


# --- cross-validation


def of_fold(number: int, dice: dict[str, list[float | None]], **changes: Any) -> dict[str, Any]:
    return line(dice=dice, **{"split": f"fold{number}of2", **changes})


def test_the_folds_of_a_seed_are_one_run_with_all_patients() -> None:
    lines = [
        of_fold(1, {"a": [0.5], "b": [0.7]}),
        of_fold(1, {"a": [0.1], "b": [0.2]}, arm="scratch"),
        of_fold(2, {"c": [0.9]}, num_labelled=4),
        of_fold(2, {"c": [0.6]}, arm="scratch"),
    ]

    rows = {row.key.arm: row for row in rows_of(lines)}

    ours = rows["pretrained"]
    assert ours.key.split == "2-fold cross-validation"
    # Pretrained: (0.5 + 0.7 + 0.9) / 3. Scratch: (0.1 + 0.2 + 0.6) / 3.
    assert ours.dice == [pytest.approx(0.7)]
    assert rows["scratch"].dice == [pytest.approx(0.3)]
    assert ours.to_scratch is not None
    assert ours.to_scratch.mean == pytest.approx(0.4)
    assert (ours.to_scratch.num_cases, ours.to_scratch.num_left_out) == (3, 0)
    # Two folds of 60 s; the larger number of labelled cases is shown.
    assert (ours.lines[0]["train_s"], ours.lines[0]["num_labelled"]) == (120.0, 4)


def test_folds_count_once_all_of_them_are_finished() -> None:
    # Seed 1 has only the first of two folds.
    lines = [of_fold(1, {"a": [0.5]}), of_fold(2, {"b": [0.7]}), of_fold(1, {"a": [0.4]}, seed=1)]

    assert [sorted(row.lines) for row in rows_of(lines)] == [[0]]
    assert unfinished_folds(lines).startswith("1 run ")
    assert unfinished_folds(lines[:2]) == ""
    note = unfinished_folds(lines)
    assert note in markdown(lines)
    assert note in summary(lines)

    # A fold that was repeated counts once, with its last line.
    again = [*lines[:2], of_fold(2, {"b": [0.9]})]
    assert rows_of(again)[0].dice == [pytest.approx(0.7)]
    # Folds of another number are another run.
    assert rows_of([lines[0], of_fold(2, {"b": [0.7]}, split="fold2of3")]) == []


def test_lines_without_folds_are_as_they_were() -> None:
    lines = [line("pretrained"), line("scratch"), line("stock", split="development")]

    assert merged_folds(lines) == lines


def test_runs_of_another_recipe_or_length_are_never_paired() -> None:
    lines = [
        line("pretrained", recipe="pretrained_rate=1e-2"),
        line("scratch"),
        line("stock", steps=100),
    ]
    ours = next(row for row in rows_of(lines) if row.key.arm == "pretrained")

    assert ours.to_scratch is None
    assert ours.to_stock is None


def test_the_summary_of_nnunet_gives_dice_by_case_and_none_for_no_object(
    tmp_path: Path,
) -> None:
    metrics = {"1": {"Dice": 0.75}, "2": {"Dice": float("nan")}}
    entry = {"reference_file": "/gt/case.a_01.nii.gz", "prediction_file": "", "metrics": metrics}
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [entry]}))

    assert read_dice(tmp_path / "summary.json", ".nii.gz") == {"case.a_01": {"1": 0.75, "2": None}}


def test_the_picture_is_drawn_for_single_runs_pairs_and_empty_intervals(
    tmp_path: Path,
) -> None:
    one = [line("stock")]
    pairs = [line("pretrained", s, {"a": [0.1 + 0.2], "b": [0.3]}) for s in (0, 1)]
    pairs += [line("scratch", s, {"a": [0.3], "b": [0.1]}) for s in (0, 1)]
    # 0.1 + 0.2 is 0.30000000000000004: an interval of one value may be empty by rounding.
    flat = [line("pretrained", 0, {"a": [0.1 + 0.2]}), line("scratch", 0, {"a": [0.1]})]

    for lines in (one, pairs, flat, pairs + one):
        draw(tmp_path / "picture.png", lines, DATASET)
        draw_curve(tmp_path / "curve.png", lines, DATASET)
        # A picture without axes and text would be smaller.
        assert (tmp_path / "picture.png").stat().st_size > 5000
        assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_learning_curve_shows_every_length_with_intervals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = []
    for steps, seed, labels in product((50, 200), (0, 1), (2, 5)):
        for arm, dice in (("pretrained", 0.51), ("scratch", 0.5), ("masked", 0.505)):
            scores = {"a": [dice + 0.002 * seed], "b": [dice]}
            lines.append(line(arm, seed, scores, steps=steps, labels=labels))
    figures = []
    # The figure is looked at instead of being saved.
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: figures.append(self))
    monkeypatch.setattr(picture, "atomic_path", nullcontext)

    draw_curve(tmp_path / "curve.png", lines, DATASET)

    panels = figures[0].axes
    assert [axis.get_title() for axis in panels] == ["50 steps", "200 steps"]
    title = figures[0].get_suptitle()
    assert "n = 2 patients" in title
    assert "2 seeds" in title
    for axis in panels:
        low, high = axis.get_ylim()
        assert high - low == pytest.approx(0.1)
        assert list(axis.get_xticks()) == [2, 5]
        curves = [container.lines[0] for container in axis.containers]
        # Pretrained: 0.51 + 0.002 * seed and 0.51, over two seeds: (0.512 + 3 * 0.51) / 4.
        assert curves[0].get_ydata() == pytest.approx([0.5105, 0.5105])
        assert len({curve.get_color() for curve in curves}) == len(curves) == 3
        assert len({curve.get_marker() for curve in curves}) == 3


@pytest.mark.parametrize("drawn, shown", [((0.01, 0.03), (0, 0.1)), ((0.98, 0.99), (0.9, 1))])
def test_an_axis_of_scores_spans_a_tenth_within_zero_and_one(
    drawn: tuple[float, float],
    shown: tuple[float, float],
) -> None:
    scores, differences = Figure().subplots(1, 2)

    for axis in (scores, differences):
        axis.set_ylim(*drawn)
    picture.widen(scores)
    picture.widen(differences, is_score=False)

    assert scores.get_ylim() == pytest.approx(shown)
    low, high = differences.get_ylim()
    assert (low + high) / 2 == pytest.approx(sum(drawn) / 2)
    assert high - low == pytest.approx(0.1)


def test_the_interval_of_a_mean_is_that_of_its_patients_and_seeds() -> None:
    # Two patients with 0 and 1 and no spread between seeds: draws of two as in the bootstrap above.
    run = line(dice={"a": [0.0], "b": [1.0]})
    runs = {0: run, 1: run}

    found = mean_interval(runs)

    assert found is not None
    assert found.mean == 0.5
    assert found.over_both == (0.0, 1.0)
    assert found.num_seeds == 2
    assert mean_interval({0: line(dice={"a": [None]})}) is None


# --- surface Dice and patients


def with_surface(
    tolerance_mm: float,
    scores: dict[str, list[float | None]],
    **changes: Any,
) -> dict[str, Any]:
    """One line of runs.jsonl with surface Dice; its Dice is 0.5 for every case."""
    surface = {}
    for case, values in scores.items():
        surface[case] = {str(i + 1): value for i, value in enumerate(values)}
    extra = {"surface_dice_per_case": surface, "surface_tolerance_mm": tolerance_mm}
    return line(**{"dice": {case: [0.5] for case in scores}, **extra, **changes})


def test_surface_dice_is_paired_as_dice_is() -> None:
    ours = with_surface(2.0, {"a": [0.9], "b": [0.8]})
    theirs = with_surface(2.0, {"a": [0.6], "b": [0.7]}, arm="scratch")

    row = next(row for row in rows_of([ours, theirs]) if row.key.arm == "pretrained")

    assert row.surface_dice == [pytest.approx(0.85)]
    assert row.surface_to_scratch is not None
    # (0.3 + 0.1) / 2.
    assert row.surface_to_scratch.mean == pytest.approx(0.2)
    assert row.to_scratch is not None
    assert row.to_scratch.mean == 0
    assert "0.850 (-) at 2 mm" in markdown([ours, theirs])


def test_surface_dice_of_two_tolerances_is_never_paired() -> None:
    ours = with_surface(2.0, {"a": [0.9]})
    theirs = with_surface(1.0, {"a": [0.6]}, arm="scratch")

    row = next(row for row in rows_of([ours, theirs]) if row.key.arm == "pretrained")

    assert row.surface_to_scratch is None
    assert row.to_scratch is not None


def test_lines_without_surface_dice_are_still_read() -> None:
    row = rows_of([line("pretrained"), line("scratch")])[0]

    assert row.surface_dice == []
    assert row.surface_to_scratch is None
    assert row.to_scratch is not None


def test_surface_dice_is_read_from_the_files_of_the_summary(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    # A cube of 3 voxels, predicted 1 voxel too far in x.
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2:5, 2:5, 2:5] = 1
    shifted = np.roll(truth, 1, axis=2)
    for folder, array in (("gt", truth), ("validation", shifted)):
        (tmp_path / folder).mkdir()
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((2.0, 1.0, 1.0))
        sitk.WriteImage(image, str(tmp_path / folder / "case_1.nii.gz"))
    summary = tmp_path / "summary.json"
    entry = {
        "reference_file": str(tmp_path / "gt" / "case_1.nii.gz"),
        "prediction_file": str(tmp_path / "validation" / "case_1.nii.gz"),
        "metrics": {"1": {}, "2": {}, "(1, 2)": {}},
    }
    summary.write_text(json.dumps({"metric_per_case": [entry]}))

    # The spacing is in the order x, y, z: one voxel of x is 2 mm, so 2 mm forgive it and 1 mm not.
    near = surface_dice_of_summary(summary, ".nii.gz", 2.0)["case_1"]
    far = surface_dice_of_summary(summary, ".nii.gz", 1.0)["case_1"]

    # No voxel has label 2. A region is the union of its labels, here that of label 1.
    assert near == {"1": 1.0, "2": None, "(1, 2)": 1.0}
    assert far["1"] is not None
    assert far["1"] < 1


def test_the_picture_shows_surface_dice_beside_dice(tmp_path: Path) -> None:
    from nnunet_autoreg.benchmark.picture import draw

    runs = [with_surface(2.0, {"a": [0.9]}), with_surface(2.0, {"a": [0.6]}, arm="scratch")]

    draw(tmp_path / "both.png", runs, DATASET)
    draw(tmp_path / "old.png", [line("pretrained"), line("scratch")], DATASET)

    # A second panel takes more bytes.
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "old.png").stat().st_size


# 5 % more is called equal, 30 % more is not; without a number nothing can be compared.
@pytest.mark.parametrize(
    ("flops", "is_named"),
    [
        (1.05e15, False),
        (1.3e15, True),
        (None, False),
    ],
)
def test_unequal_costs_of_pretraining_are_reported(flops: float | None, is_named: bool) -> None:
    cost = {"objective": "x", "steps": 5, "batch": 2, "scans": 3, "samples": 10, "seconds": 4.0}
    ours = line("pretrained", pretraining={**cost, "flops": 1e15})
    theirs = line("masked", pretraining={**cost, "flops": flops})

    text = markdown([ours, theirs])

    assert "1e+15 FLOPs, 10 samples, 4 s" in text
    assert ("NOT AT EQUAL COST" in text) is is_named
    assert bool(unequal_pretrainings(rows_of([ours, theirs]))) is is_named


def test_patients_come_from_cases_csv_if_it_names_them_all(tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    cases = ["lidc0001_n01", "lidc0001_n02", "lidc0002_n01"]
    table.write_text("case,patient\nlidc0001_n01,P1\nlidc0001_n02,P1\nlidc0002_n01,P2\n")

    found = find_patients(tmp_path, cases)

    assert found.patient_of == {"lidc0001_n01": "P1", "lidc0001_n02": "P1", "lidc0002_n01": "P2"}
    assert "cases.csv" in found.rule


# No column of patients, not every case, an empty file, no file.
@pytest.mark.parametrize("content", ["case,sex\na_1,F\n", "case,patient\na_1,x\n", "", None])
def test_names_decide_if_cases_csv_does_not(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cases.csv").write_text(content)

    found = find_patients(tmp_path, ["a_1", "a_2"])

    assert found.patient_of == {"a_1": "a_1", "a_2": "a_2"}
    assert "names" in found.rule
