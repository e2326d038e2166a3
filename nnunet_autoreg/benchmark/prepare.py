"""Everything before the trainings: the division of the patients, pretrained weights, plans,
preprocessed cases, folds. Safe to repeat.
"""

import logging
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_autoreg.benchmark.commands import Commands
from nnunet_autoreg.benchmark.leak import Scored, check_pretraining
from nnunet_autoreg.benchmark.protocol import (
    CONFIGURATION,
    MASKED_SUFFIX,
    STOCK,
    STOCK_PLANS,
    Layout,
    Request,
    fold_of,
    plans_name,
    recipe_values,
    weights_of,
)
from nnunet_autoreg.benchmark.results import RunKey
from nnunet_autoreg.benchmark.split import (
    CASES,
    PATIENTS,
    Division,
    divide,
    find_patients,
    labelled,
    read_subjects,
)
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.private import PATH_FIELDS, show_paths
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.finetune.block import BLOCK_KEY
from nnunet_autoreg.finetune.resolve import locate
from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, WEIGHTS_NAME, read_card
from nnunet_autoreg.nnunet_api import dataset_folder
from nnunet_autoreg.records import from_jsonable, read_json, write_json, write_text

log = logging.getLogger(__name__)

RECORD_NAME, PINS_NAME = "benchmark.json", "weights.json"
OWN_REQUEST_KEYS = ("objective.name=", "sequence.order=", "sequence.predictor=", "sequence.prefix")
"""Settings of a pretraining that its masked twin must not take over."""


@dataclass(frozen=True)
class Record:
    """What a benchmark's folder stands for, fixed when it is made.

    Attributes:
        dataset: folder name of the raw dataset.
        subjects: case -> patient.
        division: pool, development and test.
        label_unit: what ``--labels`` counts; folders of older versions say nothing and count cases.
        rule: how the patients were found, for the user.
    """

    dataset: str
    subjects: dict[str, str]
    division: Division
    label_unit: str = CASES
    rule: str = ""


@dataclass(frozen=True)
class Bench:
    """A benchmark at work.

    Attributes:
        images: case -> image files.
        user_preprocessed, user_results: nnU-Net's folders of the caller.
    """

    request: Request
    layout: Layout
    record: Record
    images: Mapping[str, Sequence[Path]]
    commands: Commands
    user_preprocessed: Path
    user_results: Path
    num_processes: int

    def labelled(self, key: RunKey) -> tuple[str, ...]:
        """The labelled cases of a run."""
        return labelled(
            self.record.division, self.record.subjects, key.labels, key.seed, self.record.label_unit
        )


def images_of(dataset: str) -> dict[str, list[Path]]:
    """Case -> image files of the labelled cases of a raw dataset."""
    folder = dataset_folder(dataset)
    ending = str(read_json(folder / "dataset.json").get("file_ending", ".nii.gz"))
    found: dict[str, list[Path]] = {}
    for candidate in find_scans([dataset], []):
        if (
            candidate.path.parent.name == "imagesTr"
            and (folder / "labelsTr" / f"{candidate.case}{ending}").is_file()
        ):
            found.setdefault(candidate.case, []).append(candidate.path)
    return found


def open_record(
    root: Path,
    request: Request,
    cases: Sequence[str],
    dataset: Path | None = None,
) -> Record:
    """Return the record of ``root``, made if it is not there yet.

    Args:
        dataset: folder of the raw dataset, where a ``cases.csv`` may name the patients.

    Raises:
        UsageError: the folder holds other things, or a benchmark of another dataset.
    """
    file = root / RECORD_NAME
    if file.is_file():
        record = from_jsonable(Record, read_json(file), str(file))
        if record.dataset != request.dataset:
            raise UsageError(
                f"-o {root} holds a benchmark of {record.dataset}; name another folder for "
                f"{request.dataset}"
            )
        if (
            request.subjects
            and read_subjects(Path(request.subjects), sorted(record.subjects)) != record.subjects
        ):
            raise UsageError(
                f"--subjects {request.subjects} says other patients than {file}; name another -o"
            )
        newer = sorted(set(cases) - set(record.subjects))
        if newer:
            log.warning(
                "%d cases are newer than this benchmark's division and take no part, the first is "
                "%s",
                len(newer),
                newer[0],
            )
        return record
    if root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
        raise UsageError(f"-o {root}: is neither empty nor a benchmark's folder; name a new one")
    table = Path(request.subjects) if request.subjects else None
    patients = find_patients(dataset or root, cases, table)
    division = divide(patients.patient_of)
    record = Record(request.dataset, patients.patient_of, division, PATIENTS, patients.rule)
    write_json(root / RECORD_NAME, record)
    return record


def write_exclude(layout: Layout, division: Division) -> None:
    """The cases that no pretraining may see."""
    names = sorted((*division.development, *division.test))
    write_text(layout.exclude, "".join(f"{layout.dataset}/{name}\n" for name in names))


def prepare(bench: Bench, keys: Sequence[RunKey]) -> None:
    """Weights, plans, preprocessed cases and folds of these runs.

    Raises:
        AutoregError: a command failed, or weights saw a scored patient.
    """
    for folder in (bench.layout.plans, bench.layout.results / RUNS_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    subjects, division = bench.record.subjects, bench.record.division
    scored = Scored(
        bench.request.dataset, subjects, division.scored(bench.request.split), bench.images
    )
    for family in sorted({key.encoder for key in keys if key.arm != STOCK}):
        ensure_weights(bench, family)
    for name in sorted(
        {name for key in keys if (name := weights_of(key)) and name.endswith(MASKED_SUFFIX)}
    ):
        ensure_masked(bench, name.removesuffix(MASKED_SUFFIX))
    for name in sorted({weights_of(key) or key.encoder for key in keys if key.arm != STOCK}):
        pin(bench, name)
        warning = check_pretraining(bench.layout.pretraining(name), scored, bench.layout.exclude)
        if warning:
            log.warning("%s", warning)
    ensure_plans(bench, keys)
    write_folds(bench, keys)


def ensure_weights(bench: Bench, family: str) -> None:
    """A link to the user's run, or the benchmark's own pretraining on the pool."""
    if bench.request.weights:
        _link(bench, locate(bench.user_results, family).parent, family)
        return
    encoder = dict(zip(bench.request.families, bench.request.encoders, strict=True))[family]
    _pretrain(
        bench,
        family,
        [
            "-d",
            bench.request.dataset,
            "--encoder",
            encoder,
            "--exclude",
            str(bench.layout.exclude),
            *_length(bench.request),
        ],
    )


def _length(request: Request) -> list[str]:
    steps = ["--steps", str(request.pretrain_steps)] if request.pretrain_steps else []
    return steps + (["--batch", str(request.pretrain_batch)] if request.pretrain_batch else [])


def ensure_masked(bench: Bench, family: str) -> None:
    """The masked twin of a run: the user's of that name, else the run's own line with ``--objective
    masked``.

    Raises:
        AutoregError: the run was not made by autoreg_pretrain, or by a preset, which has no masked
            form.
    """
    name = family + MASKED_SUFFIX
    theirs = bench.user_results / RUNS_FOLDER / name
    if (theirs / CARD_NAME).is_file():
        _link(bench, theirs, name)
        return
    plan_file = bench.layout.pretraining(family) / "plan.json"
    if not plan_file.is_file():
        raise AutoregError(
            f"the arm 'masked' needs a twin of '{family}', which has no {plan_file.name} to "
            "repeat; leave it out of --arms, "
            f"or give a run named {name}"
        )
    plan = read_json(plan_file)
    preset = plan["request"].get("preset")
    if preset:
        raise AutoregError(
            f"the arm 'masked' needs a twin of '{family}', which was made with --preset {preset} "
            "and would differ in more "
            f"than the objective; leave it out of --arms, or give a run named {name}"
        )
    # The plan may be shared, so the paths of its request stand in the run's private file.
    request = show_paths(plan["request"], PATH_FIELDS, plan_file.parent)
    _pretrain(
        bench, name, [*retyped(request, int(plan["optim"]["num_steps"])), "--objective", "masked"]
    )


def retyped(request: Mapping[str, Any], num_steps: int) -> list[str]:
    """The arguments of ``autoreg_pretrain`` that a run was made with, less its name and objective,
    at a fixed number of steps.
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
    words = ["--steps", str(num_steps)]
    for key, flag in flags.items():
        value = request.get(key)
        if value not in (None, "", [], ()):
            words += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    settings = [s for s in request.get("settings", []) if not s.startswith(OWN_REQUEST_KEYS)]
    words += ["--split-4d"] if request.get("split_4d") else []
    return words + (["--set", *settings] if settings else [])


def _pretrain(bench: Bench, name: str, arguments: Sequence[str]) -> None:
    if (bench.layout.pretraining(name) / CARD_NAME).is_file():
        return
    bench.commands.run(
        ["autoreg_pretrain", "--name", name, *arguments, "--device", bench.commands.device],
        nnUNet_preprocessed=bench.user_preprocessed,
    )


def _link(bench: Bench, folder: Path, name: str) -> None:
    place = bench.layout.pretraining(name)
    if not place.exists():
        place.symlink_to(folder.resolve(), target_is_directory=True)


def pin(bench: Bench, name: str) -> None:
    """Remember the weights of a pretraining when they are first used.

    Raises:
        UsageError: they are others now.
    """
    file = bench.layout.root / PINS_NAME
    pins = read_json(file) if file.is_file() else {}
    found = str(read_json(bench.layout.pretraining(name) / CARD_NAME)["sha256"])
    if pins.setdefault(name, found) != found:
        raise UsageError(
            f"the weights of '{name}' are others than those of this benchmark's trainings so far; "
            "name another -o"
        )
    write_json(file, pins)


def ensure_plans(bench: Bench, keys: Sequence[RunKey]) -> None:
    """nnU-Net's plans and ours, and the cases preprocessed by each; then the plans of the runs,
    which share them.
    """
    if any(key.arm == STOCK for key in keys):
        _once(bench, STOCK_PLANS, ["-pl", "ExperimentPlanner"], {})
    for family in sorted({key.encoder for key in keys if key.arm != STOCK}):
        name = f"AutoregPlans_{family}"
        _once(
            bench,
            name,
            ["-pl", "AutoregPlanner", "-overwrite_plans_name", name],
            {"autoreg_weights": family},
        )
    for key in keys:
        if key.arm != STOCK:
            write_plans(bench, key)


def _once(
    bench: Bench, plans: str, arguments: Sequence[str], changes: Mapping[str, object]
) -> None:
    done = bench.layout.root / "done" / plans
    if done.is_file():
        return
    # This command takes numbers only.
    number = str(int(bench.request.dataset.removeprefix("Dataset").split("_")[0]))
    bench.commands.run(
        [
            "nnUNetv2_plan_and_preprocess",
            "-d",
            number,
            *arguments,
            "-c",
            CONFIGURATION,
            "-np",
            str(bench.num_processes),
            "-npfp",
            str(bench.num_processes),
        ],
        # nnU-Net's planner takes this for torch's threads, of which there has to be one.
        **{"nnUNet_n_proc_DA": bench.num_processes, **changes},
    )
    write_text(done, "")


def write_plans(bench: Bench, key: RunKey) -> None:
    """The plans file of a run: its family's, with the weights of its arm and the changed recipe."""
    base = f"AutoregPlans_{key.encoder}"
    name = plans_name(key)
    if name == base:
        return
    plans = read_json(bench.layout.plans / f"{base}.json")
    plans["plans_name"] = name
    plans[BLOCK_KEY]["recipe"].update(recipe_values(tuple(key.recipe.split())))
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
    """``splits_final.json``: one fold for each set of labelled cases and split; earlier ones keep
    their numbers.
    """
    file = bench.layout.plans / "splits_final.json"
    folds: list[Mapping[str, object]] = read_json(file) if file.is_file() else []
    for key in keys:
        fold_of(folds, fold(bench, key))
    write_json(file, folds)


def fold(bench: Bench, key: RunKey) -> dict[str, object]:
    """What a run trains on and what it is scored on."""
    return {
        "train": list(bench.labelled(key)),
        "val": list(bench.record.division.scored(key.split)),
    }


def planned_batch(bench: Bench, keys: Sequence[RunKey]) -> int:
    """The smallest batch of the plans, so that all arms can have it."""
    files = {STOCK_PLANS if key.arm == STOCK else f"AutoregPlans_{key.encoder}" for key in keys}
    plans = [read_json(bench.layout.plans / f"{name}.json") for name in sorted(files)]
    return min(int(p["configurations"][CONFIGURATION]["batch_size"]) for p in plans)


def surface_tolerance_mm(bench: Bench) -> float | None:
    """Return the tolerance of the surface Dice: the user's, or the dataset's typical in-plane
    voxel.

    That is the median over the cases of the smallest voxel edge, from nnU-Net's fingerprint; None
    before there is one.
    """
    if bench.request.surface_tolerance_mm is not None:
        return bench.request.surface_tolerance_mm

    file = bench.layout.plans / "dataset_fingerprint.json"
    if not file.is_file():
        return None
    edges = [float(min(spacing)) for spacing in read_json(file)["spacings"]]
    return round(statistics.median(edges), 3)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
