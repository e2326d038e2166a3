"""The trainings of a benchmark, one process each. Trainings that are finished are not repeated."""

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_autoreg.benchmark.commands import last_line
from nnunet_autoreg.benchmark.prepare import Bench, fold, planned_batch, surface_tolerance_mm
from nnunet_autoreg.benchmark.protocol import (
    CONFIGURATION,
    STOCK,
    fold_of,
    plans_name,
    runs_of,
    trainer_of,
    weights_of,
)
from nnunet_autoreg.benchmark.results import (
    RESULTS_NAME,
    Cost,
    RunKey,
    key_of,
    read_results,
)
from nnunet_autoreg.benchmark.statistics import DICE, SURFACE, mean_dice
from nnunet_autoreg.benchmark.worker import JOB_NAME, RESULT_NAME, FineTuningJob
from nnunet_autoreg.children import end_children, run_guarded
from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.model.card import RUNS_FOLDER, read_card
from nnunet_autoreg.records import (
    append_json_line,
    read_json,
    read_object,
    to_jsonable,
    write_json,
)
from nnunet_autoreg.stopping import stop_requested
from nnunet_autoreg.wording import counted, duration

log = logging.getLogger(__name__)

LENGTHS_NAME, COSTS_NAME = "lengths.json", "costs.json"
_costs_lock = threading.Lock()

PACE_STEPS = 20
"""Number of steps of a training that only measures the duration of a step."""

MEASURED_FROM_STEPS = 200
"""Trainings of fewer steps are so short that their duration is not measured beforehand."""

TRAINING_SHARE = 0.9
"""Share of the budget for steps; nnU-Net computes validation patches in the rest."""

FEWEST_PER_EPOCH, MOST_PER_EPOCH, EPOCHS_WANTED = 25, 250, 40

Runner = Callable[[Path, Mapping[str, str]], int]
"""(job's folder, environment) -> exit code of the training's process."""


def worker(folder: Path, environment: Mapping[str, str]) -> int:
    """Run the job in ``folder`` in a separate process, which ends with this one."""
    line = [sys.executable, "-m", "nnunet_autoreg.benchmark.worker", str(folder)]
    with (folder / "log.txt").open("w", encoding="utf-8") as handle:
        return run_guarded(line, environment, handle)


def epochs_of(steps: int) -> tuple[int, int]:
    """Return the number of epochs and of steps in each, together at most ``steps``.

    An epoch has a fortieth of the steps, at least 25 and at most 250.
    """
    # Every epoch ends with validation patches, which must neither be rare nor cost much.
    least = min(steps, FEWEST_PER_EPOCH)
    per_epoch = max(least, min(MOST_PER_EPOCH, steps // EPOCHS_WANTED))
    return max(1, steps // per_epoch), per_epoch


def settle_lengths(bench: Bench, runner: Runner = worker) -> tuple[tuple[int, ...], int]:
    """Return the numbers of steps and the batch of the runs.

    The steps are the user's, or what each time budget allows the slowest arm. The latter is
    measured once per budget and batch.

    Raises:
        AutoregError: an arm cannot be run, or a budget is too small for a step.
    """
    request = bench.request
    file = bench.layout.root / LENGTHS_NAME
    lengths = read_object(file) if file.is_file() else {}
    batch = request.batch
    if not batch:
        batch = int(lengths.setdefault("batch", planned_batch(bench, _networks(bench))))

    steps_of_runs = list(request.steps)
    budgets = lengths.setdefault("budgets", {}) if request.budget_min else {}
    paces: dict[str, float] = {}
    for minutes in request.budget_min:
        name = f"{minutes:g} min at batch {batch}"
        if name not in budgets:
            # The pace of a network is the same for all budgets of one call.
            paces = paces or _measured_paces(bench, batch, runner)
            budgets[name] = _budget(minutes, paces)

        steps = int(budgets[name]["steps"])
        measured = [
            f"{arm} {pace:.3g} s a step" for arm, pace in budgets[name]["seconds_per_step"].items()
        ]
        log.info("%s: %d steps (%s)", name, steps, ", ".join(measured))
        steps_of_runs.append(steps)

    # Nothing depends on the pace if steps are given, but the user learns the time beforehand.
    is_long = max(request.steps, default=0) >= MEASURED_FROM_STEPS
    if is_long and "paces" not in lengths and not (bench.layout.root / RESULTS_NAME).is_file():
        lengths["paces"] = _measured_paces(bench, batch, runner)

    write_json(file, lengths)

    # Whole epochs; two budgets may give the same number.
    whole = set()
    for steps in steps_of_runs:
        epochs, per_epoch = epochs_of(steps)
        whole.add(epochs * per_epoch)
    return tuple(sorted(whole)), batch


def _networks(bench: Bench) -> list[RunKey]:
    """Return one run for each network; twins take the same time."""
    of_network: dict[tuple[str, bool], RunKey] = {}
    for key in runs_of(bench.request, [0], 0):
        of_network.setdefault((key.encoder, key.arm == STOCK), key)
    return list(of_network.values())


def _measured_paces(bench: Bench, batch: int, runner: Runner) -> dict[str, float]:
    """Return the seconds of a training step of every network, by the name of its run."""
    paces = {}
    for key in _networks(bench):
        paces[str(key)] = measure_pace(bench, key, batch, runner)
    return paces


def _budget(minutes: float, paces: Mapping[str, float]) -> dict[str, Any]:
    """Return the steps that the slowest network makes in this many minutes, and all paces.

    Raises:
        AutoregError: that is less than one step.
    """
    slowest = max(paces, key=lambda run: paces[run])
    pace = paces[slowest]
    steps = int(TRAINING_SHARE * minutes * 60 / pace)
    if steps < 1:
        raise AutoregError(
            f"--budget {minutes:g}: a step of {slowest} takes {pace:.1f} s; give more minutes",
            code="benchmark-budget-too-small",
        )

    rounded = {run: round(seconds, 4) for run, seconds in paces.items()}
    return {"steps": steps, "seconds_per_step": rounded}


@dataclass(frozen=True)
class TimeLeft:
    """The time that unfinished trainings will take.

    Attributes:
        num_runs: number of unfinished trainings.
        seconds: duration of all of them.
        has_scoring: prediction and scoring are included, since runs of every network are finished
            and show how long these take.
    """

    num_runs: int
    seconds: float
    has_scoring: bool

    def __str__(self) -> str:
        scoring = "" if self.has_scoring else "; prediction and scoring come on top"
        return f"about {duration(self.seconds)} for {counted(self.num_runs, 'training')}{scoring}"


def time_left(bench: Bench, keys: Sequence[RunKey], num_jobs: int) -> TimeLeft | None:
    """Return the time that the unfinished runs will take; None if a network has no pace yet.

    The time of a step is the one that was measured beforehand, or that of finished runs. The time
    of prediction and scoring is that of finished runs.
    """
    # Encoder -> seconds of a step. Twins take the same time, and stock nnU-Net's encoder is "-".
    lengths_file = bench.layout.root / LENGTHS_NAME
    lengths = read_json(lengths_file) if lengths_file.is_file() else {}
    paces: dict[str, float] = {}
    for budget in lengths.get("budgets", {}).values():
        paces |= _of_encoders(budget["seconds_per_step"])
    paces |= _of_encoders(lengths.get("paces", {}))

    lines = read_results(bench.layout.root / RESULTS_NAME)
    seconds_per_case: dict[str, float] = {}
    for line in lines:
        encoder = line["encoder"]
        if line["seconds_per_step"]:
            paces[encoder] = float(line["seconds_per_step"])
        if line.get("validate_s") and line[DICE]:
            seconds_per_case[encoder] = float(line["validate_s"]) / len(line[DICE])

    done = {key_of(line) for line in lines}
    missing = [key for key in keys if key not in done]
    if any(key.encoder not in paces for key in missing):
        return None

    total = 0.0
    for key in missing:
        num_cases = len(bench.record.scored(key.split))
        scoring = num_cases * seconds_per_case.get(key.encoder, 0.0)
        total += key.steps * paces[key.encoder] + scoring
    has_scoring = all(key.encoder in seconds_per_case for key in missing)
    return TimeLeft(len(missing), total / num_jobs, has_scoring)


def _of_encoders(paces: Mapping[str, float]) -> dict[str, float]:
    """Return encoder -> seconds a step from the names of runs, such as "stock, 5 labels"."""
    found = {}
    for run, seconds in paces.items():
        network = run.partition(",")[0]
        encoder = network.partition("(")[2].rstrip(")") or "-"
        found[encoder] = float(seconds)
    return found


def measure_pace(bench: Bench, key: RunKey, batch: int, runner: Runner) -> float:
    """Return the seconds of a training step of an arm, loading included."""
    network = STOCK if key.arm == STOCK else key.encoder
    folder = bench.layout.root / "pace" / network
    whole_job = job_of(bench, key, batch)
    job = replace(whole_job, num_epochs=1, steps_per_epoch=PACE_STEPS, validate=False)

    log.info("measuring a step of %s", network)
    result = _do(bench, folder, job, runner)
    if not result["seconds_per_step"]:
        raise AutoregError(
            f"the step of {key} could not be measured; see {folder / 'log.txt'}",
            code="benchmark-no-pace",
        )

    # The difference between both is the cost of other work on the machine and of waiting for data.
    pace = float(result["seconds_per_step"])
    log.info(
        "  %.3g s per step (%.3g s of processor time)",
        pace,
        result["processor_s_per_step"] or pace,
    )
    return pace


def job_of(bench: Bench, key: RunKey, batch: int) -> FineTuningJob:
    """Return the training of a run."""
    # The pace is measured before the number of steps is known.
    epochs, per_epoch = epochs_of(max(key.steps, 1))
    folds = read_json(bench.layout.plans / "splits_final.json")
    return FineTuningJob(
        dataset=bench.request.dataset,
        configuration=CONFIGURATION,
        fold=fold_of(folds, fold(bench, key)),
        trainer=trainer_of(key.arm),
        plans=plans_name(key),
        seed=key.seed,
        num_epochs=epochs,
        steps_per_epoch=per_epoch,
        batch=batch,
        device=bench.commands.device,
        threads=bench.commands.threads,
        surface_tolerance_mm=surface_tolerance_mm(bench),
    )


def run_missing(
    bench: Bench,
    keys: Sequence[RunKey],
    num_jobs: int,
    runner: Runner = worker,
) -> list[RunKey]:
    """Do all runs that ``runs.jsonl`` does not hold yet; return those that failed.

    A run that was interrupted leaves a folder without a line, and is repeated.

    Args:
        num_jobs: number of runs at a time.
    """
    file = bench.layout.root / RESULTS_NAME
    done = {key_of(line) for line in read_results(file)}
    missing = [key for key in keys if key not in done]
    num_done = len(keys) - len(missing)
    log.info(
        "%d of %d runs are finished, %d remain, %d at a time",
        num_done,
        len(keys),
        len(missing),
        num_jobs,
    )
    failed: list[RunKey] = []
    lock = threading.Lock()  # of the file of results

    def one(key: RunKey) -> None:
        # Runs that were waiting when the user asked to stop are left for the next time.
        if stop_requested():
            return
        folder = bench.layout.run(key)
        try:
            result = _do(bench, folder, job_of(bench, key, key.batch), runner)
        except AutoregError as error:
            # A run that was ended has not failed.
            if stop_requested():
                return
            failed.append(key)
            log.error("%s FAILED: %s", key, error)
            return

        line = line_of(bench, key, result)
        with lock:
            append_json_line(file, line)

        left = time_left(bench, keys, num_jobs)
        still_to_do = f"; still to do: {left}" if left is not None and left.num_runs else ""
        log.info(
            "%s: Dice %.3f after %d steps in %s%s",
            key,
            mean_dice(line),
            key.steps,
            duration(line["train_s"]),
            still_to_do,
        )

    if num_jobs == 1:
        for key in missing:
            one(key)
    else:
        with ThreadPoolExecutor(num_jobs) as pool:
            try:
                list(pool.map(one, missing))
            except BaseException:
                # The pool waits for its threads, and these for their trainings.
                pool.shutdown(wait=False, cancel_futures=True)
                end_children()
                raise
    return failed


def _do(bench: Bench, folder: Path, job: FineTuningJob, runner: Runner) -> dict[str, Any]:
    """Run a job in a new folder.

    Raises:
        AutoregError: its process failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # The trainer looks for pretrained weights in its own results folder.
    pretrainings = (bench.layout.results / RUNS_FOLDER).resolve()
    (folder / RUNS_FOLDER).symlink_to(pretrainings, target_is_directory=True)
    write_json(folder / JOB_NAME, job)

    exit_code = runner(folder, bench.commands.for_training(folder))
    result_file = folder / RESULT_NAME
    if exit_code or not result_file.is_file():
        log_file = folder / "log.txt"
        raise AutoregError(
            f"exit code {exit_code} ({last_line(log_file)}); see {log_file}",
            code="benchmark-training-failed",
        )
    return read_object(result_file)


def line_of(bench: Bench, key: RunKey, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a finished run: its key, its data, its weights, and its results."""
    # The line holds all that the table needs, so that the table can be made anywhere. Cases and
    # patients have their ids in it, never their names.
    ids = bench.ids
    cases = bench.labelled(key)
    patient_of = bench.record.subjects
    subjects = {}
    for case in bench.record.scored(key.split):
        subjects[ids.of_case(case)] = ids.of_patient(patient_of[case])

    result = dict(result)
    for metric in (DICE, SURFACE):
        if metric in result:
            scores = result[metric]
            result[metric] = {ids.of_case(case): score for case, score in scores.items()}

    _, per_epoch = epochs_of(key.steps)

    return {
        **asdict(key),
        "dataset": public_dataset(bench.request.dataset),
        "num_labelled": len(cases),
        "labelled": sorted(ids.of_case(case) for case in cases),
        "label_unit": bench.record.label_unit,
        "pretraining": pretraining_of(bench, key),
        "steps_per_epoch": per_epoch,
        **result,
        "subjects": subjects,
        "device": bench.commands.device,
        "threads": bench.commands.threads,
        "versions": {name: version(name) for name in ("torch", "nnunetv2", "nnunet-autoreg")},
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def pretraining_of(bench: Bench, key: RunKey) -> dict[str, Any] | None:
    """Return the pretraining of a run's weights and its cost; None for random weights."""
    name = weights_of(key)
    if name is None:
        return None

    folder = bench.layout.pretraining(name)
    card = read_card(folder)
    plan_file = folder / "plan.json"
    batch = None
    if plan_file.is_file():
        batch = int(read_json(plan_file)["optim"]["batch_size"])
    cost = cost_of(bench, name, card.sha256)
    return {
        "name": name,
        "objective": card.objective,
        "encoder": card.encoder,
        "steps": card.num_steps,
        "batch": batch,
        "scans": card.num_scans,
        "sha256": card.sha256,
        **(to_jsonable(cost) if cost is not None else {}),
    }


def cost_of(bench: Bench, name: str, sha256: str) -> Cost | None:
    """Return the cost of a pretraining, which is counted once and then kept in ``costs.json``."""
    file = bench.layout.root / COSTS_NAME
    # Several trainings may end at once, and each of them writes the file.
    with _costs_lock:
        known = read_object(file) if file.is_file() else {}
        if sha256 not in known:
            from nnunet_autoreg.benchmark.cost import pretraining_cost

            log.info("counting the FLOPs of the pretraining '%s'", name)
            known[sha256] = to_jsonable(pretraining_cost(bench.layout.pretraining(name)))
            write_json(file, known)
    found = known[sha256]
    return None if found is None else Cost(**found)
