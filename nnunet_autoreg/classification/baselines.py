"""Fit and score the baselines of a classifier: the majority class, sizes, and a linear probe.

All of them are fitted on the training cases and scored on the validation cases.

Shape suffixes: N training cases, M test cases, V features, K classes.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.classification.metrics import judge, scores_of
from nnunet_autoreg.classification.table import UNKNOWN, ClassTable
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.rng import generator

MAJORITY, SIZE, PROBE = "majority", "size", "linear_probe"
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Candidates for the inverse of the penalty of a logistic regression."""
NUM_INNER_FOLDS = 3

Floats = NDArray[np.floating[Any]]


def size_features(
    labels_ZYX: NDArray[np.integer],
    spacing_mm: Spacing,
    values: Sequence[int],
) -> NDArray[np.float64]:
    """Return the sizes of the labelled structures, as logarithms.

    They are the volume of every label in mm^3, the volume of all labels together, and the sides of
    the box around all of them in mm, the shortest first. A voxel is added to every volume, so that
    the logarithm of 0 voxels is finite.

    Args:
        spacing_mm: (z, y, x).
        values: label values of the structures.
    """
    inside = np.argwhere(labels_ZYX > 0)  # (voxels, 3)
    num_voxels = [int((labels_ZYX == value).sum()) for value in values]
    num_voxels.append(len(inside))
    voxel_mm3 = float(np.prod(spacing_mm))
    volumes_mm3 = [(number + 1) * voxel_mm3 for number in num_voxels]

    sides_mm = np.array(spacing_mm, dtype=np.float64)
    if len(inside):
        sides_mm = (inside.max(0) - inside.min(0) + 1) * sides_mm

    # Logarithms, because twice the size means as much for a small object as for a large one.
    sizes = np.array([*volumes_mm3, *sorted(sides_mm.tolist())], dtype=np.float64)
    return np.asarray(np.log(sizes))


def fit_predict(
    train_NV: Floats,
    labels_N: Sequence[int],
    groups: Sequence[str],
    test_MV: Floats,
    num: int,
) -> NDArray[np.float64]:
    """Return the probabilities (M, K) of a logistic regression in which every class counts equally.

    Features are standardised by the training cases. The penalty is the one of ``STRENGTHS`` with
    the lowest cross-entropy in an inner cross-validation over the groups.

    Args:
        labels_N: class index of every training case.
        groups: patient of every training case.
        num: number of classes. A class that no training case has gets the probability 0.
    """
    # Cases whose class is not known are not used.
    known = np.array(labels_N) != UNKNOWN
    train = np.asarray(train_NV, dtype=np.float64)[known]
    labels = np.array(labels_N)[known]

    # The scale of the test cases must not be used.
    mean = train.mean(0)
    deviation = np.maximum(train.std(0), 1e-6)
    train = (train - mean) / deviation
    test = (np.asarray(test_MV, dtype=np.float64) - mean) / deviation

    # Patients are distributed over the inner folds at random, but always in the same way.
    groups_of_known = np.array(groups)[known].tolist()
    names = sorted(set(groups_of_known))
    order = generator(0, "linear probe: inner folds").permutation(len(names))
    fold_of = {names[index]: number % NUM_INNER_FOLDS for number, index in enumerate(order)}
    folds = np.array([fold_of[group] for group in groups_of_known])

    # The strength of the penalty is chosen only on training cases.
    errors = []
    for strength in STRENGTHS:
        losses = []
        for fold in range(NUM_INNER_FOLDS):
            inner = folds != fold
            outer = folds == fold
            if not outer.any() or len(set(labels[inner].tolist())) < 2:
                continue
            probabilities = _fitted(train[inner], labels[inner], train[outer], strength, num)
            own = probabilities[np.arange(outer.sum()), labels[outer]]

            # The limit keeps one confident error from deciding.
            losses += (-np.log(np.maximum(own, 1e-6))).tolist()
        errors.append(float(np.mean(losses)) if losses else 0.0)

    best_strength = STRENGTHS[int(np.argmin(errors))]
    return _fitted(train, labels, test, best_strength, num)


def _fitted(
    train: Floats,
    labels: NDArray[np.int64],
    test: Floats,
    strength: float,
    num: int,
) -> NDArray[np.float64]:
    """Return the probabilities (test cases, K) of a logistic regression fitted on ``train``."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=300)
    with warnings.catch_warnings():
        # A fit that stopped early is still a baseline.
        warnings.simplefilter("ignore")
        model.fit(train, labels)

    # A class that no training case has gets the probability 0.
    found = np.zeros((len(test), num))
    found[:, model.classes_] = model.predict_proba(test)
    return found


def majority(labels: Sequence[int], num_cases: int, num: int) -> NDArray[np.float64]:
    """Return the frequencies of the classes in training as the probabilities of every case."""
    known = [label for label in labels if label != UNKNOWN]
    counts_K = np.bincount(known, minlength=num)
    return np.tile(counts_K / len(known), (num_cases, 1))


def score_baselines(
    table: ClassTable,
    validation: Sequence[str],
    predicted: Mapping[str, Sequence[NDArray[np.float64]]],
    num_resamples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Return baseline -> task -> scores on the validation cases.

    Args:
        predicted: as ``predict_baselines`` returns it.
    """
    patients = [table.patient_of[case] for case in validation]
    found: dict[str, dict[str, Any]] = {}
    for name, of_tasks in predicted.items():
        found[name] = {}
        for number, task in enumerate(table.tasks):
            truth = [table.labels[case][number] for case in validation]
            judged = judge(task, truth, of_tasks[number], patients, num_resamples)
            found[name][task.name] = scores_of(judged)
    return found


def predict_baselines(
    table: ClassTable,
    train: Sequence[str],
    validation: Sequence[str],
    features: Mapping[str, Mapping[str, Floats]],
) -> dict[str, list[NDArray[np.float64]]]:
    """Return baseline -> probabilities (validation cases, classes) of every task.

    Args:
        features: baseline -> case -> its features; the majority class needs none.
    """
    groups = [table.patient_of[case] for case in train]
    predicted: dict[str, list[NDArray[np.float64]]] = {MAJORITY: []}
    predicted |= {name: [] for name in features}
    for number, task in enumerate(table.tasks):
        labels = [table.labels[case][number] for case in train]
        num = len(task.classes)
        predicted[MAJORITY].append(majority(labels, len(validation), num))
        for name, of_case in features.items():
            train_NV = np.stack([of_case[case] for case in train])
            test_MV = np.stack([of_case[case] for case in validation])
            predicted[name].append(fit_predict(train_NV, labels, groups, test_MV, num))
    return predicted
