"""Everything before the trainings of a benchmark. It may be repeated at any time.

It divides the patients, provides pretrained weights and plans, and preprocesses the cases.
"""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nnunet_autoreg.benchmark.commands import Commands
from nnunet_autoreg.benchmark.leak import Scored, check_pretraining
from nnunet_autoreg.benchmark.protocol import (
    CONFIGURATION,
    STOCK,
    STOCK_PLANS,
    BenchmarkFolders,
    BenchmarkRequest,
    fold_of,
    plans_name,
    recipe_values,
    twin_arms,
    twin_name,
    weights_of,
)
from nnunet_autoreg.benchmark.public_ids import (
    EXCLUDE_HEADER,
    NO_IDS,
    PublicIds,
    assign_ids,
    read_ids,
)
from nnunet_autoreg.benchmark.results import RunKey
from nnunet_autoreg.benchmark.split import (
    CASES,
    CROSS_VALIDATION,
    PATIENTS,
    Division,
    divide,
    divide_for_fold,
    find_patients,
    fold_of_split,
    labelled,
    read_subjects,
)
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.private import (
    PATH_FIELDS,
    public_dataset,
    show_paths,
    terminal_only,
)
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.finetune.block import BLOCK_KEY
from nnunet_autoreg.finetune.resolve import locate
from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, WEIGHTS_NAME, read_card
from nnunet_autoreg.nnunet_api import dataset_folder
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.length import expected_seconds
from nnunet_autoreg.records import from_jsonable, read_json, read_object, write_json, write_text
from nnunet_autoreg.wording import counted, duration

log = logging.getLogger(__name__)

RECORD_NAME, PINS_NAME = "benchmark.json", "weights.json"
DEFAULT_LABELS = (5, 10, 20)
OWN_REQUEST_KEYS = ("objective.name=", "sequence.order=", "sequence.predictor=", "sequence.prefix")
"""Settings of a pretraining that its twins with other objectives must not have."""


@dataclass(frozen=True)
class Record:
    """The settings of a benchmark's folder, fixed when it is made.

    Attributes:
        dataset: folder name of the raw dataset.
        subjects: case -> patient.
        division: pool, development and test.
        label_unit: what ``--labels`` counts; folders of older versions lack it and count cases.
        rule: how the patients were found, for the user.
        has_ids: the file calls cases and patients by ids; in memory they always have their names.
    """

    dataset: str
    subjects: dict[str, str]
    division: Division
    label_unit: str = CASES
    rule: str = ""
    has_ids: bool = False

    def division_for(self, split: str) -> Division:
        """Return the division of a run's split: that of its fold, or the one of the folder."""
        fold_and_number = fold_of_split(split)
        if fold_and_number is None:
            return self.division
        fold, num_folds = fold_and_number
        return divide_for_fold(self.subjects, fold, num_folds)

    def scored(self, split: str) -> tuple[str, ...]:
        """Return the cases that a split scores; a cross-validation scores all of them."""
        if split == CROSS_VALIDATION:
            return tuple(sorted(self.subjects))
        return self.division_for(split).scored(split)

    def labelled(self, num_labels: int, seed: int, split: str) -> tuple[str, ...]:
        """Return the cases that are labelled under a seed.

        Raises:
            UsageError: the pool of the split is too small.
        """
        division = self.division_for(split)
        return labelled(division, self.subjects, num_labels, seed, self.label_unit)

    def num_available(self, split: str) -> int:
        """Return the number of labelled patients (in old folders: cases) in the pool of a split."""
        pool = self.division_for(split).pool
        if self.label_unit == PATIENTS:
            return len({self.subjects[case] for case in pool})
        return len(pool)


@dataclass(frozen=True)
class Bench:
    """A benchmark that is prepared or run.

    Attributes:
        images: case -> image files.
        user_preprocessed, user_results: nnU-Net's folders of the caller.
        ids: ids of cases and patients in results.
    """

    request: BenchmarkRequest
    layout: BenchmarkFolders
    record: Record
    images: Mapping[str, Sequence[Path]]
    commands: Commands
    user_preprocessed: Path
    user_results: Path
    num_processes: int
    ids: PublicIds = NO_IDS

    def labelled(self, key: RunKey) -> tuple[str, ...]:
        """Return the labelled cases of a run."""
        return self.record.labelled(key.labels, key.seed, key.split)


def images_of(dataset: str) -> dict[str, list[Path]]:
    """Return case -> image files, for the labelled cases of a raw dataset."""
    folder = dataset_folder(dataset)
    ending = str(read_object(folder / "dataset.json").get("file_ending", ".nii.gz"))

    found: dict[str, list[Path]] = {}
    for candidate in find_scans([dataset], []):
        is_training = candidate.path.parent.name == "imagesTr"
        label_file = folder / "labelsTr" / f"{candidate.case}{ending}"
        if is_training and label_file.is_file():
            found.setdefault(candidate.case, []).append(candidate.path)
    return found


def open_record(
    root: Path,
    request: BenchmarkRequest,
    cases: Sequence[str],
    dataset: Path | None = None,
) -> Record:
    """Return the record of ``root``. It is made if it does not exist yet.

    Args:
        dataset: folder of the raw dataset, in which ``cases.csv`` may name the patients.

    Raises:
        UsageError: the folder holds other things, or a benchmark of another dataset.
    """
    file = root / RECORD_NAME
    if file.is_file():
        record = _read_record(file)
        if public_dataset(record.dataset) != public_dataset(request.dataset):
            raise UsageError(
                f"-o {root} holds a benchmark of {record.dataset}; name another folder for "
                f"{request.dataset}",
                code="benchmark-other-dataset",
            )

        if request.subjects:
            subjects = read_subjects(Path(request.subjects), sorted(record.subjects))
            if subjects != record.subjects:
                raise UsageError(
                    f"--subjects {request.subjects} names other patients than {file}; name another "
                    "-o",
                    code="benchmark-other-patients",
                )

        newer = sorted(set(cases) - set(record.subjects))
        if newer:
            log.warning(
                "%d cases are newer than this benchmark's division and are not used",
                len(newer),
                extra=terminal_only(f"; the first is {newer[0]}"),
            )
        return replace(record, dataset=request.dataset)

    # A new folder. It may hold the lock of another benchmark that is waiting for it.
    if root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
        raise UsageError(
            f"-o {root}: is neither empty nor a benchmark's folder; name a new one",
            code="benchmark-folder-in-use",
        )

    table = Path(request.subjects) if request.subjects else None
    patients = find_patients(dataset or root, cases, table)
    division = divide(patients.patient_of)
    record = Record(request.dataset, patients.patient_of, division, PATIENTS, patients.rule, True)
    ids = assign_ids(root, record.subjects)
    write_json(root / RECORD_NAME, _translated(record, ids))
    return record


def with_labels(request: BenchmarkRequest, record: Record) -> BenchmarkRequest:
    """Return the request with numbers of labels that the pool is large enough for.

    Raises:
        UsageError: a number that the user gave cannot be drawn.
    """
    # The smallest pool decides; every seed can draw as many.
    smallest = min(request.splits, key=record.num_available)
    for number in request.labels:
        record.labelled(number, 0, smallest)  # raises an error if the pool is too small
    if request.labels:
        return request

    available = record.num_available(smallest)
    fitting = tuple(number for number in DEFAULT_LABELS if number <= available)
    return replace(request, labels=fitting or (available,))


def _read_record(file: Path) -> Record:
    """Return the record of a file, with the names of its cases and patients.

    Raises:
        UsageError: the private file beside it, which holds the names, is missing or damaged.
    """
    record = from_jsonable(Record, read_json(file), str(file))
    if not record.has_ids:
        return record
    ids = read_ids(file.parent)
    names_of_cases = {public: name for name, public in ids.cases.items()}
    names_of_patients = {public: name for name, public in ids.patients.items()}
    return _translated(record, PublicIds(names_of_cases, names_of_patients))


def _translated(record: Record, ids: PublicIds) -> Record:
    """Return a record with the dataset's number, and with other names of cases and patients."""

    def translated(cases: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(ids.of_case(case) for case in cases))

    subjects = {}
    for case, patient in record.subjects.items():
        subjects[ids.of_case(case)] = ids.of_patient(patient)

    division = Division(
        translated(record.division.pool),
        translated(record.division.development),
        translated(record.division.test),
    )
    dataset = public_dataset(record.dataset)
    return replace(record, dataset=dataset, subjects=subjects, division=division)


def write_exclude(layout: BenchmarkFolders, record: Record, split: str) -> None:
    """Write the list of the cases that no pretraining may see."""
    if split == CROSS_VALIDATION:
        cases = list(record.subjects)
    else:
        cases = [*record.division.development, *record.division.test]

    text = EXCLUDE_HEADER
    for case in sorted(cases):
        text += f"{layout.dataset}/{case}\n"
    write_text(layout.exclude, text)


def prepare(bench: Bench, keys: Sequence[RunKey]) -> None:
    """Provide weights, plans, preprocessed cases and folds of these runs.

    Raises:
        AutoregError: a command failed, or weights saw a scored patient.
    """
    bench.layout.make()

    # Weights: the user's or the benchmark's own, and their twins with other objectives.
    ours = [key for key in keys if key.arm != STOCK]
    for family in sorted({key.encoder for key in ours}):
        ensure_weights(bench, family)

    for family, arm in sorted({(key.encoder, key.arm) for key in ours}):
        if arm in twin_arms():
            ensure_twin(bench, family, arm)

    # No pretraining may have seen a scored patient.
    scored_cases = bench.record.scored(bench.request.split)
    scored = Scored(bench.request.dataset, bench.record.subjects, scored_cases, bench.images)
    # The arm from random weights has the plan of its encoder's pretraining.
    names = {weights_of(key) or key.encoder for key in ours}
    for name in sorted(names):
        pin(bench, name)
        warning = check_pretraining(bench.layout.pretraining(name), scored, bench.layout.exclude)
        if warning:
            log.warning("%s", warning)

    ensure_plans(bench, keys)
    write_folds(bench, keys)


@dataclass(frozen=True)
class ExpectedPretraining:
    """A pretraining that a benchmark still has to make.

    Attributes:
        seconds: duration of its training; None if no step was timed.
    """

    name: str
    num_steps: int
    seconds: float | None

    def __str__(self) -> str:
        steps = counted(self.num_steps, "step")
        if self.seconds is None:
            return f"pretraining {self.name}: {steps}"
        return f"pretraining {self.name}: {steps}, about {duration(self.seconds)}"


def expected_pretrainings(bench: Bench) -> list[ExpectedPretraining]:
    """Return the missing pretrainings with their steps, and with their time on this machine.

    The benchmark's own are planned by a dry run. A twin has as many steps as the run that it
    repeats, but its step may take a somewhat different time.
    """
    request = bench.request
    expected: list[ExpectedPretraining] = []
    if set(request.arms) <= {STOCK}:
        return expected

    # A dry run needs the folder of results.
    bench.layout.make()

    for family in request.families:
        if request.weights:
            folder = bench.user_results / RUNS_FOLDER / family
        else:
            folder = bench.layout.pretraining(family)
            if not (folder / CARD_NAME).is_file():
                if request.split == CROSS_VALIDATION:
                    continue
                if not (folder / "plan.json").is_file():
                    _pretrain(bench, family, [*_own_arguments(bench, family), "--dry-run"])
                expected.append(_expected(bench, family, folder))

        for arm in request.arms:
            if arm not in twin_arms():
                continue
            name = twin_name(family, arm)
            card_of_user = bench.user_results / RUNS_FOLDER / name / CARD_NAME
            own_card = bench.layout.pretraining(name) / CARD_NAME
            is_finished = card_of_user.is_file() or own_card.is_file()
            if not is_finished and (folder / "plan.json").is_file():
                expected.append(_expected(bench, name, folder))
    return expected


def _expected(bench: Bench, name: str, folder: Path) -> ExpectedPretraining:
    """Return the length and duration of a pretraining by the plan in ``folder``."""
    plan_file = folder / "plan.json"
    plan = from_jsonable(Plan, read_json(plan_file), str(plan_file))
    seconds = expected_seconds(plan, bench.commands.device)
    return ExpectedPretraining(name, plan.optim.num_steps, seconds)


def ensure_weights(bench: Bench, family: str) -> None:
    """Link the user's run, or make the benchmark's own pretraining on the pool."""
    if bench.request.weights:
        _link(bench, locate(bench.user_results, family).parent, family)
        return

    request = bench.request
    if request.split == CROSS_VALIDATION:
        raise UsageError(
            "--split cross-validation scores all labelled patients, so the benchmark has no scans "
            "of this dataset to pretrain on; pretrain on other scans with --exclude "
            f"{bench.layout.exclude}, and name that run by --weights",
            code="benchmark-folds-without-weights",
        )
    _pretrain(bench, family, _own_arguments(bench, family))


def _own_arguments(bench: Bench, family: str) -> list[str]:
    """Return the arguments of ``autoreg_pretrain`` for the benchmark's own pretraining."""
    request = bench.request
    encoder = request.encoders[request.families.index(family)]
    arguments = ["-d", request.dataset, "--encoder", encoder]
    arguments += ["--exclude", str(bench.layout.exclude)]
    if request.pretrain_steps:
        arguments += ["--steps", str(request.pretrain_steps)]
    if request.pretrain_batch:
        arguments += ["--batch", str(request.pretrain_batch)]
    return arguments


def ensure_twin(bench: Bench, family: str, objective: str) -> None:
    """Provide the twin of a run that has another objective.

    It is the user's run of that name, or else one by the run's own command line with
    ``--objective``.

    Raises:
        AutoregError: the run was not made by autoreg_pretrain, or it was made by a preset, which
            belongs to its own objective.
    """
    name = twin_name(family, objective)
    run_of_user = bench.user_results / RUNS_FOLDER / name
    if (run_of_user / CARD_NAME).is_file():
        _link(bench, run_of_user, name)
        return

    plan_file = bench.layout.pretraining(family) / "plan.json"
    if not plan_file.is_file():
        raise AutoregError(
            f"the arm '{objective}' needs a twin of '{family}', which has no {plan_file.name} to "
            f"repeat; leave it out of --arms, or give a run named {name}",
            code="benchmark-no-twin",
        )

    plan = read_object(plan_file, ("request", "optim"))
    preset = plan["request"].get("preset")
    if preset:
        raise AutoregError(
            f"the arm '{objective}' needs a twin of '{family}', which was made with --preset "
            f"{preset} and would differ in more than the objective; leave it out of --arms, or "
            f"give a run named {name}",
            code="benchmark-no-twin",
        )

    # The plan may be shared, so that the paths of its request are in the run's private file.
    request = show_paths(plan["request"], PATH_FIELDS, plan_file.parent)
    arguments = retyped(request, int(plan["optim"]["num_steps"]), objective)
    _pretrain(bench, name, [*arguments, "--objective", objective])


def retyped(request: Mapping[str, Any], num_steps: int, objective: str) -> list[str]:
    """Return the arguments of ``autoreg_pretrain`` for a twin of a run.

    Name and objective are left out, and with them all settings that another objective chooses
    itself or does not know. The number of steps is fixed.
    """
    flags = {
        "datasets": "-d",
        "folders": "-i",
        "encoder": "--encoder",
        "batch_size": "--batch",
        "seed": "--seed",
        "modality": "--modality",
        "exclude": "--exclude",
        "manifest": "--manifest",
        "init": "--init",
        "gpu_memory_gib": "--gpu-memory",
        "spacing": "--spacing",
        "sequences": "--sequences",
        "boxes": "--boxes",
    }
    arguments = ["--steps", str(num_steps)]
    for key, flag in flags.items():
        value = request.get(key)
        if value in (None, "", [], ()):
            continue
        values = value if isinstance(value, list) else [value]
        arguments.append(flag)
        arguments += [str(one) for one in values]

    if request.get("split_4d"):
        arguments.append("--split-4d")

    known = {f"objective.{field.name}" for field in fields(kind_of(objective).plan_type)}
    settings = []
    for setting in request.get("settings", []):
        key = setting.partition("=")[0]
        is_unknown = key.startswith("objective.") and key not in known
        belongs_to_objective = setting.startswith(OWN_REQUEST_KEYS)
        if not is_unknown and not belongs_to_objective:
            settings.append(setting)

    if settings:
        arguments += ["--set", *settings]
    return arguments


def _pretrain(bench: Bench, name: str, arguments: Sequence[str]) -> None:
    if (bench.layout.pretraining(name) / CARD_NAME).is_file():
        return
    bench.commands.run(
        ["autoreg_pretrain", "--name", name, *arguments, "--device", bench.commands.device],
        nnUNet_preprocessed=bench.user_preprocessed,
    )


def _link(bench: Bench, folder: Path, name: str) -> None:
    link = bench.layout.pretraining(name)
    if not link.exists():
        link.symlink_to(folder.resolve(), target_is_directory=True)


def pin(bench: Bench, name: str) -> None:
    """Record the weights of a pretraining when they are first used.

    Raises:
        UsageError: the weights have changed since then.
    """
    # A run's folder may be a link to one that the user trains on.
    file = bench.layout.root / PINS_NAME
    pins = read_object(file) if file.is_file() else {}
    card = read_object(bench.layout.pretraining(name) / CARD_NAME, ("sha256",))
    found = str(card["sha256"])
    if pins.setdefault(name, found) != found:
        raise UsageError(
            f"the weights of '{name}' have changed since this benchmark's first training with "
            "them; name another -o",
            code="benchmark-weights-changed",
        )
    write_json(file, pins)


def ensure_plans(bench: Bench, keys: Sequence[RunKey]) -> None:
    """Make nnU-Net's plans and ours, preprocess the cases by them, and write the plans of runs."""
    if any(key.arm == STOCK for key in keys):
        _once(bench, STOCK_PLANS, ["-pl", "ExperimentPlanner"], {})

    for family in sorted({key.encoder for key in keys if key.arm != STOCK}):
        name = f"AutoregPlans_{family}"
        arguments = ["-pl", "AutoregPlanner", "-overwrite_plans_name", name]
        _once(bench, name, arguments, {"autoreg_weights": family})

    for key in keys:
        if key.arm != STOCK:
            write_plans(bench, key)


def _once(
    bench: Bench,
    plans: str,
    arguments: Sequence[str],
    changes: Mapping[str, object],
) -> None:
    """Plan and preprocess, unless a marker file shows that this was done."""
    done = bench.layout.root / "done" / plans
    if done.is_file():
        return

    # This command takes numbers only.
    digits = bench.request.dataset.removeprefix("Dataset").split("_")[0]
    number = str(int(digits))
    processes = str(bench.num_processes)
    line = ["nnUNetv2_plan_and_preprocess", "-d", number, *arguments, "-c", CONFIGURATION]
    line += ["-np", processes, "-npfp", processes]

    # nnU-Net's planner uses this as the number of torch's threads, which must be at least 1.
    bench.commands.run(line, **{"nnUNet_n_proc_DA": bench.num_processes, **changes})
    write_text(done, "")


def write_plans(bench: Bench, key: RunKey) -> None:
    """Write the plans of a run: its family's, with the weights of its arm and its recipe."""
    base = f"AutoregPlans_{key.encoder}"
    name = plans_name(key)
    if name == base:
        return

    plans = read_object(bench.layout.plans / f"{base}.json", (BLOCK_KEY,))
    plans["plans_name"] = name
    changes = recipe_values(tuple(key.recipe.split()))
    plans[BLOCK_KEY]["recipe"].update(changes)

    weights = weights_of(key)
    if weights is not None:
        card = read_card(bench.layout.pretraining(weights))
        plans[BLOCK_KEY]["weights"] = {
            "name": weights,
            "file": f"{RUNS_FOLDER}/{weights}/{WEIGHTS_NAME}",
            "sha256": card.sha256,
            "has_decoder": card.has_decoder,
        }

    write_json(bench.layout.plans / f"{name}.json", plans)


def write_folds(bench: Bench, keys: Iterable[RunKey]) -> None:
    """Write ``splits_final.json``, one fold for each set of labelled cases and split.

    Earlier folds keep their numbers.
    """
    file = bench.layout.plans / "splits_final.json"
    folds: list[Mapping[str, object]] = read_json(file) if file.is_file() else []
    for key in keys:
        fold_of(folds, fold(bench, key))
    write_json(file, folds)


def fold(bench: Bench, key: RunKey) -> dict[str, object]:
    """Return the cases that a run trains on and those that it is scored on."""
    return {
        "train": list(bench.labelled(key)),
        "val": list(bench.record.scored(key.split)),
    }


def planned_batch(bench: Bench, keys: Sequence[RunKey]) -> int:
    """Return the smallest batch of the plans, which all arms can have."""
    names = {STOCK_PLANS if key.arm == STOCK else f"AutoregPlans_{key.encoder}" for key in keys}

    batches = []
    for name in sorted(names):
        plans = read_object(bench.layout.plans / f"{name}.json", ("configurations",))
        configuration = plans["configurations"][CONFIGURATION]
        batches.append(int(configuration["batch_size"]))
    return min(batches)


def surface_tolerance_mm(bench: Bench) -> float | None:
    """Return the tolerance of the surface Dice: the user's, or the typical in-plane voxel size.

    That is the median over the cases of the smallest voxel edge, from nnU-Net's fingerprint; None
    before there is one.
    """
    if bench.request.surface_tolerance_mm is not None:
        return bench.request.surface_tolerance_mm

    file = bench.layout.plans / "dataset_fingerprint.json"
    if not file.is_file():
        return None
    spacings = read_object(file, ("spacings",))["spacings"]
    edges = [float(min(spacing)) for spacing in spacings]
    return round(statistics.median(edges), 3)
