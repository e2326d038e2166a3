"""autoreg_benchmark without any training: requests, runs, resuming, leaks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from refusals import logged, refused
from sequence_cases import make_plan

from nnunet_autoreg.benchmark import prepare as preparing
from nnunet_autoreg.benchmark import run as running
from nnunet_autoreg.benchmark.announce import pretraining_lines, trainings_line
from nnunet_autoreg.benchmark.commands import Commands
from nnunet_autoreg.benchmark.leak import Scored, check_pretraining
from nnunet_autoreg.benchmark.prepare import (
    Bench,
    Record,
    ensure_twin,
    open_record,
    retyped,
    surface_tolerance_mm,
    with_labels,
    write_exclude,
    write_folds,
    write_plans,
)
from nnunet_autoreg.benchmark.protocol import (
    BenchmarkFolders,
    BenchmarkRequest,
    plans_name,
    runs_of,
    weights_of,
)
from nnunet_autoreg.benchmark.public_ids import assign_ids, read_ids
from nnunet_autoreg.benchmark.results import RunKey, key_of, read_results
from nnunet_autoreg.benchmark.run import (
    TimeLeft,
    epochs_of,
    line_of,
    run_missing,
    settle_lengths,
    time_left,
)
from nnunet_autoreg.benchmark.split import divide, labelled
from nnunet_autoreg.benchmark.worker import FineTuningJob, StepTimer
from nnunet_autoreg.cli.benchmark import after_division, parser, read_request
from nnunet_autoreg.corpus.rows import ScanRow, write_index
from nnunet_autoreg.downstream.patients import subjects_by_name
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.records import from_jsonable, read_json, write_json

DATASET = "Dataset900_Heads"
CASES = [f"head_{n:03d}" for n in range(20)]


def request(**changes: Any) -> BenchmarkRequest:
    """Two seeds of two arms with two labels for 50 steps, unless ``changes`` says otherwise."""
    values = {
        "dataset": DATASET,
        "labels": (2,),
        "num_seeds": 2,
        "arms": ("pretrained", "scratch"),
        "encoders": ("tiny",),
        "steps": (50,),
        "batch": 2,
        **changes,
    }
    return BenchmarkRequest(**values).check()


# --- requests and plans


def test_runs_go_seed_by_seed_and_stock_has_no_encoder_and_no_recipe() -> None:
    recipe = "scratch_rate=1e-2"
    asked = request(arms=("masked", "stock"), encoders=("a", "b"), recipe=(recipe,))

    keys = list(runs_of(asked, [50], 2))

    assert [(k.seed, k.arm, k.encoder, k.recipe) for k in keys[:3]] == [
        (0, "masked", "benchmark_a", "scratch_rate=1e-2"),
        (0, "masked", "benchmark_b", "scratch_rate=1e-2"),
        (0, "stock", "-", ""),
    ]
    # Three runs for each of the two seeds.
    assert len(keys) == 6
    assert len({key.folder for key in keys}) == 6
    assert weights_of(keys[0]) == "benchmark_a_masked"
    assert weights_of(keys[2]) is None
    # nnU-Net uses the name of the plans in folder names, so "=" and "-" become "_".
    assert plans_name(keys[0]) == "AutoregPlans_benchmark_a_masked_scratch_rate_1e_2"
    assert plans_name(keys[2]) == "nnUNetPlans"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"arms": ("pretraind",)}, "benchmark-unknown-arm", "'pretrained'"),
        ({"steps": ()}, "benchmark-length", "--budget"),
        ({"budget_min": (3.0,)}, "benchmark-length", "--steps"),
        ({"num_seeds": 0}, "benchmark-not-positive", "--seeds 0"),
        ({"labels": (0,)}, "benchmark-not-positive", "--labels 0"),
        ({"steps": (50, -1)}, "benchmark-not-positive", "--steps -1"),
        ({"split": "crossvalidation"}, "benchmark-unknown-split", "'cross-validation'"),
        ({"recipe": ("pretrained_rate",)}, "recipe-not-key-value", "key=value"),
        ({"recipe": ("pretrained_rat=1e-3",)}, "recipe-value", "'pretrained_rate'"),
        ({"recipe": ("pretrained_rate=fast",)}, "recipe-value", "'fast'"),
        ({"recipe": ("optimizer=sgdd",)}, "recipe-value", "'sgd'"),
        ({"recipe": ("momentum=1.5",)}, "recipe-value", "1.5"),
        ({"weights": ("some/folder",)}, "benchmark-weights-name", "some/folder"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], code: str, named: str) -> None:
    with refused(UsageError, code, named):
        request(**changes)


def test_the_line_typed_becomes_the_request(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / DATASET).mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    words = ["-d", "900", "--labels", "20", "5", "5"]
    words += ["--arms", "pretrained", "masked", "--weights", "brain"]

    typed = read_request(parser().parse_args(words))

    # The number became the name of the dataset; labels are sorted and named once; the rest is
    # default.
    assert typed == BenchmarkRequest(
        DATASET,
        (5, 20),
        3,
        ("pretrained", "masked"),
        ("brain",),
        budget_min=(30.0,),
    )
    assert typed.families == ("brain",)
    with refused(UsageError, "usage-number", "--jobs 0"):
        read_request(parser().parse_args(["-d", "900", "--jobs", "0"]))


def test_a_length_is_cut_into_about_40_epochs_of_25_to_250_steps() -> None:
    # 30 steps are one epoch of 25, because half an epoch is not trained. Between 1000 (40 x 25) and
    # 10 000 (40 x 250) steps there are always 40 epochs.
    assert [epochs_of(steps) for steps in (2, 30, 400, 4000, 100_000)] == [
        (1, 2),
        (1, 25),
        (16, 25),
        (40, 100),
        (400, 250),
    ]


def test_a_twin_repeats_the_request_without_what_masking_sets() -> None:
    # The request of a pretraining as plan.json holds it.
    made = {
        "name": "brain",
        "datasets": ["4"],
        "folders": ["/scans one"],
        "encoder": "primus_tiny",
        "num_steps": None,
        "num_hours": 2.0,
        "batch_size": 8,
        "seed": 3,
        "exclude": "/x.txt",
        "modality": None,
        "spacing": "median",
        "split_4d": True,
        "sequences": [],
        "settings": [
            "sequence.order=raster",
            "objective.name=autoregressive",
            "optim.lr=1e-4",
            "objective.variance_floor=0.1",
        ],
        "objective": "autoregressive",
    }
    from nnunet_autoreg.cli.pretrain import parser as pretrain_parser

    words = retyped(made, 700, "masked")

    args = pretrain_parser().parse_args(["--name", "brain_masked", *words, "--objective", "masked"])
    # The twin makes the 700 steps that the 2 hours of the original were enough for.
    assert (args.datasets, args.folders, args.seed) == (["4"], ["/scans one"], 3)
    assert (args.num_steps, args.num_hours, args.batch_size) == (700, None, 8)
    assert (args.exclude, args.split_4d, args.objective) == ("/x.txt", True, "masked")
    assert args.settings == ["optim.lr=1e-4", "objective.variance_floor=0.1"]
    # Alice has no floor of the variance.
    assert retyped(made, 700, "alice")[-2:] == ["--set", "optim.lr=1e-4"]


# --- a benchmark with a runner that trains nothing


def test_a_run_of_a_preset_has_no_masked_twin(bench: Bench) -> None:
    plan = {"request": {"preset": "faithful"}, "optim": {"num_steps": 5}}
    write_json(bench.layout.pretraining("published") / "plan.json", plan)

    with refused(AutoregError, "benchmark-no-twin", "--preset faithful", "published_masked"):
        ensure_twin(bench, "published", "masked")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a benchmark whose plans are written and whose record is in memory."""
    subjects = subjects_by_name(CASES)
    layout = BenchmarkFolders(tmp_path / "out", DATASET)
    layout.plans.mkdir(parents=True)
    configurations = {"3d_fullres": {"batch_size": 6}}
    recipe = {"pretrained_rate": 1e-3, "scratch_rate": 1e-3}
    for name in ("AutoregPlans_benchmark_tiny", "nnUNetPlans"):
        write_json(
            layout.plans / f"{name}.json",
            {"plans_name": name, "configurations": configurations, "autoreg": {"recipe": recipe}},
        )
    return Bench(
        request(),
        layout,
        Record(DATASET, subjects, divide(subjects)),
        {},
        Commands(tmp_path / "log", "cpu", 1),
        tmp_path / "pp",
        tmp_path / "res",
        1,
    )


class FakeRunner:
    """Writes a result as a training would; ``broken`` runs end with an exit code and no result."""

    def __init__(self, *broken: tuple[str, int], pace: dict[str, float] | None = None):
        self.broken, self.done, self.pace = broken, [], pace or {}

    def __call__(self, folder: Path, environment: Any) -> int:
        job = from_jsonable(FineTuningJob, read_json(folder / "job.json"), "job")
        assert environment["nnUNet_results"] == str(folder)
        assert (folder / "autoreg_pretraining").is_symlink()
        (folder / "log.txt").write_text("started\nout of memory\n")
        if (job.trainer, job.seed) in self.broken:
            return 1

        self.done.append((job.trainer, job.seed, job.fold))
        result = {
            "train_s": 1.0,
            "validate_s": 1.0,
            "seconds_per_step": self.pace.get(job.trainer, 0.5),
            "processor_s_per_step": 0.1,
            "curve": [0.5],
            "patch": [8, 8, 8],
            "dice_per_case": {case: {"1": 0.5} for case in job_cases(folder, job)},
        }
        write_json(folder / "result.json", result)
        return 0


def job_cases(folder: Path, job: FineTuningJob) -> list[str]:
    plans = folder.parents[1] / "preprocessed" / DATASET
    return list(read_json(plans / "splits_final.json")[job.fold]["val"])


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    # There are no pretrained weights here, so there is no cost of a pretraining to read.
    monkeypatch.setattr(running, "pretraining_of", lambda bench, key: None)


def results(bench: Bench) -> list[dict[str, Any]]:
    return read_results(bench.layout.root / "runs.jsonl")


def test_finished_runs_are_skipped_and_failed_ones_repeated(
    bench: Bench,
) -> None:
    keys = list(runs_of(bench.request, [50], 2))
    # The folder that a killed run has left behind.
    write_folds(bench, keys)
    half = bench.layout.run(keys[0])
    half.mkdir(parents=True)
    (half / "half.txt").write_text("of a killed run")
    first = FakeRunner(("AutoregScratchTrainer", 1))

    failed = run_missing(bench, keys, 1, first)

    assert [(k.arm, k.seed) for k in failed] == [("scratch", 1)]
    assert len(results(bench)) == 3
    assert not (half / "half.txt").exists()

    second = FakeRunner()

    assert run_missing(bench, keys, 2, second) == []
    assert [done[:2] for done in second.done] == [("AutoregScratchTrainer", 1)]
    assert {key_of(x) for x in results(bench)} == set(keys)
    # All runs are finished, so a runner that would fail is never called.
    assert run_missing(bench, keys, 1, FakeRunner(("AutoregPretrainedTrainer", 0))) == []


def test_all_arms_of_a_seed_train_and_are_scored_on_the_same_cases(
    bench: Bench,
) -> None:
    keys = list(runs_of(bench.request, [50], 2))
    write_folds(bench, keys)
    runner = FakeRunner()

    run_missing(bench, keys, 1, runner)

    folds = read_json(bench.layout.plans / "splits_final.json")
    # A seed has a fold of its own labelled cases, which both of its arms use.
    assert {(seed, fold) for _, seed, fold in runner.done} == {(0, 0), (1, 1)}
    of_seed_0 = list(labelled(bench.record.division, bench.record.subjects, 2, 0))
    assert folds[0]["train"] == of_seed_0 != folds[1]["train"]
    for fold in folds:
        assert fold["val"] == list(bench.record.division.test)
        assert not set(fold["val"]) & set(fold["train"])
    assert results(bench)[0]["labelled"] == folds[0]["train"]


def test_more_labels_later_keep_the_numbers_of_earlier_folds(bench: Bench) -> None:
    write_folds(bench, runs_of(bench.request, [50], 2))
    before = read_json(bench.layout.plans / "splits_final.json")
    more = replace(bench, request=request(labels=(1, 2, 4), split="development"))

    write_folds(more, runs_of(more.request, [50], 2))

    after = read_json(bench.layout.plans / "splits_final.json")

    # Three numbers of labels and two seeds, scored on other cases, are six new folds at the end.
    assert after[: len(before)] == before
    assert len(after) == len(before) + 6


def test_a_budget_gives_all_arms_the_steps_of_the_slowest(bench: Bench) -> None:
    asked = request(
        arms=("pretrained", "scratch", "stock"),
        steps=(),
        batch=None,
        budget_min=(1.0,),
    )
    bench = replace(bench, request=asked)
    write_folds(bench, runs_of(asked, [50], 2))

    runner = FakeRunner(pace={"nnUNetTrainer": 0.5, "AutoregPretrainedTrainer": 0.1})

    # 90 % of 60 s at 0.5 s are 108 steps: 4 epochs of 25. The smallest batch of the plans is 6.
    assert settle_lengths(bench, runner) == ((100,), 6)
    # One step was timed for nnU-Net's network and one for ours; scratch has the same as pretrained.
    assert len(runner.done) == 2
    # The timings are kept, so a runner that would fail is not called again.
    assert settle_lengths(bench, FakeRunner(("nnUNetTrainer", 0))) == ((100,), 6)
    # 27 s (90 % of half a minute) are less than one step of stock.
    short = replace(bench, request=replace(asked, budget_min=(0.5,)))
    with refused(AutoregError, "benchmark-budget-too-small", "stock", "100.0 s"):
        settle_lengths(short, FakeRunner(pace={"nnUNetTrainer": 100.0}))


def test_the_plans_of_the_arms_differ_only_in_weights_and_recipe(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = type("Card", (), {"sha256": "abc", "has_decoder": True})
    monkeypatch.setattr(preparing, "read_card", lambda folder: card)
    key = RunKey("masked", "benchmark_tiny", 2, 0, "test", 50, 2, "pretrained_rate=0.01")

    write_plans(bench, key)

    base = read_json(bench.layout.plans / "AutoregPlans_benchmark_tiny.json")
    made = read_json(bench.layout.plans / f"{plans_name(key)}.json")

    assert made["configurations"] == base["configurations"]
    assert made["autoreg"]["recipe"] == {"pretrained_rate": 0.01, "scratch_rate": 1e-3}
    assert made["autoreg"]["weights"] == {
        "name": "benchmark_tiny_masked",
        "file": "autoreg_pretraining/benchmark_tiny_masked/encoder.safetensors",
        "sha256": "abc",
        "has_decoder": True,
    }


def test_a_folder_of_an_older_version_keeps_counting_cases(tmp_path: Path) -> None:
    # Ten patients with two scans each: in the older version a label was one scan, not one patient.
    cases = [f"patient{n:03d}_{phase}" for n in range(10) for phase in ("ED", "ES")]
    record = open_record(tmp_path / "new", request(), cases)
    file = tmp_path / "new" / "benchmark.json"
    old = read_json(file)
    del old["label_unit"], old["rule"]  # an older file has neither
    write_json(file, old)

    reopened = open_record(tmp_path / "new", request(), cases)

    assert (record.label_unit, reopened.label_unit) == ("patients", "cases")
    assert reopened.division == record.division


def test_results_call_cases_and_patients_by_ids(bench: Bench, tmp_path: Path) -> None:
    # The first three letters are the patient; the names must not reach any file of the benchmark.
    names = ("doe", "roe", "poe", "loe")
    cases = [f"{name}_{phase}" for name in names for phase in ("ED", "ES")]
    root = bench.layout.root
    table = tmp_path / "subjects.csv"
    table.write_text("case,subject\n" + "".join(f"{case},{case[:3]}\n" for case in cases))
    asked = replace(bench.request, subjects=str(table))
    # The benchmark starts in an empty folder.
    for file in root.iterdir():
        shutil.rmtree(file)

    record = open_record(root, asked, cases)
    ids = read_ids(root)
    bench = replace(bench, request=asked, record=record, ids=ids)
    scored = record.division.scored("test")
    result = {"dice_per_case": {case: {"1": 0.5} for case in scored}}
    key = next(iter(runs_of(asked, [50], 2)))
    line = line_of(bench, key, result)

    assert open_record(root, asked, cases) == record
    written = (root / "benchmark.json").read_text() + json.dumps(line)
    assert [name for name in (*names, "Heads") if name in written] == []
    assert sorted(line["dice_per_case"]) == sorted(line["subjects"])
    # One patient is in the test set: 20 % of four, rounded up.
    assert len(set(line["subjects"].values())) == 1
    assert set(ids.cases) == set(cases)
    assert set(ids.patients) == {case[:3] for case in cases}

    # Another scan of a known patient is the first of its ids that is new.
    more = assign_ids(root, {**record.subjects, "doe_M1": "doe"})
    assert more.cases == {**ids.cases, "doe_M1": "case-0009"}
    assert more.patients == ids.patients


def test_labels_that_cannot_be_drawn_are_refused_at_once(bench: Bench) -> None:
    # 20 patients: 4 for the test, 3 for development, 13 in the pool.
    record = replace(bench.record, label_unit="patients")

    with refused(UsageError, "benchmark-too-many-labels", "--labels 14", "13"):
        with_labels(request(labels=(5, 14)), record)

    assert with_labels(request(labels=(13,)), record).labels == (13,)
    # Without --labels: 5 and 10 patients, or all if there are fewer than 5.
    assert with_labels(request(labels=()), record).labels == (5, 10)
    three_left = replace(record.division, pool=record.division.pool[:3])
    few = replace(record, division=three_left)
    assert with_labels(request(labels=()), few).labels == (3,)


def test_the_hours_before_a_benchmark_follow_from_measured_steps(bench: Bench) -> None:
    asked = request(
        arms=("pretrained", "scratch", "stock"),
        steps=(),
        batch=None,
        budget_min=(1.0,),
    )
    bench = replace(bench, request=asked)
    keys = list(runs_of(asked, [100], 6))
    # Nothing has been measured yet.
    assert time_left(bench, keys, 1) is None
    write_folds(bench, keys)

    settle_lengths(bench, FakeRunner(pace={"nnUNetTrainer": 0.5, "AutoregPretrainedTrainer": 0.1}))

    # Two seeds of three arms of 100 steps: twice 0.1, 0.1 and 0.5 s a step, in two jobs.
    left = time_left(bench, keys, 2)
    in_two_jobs = pytest.approx(2 * 100 * (0.1 + 0.1 + 0.5) / 2)
    assert left == TimeLeft(6, in_two_jobs, has_scoring=False)

    # Finished runs took 1 s to predict and score, and then train at their own pace.
    run_missing(bench, keys[:3], 1, FakeRunner(pace={"nnUNetTrainer": 0.4}))
    assert time_left(bench, keys[:3], 1) == TimeLeft(0, 0, has_scoring=True)
    rest = pytest.approx(100 * (0.5 + 0.5 + 0.4) + 3 * 1.0)
    assert time_left(bench, keys, 1) == TimeLeft(3, rest, has_scoring=True)


def test_a_budget_shows_the_total_time_before_anything_runs() -> None:
    crossed = {"split": "cross-validation", "num_folds": 5}

    timed = request(steps=(), budget_min=(10.0, 30.0), labels=(2, 4), **crossed)
    budget = trainings_line(timed, 2)
    steps = trainings_line(request(steps=(50, 200)), 1)

    # 2 seeds, 2 numbers of labels, 5 folds, 2 arms: 40 trainings of each length, 2 at a time.
    # 20 rounds of 10 + 30 minutes are 13.3 hours.
    assert "80 trainings, 2 at a time" in budget
    assert "13 h" in budget
    # 2 seeds, 2 arms and 2 lengths.
    assert "8 trainings" in steps
    assert "50 or 200 steps" in steps


def test_a_dry_run_with_weights_does_not_advise_to_pretrain(tmp_path):
    exclude = tmp_path / "exclude.txt"

    without = after_division(request(weights=()), "4", exclude)
    named = after_division(request(weights=("brain",)), "4", exclude)

    assert f"autoreg_pretrain -d 4 --name NAME --exclude {exclude}" in without
    assert "autoreg_pretrain" not in named


def test_long_trainings_of_given_steps_have_their_pace_measured(bench: Bench) -> None:
    short = replace(bench, request=request(steps=(100,)))
    long = replace(bench, request=request(steps=(100, 400)))
    write_folds(bench, runs_of(long.request, [50], 2))
    runner = FakeRunner()

    # 100 steps are not worth timing one step before; 400 are.
    assert settle_lengths(short, runner) == ((100,), 2)
    assert time_left(short, list(runs_of(short.request, [100], 2)), 1) is None
    assert settle_lengths(long, runner) == ((100, 400), 2)

    # One step of the one network; both lengths of two arms and two seeds at 0.5 s a step.
    assert len(runner.done) == 1
    keys = list(runs_of(long.request, [100, 400], 2))
    seconds = pytest.approx(2 * 2 * (100 + 400) * 0.5)
    assert time_left(long, keys, 1) == TimeLeft(8, seconds, has_scoring=False)


def test_several_lengths_train_the_shortest_first_within_a_seed(bench: Bench) -> None:
    asked = request(steps=(), batch=None, budget_min=(1.0, 2.0, 2.01))
    bench = replace(bench, request=asked)
    write_folds(bench, runs_of(asked, [50], 2))
    runner = FakeRunner(pace={"AutoregPretrainedTrainer": 0.5})

    # 108, 216 and 217 steps, of which the last two are the same number of whole epochs.
    assert settle_lengths(bench, runner) == ((100, 200), 6)
    assert len(runner.done) == 1
    keys = list(runs_of(asked, (200, 100), 6))
    assert [(key.seed, key.steps) for key in keys[::2]] == [(0, 100), (0, 200), (1, 100), (1, 200)]


def test_each_patient_is_scored_once_and_never_by_a_network_that_saw_it(bench: Bench) -> None:
    # Eight patients with two scans each, so that a fold that split a patient would be noticed.
    cases = [f"patient{n:03d}_{phase}" for n in range(8) for phase in ("ED", "ES")]
    subjects = subjects_by_name(cases)
    record = Record(DATASET, subjects, divide(subjects), label_unit="patients")
    asked = with_labels(request(split="cross-validation", num_folds=5, labels=(6,)), record)
    bench = replace(bench, request=asked, record=record)

    assert asked.splits == ("fold1of5", "fold2of5", "fold3of5", "fold4of5", "fold5of5")
    scored: list[str] = []
    for key in runs_of(replace(asked, num_seeds=1, arms=("scratch",)), [50], 2):
        fold = preparing.fold(bench, key)
        seen = {subjects[case] for case in fold["train"]}
        assert f"fold {key.split[4]} of 5" in str(key)
        assert len(seen) == 6
        assert not seen & {subjects[case] for case in fold["val"]}
        scored += fold["val"]
    assert sorted(scored) == sorted(cases)

    # Eight patients in five folds: a pool has six or seven of them.
    with refused(UsageError, "benchmark-too-many-labels", "--labels 7", "6"):
        with_labels(replace(asked, labels=(7,)), record)
    with refused(UsageError, "benchmark-folds", "--folds 9", "8 patients"):
        with_labels(replace(asked, num_folds=9), record)


def test_a_cross_validation_excludes_all_labelled_cases_from_pretraining(bench: Bench) -> None:
    write_exclude(bench.layout, bench.record, "cross-validation")
    lines = bench.layout.exclude.read_text().splitlines()

    assert [line for line in lines if line[:1] != "#"] == [f"{DATASET}/{case}" for case in CASES]
    bench = replace(bench, request=request(split="cross-validation"))
    with refused(UsageError, "benchmark-folds-without-weights", bench.layout.exclude, "--weights"):
        preparing.ensure_weights(bench, "benchmark_tiny")


def test_the_tolerance_of_the_surface_follows_the_data(bench: Bench) -> None:

    assert surface_tolerance_mm(bench) is None

    # The resolution within a slice decides (its median); 10 mm between slices would forgive too
    # much.
    spacings = [[10.0, 1.5, 1.5], [10.0, 1.2, 1.2], [10.0, 1.8, 1.8]]
    write_json(bench.layout.plans / "dataset_fingerprint.json", {"spacings": spacings})
    given = replace(bench, request=request(surface_tolerance_mm=3.0))

    assert surface_tolerance_mm(bench) == 1.5
    assert surface_tolerance_mm(given) == 3.0


def test_a_folder_of_other_things_or_of_another_dataset_is_refused(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = request()
    record = open_record(tmp_path / "new", asked, CASES)

    # Cases may disappear later without a change of the division.
    assert open_record(tmp_path / "new", asked, CASES[:5]) == record
    with refused(UsageError, "benchmark-other-dataset", "Dataset900"):
        open_record(tmp_path / "new", replace(asked, dataset="Dataset901_Other"), CASES)

    other = tmp_path / "subjects.csv"
    other.write_text("case,subject\n" + "".join(f"{case},x\n" for case in CASES))
    with refused(UsageError, "benchmark-other-patients", other):
        open_record(tmp_path / "new", replace(asked, subjects=str(other)), CASES)

    # A case that is new is left out, and a warning says how many there are.
    assert open_record(tmp_path / "new", asked, [*CASES, "head_999"]) == record
    assert logged(caplog, "1 cases")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with refused(UsageError, "benchmark-folder-in-use", tmp_path / "full"):
        open_record(tmp_path / "full", asked, CASES)


# --- leaks


def scan(dataset: str, case: str, source: str = "/elsewhere.nii.gz", status: str = "ok") -> ScanRow:
    return ScanRow(
        f"{dataset}/{case}",
        dataset,
        case,
        "MR",
        "MR",
        source,
        (8, 8, 8),
        (1.0, 1.0, 1.0),
        (8, 8, 8),
        "hash",
        status,
        "",
    )


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """Three patients, of whom p2 has two scans; only the second one is scored."""
    image = tmp_path / "p2_ES_0000.nii.gz"
    image.touch()
    return Scored(
        DATASET,
        {"p1_ED": "p1", "p2_ED": "p2", "p2_ES": "p2", "p3_ED": "p3"},
        ["p2_ES"],
        {"p2_ES": [image]},
    )


def pretrained_on(folder: Path, *rows: ScanRow) -> Path:
    folder.mkdir()
    write_index(folder / "scans.csv", rows)
    return folder


@pytest.mark.parametrize(
    "row",
    [
        scan(DATASET, "p2_ES"),
        scan(DATASET, "p2_ED"),
        scan("my scans", "anything", "SCORED IMAGE"),
    ],
    ids=["the case", "another scan of the patient", "the file by another way"],
)
def test_weights_that_saw_a_scored_patient_are_refused(
    tmp_path: Path,
    scored: Scored,
    row: ScanRow,
) -> None:
    # Parameters are made before tmp_path exists, so the path of the image is filled in here.
    if row.source == "SCORED IMAGE":
        row = replace(row, source=str(scored.images["p2_ES"][0]))
    run = pretrained_on(tmp_path / "brain", scan(DATASET, "p1_ED"), row)

    with refused(AutoregError, "benchmark-scored-patient-seen", "1 of", "--exclude /x.txt"):
        check_pretraining(run, scored, Path("/x.txt"))


def test_weights_that_saw_others_pass_and_doubts_are_warned_of(
    tmp_path: Path,
    scored: Scored,
) -> None:
    # An excluded scan is in the index but was not trained on.
    others = scan(DATASET, "p1_ED"), scan(DATASET, "p2_ES", status="excluded")
    assert check_pretraining(pretrained_on(tmp_path / "brain", *others), scored, Path("x")) == ""

    # Weights without an index of scans.
    (tmp_path / "foreign").mkdir()
    assert "foreign" in check_pretraining(tmp_path / "foreign", scored, Path("x"))

    # "p2" of another dataset may be the same person or not.
    named = pretrained_on(tmp_path / "other", scan("Dataset901_Other", "p2"))
    assert "1 of the patients" in check_pretraining(named, scored, Path("x"))


def test_a_copy_of_a_scored_scan_in_a_folder_is_found_by_its_content(
    tmp_path: Path,
    shared_data: Path,
) -> None:
    from nnunet_autoreg.corpus.content import content_hash
    from nnunet_autoreg.corpus.read import load_scan

    image = min((shared_data / "nnUNet_raw/Dataset004_Hippocampus/imagesTr").glob("*.nii.gz"))
    scored = Scored(DATASET, {"a": "a"}, ["a"], {"a": [image]})
    copy = replace(scan("backup", "x"), content_hash=content_hash(load_scan(image)))

    with refused(AutoregError, "benchmark-scored-patient-seen"):
        check_pretraining(pretrained_on(tmp_path / "brain", copy), scored, Path("x"))


def test_an_index_that_could_not_separate_tiny_values_is_warned_of(tmp_path: Path) -> None:
    from nnunet_autoreg.corpus.content import content_hash, earlier_hash
    from nnunet_autoreg.corpus.read import load_scan

    # Values around 1e-9, as in maps of physical units: the earlier hash rounded them all to 0.
    values = np.random.default_rng(0).uniform(0.5e-9, 2e-9, (12, 13, 14)).astype(np.float32)
    image = tmp_path / "a_0000.nii.gz"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(image))
    scored = Scored(DATASET, {"a": "a"}, ["a"], {"a": [image]})
    earlier = replace(scan("backup", "x"), content_hash=earlier_hash(load_scan(image)))
    newer = replace(scan("backup", "x"), content_hash=content_hash(load_scan(image)))

    of_earlier = pretrained_on(tmp_path / "earlier", earlier)
    assert "earlier version" in check_pretraining(of_earlier, scored, Path("x"))
    with pytest.raises(AutoregError):
        check_pretraining(pretrained_on(tmp_path / "newer", newer), scored, Path("x"))


# --- the worker


def test_the_time_of_a_step_leaves_out_pauses_between_epochs() -> None:
    class Trainer:
        def train_step(self, batch: Any) -> Any:
            return batch

    trainer = Trainer()
    watch = StepTimer(trainer)
    assert trainer.train_step({"x": 1}) == {"x": 1}
    assert len(watch.times) == 1

    # Ends of steps in seconds, four steps per epoch: 30 is the first of the second epoch, so the
    # 10 s before it hold a pause. The first two steps of a run (9 s each) warm up. Left are
    # 2, 3 and 2 s, with a median of 2.
    watch.times = [0, 9, 18, 20, 30, 33, 35]
    assert watch.seconds_per_step(4) == 2.0


# --- pretrainings


class Typed(Commands):
    """Notes the lines instead of running them; a pretraining leaves its card and plan."""

    def run(self, words: Any, **changes: Any) -> None:
        typed.append((list(words), changes))
        pretrainings = Path(self.folders["nnUNet_results"]) / "autoreg_pretraining"
        made_with = {
            "datasets": [DATASET],
            "encoder": "primus_tiny",
            "exclude": "/x.txt",
            "settings": [],
        }
        finished(pretrainings / option(words, "--name"), made_with)


def option(words: list[str], name: str) -> str:
    """Return the word after an option of a command line."""
    return words[words.index(name) + 1]


typed: list[tuple[list[str], dict[str, Any]]] = []


def finished(folder: Path, made_with: dict[str, Any] | None = None) -> Path:
    """Write the files of a pretraining of 700 steps; imported weights have no plan (None)."""
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
    folders = {"nnUNet_results": bench.layout.results}
    return replace(bench, commands=Typed(bench.commands.log_file, "cpu", 1, folders))


def test_own_pretrainings_leave_out_who_is_scored_and_are_done_once(typing: Bench) -> None:
    typing = replace(typing, request=request(encoders=("primus_tiny",), pretrain_steps=9))

    # The second round finds everything done.
    for _ in range(2):
        preparing.ensure_weights(typing, "benchmark_primus_tiny")
        preparing.ensure_twin(typing, "benchmark_primus_tiny", "masked")

    (first, changes), (second, _) = typed
    assert first[:3] == ["autoreg_pretrain", "--name", "benchmark_primus_tiny"]
    assert option(first, "--steps") == "9"
    assert option(first, "--exclude") == str(typing.layout.exclude)
    assert "--objective" not in first
    assert changes["nnUNet_preprocessed"] == typing.user_preprocessed
    # The twin repeats what the plan of the first one says, not what the request says.
    assert second[2] == "benchmark_primus_tiny_masked"
    assert (option(second, "--steps"), option(second, "--exclude")) == ("700", "/x.txt")
    assert option(second, "--objective") == "masked"


def test_missing_pretrainings_are_timed_beforehand(typing: Bench) -> None:
    budget = {"steps": (), "budget_min": (30.0,), "arms": ("pretrained", "masked")}
    own = replace(typing, request=request(weights=(), encoders=("primus_tiny",), **budget))
    theirs = replace(typing, request=request(weights=("brain",), **budget))
    plan = replace(make_plan(), run=replace(make_plan().run, dry_step_seconds=360.0))
    of_own = own.layout.pretraining("benchmark_primus_tiny")
    brain = own.user_results / "autoreg_pretraining/brain"
    for folder in (of_own, brain):
        write_json(folder / "plan.json", plan)
    # A card says that a pretraining is finished: only the twin of "brain" is missing.
    write_json(brain / "encoder.json", {"sha256": "first"})

    found = preparing.expected_pretrainings(own)
    of_twins = preparing.expected_pretrainings(theirs)

    # Ten steps of six minutes for the run, and as many for its twin.
    assert [(one.name, one.num_steps, one.seconds) for one in found] == [
        ("benchmark_primus_tiny", 10, pytest.approx(3600)),
        ("benchmark_primus_tiny_masked", 10, pytest.approx(3600)),
    ]
    assert [one.name for one in of_twins] == ["brain_masked"]
    assert typed == []

    # Two arms of two seeds, each of half an hour, come on top.
    *_, total = pretraining_lines(own, 1)
    assert "4 h" in total

    write_json(of_own / "encoder.json", {"sha256": "x"})
    (missing,) = preparing.expected_pretrainings(own)
    assert missing.name == "benchmark_primus_tiny_masked"


def test_the_users_runs_are_linked_and_must_not_change(
    typing: Bench,
) -> None:
    typing = replace(typing, request=request(weights=("brain",)))
    theirs = typing.user_results / "autoreg_pretraining"
    finished(theirs / "brain")
    finished(theirs / "brain_masked")

    preparing.ensure_weights(typing, "brain")
    preparing.ensure_twin(typing, "brain", "masked")

    linked = typing.layout.pretraining("brain_masked")
    assert typed == []
    assert linked.resolve() == (theirs / "brain_masked").resolve()

    # The hash is noted the first time and compared every time after.
    preparing.pin(typing, "brain")
    preparing.pin(typing, "brain")
    write_json(theirs / "brain" / "encoder.json", {"sha256": "trained again"})

    with refused(UsageError, "benchmark-weights-changed", "'brain'"):
        preparing.pin(typing, "brain")


def test_imported_weights_have_no_masked_twin(typing: Bench) -> None:
    typing = replace(typing, request=request(weights=("imported",)))
    finished(typing.user_results / "autoreg_pretraining" / "imported")
    preparing.ensure_weights(typing, "imported")

    with refused(AutoregError, "benchmark-no-twin", "'imported'", "plan.json"):
        preparing.ensure_twin(typing, "imported", "masked")


def test_a_command_that_fails_ends_with_its_last_line(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log", "cpu", 1)

    script = "print('fine'); print('no space left'); raise SystemExit(3)"
    with refused(AutoregError, "command-failed", "exit code 3", "no space left", tmp_path / "log"):
        commands.run(["python", "-c", script])

    with refused(AutoregError, "command-not-installed", "autoreg_nothing"):
        commands.run(["autoreg_nothing"])
