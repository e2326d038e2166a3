"""Patients that are scored must not have been in the pretraining: what scans.csv of a run says
about that.
"""

import os
from collections.abc import Mapping, Sequence
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
    """Refuse weights whose pretraining saw a scored patient; return a warning where that cannot be
    told, "" where all is well.

    Args:
        run: folder of the pretraining.
        exclude: a file that names the scored cases for ``autoreg_pretrain --exclude``.

    Raises:
        AutoregError: patients are in both.
    """
    index = run / INDEX_NAME
    if not index.is_file():
        return (
            f"{run.name} has no {INDEX_NAME}, so nobody knows whether its pretraining saw the "
            "patients that are scored"
        )
    try:
        rows = [row for row in read_index(index) if row.status == OK]
    except UsageError as error:
        return (
            f"whether the pretraining of {run.name} saw the patients that are scored cannot be "
            f"told: {error}"
        )
    seen = seen_subjects(rows, scored)
    if seen:
        raise AutoregError(
            f"the pretraining '{run.name}' saw {len(seen)} of the patients that are scored, e.g. "
            f"{seen[0]}: the comparison would be "
            f"worthless; pretrain another run with --exclude {exclude}"
        )
    uncertain = _perhaps_seen(rows, scored)
    if uncertain:
        return (
            f"the pretraining '{run.name}' was indexed by an earlier version, which could not tell "
            "scans of very small values "
            f"apart, so it may have seen scored patients, e.g. {uncertain[0]}; pretrain again to "
            "be sure"
        )
    alike = _subjects(scored) | set(scored.cases)
    namesakes = sorted(
        {row.case for row in rows if row.dataset != scored.dataset and row.case in alike}
    )
    if namesakes:
        return (
            f"the pretraining '{run.name}' saw scans of other datasets that are named like scored "
            f"patients, e.g. {namesakes[0]}; "
            "exclude them if they are the same people"
        )
    return ""


def seen_subjects(rows: Sequence[ScanRow], scored: Scored) -> list[str]:
    """Scored patients among the scans of a pretraining: by case of the dataset, by file, and by
    content.
    """
    subjects = _subjects(scored)
    files = {
        os.path.realpath(image): case for case in scored.cases for image in scored.images[case]
    }
    found = {
        scored.subject_of[row.case]
        for row in rows
        if row.dataset == scored.dataset and row.case in scored.subject_of
    } & subjects
    found |= {
        scored.subject_of[files[path]]
        for path in (os.path.realpath(row.source) for row in rows)
        if path in files
    }
    hashes = {row.content_hash for row in rows if row.dataset != scored.dataset}
    if hashes:
        found |= {
            scored.subject_of[case]
            for case in scored.cases
            if any(_hash(image) in hashes for image in scored.images[case])
        }
    return sorted(found)


def _perhaps_seen(rows: Sequence[ScanRow], scored: Scored) -> list[str]:
    """Scored patients with a scan that has the hash of a pretraining's scan by the earlier rule
    alone.
    """
    hashes = {row.content_hash for row in rows if row.dataset != scored.dataset}
    if not hashes:
        return []
    found = set()
    for case in scored.cases:
        if any(_earlier_hash(image) in hashes for image in scored.images[case]):
            found.add(scored.subject_of[case])
    return sorted(found)


def _earlier_hash(image: Path) -> str:
    """The hash by the earlier rule, where it is another one; "" else."""
    try:
        scan = load_scan(image)
    except ScanError:
        return ""
    earlier = earlier_hash(scan)
    return earlier if earlier != content_hash(scan) else ""


def _hash(image: Path) -> str:
    """As the index hashes a scan; "" for one that pretraining would leave out."""
    try:
        return content_hash(load_scan(image))
    except ScanError:
        return ""


def _subjects(scored: Scored) -> set[str]:
    return {scored.subject_of[case] for case in scored.cases}
