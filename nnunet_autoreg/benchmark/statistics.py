"""From the lines of runs to paired differences and their intervals. Pure.

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
        over_both: interval when patients and seeds are drawn anew. Each seed labels other patients,
            so it holds that choice, too.
        over_cases: interval when patients alone are drawn anew.
        num_seeds, num_cases: what it rests on.
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
    """``ours`` minus ``theirs``, run by run and case by case; None where they share no seed.

    Args:
        ours, theirs: lines of runs by seed, of the same cases.
    """
    seeds = sorted(set(ours) & set(theirs))
    if metric == SURFACE:
        # A surface Dice means something at its own tolerance only.
        seeds = [
            seed
            for seed in seeds
            if tolerance_of(ours[seed]) == tolerance_of(theirs[seed]) is not None
        ]
    if not seeds:
        return None
    cases = sorted(set(ours[seeds[0]][metric]))
    rows = []
    for seed in seeds:
        a, b = case_scores(ours[seed], metric), case_scores(theirs[seed], metric)
        rows.append([a.get(case, np.nan) - b.get(case, np.nan) for case in cases])
    difference_RC = np.array(rows)
    kept = np.isfinite(difference_RC).all(axis=0)
    subjects = [
        str(ours[seeds[0]]["subjects"][case])
        for case, keep in zip(cases, kept, strict=True)
        if keep
    ]
    return (
        interval(difference_RC[:, kept], subjects, num_left_out=int((~kept).sum()))
        if kept.any()
        else None
    )


def interval(
    difference_RC: Array, subjects: Sequence[str], num_left_out: int = 0, num_draws: int = NUM_DRAWS
) -> Difference:
    """Mean and bootstrap intervals of differences.

    Args:
        difference_RC: per seed and case.
        subjects: the patient of every case; all cases of one are drawn together.
    """
    names = sorted(set(subjects))
    member_CJ = np.array([[subject == name for name in names] for subject in subjects], dtype=float)
    # A patient counts once, however many scans there are.
    means_RJ = difference_RC @ (member_CJ / member_CJ.sum(axis=0))
    generator = rng.generator(0, "benchmark: bootstrap")
    drawn_DJ = generator.multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=num_draws
    ).astype(float)
    num_seeds = len(difference_RC)
    drawn_DR = generator.multinomial(
        num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_draws
    ).astype(float)
    total = num_seeds * len(names)
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
    """Return the tolerance of a line's surface Dice in mm; None where it has none."""
    value = line.get("surface_tolerance_mm")
    return float(value) if value is not None and line.get(SURFACE) else None


def _middle(values_D: Array) -> tuple[float, float]:
    low, high = np.percentile(values_D, [2.5, 97.5])
    return float(low), float(high)


def steps_to(line: Mapping[str, Any], dice: float) -> int | None:
    """Steps until the Dice of patches during training first reached a value; None if it never
    did.
    """
    reached = [i for i, value in enumerate(line["curve"]) if value is not None and value >= dice]
    return (reached[0] + 1) * int(line["steps_per_epoch"]) if reached else None
