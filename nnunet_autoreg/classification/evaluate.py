"""Compare the predicted classes of a folder with a table of true classes."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.classification.metrics import evaluate_task, judge
from nnunet_autoreg.classification.predictions import NAME, ClassPredictions, read_predictions
from nnunet_autoreg.classification.table import (
    CASE_COLUMN,
    class_index,
    patients_of,
    read_rows,
)
from nnunet_autoreg.classification.validate import shown
from nnunet_autoreg.downstream.scans import facts_of
from nnunet_autoreg.errors import ClassesError
from nnunet_autoreg.geometry import names_text

FORMAT, VERSION = "nnunet_autoreg.classification_evaluation", 1

log = logging.getLogger(__name__)


def evaluate_folders(
    predictions: Path,
    truth: Path,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return every figure of every task that both tables have.

    Args:
        predictions: ``classes.csv``, or the folder that holds it.
        truth: table of the true classes.
        num_resamples: number of bootstrap resamples; 0 for no intervals.
        seed: random seed of the bootstrap.

    Raises:
        ClassesError: a table is missing (code "classes-no-predictions") or wrong, or no scan or no
            task is in both (codes "classes-no-common-case", "classes-no-common-task"), or the model
            does not have a true class (code "classes-unknown-class").
    """
    file = predictions / NAME if predictions.is_dir() else predictions
    if not file.is_file():
        raise ClassesError(
            f"-p {predictions}: there is no {file}; give the folder that autoreg_classify wrote, "
            "or the folder validation of a trained fold",
            code="classes-no-predictions",
        )
    predicted = read_predictions(file)
    rows = {row[CASE_COLUMN]: row for row in read_rows(truth)}
    common, without_truth, without_prediction = _matched(file, predicted, truth, rows)

    # All tasks get the same resamples of the patients.
    patient_of, rule = patients_of(list(rows.values()))
    patients = [patient_of[case] for case in common]
    tasks: dict[str, Any] = {}
    for number, task in enumerate(predicted.tasks):
        if task.name not in rows[common[0]]:
            log.warning("%s has no column %s: not scored", truth, task.name)
            continue
        indices = []
        for case in common:
            true_class = rows[case][task.name]
            indices.append(class_index(truth, task, case, true_class, source="the model"))
        values_SK = np.stack([predicted.probabilities[case][number] for case in common])
        judged = judge(task, indices, values_SK, patients, num_resamples, seed)
        if judged is None:
            log.warning("no scan has a known %s: not scored", task.name)
            continue
        tasks[task.name] = evaluate_task(judged)

    if not tasks:
        known = ", ".join(task.name for task in predicted.tasks)
        raise ClassesError(
            f"{truth} has no true class of a task of {file} ({known}); its columns must be named "
            "like the tasks",
            code="classes-no-common-task",
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": {"resamples": num_resamples, "seed": seed, "patients": rule},
        # Without paths, which may hold names of patients.
        "inputs": {"predictions": facts_of([file])[0], "truth": facts_of([truth])[0]},
        "scans": {
            "number": len(common),
            "without_truth": without_truth,
            "without_prediction": without_prediction,
        },
        "tasks": tasks,
    }


def _matched(
    file: Path,
    predicted: ClassPredictions,
    truth: Path,
    rows: Mapping[str, Mapping[str, str]],
) -> tuple[list[str], list[str], list[str]]:
    """Return the scans in both tables, those that lack a true class, and those not predicted."""
    common = [case for case in predicted.probabilities if case in rows]
    if not common:
        raise ClassesError(
            f"no scan of {file} ({names_text(predicted.probabilities)}) has a row in {truth} "
            f"({names_text(rows)}): their names must agree",
            code="classes-no-common-case",
        )

    without_truth = [case for case in predicted.probabilities if case not in rows]
    without_prediction = [case for case in rows if case not in predicted.probabilities]
    faults = {
        "have predictions and no true class": without_truth,
        "have true classes and no prediction": without_prediction,
    }
    for fault, names in faults.items():
        if names:
            log.warning("%d scans %s (%s): left out", len(names), fault, names_text(names))
    return common, without_truth, without_prediction


def lines_of(results: Mapping[str, Any]) -> list[str]:
    """Return the lines for the terminal."""
    num_scans = results["scans"]["number"]
    lines = [f"{num_scans} scans, {results['settings']['patients']}"]
    for name, scores in results["tasks"].items():
        lines.append(f"{name}, {scores['cases']} cases: {shown(scores)}")
    return lines
