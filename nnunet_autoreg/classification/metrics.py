"""Compute the scores of a classification, with bootstrap intervals over patients. Torch-free.

Every score takes a weight per case, so that all bootstrap resamples are computed at once: a patient
that is drawn twice weighs 2. Cases whose class is not known are left out.

Shape suffixes: S cases, J patients, K classes, B weightings (the first is 1 for every case, the
    others are resamples), F points of a curve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.classification.table import UNKNOWN, ClassificationTask
from nnunet_autoreg.downstream.bootstrap import bootstrap_weights, interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_BINS = 10
NUM_POINTS = 101
"""Of the ROC curve, at evenly spread false positive rates."""


@dataclass(frozen=True)
class Judged:
    """Hold the predictions of one task for the cases whose class is known.

    Attributes:
        task: the task, with its classes.
        truth_S: index of the true class.
        probabilities_SK: probabilities of every class.
        weights_BS: weight of each case in each weighting.
        num_patients: number of patients with these cases.
        strata_S: stratum of each case, such as the model that predicted it. The AUC compares only
            cases of one stratum. All cases are in one stratum if it is None.
    """

    task: ClassificationTask
    truth_S: Ints  # noqa: N815
    probabilities_SK: Floats  # noqa: N815
    weights_BS: Floats  # noqa: N815
    num_patients: int
    strata_S: Ints | None = None  # noqa: N815

    @property
    def predicted_S(self) -> Ints:
        """Return the most probable class of every case."""
        return np.asarray(self.probabilities_SK.argmax(1))

    @property
    def present(self) -> list[int]:
        """Return the classes that some case has."""
        return sorted(set(self.truth_S.tolist()))


def judge(
    task: ClassificationTask,
    truth: Sequence[int],
    probabilities_SK: NDArray[np.floating],
    patients: Sequence[str],
    num_resamples: int = 1000,
    seed: int = 0,
    strata: Sequence[int] | None = None,
) -> Judged | None:
    """Return the predictions of a task with their bootstrap weights; None if no class is known.

    Args:
        truth: index of the class of each case; ``UNKNOWN`` if it is not known.
        patients: patient of each case.
        num_resamples: number of bootstrap resamples; 0 for none.
        strata: stratum of each case (``Judged``).
    """
    is_known = np.array(truth) != UNKNOWN
    if not is_known.any():
        return None

    # Scans of one patient are drawn together, because they are alike.
    chosen = [patient for patient, known in zip(patients, is_known, strict=True) if known]
    names = sorted(set(chosen))
    index_S = np.array([names.index(patient) for patient in chosen])
    weights_BS = np.ones((1, len(chosen)))
    # A single patient has no interval, because every resample would be that patient.
    if num_resamples and len(names) > 1:
        drawn_BJ = bootstrap_weights(len(names), num_resamples, seed)
        weights_BS = np.concatenate([weights_BS, drawn_BJ[:, index_S]])

    return Judged(
        task=task,
        truth_S=np.array(truth)[is_known],
        probabilities_SK=np.asarray(probabilities_SK, dtype=np.float64)[is_known],
        weights_BS=weights_BS,
        num_patients=len(names),
        strata_S=None if strata is None else np.array(strata)[is_known],
    )


def auc_of_class(judged: Judged, index: int) -> Floats:
    """Return the area under the ROC curve of one class against all others, (B,).

    It is the probability that a case of the class has a higher score than another case, plus half
    of the probability of a tie. It is NaN for a resample without either kind of case.
    """
    scores_S = judged.probabilities_SK[:, index]
    is_own_S = judged.truth_S == index
    own = scores_S[is_own_S]
    others = scores_S[~is_own_S]

    # Every case of the class (row) is compared with every other case (column).
    is_higher = own[:, None] > others
    is_equal = own[:, None] == others
    wins = is_higher + 0.5 * is_equal
    is_compared = np.ones_like(wins)
    if judged.strata_S is not None:
        is_compared = judged.strata_S[is_own_S][:, None] == judged.strata_S[~is_own_S]

    # The weight of a pair is the product of its cases' weights, so matrix products sum all pairs.
    own_weights = judged.weights_BS[:, is_own_S]
    other_weights = judged.weights_BS[:, ~is_own_S]
    won_by_other = own_weights @ (wins * is_compared)  # (B, other cases)
    pairs_of_other = own_weights @ is_compared.astype(np.float64)  # (B, other cases)
    won_B = (won_by_other * other_weights).sum(1)
    pairs_B = (pairs_of_other * other_weights).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(won_B / pairs_B)


def auc(judged: Judged) -> Floats:
    """Return the AUC of the second of two classes, or the mean over all classes, (B,)."""
    if len(judged.task.classes) == 2:
        return auc_of_class(judged, 1)
    return _mean_of_present([auc_of_class(judged, index) for index in judged.present])


def confusion(judged: Judged) -> Floats:
    """Return the weight of the cases of each true class (row) and predicted class, (B, K, K)."""
    K = len(judged.task.classes)
    cell_S = judged.truth_S * K + judged.predicted_S
    is_in_cell = np.eye(K * K)[cell_S]  # (S, K * K)
    weights = judged.weights_BS @ is_in_cell
    return np.asarray(weights.reshape(-1, K, K))


def balanced_accuracy(judged: Judged) -> Floats:
    """Return the mean, over the classes, of the share of their cases that is predicted right, (B,).

    Classes without cases are left out.
    """
    matrix = confusion(judged)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall_BK = np.diagonal(matrix, axis1=1, axis2=2) / matrix.sum(2)
    return _mean_of_present([recall_BK[:, index] for index in judged.present])


def macro_f1(judged: Judged) -> Floats:
    """Return the mean F1 score over the classes that have cases, (B,)."""
    matrix = confusion(judged)
    right_BK = np.diagonal(matrix, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1_BK = 2 * right_BK / (matrix.sum(1) + matrix.sum(2))
    return _mean_of_present([f1_BK[:, index] for index in judged.present])


def accuracy(judged: Judged) -> Floats:
    """Return the share of the cases that is predicted right, (B,)."""
    is_right_S = judged.predicted_S == judged.truth_S
    right_B = judged.weights_BS @ is_right_S.astype(np.float64)
    return np.asarray(right_B / judged.weights_BS.sum(1))


def brier(judged: Judged) -> Floats:
    """Return the mean squared distance of the probabilities from the truth, (B,)."""
    target_SK = np.eye(len(judged.task.classes))[judged.truth_S]
    difference_SK = judged.probabilities_SK - target_SK
    error_S = (difference_SK**2).sum(1)
    return np.asarray(judged.weights_BS @ error_S / judged.weights_BS.sum(1))


def calibration_error(judged: Judged) -> Floats:
    """Return the expected calibration error of the predicted class in ten bins, (B,).

    Source: Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599).
    """
    confidence_S = judged.probabilities_SK.max(1)
    is_right_S = (judged.predicted_S == judged.truth_S).astype(np.float64)

    # A confidence of 1 belongs to the last bin.
    bins_S = np.minimum((confidence_S * NUM_BINS).astype(int), NUM_BINS - 1)
    total_B = np.zeros(len(judged.weights_BS))
    for number in set(bins_S.tolist()):
        inside = bins_S == number
        difference_S = is_right_S[inside] - confidence_S[inside]

        # The difference between accuracy and mean confidence, times the weight of the bin.
        total_B += np.abs(judged.weights_BS[:, inside] @ difference_S)
    return np.asarray(total_B / judged.weights_BS.sum(1))


def ordinal_error(judged: Judged) -> Floats:
    """Return the mean number of grades between the expected and the true class, (B,)."""
    grades_K = np.arange(len(judged.task.classes))
    expected_S = judged.probabilities_SK @ grades_K
    error_S = np.abs(expected_S - judged.truth_S)
    return np.asarray(judged.weights_BS @ error_S / judged.weights_BS.sum(1))


SCORES: dict[str, Callable[[Judged], Floats]] = {
    "auc": auc,
    "balanced_accuracy": balanced_accuracy,
    "f1": macro_f1,
    "accuracy": accuracy,
    "calibration_error": calibration_error,
    "brier": brier,
}


def scores_of(judged: Judged | None) -> dict[str, Any]:
    """Return every score with its 95 % interval; None means that there is nothing to measure."""
    if judged is None:
        return {"cases": 0, "patients": 0}
    scores = dict(SCORES)
    if judged.task.ordinal:
        scores["mean_grades_off"] = ordinal_error
    found: dict[str, Any] = {"cases": len(judged.truth_S), "patients": judged.num_patients}
    for name, score in scores.items():
        found[name] = _with_interval(score(judged))
    return found


def evaluate_task(judged: Judged) -> dict[str, Any]:
    """Return all scores of a task, and the curves and matrix that are drawn."""
    task = judged.task
    counts = np.bincount(judged.truth_S, minlength=len(task.classes))
    per_class = {}
    for index in judged.present:
        per_class[task.classes[index]] = _with_interval(auc_of_class(judged, index))
    return {
        **scores_of(judged),
        "classes": list(task.classes),
        "cases_of_class": dict(zip(task.classes, counts.tolist(), strict=True)),
        "auc_of_class": per_class,
        "confusion": confusion(judged)[0].astype(int).tolist(),
        "roc": roc(judged),
        "calibration": calibration(judged),
    }


def roc(judged: Judged) -> dict[str, Any]:
    """Return the ROC curve with its interval at every false positive rate.

    Of two classes the second is the positive one. Of more, the curves of all classes against the
    others are averaged.
    """
    grid_F = np.linspace(0, 1, NUM_POINTS)
    is_binary = len(judged.task.classes) == 2
    positives = [1] if is_binary else judged.present
    curves = [_roc_of_class(judged, index, grid_F) for index in positives]  # each (B, F)
    mean_BF = _mean_of_present(curves)
    band = [_ends(mean_BF[:, point]) for point in range(NUM_POINTS)]
    return {
        "positive": judged.task.classes[1] if is_binary else None,
        "false_positive_rate": grid_F.tolist(),
        "sensitivity": [_or_none(value) for value in mean_BF[0]],
        "ci95": None if any(ends is None for ends in band) else band,
    }


def _roc_of_class(judged: Judged, index: int, grid_F: Floats) -> Floats:
    """Return the sensitivity (B, F) of a class at the false positive rates of a grid."""
    order = np.argsort(-judged.probabilities_SK[:, index], kind="stable")
    scores_S = judged.probabilities_SK[order, index]
    is_own_S = judged.truth_S[order] == index
    weights_BS = judged.weights_BS[:, order]
    # A threshold lies only between different scores.
    is_last_S = np.append(np.diff(scores_S) != 0, True)

    # One case after the other becomes positive as the threshold falls from the highest score.
    own_BS = np.cumsum(weights_BS * is_own_S, 1)
    others_BS = np.cumsum(weights_BS * ~is_own_S, 1)

    # A resample without the class, or without any other, has no curve.
    curves = np.full((len(weights_BS), len(grid_F)), np.nan)
    for number, (own_S, others_S) in enumerate(zip(own_BS, others_BS, strict=True)):
        if own_S[-1] > 0 and others_S[-1] > 0:
            false_rate = np.concatenate([[0], others_S[is_last_S] / others_S[-1]])
            sensitivity = np.concatenate([[0], own_S[is_last_S] / own_S[-1]])
            curves[number] = np.interp(grid_F, false_rate, sensitivity)
    return curves


def calibration(judged: Judged) -> dict[str, Any]:
    """Return how often a prediction is right, by its probability in ten bins.

    For two classes, it is the probability of the second class, and how often that is the true one.
    For more, it is the probability of the predicted class, and how often that is the true one.
    """
    if len(judged.task.classes) == 2:
        probability_S = judged.probabilities_SK[:, 1]
        is_true_S = judged.truth_S == 1
    else:
        probability_S = judged.probabilities_SK.max(1)
        is_true_S = judged.predicted_S == judged.truth_S
    bins_S = np.minimum((probability_S * NUM_BINS).astype(int), NUM_BINS - 1)
    rows = []
    for number in range(NUM_BINS):
        inside = bins_S == number
        if not inside.any():
            continue
        weights_BS = judged.weights_BS[:, inside]
        with np.errstate(invalid="ignore", divide="ignore"):
            share_B = weights_BS @ is_true_S[inside] / weights_BS.sum(1)
        rows.append(
            {
                "probability": float(probability_S[inside].mean()),
                "true": _or_none(share_B[0]),
                "ci95": _ends(share_B),
                "cases": int(inside.sum()),
            },
        )
    return {"bins": rows}


def _mean_of_present(values: Sequence[Floats]) -> Floats:
    """Return the mean over the classes, leaving out those that a resample lacks."""
    stacked = np.stack(values)
    number_B = (~np.isnan(stacked)).sum(0)
    total_B = np.nansum(stacked, axis=0)

    # Without any class there is no mean.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total_B / np.where(number_B, number_B, np.nan))


def _with_interval(values_B: Floats) -> dict[str, Any]:
    """Return a score over all cases, and the ends of its 95 % interval."""
    return {"value": _or_none(values_B[0]), "ci95": _ends(values_B)}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _ends(values_B: Floats) -> list[float] | None:
    ends = interval(values_B[1:].tolist())
    return None if ends is None else list(ends)
