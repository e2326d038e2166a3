"""autoreg_benchmark without any training: division of patients, pairs, intervals, lines, resuming, leaks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_autoreg.benchmark import prepare as preparing
from nnunet_autoreg.benchmark import run as running
from nnunet_autoreg.benchmark.commands import Commands
from nnunet_autoreg.benchmark.leak import Scored, check_pretraining
from nnunet_autoreg.benchmark.prepare import Bench, Record, ensure_masked, open_record, retyped, write_folds, write_plans
from nnunet_autoreg.benchmark.protocol import Layout, Request, plans_name, runs_of, weights_of
from nnunet_autoreg.benchmark.results import RunKey, append_result, key_of, read_results
from nnunet_autoreg.benchmark.run import epochs_of, run_missing, settle_length
from nnunet_autoreg.benchmark.split import divide, labelled, read_subjects, subjects_by_name
from nnunet_autoreg.benchmark.statistics import interval, mean_dice, paired, steps_to
from nnunet_autoreg.benchmark.table import markdown, rows_of
from nnunet_autoreg.benchmark.worker import Job, Stopwatch, read_dice
from nnunet_autoreg.cli.benchmark import parser, read_request
from nnunet_autoreg.corpus.rows import ScanRow, write_index
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.records import from_jsonable, read_json, write_json

DATASET = "Dataset900_Heads"
CASES = [f"head_{n:03d}" for n in range(20)]


def request(**changes: Any) -> Request:
    return Request(**{"dataset": DATASET, "labels": (2,), "num_seeds": 2, "arms": ("pretrained", "scratch"), "encoders": ("tiny",),
                      "steps": 50, "batch": 2, **changes}).check()


# --- patients


def test_names_tell_patients_by_their_first_number_that_separates_them() -> None:
    assert subjects_by_name(["patient001_ED", "patient001_ES", "patient002_ED"]) == {
        "patient001_ED": "patient001", "patient001_ES": "patient001", "patient002_ED": "patient002"}
    assert set(subjects_by_name(CASES).values()) == set(CASES)
    flare = [f"FLARE22_Tr_{n:04d}" for n in range(50)]
    assert set(subjects_by_name(flare).values()) == set(flare)
    sites = [f"site{s}_{n:03d}_scan{k}" for s in (1, 2) for n in range(10) for k in (1, 2)]
    assert subjects_by_name(sites)["site2_004_scan1"] == "site2_004"
    assert subjects_by_name(["left", "right"]) == {"left": "left", "right": "right"}


def test_both_phases_of_a_patient_always_go_together() -> None:
    cases = [f"patient{n:03d}_{phase}" for n in range(1, 26) for phase in ("ED", "ES")]
    subjects = subjects_by_name(cases)
    division = divide(subjects)
    parts = [{subjects[case] for case in part} for part in (division.pool, division.development, division.test)]
    assert [len(part) for part in parts] == [16, 4, 5] and not set.intersection(*parts) and len(set.union(*parts)) == 25
    assert [len(p) for p in (division.pool, division.development, division.test)] == [32, 8, 10]
    five = labelled(division, subjects, 5, seed=0)
    assert len(five) == 6 and {case[:-3] + phase for case in five for phase in ("_ED", "_ES")} == set(five)


def test_the_division_is_the_same_every_time_and_labels_of_a_seed_are_nested() -> None:
    subjects = subjects_by_name(CASES)
    division = divide(subjects)
    assert division == divide(dict(reversed(subjects.items())))
    assert (len(division.pool), len(division.development), len(division.test)) == (13, 3, 4)
    assert set(labelled(division, subjects, 3, 0)) < set(labelled(division, subjects, 8, 0)) < set(division.pool)
    assert labelled(division, subjects, 3, 0) != labelled(division, subjects, 3, 1)
    with pytest.raises(UsageError, match="--labels 14: the pool holds 13 labelled cases"):
        labelled(division, subjects, 14, 0)
    with pytest.raises(UsageError, match="2 patients cannot be divided"):
        divide({"a": "a", "b": "b", "c": "b"})


def test_subjects_come_from_a_file_that_has_to_name_every_case(tmp_path: Path) -> None:
    file = tmp_path / "subjects.csv"
    file.write_text("case,subject\na_1,x\na_2,x\nb_1,y\n")
    assert read_subjects(file, ["a_1", "a_2", "b_1"]) == {"a_1": "x", "a_2": "x", "b_1": "y"}
    with pytest.raises(UsageError, match="names no subject for 1 of 2 cases, the first is b_2; did you mean 'b_1'"):
        read_subjects(file, ["a_1", "b_2"])
    file.write_text("name,patient\na_1,x\n")
    with pytest.raises(UsageError, match="columns case and subject"):
        read_subjects(file, ["a_1"])


# --- numbers


def line(arm: str = "pretrained", seed: int = 0, dice: dict[str, list[float | None]] | None = None, **changes: Any) -> dict[str, Any]:
    dice = {"a": [0.5, 0.7], "b": [0.4, 0.4]} if dice is None else dice
    return {
        "arm": arm, "encoder": "-" if arm == "stock" else "brain", "labels": 2, "seed": seed, "split": "test", "steps": 50, "batch": 2,
        "recipe": "", "num_labelled": 2, "steps_per_epoch": 25, "curve": [0.1, 0.3], "train_s": 60.0, "validate_s": 6.0,
        "seconds_per_step": 1.2, "subjects": {case: case for case in dice}, "pretraining": None,
        "dice_per_case": {case: {str(i + 1): v for i, v in enumerate(values)} for case, values in dice.items()}, **changes,
    }


def test_dice_is_the_mean_over_cases_of_the_mean_over_labels_that_have_one() -> None:
    assert mean_dice(line()) == pytest.approx((0.6 + 0.4) / 2)
    assert mean_dice(line(dice={"a": [None, 0.8], "b": [None, None], "c": [0.2, 0.4]})) == pytest.approx((0.8 + 0.3) / 2)
    assert math.isnan(mean_dice(line(dice={"a": [None]})))


def test_pairs_are_of_one_seed_and_one_case_and_cases_without_a_dice_are_counted() -> None:
    ours = {0: line(dice={"a": [0.5], "b": [0.6], "c": [None]}), 1: line(dice={"a": [0.7], "b": [0.6], "c": [0.1]}), 2: line()}
    theirs = {0: line(dice={"a": [0.4], "b": [0.6], "c": [0.1]}), 1: line(dice={"a": [0.4], "b": [0.5], "c": [0.1]})}
    found = paired(ours, theirs)
    assert found is not None and found.mean == pytest.approx((0.1 + 0.0 + 0.3 + 0.1) / 4)
    assert (found.num_seeds, found.num_cases, found.num_left_out) == (2, 2, 1)
    assert paired({0: line()}, {1: line()}) is None


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = interval(np.full((3, 4), 0.25), list("abcd"))
    assert found.mean == 0.25
    assert found.over_both == pytest.approx((0.25, 0.25)) and found.over_cases == pytest.approx((0.25, 0.25))


def test_two_patients_and_one_seed_give_the_exact_bootstrap() -> None:
    # Draws of two from {0, 1}: mean 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4, so 2.5 % and 97.5 % lie at 0 and 1.
    found = interval(np.array([[0.0, 1.0]]), ["a", "b"])
    assert found.over_cases == (0.0, 1.0) and found.mean == 0.5
    # Both scans of one patient come and go together: without that, a mean of 0 (all four draws from the first patient's) would be
    # rarer than 1 in 16.
    grouped = interval(np.array([[0.0, 0.0, 1.0, 1.0]]), ["a", "a", "b", "b"])
    assert grouped.over_cases == (0.0, 1.0)
    alone = interval(np.array([[0.0] * 10 + [1.0] * 10]), [str(n) for n in range(20)])
    assert alone.over_cases == pytest.approx((0.3, 0.7), abs=0.051)


def test_the_spread_between_seeds_is_in_the_interval_over_both_only() -> None:
    found = interval(np.array([[0.0] * 30, [1.0] * 30]), [str(n) for n in range(30)])
    assert found.over_cases == pytest.approx((0.5, 0.5)) and found.over_both == (0.0, 1.0)


def test_patients_with_more_scans_weigh_more() -> None:
    assert interval(np.array([[0.0, 1.0, 1.0]]), ["a", "b", "b"]).mean == pytest.approx(2 / 3)


def test_steps_to_a_dice_count_whole_epochs() -> None:
    assert [steps_to(line(), dice) for dice in (0.05, 0.3, 0.5)] == [25, 50, None]


# --- lines and table


def test_lines_come_back_and_a_torn_last_one_is_dropped_and_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert read_results(file) == []
    append_result(file, line(seed=0))
    with file.open("a") as handle:
        handle.write('{"arm": "scra')
    assert [key_of(x).seed for x in read_results(file)] == [0]
    append_result(file, line(seed=1))
    assert [key_of(x).seed for x in read_results(file)] == [0, 1]
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(AutoregError, match=r"line 1 is no run .* remove that line"):
        read_results(file)


def test_the_table_pairs_each_arm_with_its_twin_and_with_stock() -> None:
    lines = [line("pretrained", s, {"a": [0.5 + 0.1 * s], "b": [0.5]}) for s in (0, 1)]
    lines += [line("scratch", s, {"a": [0.4], "b": [0.4]}) for s in (0, 1)] + [line("stock", 0, {"a": [0.8], "b": [0.7]})]
    rows = {row.key.arm: row for row in rows_of(lines)}
    assert list(rows) == ["pretrained", "scratch", "stock"]
    ours = rows["pretrained"]
    assert ours.to_scratch is not None and ours.to_scratch.mean == pytest.approx((0.1 + 0.1 + 0.2 + 0.1) / 4)
    assert ours.to_stock is not None and ours.to_stock.mean == pytest.approx(-0.25) and ours.to_stock.num_seeds == 1
    assert rows["scratch"].to_scratch is None and rows["stock"].to_stock is None
    text = markdown(lines)
    assert "| test | 50 x 2 | 2 | brain | pretrained | 2 | 0.525 (0.035) | +0.125 [" in text
    assert ", 1 seed |" in text and "does not hold another pretraining" in text


def test_runs_of_another_recipe_or_length_are_never_paired() -> None:
    lines = [line("pretrained", recipe="pretrained_rate=1e-2"), line("scratch"), line("stock", steps=100)]
    ours = next(row for row in rows_of(lines) if row.key.arm == "pretrained")
    assert ours.to_scratch is None and ours.to_stock is None


# --- requests and plans


def test_runs_go_seed_by_seed_and_stock_has_no_encoder_and_no_recipe() -> None:
    keys = list(runs_of(request(arms=("masked", "stock"), encoders=("a", "b"), recipe=("scratch_rate=1e-2",)), 50, 2))
    assert [(k.seed, k.arm, k.encoder, k.recipe) for k in keys[:3]] == [
        (0, "masked", "benchmark_a", "scratch_rate=1e-2"), (0, "masked", "benchmark_b", "scratch_rate=1e-2"), (0, "stock", "-", "")]
    assert len(keys) == 6 and len({key.folder for key in keys}) == 6
    assert weights_of(keys[0]) == "benchmark_a_masked" and weights_of(keys[2]) is None
    assert plans_name(keys[0]) == "AutoregPlans_benchmark_a_masked_scratch_rate_1e_2" and plans_name(keys[2]) == "nnUNetPlans"


@pytest.mark.parametrize(("changes", "message"), [
    ({"arms": ("pretraind",)}, "did you mean 'pretrained'"),
    ({"steps": None}, "--steps or as --budget"),
    ({"budget_min": 3.0}, "--steps or as --budget"),
    ({"num_seeds": 0}, "--seeds 0: must be greater than 0"),
    ({"labels": (0,)}, "--labels 0"),
    ({"recipe": ("pretrained_rat=1e-3",)}, "did you mean 'pretrained_rate'"),
    ({"recipe": ("pretrained_rate",)}, "write it as key=value"),
    ({"recipe": ("pretrained_rate=fast",)}, "'fast' is not of type float"),
    ({"recipe": ("optimizer=sgdd",)}, "did you mean 'sgd'"),
    ({"recipe": ("momentum=1.5",)}, r"must be in \[0, 1\)"),
    ({"weights": ("some/folder",)}, "give the name of a run"),
])  # fmt: skip
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(**changes)


def test_the_line_typed_becomes_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / DATASET).mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    typed = read_request(parser().parse_args(
        ["-d", "900", "--labels", "20", "5", "5", "--arms", "pretrained", "masked", "--weights", "brain"]))
    assert typed == Request(DATASET, (5, 20), 3, ("pretrained", "masked"), ("brain",), budget_min=30.0)
    assert typed.families == ("brain",)
    with pytest.raises(UsageError, match="--jobs 0"):
        read_request(parser().parse_args(["-d", "900", "--jobs", "0"]))


def test_a_length_is_cut_into_about_40_epochs_of_25_to_250_steps() -> None:
    assert [epochs_of(steps) for steps in (2, 30, 400, 4000, 100_000)] == [(1, 2), (1, 25), (16, 25), (40, 100), (400, 250)]


def test_a_twin_is_retyped_from_the_runs_own_request_without_what_masking_sets() -> None:
    made = {"name": "brain", "datasets": ["4"], "folders": ["/scans one"], "encoder": "primus_tiny", "num_steps": None, "num_hours": 2.0,
            "batch_size": 8, "seed": 3, "exclude": "/x.txt", "modality": None, "spacing": "median", "split_4d": True, "sequences": [],
            "settings": ["sequence.order=raster", "objective.name=autoregressive", "optim.lr=1e-4", "objective.variance_floor=0.1"],
            "objective": "autoregressive"}
    words = retyped(made, 700)
    from nnunet_autoreg.cli.pretrain import parser as pretrain_parser

    args = pretrain_parser().parse_args(["--name", "brain_masked", *words, "--objective", "masked"])
    assert (args.d, args.i, args.steps, args.hours, args.batch, args.seed) == (["4"], ["/scans one"], 700, None, 8, 3)
    assert (args.exclude, args.split_4d, args.set, args.objective) == (
        "/x.txt", True, ["optim.lr=1e-4", "objective.variance_floor=0.1"], "masked")


# --- a benchmark with a runner that trains nothing


def test_a_run_of_a_preset_has_no_masked_twin(bench: Bench) -> None:
    write_json(bench.layout.pretraining("published") / "plan.json", {"request": {"preset": "faithful"}, "optim": {"num_steps": 5}})
    with pytest.raises(AutoregError, match=r"--preset faithful and would differ in more than the objective.*named published_masked"):
        ensure_masked(bench, "published")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    subjects = subjects_by_name(CASES)
    layout = Layout(tmp_path / "out", DATASET)
    layout.plans.mkdir(parents=True)
    configurations = {"3d_fullres": {"batch_size": 6}}
    recipe = {"pretrained_rate": 1e-3, "scratch_rate": 1e-3}
    for name in ("AutoregPlans_benchmark_tiny", "nnUNetPlans"):
        write_json(layout.plans / f"{name}.json", {"plans_name": name, "configurations": configurations, "autoreg": {"recipe": recipe}})
    made = Bench(request(), layout, Record(DATASET, subjects, divide(subjects)), {}, Commands(tmp_path / "log", "cpu", 1),
                 tmp_path / "pp", tmp_path / "res", 1)
    return made


class FakeRunner:
    """Writes a result as a training would; ``broken`` runs end with an exit code and no result."""

    def __init__(self, *broken: tuple[str, int], pace: dict[str, float] | None = None):
        self.broken, self.done, self.pace = broken, [], pace or {}

    def __call__(self, folder: Path, environment: Any) -> int:
        job = from_jsonable(Job, read_json(folder / "job.json"), "job")
        assert environment["nnUNet_results"] == str(folder) and (folder / "autoreg_pretraining").is_symlink()
        (folder / "log.txt").write_text("started\nout of memory\n")
        if (job.trainer, job.seed) in self.broken:
            return 1
        self.done.append((job.trainer, job.seed, job.fold))
        write_json(folder / "result.json", {
            "train_s": 1.0, "validate_s": 1.0, "seconds_per_step": self.pace.get(job.trainer, 0.5), "processor_s_per_step": 0.1,
            "curve": [0.5], "patch": [8, 8, 8],
            "dice_per_case": {case: {"1": 0.5} for case in job_cases(folder, job)}})
        return 0


def job_cases(folder: Path, job: Job) -> list[str]:
    plans = folder.parents[1] / "preprocessed" / DATASET
    return list(read_json(plans / "splits_final.json")[job.fold]["val"])


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "pretraining_of", lambda bench, key: None)


def results(bench: Bench) -> list[dict[str, Any]]:
    return read_results(bench.layout.root / "runs.jsonl")


def test_what_is_there_is_skipped_what_failed_is_done_again_and_half_done_folders_are_cleared(bench: Bench) -> None:
    keys = list(runs_of(bench.request, 50, 2))
    write_folds(bench, keys)
    half = bench.layout.run(keys[0])
    half.mkdir(parents=True)
    (half / "half.txt").write_text("of a killed run")
    first = FakeRunner(("AutoregScratchTrainer", 1))
    failed = run_missing(bench, keys, 1, first)
    assert [(k.arm, k.seed) for k in failed] == [("scratch", 1)] and len(results(bench)) == 3
    assert not (half / "half.txt").exists()
    second = FakeRunner()
    assert run_missing(bench, keys, 2, second) == []
    assert [done[:2] for done in second.done] == [("AutoregScratchTrainer", 1)]
    assert {key_of(x) for x in results(bench)} == set(keys)
    assert run_missing(bench, keys, 1, FakeRunner(("AutoregPretrainedTrainer", 0))) == []


def test_all_arms_of_a_seed_train_on_the_same_cases_and_are_scored_on_the_same(bench: Bench) -> None:
    keys = list(runs_of(bench.request, 50, 2))
    write_folds(bench, keys)
    runner = FakeRunner()
    run_missing(bench, keys, 1, runner)
    folds = read_json(bench.layout.plans / "splits_final.json")
    by_seed = {seed: {fold for _, s, fold in runner.done if s == seed} for seed in (0, 1)}
    assert by_seed == {0: {0}, 1: {1}}
    assert folds[0]["train"] == list(labelled(bench.record.division, bench.record.subjects, 2, 0)) != folds[1]["train"]
    assert all(fold["val"] == list(bench.record.division.test) and not set(fold["val"]) & set(fold["train"]) for fold in folds)
    assert results(bench)[0]["labelled"] == folds[0]["train"]


def test_more_labels_later_leave_the_numbers_of_earlier_folds_alone(bench: Bench) -> None:
    write_folds(bench, runs_of(bench.request, 50, 2))
    before = read_json(bench.layout.plans / "splits_final.json")
    more = replace(bench, request=request(labels=(1, 2, 4), split="development"))
    write_folds(more, runs_of(more.request, 50, 2))
    after = read_json(bench.layout.plans / "splits_final.json")
    assert after[: len(before)] == before and len(after) == len(before) + 6


def test_a_budget_gives_all_arms_the_steps_of_the_slowest_and_is_settled_once(bench: Bench) -> None:
    asked = request(arms=("pretrained", "scratch", "stock"), steps=None, batch=None, budget_min=1.0)
    bench = replace(bench, request=asked)
    write_folds(bench, runs_of(asked, 50, 2))
    runner = FakeRunner(pace={"nnUNetTrainer": 0.5, "AutoregPretrainedTrainer": 0.1})
    # 90 % of 60 s at 0.5 s are 108 steps: 4 epochs of 25. The smallest batch of the plans is 6.
    assert settle_length(bench, runner) == (100, 6)
    assert len(runner.done) == 2
    assert settle_length(bench, FakeRunner(("nnUNetTrainer", 0))) == (100, 6)
    with pytest.raises(AutoregError, match=r"a step of stock.* takes 100\.0 s; give more minutes"):
        settle_length(replace(bench, request=replace(asked, budget_min=0.5)), FakeRunner(pace={"nnUNetTrainer": 100.0}))


def test_the_plans_of_the_arms_differ_in_weights_and_recipe_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "read_card", lambda folder: type("Card", (), {"sha256": "abc"}))
    key = RunKey("masked", "benchmark_tiny", 2, 0, "test", 50, 2, "pretrained_rate=0.01")
    write_plans(bench, key)
    base = read_json(bench.layout.plans / "AutoregPlans_benchmark_tiny.json")
    made = read_json(bench.layout.plans / f"{plans_name(key)}.json")
    assert made["configurations"] == base["configurations"]
    assert made["autoreg"]["recipe"] == {"pretrained_rate": 0.01, "scratch_rate": 1e-3}
    assert made["autoreg"]["weights"] == {
        "name": "benchmark_tiny_masked", "file": "autoreg_pretraining/benchmark_tiny_masked/encoder.safetensors", "sha256": "abc"}


def test_a_folder_of_other_things_or_of_another_dataset_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = request()
    record = open_record(tmp_path / "new", asked, CASES)
    assert open_record(tmp_path / "new", asked, CASES[:5]) == record
    with pytest.raises(UsageError, match="holds a benchmark of Dataset900_Heads"):
        open_record(tmp_path / "new", replace(asked, dataset="Dataset901_Other"), CASES)
    other = tmp_path / "subjects.csv"
    other.write_text("case,subject\n" + "".join(f"{case},x\n" for case in CASES))
    with pytest.raises(UsageError, match="says other patients than"):
        open_record(tmp_path / "new", replace(asked, subjects=str(other)), CASES)
    assert open_record(tmp_path / "new", asked, [*CASES, "head_999"]) == record
    assert "1 cases are newer than this benchmark's division and take no part, the first is head_999" in caplog.text
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(UsageError, match="neither empty nor a benchmark's folder"):
        open_record(tmp_path / "full", asked, CASES)


# --- leaks


def scan(dataset: str, case: str, source: str = "/elsewhere.nii.gz", status: str = "ok") -> ScanRow:
    return ScanRow(f"{dataset}/{case}", dataset, case, "MR", "MR", source, (8, 8, 8), (1.0, 1.0, 1.0), (8, 8, 8), "hash", status, "")


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    image = tmp_path / "p2_ES_0000.nii.gz"
    image.touch()
    return Scored(DATASET, {"p1_ED": "p1", "p2_ED": "p2", "p2_ES": "p2", "p3_ED": "p3"}, ["p2_ES"], {"p2_ES": [image]})


def pretrained_on(folder: Path, *rows: ScanRow) -> Path:
    folder.mkdir()
    write_index(folder / "scans.csv", rows)
    return folder


@pytest.mark.parametrize("row", [
    scan(DATASET, "p2_ES"), scan(DATASET, "p2_ED"), scan("my scans", "anything", "SCORED IMAGE"),
], ids=["the case", "another scan of the patient", "the file by another way"])  # fmt: skip
def test_weights_that_saw_a_scored_patient_are_refused(tmp_path: Path, scored: Scored, row: ScanRow) -> None:
    if row.source == "SCORED IMAGE":
        row = replace(row, source=str(scored.images["p2_ES"][0]))
    run = pretrained_on(tmp_path / "brain", scan(DATASET, "p1_ED"), row)
    with pytest.raises(AutoregError, match=r"saw 1 of the patients that are scored, e\.g\. p2: .* --exclude /x\.txt"):
        check_pretraining(run, scored, Path("/x.txt"))


def test_weights_that_saw_others_pass_and_what_nobody_knows_is_said(tmp_path: Path, scored: Scored) -> None:
    others = scan(DATASET, "p1_ED"), scan(DATASET, "p2_ES", status="excluded")
    assert check_pretraining(pretrained_on(tmp_path / "brain", *others), scored, Path("x")) == ""
    (tmp_path / "foreign").mkdir()
    assert "nobody knows" in check_pretraining(tmp_path / "foreign", scored, Path("x"))
    named = pretrained_on(tmp_path / "other", scan("Dataset901_Other", "p2"))
    assert "named like scored patients, e.g. p2" in check_pretraining(named, scored, Path("x"))


def test_a_copy_of_a_scored_scan_in_a_folder_is_found_by_its_content(tmp_path: Path, shared_data: Path) -> None:
    from nnunet_autoreg.corpus.content import content_hash
    from nnunet_autoreg.corpus.read import load_scan

    image = min((shared_data / "nnUNet_raw/Dataset004_Hippocampus/imagesTr").glob("*.nii.gz"))
    scored = Scored(DATASET, {"a": "a"}, ["a"], {"a": [image]})
    copy = replace(scan("backup", "x"), content_hash=content_hash(load_scan(image)))
    with pytest.raises(AutoregError, match="saw 1 of the patients"):
        check_pretraining(pretrained_on(tmp_path / "brain", copy), scored, Path("x"))


# --- the worker


def test_a_steps_time_leaves_out_the_first_steps_and_what_lies_between_epochs() -> None:
    class Trainer:
        def train_step(self, batch: Any) -> Any:
            return batch

    trainer = Trainer()
    watch = Stopwatch(trainer)
    assert trainer.train_step({"x": 1}) == {"x": 1} and len(watch.times) == 1
    watch.times = [0, 9, 18, 20, 30, 33, 35]  # epochs of 4: 30 begins the second one; 2, 3 and 2 s are left
    assert watch.seconds_per_step(4) == 2.0


def test_nnunets_summary_gives_dice_by_case_and_none_where_nothing_was_there(tmp_path: Path) -> None:
    metrics = {"1": {"Dice": 0.75}, "2": {"Dice": float("nan")}}
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [
        {"reference_file": "/gt/case.a_01.nii.gz", "prediction_file": "", "metrics": metrics}]}))
    assert read_dice(tmp_path / "summary.json", ".nii.gz") == {"case.a_01": {"1": 0.75, "2": None}}


def test_the_picture_is_drawn_of_one_run_of_pairs_and_of_intervals_of_no_width(tmp_path: Path) -> None:
    from nnunet_autoreg.benchmark.picture import draw

    one = [line("stock")]
    pairs = [line("pretrained", s, {"a": [0.1 + 0.2], "b": [0.3]}) for s in (0, 1)]
    pairs += [line("scratch", s, {"a": [0.3], "b": [0.1]}) for s in (0, 1)]
    flat = [line("pretrained", 0, {"a": [0.1 + 0.2]}), line("scratch", 0, {"a": [0.1]})]
    for lines in (one, pairs, flat, pairs + one):
        draw(tmp_path / "picture.png", lines, DATASET)
        assert (tmp_path / "picture.png").stat().st_size > 5000


# --- pretrainings


class Typed(Commands):
    """Notes the lines instead of running them; a pretraining leaves its card and plan."""

    def run(self, words: Any, **changes: Any) -> None:
        typed.append((list(words), changes))
        folder = Path(self.folders["nnUNet_results"]) / "autoreg_pretraining" / words[words.index("--name") + 1]
        finished(folder, {"datasets": [DATASET], "encoder": "primus_tiny", "exclude": "/x.txt", "settings": []})


typed: list[tuple[list[str], dict[str, Any]]] = []


def finished(folder: Path, made_with: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "encoder.json", {"sha256": "first"})
    (folder / "encoder.safetensors").touch()
    if made_with is not None:
        write_json(folder / "plan.json", {"request": made_with, "optim": {"num_steps": 700}})
    return folder


@pytest.fixture
def typing(bench: Bench) -> Bench:
    typed.clear()
    (bench.layout.results / "autoreg_pretraining").mkdir(parents=True)
    return replace(bench, commands=Typed(bench.commands.log_file, "cpu", 1, {"nnUNet_results": bench.layout.results}))


def test_own_pretrainings_leave_out_who_is_scored_and_are_done_once(typing: Bench) -> None:
    typing = replace(typing, request=request(encoders=("primus_tiny",), pretrain_steps=9))
    for _ in range(2):
        preparing.ensure_weights(typing, "benchmark_primus_tiny")
        preparing.ensure_masked(typing, "benchmark_primus_tiny")
    (first, changes), (second, _) = typed
    assert first[:3] == ["autoreg_pretrain", "--name", "benchmark_primus_tiny"] and first[first.index("--steps") + 1] == "9"
    assert first[first.index("--exclude") + 1] == str(typing.layout.exclude) and "--objective" not in first
    assert changes["nnUNet_preprocessed"] == typing.user_preprocessed
    assert second[2] == "benchmark_primus_tiny_masked" and second[second.index("--steps") + 1] == "700"
    assert second[second.index("--objective") + 1] == "masked" and second[second.index("--exclude") + 1] == "/x.txt"


def test_the_users_runs_are_linked_and_other_weights_of_that_name_later_are_refused(typing: Bench) -> None:
    typing = replace(typing, request=request(weights=("brain",)))
    theirs = typing.user_results / "autoreg_pretraining"
    finished(theirs / "brain")
    finished(theirs / "brain_masked")
    preparing.ensure_weights(typing, "brain")
    preparing.ensure_masked(typing, "brain")
    assert typed == [] and typing.layout.pretraining("brain_masked").resolve() == (theirs / "brain_masked").resolve()
    preparing.pin(typing, "brain")
    preparing.pin(typing, "brain")
    write_json(theirs / "brain" / "encoder.json", {"sha256": "trained anew"})
    with pytest.raises(UsageError, match="the weights of 'brain' are others than those of this benchmark's trainings so far"):
        preparing.pin(typing, "brain")


def test_imported_weights_have_no_masked_twin(typing: Bench) -> None:
    typing = replace(typing, request=request(weights=("imported",)))
    finished(typing.user_results / "autoreg_pretraining" / "imported")
    preparing.ensure_weights(typing, "imported")
    with pytest.raises(AutoregError, match=r"the arm 'masked' needs a twin of 'imported', which has no plan\.json to repeat"):
        preparing.ensure_masked(typing, "imported")


def test_a_command_that_fails_ends_with_its_last_words(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", "cpu", 1)
    with pytest.raises(AutoregError, match=r"python ended with exit code 3 \(no space left\); all of its output is in .*log"):
        commands.run(["python", "-c", "print('fine'); print('no space left'); raise SystemExit(3)"])
    with pytest.raises(AutoregError, match="the command autoreg_nothing is not installed"):
        commands.run(["autoreg_nothing"])
