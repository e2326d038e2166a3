"""One training in a separate process, by nnU-Net's own trainer, loader and validation.

Its command is ``python -m nnunet_autoreg.benchmark.worker JOB``. The job's folder holds
``job.json``; ``result.json`` is written last. nnU-Net's folders are in the environment.
"""

import ast
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.statistics import SURFACE
from nnunet_autoreg.benchmark.surface import surface_dice
from nnunet_autoreg.nnunet_api import read_scan
from nnunet_autoreg.records import from_jsonable, read_json, write_json

JOB_NAME, RESULT_NAME = "job.json", "result.json"
NUM_WARM_STEPS = 2
VAL_STEPS = 8


@dataclass(frozen=True)
class FineTuningJob:
    """A training.

    Attributes:
        dataset, configuration, fold, trainer, plans: as of ``nnUNetv2_train``.
        num_epochs, steps_per_epoch, batch: length; the same for all arms.
        validate: predict and score the fold's validation cases afterwards; off if only the duration
            of a step is measured.
        threads: number of threads of torch on a CPU.
        surface_tolerance_mm: tolerance of the surface Dice of the validation; None to leave it out.
    """

    dataset: str
    configuration: str
    fold: int
    trainer: str
    plans: str
    seed: int
    num_epochs: int
    steps_per_epoch: int
    batch: int
    device: str
    threads: int
    validate: bool = True
    surface_tolerance_mm: float | None = None


class StepTimer:
    """Records when each step of a trainer begins, by the clock and by processor time."""

    def __init__(self, trainer: Any):
        self.times: list[float] = []
        self.processor_times: list[float] = []
        step = trainer.train_step

        def timed(batch: dict[str, Any]) -> dict[str, Any]:
            self.times.append(time.monotonic())
            self.processor_times.append(time.process_time())
            done: dict[str, Any] = step(batch)
            return done

        trainer.train_step = timed

    def seconds_per_step(self, steps_per_epoch: int) -> float:
        """Return the median time from the beginning of a step to that of the next, with loading.

        The first steps, and pauses between epochs, are left out.
        """
        return _median_gap(self.times, steps_per_epoch)

    def processor_seconds_per_step(self, steps_per_epoch: int) -> float:
        """Return the same in processor time, which other work on the machine does not lengthen."""
        return _median_gap(self.processor_times, steps_per_epoch)


def _median_gap(times: list[float], steps_per_epoch: int) -> float:
    gaps = []
    for step, (begin, end) in enumerate(pairwise(times), start=1):
        # After the last step of every epoch the trainer validates.
        is_last_of_epoch = step % steps_per_epoch == 0
        if step > NUM_WARM_STEPS and not is_last_of_epoch:
            gaps.append(end - begin)
    return statistics.median(gaps) if gaps else float("nan")


def train(job: FineTuningJob) -> dict[str, Any]:
    """Train, validate if the job says so, and return the results as plain values."""
    trainer = prepare(job)
    timer = StepTimer(trainer)
    start = time.monotonic()
    trainer.run_training()
    train_s = time.monotonic() - start

    step_s = timer.seconds_per_step(job.steps_per_epoch)
    processor_s = timer.processor_seconds_per_step(job.steps_per_epoch)
    curve = trainer.logger.get_value("mean_fg_dice", step=None)
    result: dict[str, Any] = {
        "train_s": round(train_s, 1),
        "seconds_per_step": none_for_nan(step_s),
        "processor_s_per_step": none_for_nan(processor_s),
        "curve": [none_for_nan(float(value)) for value in curve],
        "patch": [int(side) for side in trainer.configuration_manager.patch_size],
        "num_parameters": sum(tensor.numel() for tensor in trainer.network.parameters()),
    }

    if job.validate:
        # One pass per tile in every arm: mirroring would cost eight times as much.
        trainer.inference_allowed_mirroring_axes = None
        start = time.monotonic()
        trainer.perform_actual_validation()
        result["validate_s"] = round(time.monotonic() - start, 1)

        ending = str(trainer.dataset_json["file_ending"])
        summary = Path(trainer.output_folder) / "validation" / "summary.json"
        result["dice_per_case"] = read_dice(summary, ending)
        if job.surface_tolerance_mm is not None:
            result["surface_tolerance_mm"] = job.surface_tolerance_mm
            result[SURFACE] = surface_dice_of_summary(summary, ending, job.surface_tolerance_mm)
    return result


def prepare(job: FineTuningJob) -> Any:
    """Return nnU-Net's trainer of a job, with its length and batch."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    # nnU-Net's loaders and augmentation draw from all three.
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    if job.device == "cpu":
        torch.set_num_threads(job.threads)

    trainer = get_trainer_from_args(
        job.dataset,
        job.configuration,
        job.fold,
        job.trainer,
        job.plans,
        device=torch.device(job.device),
    )

    # The plans and the trainer's class decide everything but the length and the batch.
    trainer.num_epochs = job.num_epochs
    trainer.num_iterations_per_epoch = job.steps_per_epoch
    trainer.num_val_iterations_per_epoch = VAL_STEPS if job.validate else 1
    trainer.configuration_manager.configuration["batch_size"] = job.batch
    trainer.disable_checkpointing = True  # a run that was interrupted is repeated
    return trainer


def read_dice(summary: Path, ending: str) -> dict[str, dict[str, float | None]]:
    """Return case -> label -> Dice of nnU-Net's summary.

    None means that a label is in neither of the two label maps.
    """
    found = {}
    for case in read_json(summary)["metric_per_case"]:
        dice_of_label = {}
        for label, values in case["metrics"].items():
            dice_of_label[str(label)] = none_for_nan(float(values["Dice"]))

        name = Path(case["reference_file"]).name
        found[name.removesuffix(ending)] = dice_of_label
    return found


def surface_dice_of_summary(
    summary: Path,
    ending: str,
    tolerance_mm: float,
) -> dict[str, dict[str, float | None]]:
    """Return case -> label -> surface Dice of the files that nnU-Net's summary names.

    None means that a label is neither in the truth nor predicted. A region counts as one structure.
    """
    found = {}
    for case in read_json(summary)["metric_per_case"]:
        reference_file = Path(case["reference_file"])
        truth = read_scan(reference_file)
        prediction = read_scan(Path(case["prediction_file"]))

        scores = {}
        for structure in case["metrics"]:
            # A structure is a label such as "1", or a region such as "(1, 2)".
            labels = np.atleast_1d(ast.literal_eval(structure))
            in_truth = np.isin(truth.array_CZYX[0], labels)  # (Z, Y, X)
            in_prediction = np.isin(prediction.array_CZYX[0], labels)
            score = surface_dice(in_truth, in_prediction, truth.spacing_mm, tolerance_mm)
            scores[str(structure)] = none_for_nan(score)
        found[reference_file.name.removesuffix(ending)] = scores
    return found


def none_for_nan(value: float) -> float | None:
    """Return a rounded value, or None for NaN, which JSON does not know."""
    return round(value, 5) if math.isfinite(value) else None


def main(folder: Path) -> None:
    """Do the job in ``folder``."""
    job_file = folder / JOB_NAME
    job = from_jsonable(FineTuningJob, read_json(job_file), str(job_file))
    write_json(folder / RESULT_NAME, train(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
