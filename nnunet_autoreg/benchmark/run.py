"""The trainings of a benchmark, one process each. Trainings that are finished are not repeated."""

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_autoreg.benchmark.commands import last_line
from nnunet_autoreg.benchmark.prepare import Bench, fold, planned_batch, surface_tolerance_mm
from nnunet_autoreg.benchmark.protocol import (
    CONFIGURATION,
    STOCK,
    TRAINERS,
    fold_of,
    plans_name,
    runs_of,
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

log = logging.getLogger(__name__)

LENGTHS_NAME, COSTS_NAME = "lengths.json", "costs.json"
_costs_lock = threading.Lock()
PACE_STEPS = 20
TRAINING_SHARE = 0.9
"""Of the budget; the rest is left for nnU-Net's look at validation patches after every epoch."""
FEWEST_PER_EPOCH, MOST_PER_EPOCH, EPOCHS_WANTED = 25, 250, 40

Runner = Callable[[Path, Mapping[str, str]], int]
"""(job's folder, environment) -> exit code of the training's process."""


def worker(folder: Path, environment: Mapping[str, str]) -> int:
    """Run the job in ``folder`` in a process of its own, which ends with this one."""
    line = [sys.executable, "-m", "nnunet_autoreg.benchmark.worker", str(folder)]
    with (folder / "log.txt").open("w", encoding="utf-8") as handle:
        return run_guarded(line, environment, handle)


def epochs_of(steps: int) -> tuple[int, int]:
    """Return the number of epochs and of steps in each, together at most ``steps``.

    These are about 40 epochs of 25 to 250 steps.
    """
    # Every epoch ends with a look at validation patches, which must neither be rare nor cost much.
    least = min(steps, FEWEST_PER_EPOCH)
    per_epoch = max(least, min(MOST_PER_EPOCH, steps // EPOCHS_WANTED))
    return max(1, steps // per_epoch), per_epoch


def settle_length(bench: Bench, runner: Runner = worker) -> tuple[int, int]:
    """Return steps and batch of all runs.

    They are the user's, or what the time budget allows the slowest arm. The latter is measured once
    per budget and batch.

    Raises:
        AutoregError: an arm cannot be run, or the budget is too small for a step.
    """
    request, file = bench.request, bench.layout.root / LENGTHS_NAME
    lengths = read_object(file) if file.is_file() else {}
    keys = list(runs_of(request, 0, 0))
    batch = request.batch or lengths.setdefault("batch", planned_batch(bench, keys))
    steps = request.steps

    if steps is None:
        assert request.budget_min is not None
        budgets = lengths.setdefault("budgets", {})
        name = f"{request.budget_min:g} min at batch {batch}"

        if name not in budgets:
            paces = {}
            # One run for each network: twins take the same time.
            of_network: dict[tuple[str, bool], RunKey] = {}
            for key in keys:
                of_network.setdefault((key.encoder, key.arm == STOCK), key)
            for key in of_network.values():
                paces[str(key)] = measure_pace(bench, key, batch, runner)

            slowest = max(paces, key=lambda arm: paces[arm])
            steps = int(TRAINING_SHARE * request.budget_min * 60 / paces[slowest])
            if steps < 1:
                raise AutoregError(
                    f"--budget {request.budget_min:g}: a step of {slowest} takes "
                    f"{paces[slowest]:.1f} s; give more minutes",
                    code="benchmark-budget-too-small",
                )
            budgets[name] = {
                "steps": steps,
                "seconds_per_step": {arm: round(pace, 4) for arm, pace in paces.items()},
            }

        steps, paces = int(budgets[name]["steps"]), budgets[name]["seconds_per_step"]
        measured = ", ".join(f"{arm} {pace:.3g} s a step" for arm, pace in paces.items())
        log.info("%s: %d steps (%s)", name, steps, measured)

    write_json(file, lengths)
    epochs, per_epoch = epochs_of(steps)
    return epochs * per_epoch, int(batch)


def hours_of(bench: Bench, keys: Sequence[RunKey], num_jobs: int) -> float | None:
    """Return the hours that unfinished runs will train.

    The time of a step is what was measured for the budget, or what finished runs took. None where
    a network has neither.
    """
    root = bench.layout.root
    file = root / LENGTHS_NAME
    lengths = read_json(file) if file.is_file() else {}

    # Twins take the same time, so that the encoder decides; stock nnU-Net has "-".
    paces: dict[str, float] = {}
    for budget in lengths.get("budgets", {}).values():
        for run, seconds in budget["seconds_per_step"].items():
            network = run.partition(",")[0]
            encoder = network.partition("(")[2].rstrip(")") or "-"
            paces[encoder] = float(seconds)
    lines = read_results(root / RESULTS_NAME)
    for line in lines:
        if line["seconds_per_step"]:
            paces[line["encoder"]] = float(line["seconds_per_step"])

    done = {key_of(line) for line in lines}
    missing = [key for key in keys if key not in done]
    if any(key.encoder not in paces for key in missing):
        return None
    return sum(key.steps * paces[key.encoder] for key in missing) / num_jobs / 3600


def _one_of_each(keys: Sequence[RunKey]) -> list[RunKey]:
    """Return one run for each network; twins take the same time."""
    found: dict[tuple[str, bool], RunKey] = {}
    for key in keys:
        found.setdefault((key.encoder, key.arm == STOCK), key)
    return list(found.values())


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

    # The difference between both is what other work on the machine, or waiting for data, costs.
    pace = float(result["seconds_per_step"])
    log.info(
        "  %.3g s a step, of which %.3g s on a processor",
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
        trainer=TRAINERS[key.arm],
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
    bench: Bench, keys: Sequence[RunKey], num_jobs: int, runner: Runner = worker
) -> list[RunKey]:
    """Do all runs that ``runs.jsonl`` does not hold yet; return those that failed.

    A run that was interrupted leaves a folder without a line, and is repeated.

    Args:
        num_jobs: how many run at a time.
    """
    file = bench.layout.root / RESULTS_NAME
    done = {key_of(line) for line in read_results(file)}
    missing = [key for key in keys if key not in done]
    log.info(
        "%d of %d runs are finished, %d remain, %d at a time",
        len(keys) - len(missing),
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

        log.info(
            "%s: Dice %.3f after %d steps in %.0f s",
            key,
            mean_dice(line),
            key.steps,
            line["train_s"],
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
    """Run a job in a fresh folder of its own.

    Raises:
        AutoregError: its process failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # The trainer looks for pretrained weights in its own results folder.
    pretrainings = (bench.layout.results / RUNS_FOLDER).resolve()
    (folder / RUNS_FOLDER).symlink_to(pretrainings, target_is_directory=True)
    write_json(folder / JOB_NAME, job)

    code = runner(folder, bench.commands.for_training(folder))
    if code or not (folder / RESULT_NAME).is_file():
        raise AutoregError(
            f"exit code {code} ({last_line(folder / 'log.txt')}); see {folder / 'log.txt'}",
            code="benchmark-training-failed",
        )

    return read_object(folder / RESULT_NAME)


def line_of(bench: Bench, key: RunKey, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a finished run: its key, its data, its weights, and its results."""
    ids = bench.ids
    # The line holds all that the table needs, so that it can be made anywhere.
    cases = bench.labelled(key)
    scored = bench.record.division.scored(key.split)
    patient_of = bench.record.subjects
    subjects = {ids.of_case(case): ids.of_patient(patient_of[case]) for case in scored}
    _, per_epoch = epochs_of(key.steps)

    # Scores come by the names of the cases, which the line must not have.
    result = dict(result)
    for name in (DICE, SURFACE):
        if name in result:
            scores = result[name]
            result[name] = {ids.of_case(case): score for case, score in scores.items()}

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
    plan = folder / "plan.json"
    batch = int(read_json(plan)["optim"]["batch_size"]) if plan.is_file() else None
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

            log.info("counting the arithmetic of the pretraining '%s'", name)
            known[sha256] = to_jsonable(pretraining_cost(bench.layout.pretraining(name)))
            write_json(file, known)
    found = known[sha256]
    return None if found is None else Cost(**found)
