"""Classify whole cases of a fold, and score them, with the baselines beside them."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_autoreg.classification.baselines import (
    MAJORITY,
    PROBE,
    SIZE,
    predict_baselines,
    score_baselines,
    size_features,
)
from nnunet_autoreg.classification.metrics import auc, evaluate_task, judge
from nnunet_autoreg.classification.net import Classifier
from nnunet_autoreg.classification.plan import ClassificationPlan
from nnunet_autoreg.classification.predict import probabilities_of
from nnunet_autoreg.classification.predictions import NAME, write_predictions
from nnunet_autoreg.classification.table import TABLE_NAME, ClassTable, public_table, read_table
from nnunet_autoreg.downstream.tiles import is_smaller
from nnunet_autoreg.geometry import Size, as_spacing
from nnunet_autoreg.records import write_json, write_text

SUMMARY = Path("validation") / "summary.json"
"""nnU-Net's own name, so that nnUNetv2_export_model_to_zip includes the file."""
BASELINES = Path("validation") / "baselines.json"
FORMAT, VERSION = "nnunet_autoreg.classification_validation", 1
NAMES_OF_BASELINES = {
    MAJORITY: "majority class",
    SIZE: "size of the labels only",
    PROBE: "linear probe of the frozen encoder",
}
SHOWN = ("auc", "balanced_accuracy", "f1")

log = logging.getLogger(__name__)


def kept_table(preprocessed: Path, dataset: Mapping[str, Any], cases: Sequence[str]) -> ClassTable:
    """Return the checked classes of a preprocessed dataset.

    The table of the raw dataset is copied beside the preprocessed cases, because the raw dataset
    may be gone when training is continued elsewhere. In the copy, patients have numbers.

    Args:
        preprocessed: folder of the preprocessed dataset.
        dataset: parsed dataset.json.
        cases: all cases of the dataset.

    Raises:
        ClassesError: there is no table, or it contradicts the cases.
    """
    copy = preprocessed / TABLE_NAME
    raw = Path(os.environ.get("nnUNet_raw", "")) / preprocessed.name / TABLE_NAME  # noqa: SIM112

    # The copy is read only if the raw dataset is missing, because classes may be corrected there.
    if not raw.is_file() and copy.is_file():
        return read_table(copy, dataset, cases)
    table = read_table(raw, dataset, cases)
    text = public_table(table)
    if not copy.is_file() or copy.read_bytes() != text.encode():
        write_text(copy, text)
    return table


def small_cases(stock: Any, cases: Sequence[str], patch_size: Size) -> list[str]:
    """Return the preprocessed cases that are smaller than the patch along some axis.

    Args:
        stock: nnU-Net's dataset of the preprocessed cases.
    """
    found = []
    for case in cases:
        data, _, _, _ = stock.load_case(case)
        if is_smaller(data.shape[1:], patch_size):
            found.append(case)
    return found


def features_of_baselines(
    network: Classifier,
    stock: Any,
    cases: Sequence[str],
    spacing_mm: Sequence[float],
    label_values: Sequence[int],
    patch_size: Size,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the sizes of the labels and the frozen encoder's features: baseline -> case -> values.

    Args:
        network: classifier in evaluation mode.
        stock: nnU-Net's dataset of the preprocessed cases.
        spacing_mm: spacing (z, y, x) of the preprocessed cases.
        label_values: label values of the foreground.
        autocast: makes the context of a forward pass.
    """
    sizes: dict[str, NDArray[Any]] = {}
    features: dict[str, NDArray[Any]] = {}
    spacing = as_spacing(spacing_mm)
    for case in cases:
        data, seg, _, _ = stock.load_case(case)
        sizes[case] = size_features(np.asarray(seg[0]), spacing, label_values)
        image_CZYX = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
        with autocast():
            pooled_V = network.pooled_over_scan(image_CZYX, patch_size, device)
        features[case] = pooled_V.float().cpu().numpy()
    return {SIZE: sizes, PROBE: features}


def write_baselines(
    folder: Path,
    table: ClassTable,
    train: Sequence[str],
    validation: Sequence[str],
    features: Mapping[str, Mapping[str, NDArray[Any]]],
) -> dict[str, dict[str, Any]]:
    """Fit, score and write the baselines of a fold, and return baseline -> task -> scores.

    Their predictions are written as well, in the form of ``classes.csv``, so that those of several
    folds can be scored together.

    Args:
        folder: folder of the fold.
        train, validation: cases of the fold.
        features: as ``features_of_baselines`` returns them.
    """
    predicted = predict_baselines(table, train, validation, features)
    file = folder / BASELINES
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, of_tasks in predicted.items():
        of_cases = {}
        for row, case in enumerate(validation):
            of_cases[case] = [values_SK[row] for values_SK in of_tasks]
        write_predictions(file.with_name(f"baseline_{name}.csv"), table.tasks, of_cases)

    found = score_baselines(table, validation, predicted)
    write_json(file, {"format": FORMAT, "version": VERSION, "baselines": found})
    return found


def classify_cases(
    network: Classifier,
    stock: Any,
    cases: Sequence[str],
    patch_size: Size,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, list[NDArray[np.float64]]]:
    """Return case -> the probabilities (K,) of every task.

    Args:
        stock: nnU-Net's dataset of the preprocessed cases.
        autocast: makes the context of a forward pass.
    """
    found = {}
    for case in cases:
        data, _, _, _ = stock.load_case(case)
        image_CZYX = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
        found[case] = probabilities_of(network, image_CZYX, patch_size, device, autocast())
    return found


def write_validation(
    folder: Path,
    table: ClassTable,
    plan: ClassificationPlan,
    probabilities: Mapping[str, Sequence[NDArray[np.float64]]],
    baselines: Mapping[str, Mapping[str, Any]] | None,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``classes.csv`` and ``summary.json`` of a fold, and return task -> scores.

    Args:
        folder: folder of the fold.
        probabilities: case -> one array (K,) for each task.
        baselines: as ``write_baselines`` returns them; None if there are none.
        model: description of the model for the summary.
    """
    cases = sorted(probabilities)
    patients = [table.patient_of[case] for case in cases]
    tasks: dict[str, Any] = {}
    for number, task in enumerate(plan.tasks):
        truth = [table.labels[case][number] for case in cases]
        values_SK = np.stack([probabilities[case][number] for case in cases])
        judged = judge(task, truth, values_SK, patients)
        tasks[task.name] = {"cases": 0} if judged is None else evaluate_task(judged)

    file = folder / SUMMARY
    file.parent.mkdir(parents=True, exist_ok=True)
    in_order = {case: probabilities[case] for case in cases}
    write_predictions(file.parent / NAME, plan.tasks, in_order)
    summary = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "tasks": tasks,
        "baselines": baselines,
    }
    write_json(file, summary)
    return tasks


def score_lines(
    tasks: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    """Return one line per task for the log, and one per baseline below it."""
    lines = []
    for name, scores in tasks.items():
        lines.append(f"{name}, {scores['cases']} cases: {shown(scores)}")
        for baseline, of_tasks in (baselines or {}).items():
            lines.append(f"  {NAMES_OF_BASELINES[baseline]}: {shown(of_tasks[name])}")
    return lines


def shown(scores: Mapping[str, Any]) -> str:
    """Return the main scores with their intervals as text."""
    parts = []
    for name in SHOWN:
        found = scores.get(name)
        if not found or found["value"] is None:
            continue
        text = f"{name.replace('_', ' ')} {found['value']:.3f}"
        if found["ci95"]:
            low, high = found["ci95"]
            text += f" ({low:.3f} to {high:.3f})"
        parts.append(text)
    return ", ".join(parts) or "nothing to score"


def patch_scores(
    plan: ClassificationPlan,
    table: ClassTable,
    outputs: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Return the AUC of every task over the validation patches of an epoch.

    The probabilities of patches of one case are averaged. The AUC is 0.5, which is chance, if only
    one class was drawn.

    Args:
        outputs: each with ``cases``, and ``probabilities``: one array (B, K) for each task.
    """
    sums: dict[str, list[NDArray[np.float64]]] = {}
    for output in outputs:
        for row, case in enumerate(output["cases"]):
            values = [of_task[row] for of_task in output["probabilities"]]  # each (K,)
            # Several patches may be of one case.
            if case in sums:
                values = [a + b for a, b in zip(sums[case], values, strict=True)]
            sums[case] = values

    cases = sorted(sums)
    found = []
    for number, task in enumerate(plan.tasks):
        sums_SK = np.stack([sums[case][number] for case in cases])
        values_SK = sums_SK / sums_SK.sum(1, keepdims=True)
        truth = [table.labels[case][number] for case in cases]
        judged = judge(task, truth, values_SK, cases, num_resamples=0)
        value = float("nan") if judged is None else float(auc(judged)[0])
        found.append(0.5 if np.isnan(value) else value)
    return found
