"""Divides patients into parts or folds, and draws the labelled ones of a seed. Pure.

Everything follows from hashes of names, so that it never changes. Patients are never split: all
scans of one are in the same part.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.downstream.patients import PATIENT_COLUMNS, subjects_by_name
from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.records import regular

TEST_SHARE, DEVELOPMENT_SHARE = 0.2, 0.15
CROSS_VALIDATION = "cross-validation"
SPLITS = ("development", "test")
SCORED_SPLITS = (*SPLITS, CROSS_VALIDATION)
NUM_FOLDS = 5
SMALL_TEST = 10
"""A test part of fewer patients says little; cross-validation scores all of them."""
PATIENTS, CASES = "patients", "cases"
"""What a number of labels counts."""
CASES_NAME = "cases.csv"


@dataclass(frozen=True)
class Division:
    """Names of cases by their part of the split.

    Attributes:
        pool: patients to label and to pretrain on.
        development: patients for making choices.
        test: patients for the final table.
    """

    pool: tuple[str, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]

    def scored(self, split: str) -> tuple[str, ...]:
        """Return the cases of a split; those of a fold are its test part."""
        return self.development if split == "development" else self.test


def read_subjects(path: Path, cases: Sequence[str]) -> dict[str, str]:
    """Return case -> patient from a CSV file with the columns ``case`` and ``subject``.

    Raises:
        UsageError: it cannot be read, lacks a column, or does not name every case.
    """
    try:
        # Spreadsheet programs put a mark in front, which utf-8-sig removes.
        with regular(path).open(encoding="utf-8-sig", newline="") as handle:
            found = {row["case"]: row["subject"] for row in csv.DictReader(handle)}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise UsageError(
            f"--subjects {path} cannot be used ({error!r}); give a CSV with the columns case and "
            "subject",
            code="subjects-unreadable",
        ) from error

    missing = [case for case in cases if not found.get(case)]
    if missing:
        first = missing[0]
        raise UsageError(
            f"--subjects {path} names no subject for {len(missing)} of {len(cases)} cases, the "
            f"first is {first}; {did_you_mean(first, found)}",
            code="subjects-missing-case",
        )
    return {case: found[case] for case in cases}


@dataclass(frozen=True)
class Patients:
    """The patients of all cases.

    Attributes:
        patient_of: case -> patient.
        rule: one line for the user that says how this was found.
    """

    patient_of: dict[str, str]
    rule: str


def find_patients(dataset: Path, cases: Sequence[str], file: Path | None = None) -> Patients:
    """Return the patients of a raw dataset's cases.

    They come from ``file`` if the user names one; else from ``cases.csv`` in the dataset's folder
    if that has a column of patients and names every case; else from the names of the cases.

    Args:
        dataset: folder of the raw dataset.

    Raises:
        UsageError: ``file`` cannot be used.
    """
    if file is not None:
        return _counted(read_subjects(file, cases), "the file of --subjects")

    table = dataset / CASES_NAME
    column, listed = _listed_patients(table)
    missing = [case for case in cases if not listed.get(case)]
    if listed and not missing:
        return _counted({case: listed[case] for case in cases}, f"{CASES_NAME}, column {column}")

    source = "the cases' names"
    if listed:
        source += f", as {CASES_NAME} has no patient for {len(missing)} of {len(cases)} cases"
    return _counted(subjects_by_name(cases), source)


def _listed_patients(table: Path) -> tuple[str, dict[str, str]]:
    """Return the column of patients in ``cases.csv``, and case -> patient; empty without one."""
    if not table.is_file():
        return "", {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error):
        return "", {}

    if not rows or "case" not in rows[0]:
        return "", {}
    for column in PATIENT_COLUMNS:
        if column in rows[0]:
            return column, {row["case"]: (row[column] or "").strip() for row in rows}
    return "", {}


def _counted(patient_of: dict[str, str], source: str) -> Patients:
    """Return the patients, with their number in the rule."""
    number = len(set(patient_of.values()))
    return Patients(patient_of, f"{number} patients by {source}")


def divide(subject_of: Mapping[str, str]) -> Division:
    """Divide the patients: a fifth is for the test, 15 % for development, the others are the pool.

    Each part has at least one patient.

    Raises:
        UsageError: fewer than 3 patients.
    """
    order = ordered(set(subject_of.values()))
    if len(order) < 3:
        raise UsageError(
            f"{len(subject_of)} labelled cases of {len(order)} patients cannot be divided into "
            "pool, development and test; give a dataset of at least 3 patients, or --subjects if "
            "the names mislead",
            code="benchmark-too-few-patients",
        )

    # Patients in the order of their hashes: the first are for the test, the next for development.
    num_test = max(1, round(TEST_SHARE * len(order)))
    num_development = max(1, round(DEVELOPMENT_SHARE * len(order)))
    test_patients = set(order[:num_test])
    development_patients = set(order[num_test : num_test + num_development])

    pool, development, test = [], [], []
    for case in sorted(subject_of):
        if subject_of[case] in test_patients:
            test.append(case)
        elif subject_of[case] in development_patients:
            development.append(case)
        else:
            pool.append(case)
    return Division(tuple(pool), tuple(development), tuple(test))


def fold_name(fold: int, num_folds: int) -> str:
    """Return the split of a run that is scored on one fold: "fold1of5" for the first of five."""
    return f"fold{fold + 1}of{num_folds}"


def fold_of_split(split: str) -> tuple[int, int] | None:
    """Return fold and number of folds of a run's split; None if it is not a fold."""
    match = re.fullmatch(r"fold(\d+)of(\d+)", split)
    if match is None:
        return None
    fold, num_folds = int(match[1]) - 1, int(match[2])
    return fold, num_folds


def divide_for_fold(subject_of: Mapping[str, str], fold: int, num_folds: int) -> Division:
    """Return the division of one fold: its patients are the test, all others the pool.

    The patients are dealt out in the order of their hashes, so that every patient is in the test
    part of exactly one fold, and the sizes of folds differ by one patient at most.

    Raises:
        UsageError: there are fewer patients than folds, or fewer than two folds.
    """
    order = ordered(set(subject_of.values()))
    if not 2 <= num_folds <= len(order):
        raise UsageError(
            f"--folds {num_folds}: {len(order)} patients can be divided into 2 to {len(order)} "
            "folds; give another number, or --subjects if the names mislead",
            code="benchmark-folds",
        )

    fold_of = {patient: number % num_folds for number, patient in enumerate(order)}
    pool: list[str] = []
    test: list[str] = []
    for case in sorted(subject_of):
        part = test if fold_of[subject_of[case]] == fold else pool
        part.append(case)
    return Division(tuple(pool), (), tuple(test))


def labelled(
    division: Division,
    subject_of: Mapping[str, str],
    num_labels: int,
    seed: int,
    unit: str = PATIENTS,
) -> tuple[str, ...]:
    """Return the cases of the pool that are labelled under a seed: all scans of this many patients.

    Another seed labels other patients. The smaller sets of one seed are parts of its larger ones.

    Args:
        unit: what is counted. Folders of older versions count ``CASES``, and take whole patients
            until there are at least ``num_labels`` cases.

    Raises:
        UsageError: the pool is too small.
    """
    # The first patients in an order that belongs to the seed, so that smaller sets are nested.
    patients = {subject_of[case] for case in division.pool}
    available = len(patients) if unit == PATIENTS else len(division.pool)
    if num_labels > available:
        raise UsageError(
            f"--labels {num_labels}: the pool holds {available} labelled {unit}; ask for fewer, "
            "as the others are for development and test",
            code="benchmark-too-many-labels",
        )

    chosen: list[str] = []
    for num_patients, patient in enumerate(ordered(patients, f"{seed}/")):
        count = num_patients if unit == PATIENTS else len(chosen)
        if count >= num_labels:
            break
        chosen += [case for case in division.pool if subject_of[case] == patient]
    return tuple(sorted(chosen))


def ordered(names: Iterable[str], before: str = "") -> list[str]:
    """Return names in the order of their hashes.

    Args:
        before: put in front of each name; another text gives another order.
    """

    def hash_of(name: str) -> str:
        return hashlib.sha256(f"{before}{name}".encode()).hexdigest()

    return sorted(names, key=hash_of)
