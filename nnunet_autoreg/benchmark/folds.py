"""The folds of a cross-validation, joined into one line of results for each seed. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_autoreg.benchmark.results import KEYS
from nnunet_autoreg.benchmark.split import fold_of_split
from nnunet_autoreg.benchmark.statistics import DICE, SURFACE
from nnunet_autoreg.wording import counted

Line = Mapping[str, Any]
SUMMED = ("train_s", "validate_s")
OF_ALL_CASES = (DICE, SURFACE, "subjects")
"""Values by case; every case is in one fold."""


def shown_split(split: str) -> str:
    """Return the split of a run as results name it: "5-fold cross-validation" for each fold."""
    fold = fold_of_split(split)
    return split if fold is None else f"{fold[1]}-fold cross-validation"


def merged_folds(lines: Sequence[Line]) -> list[Line]:
    """Return the lines, with one line in the place of the folds of a run.

    It has the scores of all patients, and the times of all folds together. Runs some folds of which
    are not finished are left out. Other lines stay as they are.
    """
    found: list[Line] = []
    by_run = _folds_by_run(lines)
    for line in lines:
        run = _run_of(line)
        if run is None:
            found.append(line)
        # A run comes where its first fold comes; its other folds follow.
        elif run in by_run:
            folds = by_run.pop(run)
            if len(folds) == run[-1]:
                found.append(_merged(list(folds.values())))
    return found


def unfinished_folds(lines: Sequence[Line]) -> str:
    """Return a sentence about runs that are left out for missing folds; "" if there are none."""
    num_runs = 0
    for run, folds in _folds_by_run(lines).items():
        if len(folds) < run[-1]:
            num_runs += 1
    if not num_runs:
        return ""
    return (
        f"{counted(num_runs, 'run')} of a cross-validation left out, because some folds are not "
        "finished."
    )


def _folds_by_run(lines: Sequence[Line]) -> dict[tuple[Any, ...], dict[int, Line]]:
    """Return run -> fold -> line; of several lines of one fold the last one counts."""
    found: dict[tuple[Any, ...], dict[int, Line]] = {}
    for line in lines:
        run, fold = _run_of(line), fold_of_split(line["split"])
        if run is not None and fold is not None:
            found.setdefault(run, {})[fold[0]] = line
    return found


def _run_of(line: Line) -> tuple[Any, ...] | None:
    """Return the properties that the folds of a run share, with their number as the last.

    None if the split is not a fold.
    """
    fold = fold_of_split(line["split"])
    if fold is None:
        return None
    _, num_folds = fold
    shared = [line[name] for name in KEYS if name != "split"]
    return (*shared, num_folds)


def _merged(folds: Sequence[Line]) -> dict[str, Any]:
    """Return one line for the folds of a run."""
    merged = {**folds[0], "split": shown_split(folds[0]["split"])}
    for name in OF_ALL_CASES:
        by_case: dict[str, Any] = {}
        for line in folds:
            by_case |= line.get(name, {})
        if by_case:
            merged[name] = by_case

    for name in SUMMED:
        merged[name] = sum(line[name] for line in folds)
    merged["num_labelled"] = max(int(line["num_labelled"]) for line in folds)
    return merged
