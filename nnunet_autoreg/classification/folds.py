"""Make folds for classification: stratified by class, and every patient in one part. Torch-free."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.classification.table import UNKNOWN, ClassTable
from nnunet_autoreg.errors import ClassesError
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.records import read_json, write_json

NUM_FOLDS = 5
OUR_FILE = "splits_autoreg_classification.json"
STOCK_FILE = "splits_final.json"

Fold = dict[str, list[str]]
"""nnU-Net's form: ``train`` and ``val``, both lists of cases."""


def make_folds(table: ClassTable, num_folds: int = NUM_FOLDS) -> list[Fold]:
    """Return stratified folds; the same table always gives the same folds.

    The rarest class is distributed first: each of its patients goes to the fold with the fewest
    patients of that class, and to the smallest fold if several have as few.

    Source: iterative stratification (Sechidis et al. 2011, ECML PKDD), with patients as samples.

    Raises:
        ClassesError: there are fewer patients than folds (code "classes-few-patients").
    """
    # Patient -> the (task, class) pairs of the patient's cases.
    kinds_of: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for case, labels in table.labels.items():
        kinds = {(task, label) for task, label in enumerate(labels) if label != UNKNOWN}
        kinds_of[table.patient_of[case]] |= kinds
    if len(kinds_of) < num_folds:
        raise ClassesError(
            f"{len(kinds_of)} patients cannot be divided into {num_folds} folds; add patients, or "
            f"write {STOCK_FILE} with fewer folds",
            code="classes-few-patients",
        )

    fold_of: dict[str, int] = {}
    sizes = [0] * num_folds
    in_fold: list[Counter[tuple[int, int]]] = [Counter() for _ in range(num_folds)]

    # By hash, so that the order does not depend on sites or dates in the patients' names.
    hash_of = {name: hashlib.sha256(name.encode()).hexdigest() for name in kinds_of}
    waiting = sorted(kinds_of, key=lambda name: hash_of[name])
    while waiting:
        left = Counter(kind for patient in waiting for kind in kinds_of[patient])
        # Patients without any known class come last.
        rarest = min(left, key=lambda kind: (left[kind], kind)) if left else None
        chosen = [p for p in waiting if rarest is None or rarest in kinds_of[p]]
        for patient in chosen:
            # By number of patients of the class, then by size, then by number of the fold.
            ranked = []
            for fold_index, counts in enumerate(in_fold):
                num_of_class = counts[rarest] if rarest else 0
                ranked.append((num_of_class, sizes[fold_index], fold_index))
            _, _, chosen_fold = min(ranked)
            fold_of[patient] = chosen_fold
            sizes[chosen_fold] += 1
            in_fold[chosen_fold].update(kinds_of[patient])
        waiting = [patient for patient in waiting if patient not in fold_of]

    folds = []
    for number in range(num_folds):
        fold: Fold = {"train": [], "val": []}
        for case in sorted(table.labels):
            part = "val" if fold_of[table.patient_of[case]] == number else "train"
            fold[part].append(case)
        folds.append(fold)
    return folds


def find_folds(folder: Path, table: ClassTable) -> tuple[list[Fold], str]:
    """Return the folds of a preprocessed dataset, and their source as text.

    ``splits_final.json`` is used if it exists and keeps every patient in one part. Otherwise our
    own file is read, or made. ``splits_final.json`` is never changed.

    Raises:
        ClassesError: our file is of other cases (code "classes-other-folds").
    """
    stock = folder / STOCK_FILE
    reason = f"there is no {STOCK_FILE}"
    if stock.is_file():
        folds = _checked(stock, read_json(stock))
        torn = patients_in_two_parts(folds, table.patient_of)
        if not torn:
            return folds, f"{stock}, which keeps every patient in one part"
        reason = f"{STOCK_FILE} has {names_text(torn)} in training and in validation"

    ours = folder / OUR_FILE
    if ours.is_file():
        folds = _checked(ours, read_json(ours))
        known = {case for fold in folds for part in fold.values() for case in part}
        if known != set(table.labels) or patients_in_two_parts(folds, table.patient_of):
            raise ClassesError(
                f"{ours} is of other cases or patients than the dataset has now; remove it to have "
                "new folds made, and train all folds again",
                code="classes-other-folds",
            )
        return folds, f"{ours} ({reason})"
    folds = make_folds(table)
    write_json(ours, folds)
    return folds, f"{ours}, made now: stratified by class and split by patient ({reason})"


def _checked(file: Path, folds: Any) -> list[Fold]:
    """Return the folds of a parsed file.

    Raises:
        ClassesError: they have another form (code "classes-damaged-folds").
    """
    is_list = isinstance(folds, list) and bool(folds)
    if not is_list or not all(map(_is_fold, folds)):
        raise ClassesError(
            f'{file} is not a list of folds with "train" and "val"; repair or remove it',
            code="classes-damaged-folds",
        )
    return [{"train": list(fold["train"]), "val": list(fold["val"])} for fold in folds]


def _is_fold(fold: Any) -> bool:
    """Return whether a parsed value has lists of names for training and validation."""
    if not isinstance(fold, Mapping):
        return False
    for name in ("train", "val"):
        cases = fold.get(name)
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            return False
    return True


def patients_in_two_parts(folds: Sequence[Fold], patient_of: Mapping[str, str]) -> list[str]:
    """Return patients with cases in both parts of a fold."""
    found: set[str] = set()
    for fold in folds:
        training = {patient_of[case] for case in fold["train"] if case in patient_of}
        validation = {patient_of[case] for case in fold["val"] if case in patient_of}
        found |= training & validation
    return sorted(found)


def check_fold(fold: Fold, table: ClassTable, name: str) -> list[str]:
    """Return warnings about a fold that can be used.

    Args:
        name: name of the fold in messages.

    Raises:
        ClassesError: a part holds no case (code "classes-empty-fold"), a case has no row (code
            "classes-case-without-row"), or training knows fewer than two classes of a task (code
            "classes-single-class-fold").
    """
    for part, cases in fold.items():
        if not cases:
            purpose = "training" if part == "train" else "validation"
            raise ClassesError(
                f"fold {name} has no case for {purpose}; correct the file of folds, or remove it",
                code="classes-empty-fold",
            )
        strangers = [case for case in cases if case not in table.labels]
        if strangers:
            raise ClassesError(
                f"fold {name} has {len(strangers)} cases without a row in the table of classes "
                f"({names_text(strangers)}); add rows, or remove the file of folds",
                code="classes-case-without-row",
            )

    warnings = []
    for number, task in enumerate(table.tasks):
        in_training = table.counts(number, fold["train"])
        in_validation = table.counts(number, fold["val"])
        if sum(count > 0 for count in in_training) < 2:
            raise ClassesError(
                f"the training cases of fold {name} have fewer than two classes of {task.name}; "
                "correct the file of folds, or remove it to have stratified folds made",
                code="classes-single-class-fold",
            )
        for index, kind in enumerate(task.classes):
            if not in_training[index]:
                warnings.append(
                    f"no training case of fold {name} is {task.name} '{kind}'; "
                    "it cannot be learned",
                )
            if not in_validation[index]:
                warnings.append(
                    f"no validation case of fold {name} is {task.name} '{kind}'; it is left out of "
                    "the scores",
                )
    return warnings
