"""Paired differences between runs, and their bootstrap intervals. Pure.

Shape suffixes: R seeds, C cases, J patients, D draws of the bootstrap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng

NUM_DRAWS = 10_000
Array = NDArray[np.float64]

DICE, SURFACE = "dice_per_case", "surface_dice_per_case"
"""Keys of a run's line: case -> label -> score."""


@dataclass(frozen=True)
class Difference:
    """A mean paired difference in Dice with 95 % bootstrap intervals.

    Attributes:
        mean: over seeds and patients; a patient's value is the mean over the patient's scans.
        over_both: interval of a bootstrap over patients and seeds. Each seed labels other patients,
            so the interval includes that choice.
        over_cases: interval of a bootstrap over patients only.
        num_seeds, num_cases: how many were compared.
        num_left_out: cases without a Dice in some run (nothing to find, nothing found).
    """

    mean: float
    over_both: tuple[float, float]
    over_cases: tuple[float, float]
    num_seeds: int
    num_cases: int
    num_left_out: int


def case_scores(line: Mapping[str, Any], metric: str = DICE) -> dict[str, float]:
    """Return case -> mean score over its labels; NaN where no label has one.

    Args:
        metric: ``DICE`` or ``SURFACE``; lines of older versions lack the latter, and give nothing.
    """
    found = {}
    for case, by_label in line.get(metric, {}).items():
        known = [value for value in by_label.values() if value is not None]
        found[case] = float(np.mean(known)) if known else float("nan")
    return found


def mean_dice(line: Mapping[str, Any], metric: str = DICE) -> float:
    """Return the mean over the patients of the mean over their scans that have a score."""
    # Patients with many scans must not count more than the others.
    scores_of: dict[str, list[float]] = {}
    for case, score in case_scores(line, metric).items():
        if np.isfinite(score):
            scores_of.setdefault(str(line["subjects"][case]), []).append(score)

    means = [float(np.mean(scores)) for scores in scores_of.values()]
    return float(np.mean(means)) if means else float("nan")


def paired(
    ours: Mapping[int, Mapping[str, Any]],
    theirs: Mapping[int, Mapping[str, Any]],
    metric: str = DICE,
) -> Difference | None:
    """Return ``ours`` minus ``theirs``, paired by seed and case; None if no seed is shared.

    Args:
        ours, theirs: lines of runs by seed, of the same cases.
    """
    seeds = sorted(set(ours) & set(theirs))
    if metric == SURFACE:
        # Surface Dice at different tolerances cannot be compared.
        alike = []
        for seed in seeds:
            tolerance = tolerance_of(ours[seed])
            if tolerance is not None and tolerance == tolerance_of(theirs[seed]):
                alike.append(seed)
        seeds = alike

    if not seeds:
        return None

    first = ours[seeds[0]]
    cases = sorted(first[metric])
    rows = []
    for seed in seeds:
        a, b = case_scores(ours[seed], metric), case_scores(theirs[seed], metric)
        rows.append([a.get(case, np.nan) - b.get(case, np.nan) for case in cases])
    return _interval_of_cases(np.array(rows), cases, first["subjects"])


def mean_interval(lines: Mapping[int, Mapping[str, Any]]) -> Difference | None:
    """Return the mean Dice of runs of several seeds with its bootstrap intervals.

    It is computed as a difference to 0, with the patients and seeds drawn in the same way.
    """
    seeds = sorted(lines)
    first = lines[seeds[0]]
    cases = sorted(first[DICE])
    rows = []
    for seed in seeds:
        scores = case_scores(lines[seed])
        rows.append([scores.get(case, np.nan) for case in cases])
    return _interval_of_cases(np.array(rows), cases, first["subjects"])


def _interval_of_cases(
    difference_RC: Array,
    cases: Sequence[str],
    subject_of: Mapping[str, str],
) -> Difference | None:
    """Return the intervals over the cases that have a value in every run; None without such."""
    kept_C = np.isfinite(difference_RC).all(axis=0)
    if not kept_C.any():
        return None

    subjects = [str(subject_of[cases[index]]) for index in np.flatnonzero(kept_C).tolist()]
    num_left_out = len(cases) - len(subjects)
    return interval(difference_RC[:, kept_C], subjects, num_left_out)


def interval(difference_RC: Array, subjects: Sequence[str], num_left_out: int = 0) -> Difference:
    """Return the mean and the bootstrap intervals of differences.

    Args:
        difference_RC: per seed and case.
        subjects: the patient of every case; all cases of one patient are drawn together.
    """
    names = sorted(set(subjects))
    member_CJ = (np.array(subjects)[:, None] == np.array(names)).astype(float)  # 1 if C is J's
    # A patient counts once, however many scans there are.
    weight_CJ = member_CJ / member_CJ.sum(axis=0)
    means_RJ = difference_RC @ weight_CJ

    # How often each patient and each seed is in a bootstrap sample.
    generator = rng.generator(0, "benchmark: bootstrap")
    num_seeds, num_patients = means_RJ.shape
    share_J = np.full(num_patients, 1 / num_patients)
    share_R = np.full(num_seeds, 1 / num_seeds)
    drawn_DJ = generator.multinomial(num_patients, share_J, size=NUM_DRAWS).astype(float)
    drawn_DR = generator.multinomial(num_seeds, share_R, size=NUM_DRAWS).astype(float)

    # The mean difference of every bootstrap sample.
    total = num_seeds * num_patients
    over_both_D = np.einsum("dr,rj,dj->d", drawn_DR, means_RJ, drawn_DJ) / total
    over_cases_D = (drawn_DJ @ means_RJ.sum(axis=0)) / total
    return Difference(
        float(means_RJ.mean()),
        _middle(over_both_D),
        _middle(over_cases_D),
        num_seeds,
        len(subjects),
        num_left_out,
    )


def tolerance_of(line: Mapping[str, Any]) -> float | None:
    """Return the tolerance of a line's surface Dice in mm; None if it has none."""
    value = line.get("surface_tolerance_mm")
    if value is None or not line.get(SURFACE):
        return None
    return float(value)


def _middle(values_D: Array) -> tuple[float, float]:
    """Return the ends of the middle 95 % of the values."""
    low, high = np.percentile(values_D, [2.5, 97.5])
    return float(low), float(high)
