"""Checks, by scans.csv of a pretraining, that it did not see the patients that are scored."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.corpus.content import content_hash, earlier_hash
from nnunet_autoreg.corpus.read import load_scan
from nnunet_autoreg.corpus.rows import OK, ScanRow, read_index
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError

INDEX_NAME = "scans.csv"


@dataclass(frozen=True)
class Scored:
    """The scans that are scored.

    Attributes:
        dataset: folder name of the raw dataset.
        subject_of: case -> patient, of all its cases.
        cases: those that are scored.
        images: case -> its image files.
    """

    dataset: str
    subject_of: Mapping[str, str]
    cases: Sequence[str]
    images: Mapping[str, Sequence[Path]]


def check_pretraining(run: Path, scored: Scored, exclude: Path) -> str:
    """Refuse weights whose pretraining saw a scored patient.

    Args:
        run: folder of the pretraining.
        exclude: a file that names the scored cases for ``autoreg_pretrain --exclude``.

    Returns:
        A warning if it cannot be known; "" if no scored patient was seen.

    Raises:
        AutoregError: patients are in both.
    """
    index = run / INDEX_NAME
    if not index.is_file():
        return (
            f"{run.name} has no {INDEX_NAME}, so it is not known whether its pretraining saw the "
            "patients that are scored"
        )

    try:
        rows = [row for row in read_index(index) if row.status == OK]
    except UsageError as error:
        return (
            f"it is not known whether the pretraining of {run.name} saw the patients that are "
            f"scored: {error}"
        )

    # Certain: the case, the file or the content is the same.
    seen = seen_subjects(rows, scored)
    if seen:
        raise AutoregError(
            f"the pretraining '{run.name}' saw {len(seen)} of the patients that are scored: the "
            f"comparison would be worthless; pretrain another run with --exclude {exclude}",
            code="benchmark-scored-patient-seen",
        )

    # Scans that are equal only by the earlier hash may be different.
    others = _of_others(rows, scored)
    uncertain = _with_hash_in(others, scored, _earlier_hash)
    if uncertain:
        return (
            f"the pretraining '{run.name}' was indexed by an earlier version, which could not "
            f"distinguish scans of very small values, so it may have seen {len(uncertain)} of the "
            "patients that are scored; pretrain again to be sure"
        )

    # An equal name proves nothing: many datasets number their patients from 1.
    names = _subjects(scored) | set(scored.cases)
    namesakes = {row.case for row in others if row.case in names}
    if namesakes:
        return (
            f"the pretraining '{run.name}' saw scans of other datasets that are named like "
            f"{len(namesakes)} of the patients that are scored; exclude them if they are the same "
            "people"
        )
    return ""


def seen_subjects(rows: Sequence[ScanRow], scored: Scored) -> list[str]:
    """Return the scored patients among the scans of a pretraining.

    They are found by their case in the dataset, by their files, and by the content of these.
    """
    seen = set()
    file_of_case: dict[str, str] = {}
    for case in scored.cases:
        for image in scored.images[case]:
            file_of_case[os.path.realpath(image)] = case

    for row in rows:
        if row.dataset == scored.dataset and row.case in scored.subject_of:
            seen.add(scored.subject_of[row.case])
        # The same file may have been given as a folder.
        case_of_file = file_of_case.get(os.path.realpath(row.source))
        if case_of_file is not None:
            seen.add(scored.subject_of[case_of_file])

    others = _of_others(rows, scored)
    seen |= _with_hash_in(others, scored, _hash)
    # A patient of the dataset whose cases are not scored may have been seen.
    return sorted(seen & _subjects(scored))


def _of_others(rows: Sequence[ScanRow], scored: Scored) -> list[ScanRow]:
    """Return the rows of other datasets."""
    return [row for row in rows if row.dataset != scored.dataset]


def _with_hash_in(
    rows: Sequence[ScanRow],
    scored: Scored,
    hash_of: Callable[[Path], str],
) -> set[str]:
    """Return the scored patients one of whose images has the hash of one of the rows."""
    hashes = {row.content_hash for row in rows}
    # Hashing reads every image, and is not needed without other datasets.
    if not hashes:
        return set()

    found = set()
    for case in scored.cases:
        if any(hash_of(image) in hashes for image in scored.images[case]):
            found.add(scored.subject_of[case])
    return found


def _earlier_hash(image: Path) -> str:
    """Return the hash by the earlier rule; "" if today's is the same or the scan unreadable."""
    try:
        scan = load_scan(image)
    except ScanError:
        return ""
    earlier = earlier_hash(scan)
    return earlier if earlier != content_hash(scan) else ""


def _hash(image: Path) -> str:
    """Return the hash that the index has for a scan; "" if pretraining would leave it out."""
    try:
        return content_hash(load_scan(image))
    except ScanError:
        return ""


def _subjects(scored: Scored) -> set[str]:
    return {scored.subject_of[case] for case in scored.cases}
