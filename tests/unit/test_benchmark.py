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
    return BenchmarkRequest(
        **{
            "dataset": DATASET,
            "labels": (2,),
            "num_seeds": 2,
            "arms": ("pretrained", "scratch"),
            "encoders": ("tiny",),
            "steps": (50,),
            "batch": 2,
            **changes,
        },
    ).check()


# --- requests and plans


def test_runs_go_seed_by_seed_and_stock_has_no_encoder_and_no_recipe() -> None:
    keys = list(
        runs_of(
            request(arms=("masked", "stock"), encoders=("a", "b"), recipe=("scratch_rate=1e-2",)),
            [50],
            2,
        ),
    )

    assert [(k.seed, k.arm, k.encoder, k.recipe) for k in keys[:3]] == [
        (0, "masked", "benchmark_a", "scratch_rate=1e-2"),
        (0, "masked", "benchmark_b", "scratch_rate=1e-2"),
        (0, "stock", "-", ""),
    ]
    assert len(keys) == 6 and len({key.folder for key in keys}) == 6
    assert weights_of(keys[0]) == "benchmark_a_masked" and weights_of(keys[2]) is None
    assert (
        plans_name(keys[0]) == "AutoregPlans_benchmark_a_masked_scratch_rate_1e_2"
        and plans_name(keys[2]) == "nnUNetPlans"
    )


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
    typed = read_request(
        parser().parse_args(
            [
                "-d",
                "900",
                "--labels",
                "20",
                "5",
                "5",
                "--arms",
                "pretrained",
                "masked",
                "--weights",
                "brain",
            ],
        ),
    )

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
    assert [epochs_of(steps) for steps in (2, 30, 400, 4000, 100_000)] == [
        (1, 2),
        (1, 25),
        (16, 25),
        (40, 100),
        (400, 250),
    ]


def test_a_twin_repeats_the_request_without_what_masking_sets() -> None:
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
    words = retyped(made, 700, "masked")
    from nnunet_autoreg.cli.pretrain import parser as pretrain_parser

    args = pretrain_parser().parse_args(["--name", "brain_masked", *words, "--objective", "masked"])
    assert (args.datasets, args.folders, args.seed) == (["4"], ["/scans one"], 3)
    assert (args.num_steps, args.num_hours, args.batch_size) == (700, None, 8)
    assert (args.exclude, args.split_4d, args.objective) == ("/x.txt", True, "masked")
    assert args.settings == ["optim.lr=1e-4", "objective.variance_floor=0.1"]
    # Alice has no floor of the variance.
    assert retyped(made, 700, "alice")[-2:] == ["--set", "optim.lr=1e-4"]


# --- a benchmark with a runner that trains nothing


def test_a_run_of_a_preset_has_no_masked_twin(bench: Bench) -> None:
    write_json(
        bench.layout.pretraining("published") / "plan.json",
        {"request": {"preset": "faithful"}, "optim": {"num_steps": 5}},
    )

    with refused(AutoregError, "benchmark-no-twin", "--preset faithful", "published_masked"):
        ensure_twin(bench, "published", "masked")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
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
    made = Bench(
        request(),
        layout,
        Record(DATASET, subjects, divide(subjects)),
        {},
        Commands(tmp_path / "log", "cpu", 1),
        tmp_path / "pp",
        tmp_path / "res",
        1,
    )
    return made


class FakeRunner:
    """Writes a result as a training would; ``broken`` runs end with an exit code and no result."""

    def __init__(self, *broken: tuple[str, int], pace: dict[str, float] | None = None):
        self.broken, self.done, self.pace = broken, [], pace or {}

    def __call__(self, folder: Path, environment: Any) -> int:
        job = from_jsonable(FineTuningJob, read_json(folder / "job.json"), "job")
        assert (
            environment["nnUNet_results"] == str(folder)
            and (folder / "autoreg_pretraining").is_symlink()
        )
        (folder / "log.txt").write_text("started\nout of memory\n")
        if (job.trainer, job.seed) in self.broken:
            return 1
        self.done.append((job.trainer, job.seed, job.fold))
        write_json(
            folder / "result.json",
            {
                "train_s": 1.0,
                "validate_s": 1.0,
                "seconds_per_step": self.pace.get(job.trainer, 0.5),
                "processor_s_per_step": 0.1,
                "curve": [0.5],
                "patch": [8, 8, 8],
                "dice_per_case": {case: {"1": 0.5} for case in job_cases(folder, job)},
            },
        )
        return 0


def job_cases(folder: Path, job: FineTuningJob) -> list[str]:
    plans = folder.parents[1] / "preprocessed" / DATASET
    return list(read_json(plans / "splits_final.json")[job.fold]["val"])


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "pretraining_of", lambda bench, key: None)


def results(bench: Bench) -> list[dict[str, Any]]:
    return read_results(bench.layout.root / "runs.jsonl")


def test_finished_runs_are_skipped_and_failed_ones_repeated(
    bench: Bench,
) -> None:
    keys = list(runs_of(bench.request, [50], 2))
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


def test_all_arms_of_a_seed_train_and_are_scored_on_the_same_cases(
    bench: Bench,
) -> None:
    keys = list(runs_of(bench.request, [50], 2))
    write_folds(bench, keys)
    runner = FakeRunner()
    run_missing(bench, keys, 1, runner)
    folds = read_json(bench.layout.plans / "splits_final.json")

    assert {(seed, fold) for _, seed, fold in runner.done} == {(0, 0), (1, 1)}
    assert (
        folds[0]["train"]
        == list(labelled(bench.record.division, bench.record.subjects, 2, 0))
        != folds[1]["train"]
    )
    assert all(
        fold["val"] == list(bench.record.division.test)
        and not set(fold["val"]) & set(fold["train"])
        for fold in folds
    )
    assert results(bench)[0]["labelled"] == folds[0]["train"]


def test_more_labels_later_leave_the_numbers_of_earlier_folds_alone(bench: Bench) -> None:
    write_folds(bench, runs_of(bench.request, [50], 2))
    before = read_json(bench.layout.plans / "splits_final.json")
    more = replace(bench, request=request(labels=(1, 2, 4), split="development"))
    write_folds(more, runs_of(more.request, [50], 2))

    after = read_json(bench.layout.plans / "splits_final.json")

    assert after[: len(before)] == before and len(after) == len(before) + 6


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
    assert len(runner.done) == 2
    assert settle_lengths(bench, FakeRunner(("nnUNetTrainer", 0))) == ((100,), 6)
    with refused(AutoregError, "benchmark-budget-too-small", "stock", "100.0 s"):
        settle_lengths(
            replace(bench, request=replace(asked, budget_min=(0.5,))),
            FakeRunner(pace={"nnUNetTrainer": 100.0}),
        )


def test_the_plans_of_the_arms_differ_in_weights_and_recipe_alone(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        preparing,
        "read_card",
        lambda folder: type("Card", (), {"sha256": "abc", "has_decoder": True}),
    )
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
    cases = [f"patient{n:03d}_{phase}" for n in range(10) for phase in ("ED", "ES")]
    record = open_record(tmp_path / "new", request(), cases)
    file = tmp_path / "new" / "benchmark.json"
    old = read_json(file)
    del old["label_unit"], old["rule"]
    write_json(file, old)

    reopened = open_record(tmp_path / "new", request(), cases)

    assert (record.label_unit, reopened.label_unit) == ("patients", "cases")
    assert reopened.division == record.division


def test_results_call_cases_and_patients_by_ids(bench: Bench, tmp_path: Path) -> None:
    cases = [f"{name}_{phase}" for name in ("doe", "roe", "poe", "loe") for phase in ("ED", "ES")]
    root = bench.layout.root
    table = tmp_path / "subjects.csv"
    table.write_text("case,subject\n" + "".join(f"{case},{case[:3]}\n" for case in cases))
    asked = replace(bench.request, subjects=str(table))
    for file in root.iterdir():
        shutil.rmtree(file)

    record = open_record(root, asked, cases)
    ids = read_ids(root)
    bench = replace(bench, request=asked, record=record, ids=ids)
    scored = record.division.scored("test")
    result = {"dice_per_case": {case: {"1": 0.5} for case in scored}}
    line = line_of(bench, next(iter(runs_of(asked, [50], 2))), result)

    assert open_record(root, asked, cases) == record
    written = (root / "benchmark.json").read_text() + json.dumps(line)
    assert [name for name in ("doe", "roe", "poe", "loe", "Heads") if name in written] == []
    assert sorted(line["dice_per_case"]) == sorted(line["subjects"])
    assert len(set(line["subjects"].values())) == 1
    assert set(ids.cases) == set(cases) and set(ids.patients) == {case[:3] for case in cases}

    # Another scan of a known patient is the first of its ids that is new.
    more = assign_ids(root, {**record.subjects, "doe_M1": "doe"})
    assert more.cases == {**ids.cases, "doe_M1": "case-0009"} and more.patients == ids.patients


def test_labels_that_cannot_be_drawn_are_refused_at_once(bench: Bench) -> None:
    # 20 patients: 4 for the test, 3 for development, 13 in the pool.
    record = replace(bench.record, label_unit="patients")

    with refused(UsageError, "benchmark-too-many-labels", "--labels 14", "13"):
        with_labels(request(labels=(5, 14)), record)

    assert with_labels(request(labels=(13,)), record).labels == (13,)
    assert with_labels(request(labels=()), record).labels == (5, 10)
    few = replace(record, division=replace(record.division, pool=record.division.pool[:3]))
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
    assert time_left(bench, keys, 1) is None
    write_folds(bench, keys)

    settle_lengths(bench, FakeRunner(pace={"nnUNetTrainer": 0.5, "AutoregPretrainedTrainer": 0.1}))

    # Two seeds of three arms of 100 steps: twice 0.1, 0.1 and 0.5 s a step, in two jobs.
    left = time_left(bench, keys, 2)
    assert left == TimeLeft(6, pytest.approx(2 * 100 * 0.7 / 2), has_scoring=False)

    # Finished runs took 1 s to predict and score, and then train at their own pace.
    run_missing(bench, keys[:3], 1, FakeRunner(pace={"nnUNetTrainer": 0.4}))
    assert time_left(bench, keys[:3], 1) == TimeLeft(0, 0, has_scoring=True)
    assert time_left(bench, keys, 1) == TimeLeft(
        3,
        pytest.approx(100 * (0.5 + 0.5 + 0.4) + 3 * 1.0),
        has_scoring=True,
    )


def test_a_budget_tells_the_total_time_before_anything_runs() -> None:
    crossed = {"split": "cross-validation", "num_folds": 5}

    timed = request(steps=(), budget_min=(10.0, 30.0), labels=(2, 4), **crossed)
    budget = trainings_line(timed, 2)
    steps = trainings_line(request(steps=(50, 200)), 1)

    # 2 seeds, 2 numbers of labels, 5 folds, 2 arms: 40 trainings of each length, 2 at a time.
    assert "80 trainings, 2 at a time" in budget and "13 h" in budget
    assert "8 trainings" in steps and "50 or 200 steps" in steps


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

    assert settle_lengths(short, runner) == ((100,), 2)
    assert time_left(short, list(runs_of(short.request, [100], 2)), 1) is None
    assert settle_lengths(long, runner) == ((100, 400), 2)

    # One step of the one network; both lengths of two arms and two seeds at 0.5 s a step.
    assert len(runner.done) == 1
    keys = list(runs_of(long.request, [100, 400], 2))
    assert time_left(long, keys, 1) == TimeLeft(8, pytest.approx(4 * 500 * 0.5), has_scoring=False)


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
        assert len(seen) == 6 and not seen & {subjects[case] for case in fold["val"]}
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
    assert open_record(tmp_path / "new", asked, CASES[:5]) == record
    with refused(UsageError, "benchmark-other-dataset", "Dataset900"):
        open_record(tmp_path / "new", replace(asked, dataset="Dataset901_Other"), CASES)
    other = tmp_path / "subjects.csv"
    other.write_text("case,subject\n" + "".join(f"{case},x\n" for case in CASES))
    with refused(UsageError, "benchmark-other-patients", other):
        open_record(tmp_path / "new", replace(asked, subjects=str(other)), CASES)
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
    if row.source == "SCORED IMAGE":
        row = replace(row, source=str(scored.images["p2_ES"][0]))
    run = pretrained_on(tmp_path / "brain", scan(DATASET, "p1_ED"), row)

    with refused(AutoregError, "benchmark-scored-patient-seen", "1 of", "--exclude /x.txt"):
        check_pretraining(run, scored, Path("/x.txt"))


def test_weights_that_saw_others_pass_and_doubts_are_warned_of(
    tmp_path: Path,
    scored: Scored,
) -> None:
    others = scan(DATASET, "p1_ED"), scan(DATASET, "p2_ES", status="excluded")
    assert check_pretraining(pretrained_on(tmp_path / "brain", *others), scored, Path("x")) == ""

    (tmp_path / "foreign").mkdir()
    assert "foreign" in check_pretraining(tmp_path / "foreign", scored, Path("x"))

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


def test_an_index_that_could_not_tell_tiny_values_apart_is_warned_of(tmp_path: Path) -> None:
    from nnunet_autoreg.corpus.content import content_hash, earlier_hash
    from nnunet_autoreg.corpus.read import load_scan

    values = np.random.default_rng(0).uniform(0.5e-9, 2e-9, (12, 13, 14)).astype(np.float32)
    image = tmp_path / "a_0000.nii.gz"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(image))
    scored = Scored(DATASET, {"a": "a"}, ["a"], {"a": [image]})
    earlier = replace(scan("backup", "x"), content_hash=earlier_hash(load_scan(image)))
    newer = replace(scan("backup", "x"), content_hash=content_hash(load_scan(image)))

    assert "earlier version" in check_pretraining(
        pretrained_on(tmp_path / "earlier", earlier),
        scored,
        Path("x"),
    )
    with pytest.raises(AutoregError):
        check_pretraining(pretrained_on(tmp_path / "newer", newer), scored, Path("x"))


# --- the worker


def test_the_time_of_a_step_leaves_out_pauses_between_epochs() -> None:
    class Trainer:
        def train_step(self, batch: Any) -> Any:
            return batch

    trainer = Trainer()
    watch = StepTimer(trainer)
    assert trainer.train_step({"x": 1}) == {"x": 1} and len(watch.times) == 1
    watch.times = [
        0,
        9,
        18,
        20,
        30,
        33,
        35,
    ]  # epochs of 4: 30 begins the second one; 2, 3 and 2 s are left
    assert watch.seconds_per_step(4) == 2.0


# --- pretrainings


class Typed(Commands):
    """Notes the lines instead of running them; a pretraining leaves its card and plan."""

    def run(self, words: Any, **changes: Any) -> None:
        typed.append((list(words), changes))
        folder = (
            Path(self.folders["nnUNet_results"])
            / "autoreg_pretraining"
            / words[words.index("--name") + 1]
        )
        finished(
            folder,
            {"datasets": [DATASET], "encoder": "primus_tiny", "exclude": "/x.txt", "settings": []},
        )


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
    return replace(
        bench,
        commands=Typed(bench.commands.log_file, "cpu", 1, {"nnUNet_results": bench.layout.results}),
    )


def test_own_pretrainings_leave_out_who_is_scored_and_are_done_once(typing: Bench) -> None:
    typing = replace(typing, request=request(encoders=("primus_tiny",), pretrain_steps=9))
    for _ in range(2):
        preparing.ensure_weights(typing, "benchmark_primus_tiny")
        preparing.ensure_twin(typing, "benchmark_primus_tiny", "masked")
    (first, changes), (second, _) = typed

    assert (
        first[:3] == ["autoreg_pretrain", "--name", "benchmark_primus_tiny"]
        and first[first.index("--steps") + 1] == "9"
    )
    assert (
        first[first.index("--exclude") + 1] == str(typing.layout.exclude)
        and "--objective" not in first
    )
    assert changes["nnUNet_preprocessed"] == typing.user_preprocessed
    assert (
        second[2] == "benchmark_primus_tiny_masked" and second[second.index("--steps") + 1] == "700"
    )
    assert (
        second[second.index("--objective") + 1] == "masked"
        and second[second.index("--exclude") + 1] == "/x.txt"
    )


def test_missing_pretrainings_are_timed_beforehand(typing: Bench) -> None:
    budget = {"steps": (), "budget_min": (30.0,), "arms": ("pretrained", "masked")}
    own = replace(typing, request=request(weights=(), encoders=("primus_tiny",), **budget))
    theirs = replace(typing, request=request(weights=("brain",), **budget))
    plan = replace(make_plan(), run=replace(make_plan().run, dry_step_seconds=360.0))
    for folder in (
        own.layout.pretraining("benchmark_primus_tiny"),
        own.user_results / "autoreg_pretraining/brain",
    ):
        write_json(folder / "plan.json", plan)
    write_json(own.user_results / "autoreg_pretraining/brain/encoder.json", {"sha256": "first"})

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

    write_json(own.layout.pretraining("benchmark_primus_tiny") / "encoder.json", {"sha256": "x"})
    assert [one.name for one in preparing.expected_pretrainings(own)] == [
        "benchmark_primus_tiny_masked",
    ]


def test_the_users_runs_are_linked_and_must_not_change(
    typing: Bench,
) -> None:
    typing = replace(typing, request=request(weights=("brain",)))
    theirs = typing.user_results / "autoreg_pretraining"
    finished(theirs / "brain")
    finished(theirs / "brain_masked")
    preparing.ensure_weights(typing, "brain")
    preparing.ensure_twin(typing, "brain", "masked")
    assert (
        typed == []
        and typing.layout.pretraining("brain_masked").resolve()
        == (theirs / "brain_masked").resolve()
    )
    preparing.pin(typing, "brain")
    preparing.pin(typing, "brain")
    write_json(theirs / "brain" / "encoder.json", {"sha256": "trained anew"})

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

    with refused(AutoregError, "command-failed", "exit code 3", "no space left", tmp_path / "log"):
        commands.run(["python", "-c", "print('fine'); print('no space left'); raise SystemExit(3)"])
    with refused(AutoregError, "command-not-installed", "autoreg_nothing"):
        commands.run(["autoreg_nothing"])
