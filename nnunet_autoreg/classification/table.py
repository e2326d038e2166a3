"""Read ``classesTr.csv``: the class of every case in every task, and the patients. Torch-free.

There is a row per case, with the column ``case``, one column per task, and optionally ``patient``.
An empty cell is a class that is not known. ``dataset.json`` may name the tasks and their classes::

    "classification": {"diagnosis": ["NOR", "MINF", "DCM"],
                       "texture": {"classes": ["1", "2", "3"], "ordinal": true}}

Otherwise, every column with at most 20 different values is a task.
"""

import csv
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_autoreg.downstream.patients import PATIENT_COLUMNS, subjects_by_name
from nnunet_autoreg.errors import ClassesError, did_you_mean
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.machine import is_whole_number
from nnunet_autoreg.records import from_cell, to_cell

TABLE_NAME = "classesTr.csv"
KEY = "classification"
"""Key of ``dataset.json`` with the tasks."""
CASE_COLUMN = "case"
MOST_CLASSES = 20
MOST_GRADE_DIGITS = 18
"""A whole number with more digits is not a grade."""
UNKNOWN = -1
"""Index of a class that is not known."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassificationTask:
    """Hold one task: a question about scans, and the classes that answer it.

    Attributes:
        name: name of its column.
        classes: names, in the order of the network's scores.
        ordinal: whether the classes have an order, such as grades.
    """

    name: str
    classes: tuple[str, ...]
    ordinal: bool = False


@dataclass(frozen=True)
class ClassTable:
    """Hold the classes of all cases.

    Attributes:
        tasks: all tasks, in the order of the columns.
        labels: case -> index of its class in each task; ``UNKNOWN`` if the cell is empty.
        patient_of: case -> patient.
        patient_rule: a sentence for the user about how the patients were found.
        ignored: column that is not a task -> the reason.
    """

    tasks: tuple[ClassificationTask, ...]
    labels: dict[str, tuple[int, ...]]
    patient_of: dict[str, str]
    patient_rule: str
    ignored: dict[str, str]

    def counts(self, task_index: int, cases: Sequence[str] | None = None) -> list[int]:
        """Return the number of cases of each class of a task; of all cases if none are given."""
        chosen = self.labels if cases is None else cases
        found = [self.labels[case][task_index] for case in chosen]
        num_classes = len(self.tasks[task_index].classes)
        return [found.count(index) for index in range(num_classes)]


def read_table(file: Path, dataset: Mapping[str, Any], cases: Sequence[str]) -> ClassTable:
    """Return the checked classes of a dataset's cases.

    Args:
        file: ``classesTr.csv``.
        dataset: parsed dataset.json.
        cases: all cases of the dataset.

    Raises:
        ClassesError: the file is missing, damaged, or contradicts the dataset, or a task cannot be
            learned.
    """
    rows = read_rows(file)
    names = [row[CASE_COLUMN] for row in rows]
    _check_cases(file, names, cases)

    # Column -> case -> cell.
    values: dict[str, dict[str, str]] = {}
    for column in rows[0]:
        if column not in (CASE_COLUMN, *PATIENT_COLUMNS):
            values[column] = {row[CASE_COLUMN]: row[column] for row in rows}
    tasks, ignored = _tasks(file, values, dataset.get(KEY))

    labels = {}
    for case in cases:
        indices = [class_index(file, task, case, values[task.name][case]) for task in tasks]
        labels[case] = tuple(indices)
    patient_of, rule = patients_of(rows)
    table = ClassTable(tuple(tasks), labels, patient_of, rule, ignored)
    _check_classes(file, table)
    return table


def public_table(table: ClassTable) -> str:
    """Return a table as a file of the same form, with a number for each patient.

    Columns that are not tasks are left out: like the patients' column, they may hold names.
    """
    number_of: dict[str, int] = {}
    for patient in table.patient_of.values():
        number_of.setdefault(patient, len(number_of) + 1)

    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    header = [CASE_COLUMN, PATIENT_COLUMNS[0], *(task.name for task in table.tasks)]
    writer.writerow([to_cell(name) for name in header])
    for case, labels in table.labels.items():
        row = [to_cell(case), f"patient-{number_of[table.patient_of[case]]:04d}"]
        for task, label in zip(table.tasks, labels, strict=True):
            row.append("" if label == UNKNOWN else to_cell(task.classes[label]))
        writer.writerow(row)
    return lines.getvalue()


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a table of cases; names and values without blanks around them.

    Raises:
        ClassesError: there is no such file (code "classes-no-file"), it is not a table (code
            "classes-unreadable"), it has no column ``case`` (code "classes-no-case-column"), no
            row (code "classes-no-row"), two columns of one name (code "classes-duplicate-column"),
            or two rows for one case (code "classes-duplicate-row").
    """
    if not file.is_file():
        raise ClassesError(
            f"{file} is not an existing file; write a table with the columns {CASE_COLUMN} and "
            f"one per task, such as '{CASE_COLUMN},diagnosis'",
            code="classes-no-file",
        )
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            read = list(reader)
            columns = [_text_of(name) for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClassesError(
            f"{file} cannot be read as a table ({error}); save it as CSV with commas, in UTF-8",
            code="classes-unreadable",
        ) from error

    # Of two columns of one name, only the last would be read.
    counts = Counter(columns)
    doubled = sorted(name for name, count in counts.items() if count > 1)
    if doubled:
        raise ClassesError(
            f"{file} has the column '{doubled[0]}' {counts[doubled[0]]} times; rename or remove "
            "all but one",
            code="classes-duplicate-column",
        )

    rows = []
    for number, cells in enumerate(read, start=2):
        # The key None holds cells without a column, and the value None marks missing cells.
        if None in cells or None in cells.values():
            raise ClassesError(
                f"{file}: line {number} has more or fewer cells than the first line; repair it",
                code="classes-unreadable",
            )
        rows.append({_text_of(name): _text_of(value) for name, value in cells.items()})

    if CASE_COLUMN not in columns:
        raise ClassesError(
            f"{file} has no column '{CASE_COLUMN}' (found: {', '.join(columns) or 'nothing'}); its "
            "first line has to name the columns",
            code="classes-no-case-column",
        )
    if not rows:
        raise ClassesError(
            f"{file} has no row below its first line; add a row per case",
            code="classes-no-row",
        )

    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        first = seen.setdefault(row[CASE_COLUMN], number)
        if first != number:
            raise ClassesError(
                f"{file}: case {row[CASE_COLUMN]} has two rows (lines {first} and {number}); "
                "remove one",
                code="classes-duplicate-row",
            )
    return rows


def _text_of(cell: Any) -> str:
    """Return the text that ``to_cell`` wrote into a cell, without blanks around it."""
    return from_cell(str(cell).strip())


def _check_cases(file: Path, named: Sequence[str], cases: Sequence[str]) -> None:
    """Refuse cases without a row and rows without a case."""
    missing = sorted(set(cases) - set(named), key=natural_key)
    if missing:
        raise ClassesError(
            f"{file} has no row for {len(missing)} of {len(cases)} cases ({names_text(missing)}); "
            "add a row for each, with empty cells where the class is not known",
            code="classes-case-without-row",
        )
    surplus = sorted(set(named) - set(cases), key=natural_key)
    if surplus:
        raise ClassesError(
            f"{file} has rows for {len(surplus)} cases that the dataset does not have "
            f"({names_text(surplus)}); correct their names, or remove the rows",
            code="classes-row-without-case",
        )


def _tasks(
    file: Path,
    values: Mapping[str, Mapping[str, str]],
    described: Any,
) -> tuple[list[ClassificationTask], dict[str, str]]:
    """Return the tasks, and for each column that is not a task the reason.

    Args:
        values: column -> case -> cell.
        described: the tasks in dataset.json; None if it does not name them.
    """
    if described is not None:
        tasks = read_tasks(described)
        for task in tasks:
            if task.name not in values:
                raise ClassesError(
                    f"{file} has no column '{task.name}', which dataset.json names as a task; "
                    f"{did_you_mean(task.name, values)}",
                    code="classes-no-column",
                )
        named = {task.name for task in tasks}
        ignored = {name: "dataset.json does not name it" for name in values if name not in named}
        return tasks, ignored

    tasks = []
    ignored = {}
    for name, of_case in values.items():
        different = sorted(set(of_case.values()) - {""}, key=natural_key)
        if len(different) > MOST_CLASSES:
            ignored[name] = f"{len(different)} different values, more than {MOST_CLASSES}"
            continue

        # Whole numbers are grades, unless there are only two, which may mean no and yes.
        digits = [value.removeprefix("-") for value in different]
        are_whole = all(is_whole_number(word, MOST_GRADE_DIGITS) for word in digits)
        is_graded = are_whole and len(different) > 2
        classes = sorted(different, key=int) if is_graded else different
        tasks.append(ClassificationTask(name, tuple(classes), is_graded))
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in ignored.items())
        raise ClassesError(
            f"{file} has no column of classes ({reasons or 'only cases'}); add one, or name the "
            f'tasks in dataset.json under "{KEY}"',
            code="classes-no-task",
        )
    return tasks, ignored


def read_tasks(described: Any) -> list[ClassificationTask]:
    """Return the tasks that ``dataset.json["classification"]`` describes.

    Raises:
        ClassesError: it is of another form (code "classes-dataset-json").
    """
    tasks = []
    is_right = isinstance(described, Mapping) and bool(described)
    for name, value in described.items() if is_right else ():
        settings = value if isinstance(value, Mapping) else {"classes": value}
        listed: Any = settings.get("classes")
        ordinal: Any = settings.get("ordinal", False)
        names = tuple(str(kind) for kind in listed) if isinstance(listed, list) else ()
        has_different_names = bool(names) and len(set(names)) == len(names)
        has_only_known_keys = set(settings) <= {"classes", "ordinal"}
        if not has_different_names or not has_only_known_keys or not isinstance(ordinal, bool):
            is_right = False
            break
        tasks.append(ClassificationTask(str(name), names, ordinal))

    if not is_right:
        raise ClassesError(
            f'dataset.json: "{KEY}" must be an object like {{"diagnosis": ["NOR", "DCM"]}}, or '
            '{"grade": {"classes": ["1", "2", "3"], "ordinal": true}}, with different names of '
            "classes",
            code="classes-dataset-json",
        )
    return tasks


def class_index(
    file: Path,
    task: ClassificationTask,
    case: str,
    value: str,
    source: str = "dataset.json",
) -> int:
    """Return the index of the class in a cell; an empty cell is ``UNKNOWN``.

    Args:
        file: the table, for messages.
        case: the case of the cell.
        value: the cell.
        source: name of the source of the classes, for messages.

    Raises:
        ClassesError: there is no such class (code "classes-unknown-class").
    """
    if not value:
        return UNKNOWN
    if value not in task.classes:
        raise ClassesError(
            f"{file}: '{value}', the {task.name} of {case}, is not a class of {source}; "
            f"{did_you_mean(value, task.classes)}",
            code="classes-unknown-class",
        )
    return task.classes.index(value)


def patients_of(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], str]:
    """Return case -> patient of the rows of a table, and how they were found."""
    columns = [name for name in PATIENT_COLUMNS if name in rows[0]]
    if not columns:
        by_name = subjects_by_name([row[CASE_COLUMN] for row in rows])
        num_patients = len(set(by_name.values()))
        return by_name, f"{num_patients} patients by the cases' names; add a column patient to say"

    found = {}
    for row in rows:
        # A case without a patient in the table is a separate patient.
        case = row[CASE_COLUMN]
        found[case] = row[columns[0]] or f"case {case}"
    num_patients = len(set(found.values()))
    return found, f"{num_patients} patients by the column {columns[0]}"


def _check_classes(file: Path, table: ClassTable) -> None:
    """Refuse tasks that cannot be learned.

    They have no classes, only one, or a class of which all cases are of one patient.
    """
    for number, task in enumerate(table.tasks):
        # Index of the class -> patients with cases of it.
        patients = defaultdict(set)
        for case, labels in table.labels.items():
            if labels[number] != UNKNOWN:
                patients[labels[number]].add(table.patient_of[case])
        if not patients:
            raise ClassesError(
                f"{file}: all values of {task.name} are missing; fill the column in, or remove it",
                code="classes-all-missing",
            )
        if len(patients) == 1:
            (only,) = patients
            raise ClassesError(
                f"{file}: {task.name} has the single class '{task.classes[only]}', so there is "
                "nothing to learn; remove the column, or add cases of another class",
                code="classes-single-class",
            )
        absent = [kind for index, kind in enumerate(task.classes) if index not in patients]
        if absent:
            log.warning(
                "no case of %s is %s, so that it cannot be learned",
                task.name,
                ", ".join(absent),
            )
        for index, members in sorted(patients.items()):
            if len(members) == 1:
                raise ClassesError(
                    f"{file}: all cases of {task.name} '{task.classes[index]}' are of one patient "
                    f"({next(iter(members))}), so the class would be in one fold only; merge it "
                    "with another class, or leave its cells empty",
                    code="classes-one-fold",
                )
