"""Write and read ``classes.csv``: the predicted classes and probabilities of scans. Torch-free.

There is a row per scan. Its columns are ``case``, then for every task a column of that name with
the predicted class, and the columns ``task:class`` with the probability of each class.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.classification.table import (
    CASE_COLUMN,
    MOST_CLASSES,
    ClassificationTask,
    read_rows,
)
from nnunet_autoreg.errors import ClassesError
from nnunet_autoreg.records import to_cell, write_text

NAME = "classes.csv"


@dataclass(frozen=True)
class ClassPredictions:
    """Hold the probabilities of several scans.

    Attributes:
        tasks: tasks with their classes. The file does not say whether the classes have an order.
        probabilities: scan -> one array (K,) for each task.
    """

    tasks: tuple[ClassificationTask, ...]
    probabilities: dict[str, list[NDArray[np.float64]]]


def write_predictions(
    file: Path,
    tasks: Sequence[ClassificationTask],
    probabilities: Mapping[str, Sequence[NDArray[np.floating]]],
) -> None:
    """Write the table, whole or not at all.

    Args:
        probabilities: scan -> one array (K,) for each task.
    """
    header = [CASE_COLUMN]
    for task in tasks:
        header.append(task.name)
        header += [f"{task.name}:{kind}" for kind in task.classes]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([to_cell(cell) for cell in header])
    for case, of_tasks in probabilities.items():
        row = [to_cell(case)]
        for task, values_K in zip(tasks, of_tasks, strict=True):
            most_probable = int(np.argmax(values_K))
            row.append(to_cell(task.classes[most_probable]))
            row += [f"{value:.6f}" for value in values_K]
        writer.writerow(row)
    write_text(file, lines.getvalue())


def read_predictions(file: Path) -> ClassPredictions:
    """Read the table.

    Raises:
        ClassesError: the file is missing, it is not such a table (code
            "classes-predictions-format"), or the probabilities of a scan are impossible (code
            "classes-probability").
    """
    rows = read_rows(file)
    # A task is a column that has columns of probabilities beside it.
    columns = [name for name in rows[0] if name != CASE_COLUMN]
    tasks = []
    for name in columns:
        prefix = f"{name}:"
        classes = [c.removeprefix(prefix) for c in columns if c.startswith(prefix)]
        if len(classes) >= 2:
            tasks.append(ClassificationTask(name, tuple(classes)))
    if not tasks:
        raise ClassesError(
            f"{file} has no columns like 'task' with 'task:class'; give the folder that "
            "autoreg_classify wrote",
            code="classes-predictions-format",
        )

    probabilities = {}
    for row in rows:
        of_tasks = []
        for task in tasks:
            cells = [row[f"{task.name}:{kind}"] for kind in task.classes]
            of_tasks.append(_probabilities(file, row[CASE_COLUMN], task, cells))
        probabilities[row[CASE_COLUMN]] = of_tasks
    return ClassPredictions(tuple(tasks), probabilities)


def are_probabilities(values_K: NDArray[np.float64]) -> bool:
    """Return whether numbers are not negative and have the sum 1, up to rounding."""
    # Six decimals of each value are written.
    rounding = 1e-6 * max(MOST_CLASSES, len(values_K))
    are_positive = bool((values_K >= 0).all())
    return are_positive and bool(abs(values_K.sum() - 1) <= rounding)


def _probabilities(
    file: Path,
    case: str,
    task: ClassificationTask,
    cells: Sequence[str],
) -> NDArray[np.float64]:
    """Return the probabilities (K,) of a task that are written in the cells of a row."""
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        values = np.full(len(cells), np.nan)
    if not are_probabilities(values):
        raise ClassesError(
            f"{file}: the probabilities of {task.name} for {case} ({', '.join(cells)}) are not "
            "numbers from 0 to 1 with the sum 1; classify that scan again",
            code="classes-probability",
        )
    return values
