"""From indexed scans to preprocessed cases: which scans are used, and shares for job arrays."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nnunet_autoreg import nnunet_api
from nnunet_autoreg.corpus.fingerprint import row_spacing
from nnunet_autoreg.corpus.groups import ContrastGroup, contrast_groups, reduced
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.machine import num_processes
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.pretrain.run_folder import (
    INDEX_NAME,
    PLAN_NAME,
    index_of,
    log_file,
    matching_plan,
    run_folder,
)
from nnunet_autoreg.sampling.kinds import wanted
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.groups import ensure_groups
from nnunet_autoreg.store.store import Store, StorePart

log = logging.getLogger(__name__)


def usable_rows(rows: Sequence[ScanRow]) -> list[ScanRow]:
    """Return the rows of scans that can be used."""
    return [row for row in rows if row.status == "ok"]


def split(
    rows: Sequence[ScanRow], fraction: float, seed: int
) -> tuple[list[ScanRow], list[ScanRow]]:
    """Return the training scans and the validation scans.

    All scans of a subject, and all channels of a case, go to the same side. A hash of the cases'
    names decides, so that other cases do not change it. For a subject the lowest hash of its cases
    counts, because the hash of its own id differs between machines.
    """
    # (dataset, case) -> subject, "" where the subject is not known
    subjects = {(row.dataset, row.case): row.subject for row in reversed(rows)}
    lowest: dict[object, str] = {}
    for case, subject in subjects.items():
        unit = subject or case
        digest = hashlib.sha256(f"{seed}/{case}".encode()).hexdigest()
        lowest[unit] = min(digest, lowest.get(unit, digest))

    num_validation = 0
    if fraction > 0 and len(lowest) > 1:
        wanted_units = max(1, round(fraction * len(lowest)))
        num_validation = min(wanted_units, len(lowest) - 1)
    chosen = set(sorted(lowest, key=lambda unit: lowest[unit])[:num_validation])

    training: list[ScanRow] = []
    validation: list[ScanRow] = []
    for row in rows:
        case = (row.dataset, row.case)
        unit = subjects[case] or case
        (validation if unit in chosen else training).append(row)
    return training, validation


def remove_failed(
    folder: Path, rows: list[ScanRow], store: Store, has_begun: bool
) -> list[ScanRow]:
    """Return the scans that are in the store, and note in scans.csv why others are not.

    Args:
        has_begun: training has begun, so that its scans must stay the same.

    Raises:
        AutoregError: no scan is left, or one is missing from a training that has begun.
    """
    if not store.failures:
        return rows
    failed = {row: (error.status, str(error)) for row, error in store.failures.items()}
    remaining = [row for row in rows if row.id not in failed]
    first, (status, reason) = next(iter(failed.items()))
    if not remaining:
        raise AutoregError(
            f"none of {len(rows)} scans could be preprocessed; the first, {first}, is {status}: "
            f"{reason}",
            code="run-nothing-preprocessed",
        )
    if has_begun:
        raise AutoregError(
            f"{len(failed)} scans of this run are missing from the store and cannot be read again; "
            f"the first, {first}, is {status} ({reason}): put them back, so that the run stays the "
            "same, or use another --name",
            code="run-scan-missing",
        )

    index_file = folder / INDEX_NAME
    indexed = []
    for row in read_index(index_file):
        if row.id in failed:
            status, reason = failed[row.id]
            indexed.append(replace(row, status=status, reason=reason))
        else:
            indexed.append(row)
    write_index(index_file, indexed)
    log.warning(
        "%d scans could not be preprocessed and are left out; %s gives the reasons",
        len(failed),
        index_file,
    )
    return remaining


def store_groups(
    plan: Plan, store: Store, groups: Sequence[ContrastGroup], num_workers: int
) -> list[tuple[ContrastGroup, list[StoredCase]]]:
    """Preprocess the groups that have enough of the plan's contrasts, each on one voxel grid.

    Returns:
        each such group with its stored cases; without those that could not be preprocessed.
    """
    with_contrasts = [reduced(group, plan.sequence.contrasts) for group in groups]
    fitting = [g for g in with_contrasts if len(g.rows) >= plan.sequence.contrast_members]
    spacing_of = partial(row_spacing, data=plan.data)
    keys = ensure_groups(store, fitting, spacing_of, plan.data.ct_window, num_workers)

    stored = []
    for group in fitting:
        if group.name in keys:
            stored.append((group, [store.open(key) for key in keys[group.name]]))
    return stored


@dataclass(frozen=True)
class PartOutcome:
    """How the preprocessing of one part ended.

    Attributes:
        num_failed: scans of the part that could not be preprocessed.
        num_missing: cases of the whole run that are not in the store.
    """

    num_failed: int
    num_missing: int


def preprocess_part(request: Request, part: StorePart) -> PartOutcome:
    """Preprocess one part of a planned run, for job arrays.

    Parts on any machines meet in one store without a coordinator. They only read the run's folder,
    so that no part waits for another.

    Raises:
        UsageError: the run is not planned yet, or was planned with other settings.
        PlanError: its plan was edited into one that cannot be carried out.
        StoreError: the disk is full, or the store cannot be written; finished cases stay.
    """
    folder = run_folder(nnunet_api.results_folder(), request.check().name)
    store = Store()
    if not (folder / PLAN_NAME).exists():
        raise UsageError(
            f"--part {part.number}/{part.count}: the run '{request.name}' has no {PLAN_NAME} and "
            f"{INDEX_NAME} yet, which all parts share; type the same line once with --dry-run "
            "instead of --part",
            code="run-not-planned",
        )

    with log_file(folder, f"preprocessing_log_{part.number}of{part.count}"):
        plan = check(matching_plan(folder, request))
        rows = usable_rows(read_index(index_of(folder)))
        spacing_of = partial(row_spacing, data=plan.data)
        keys = store.ensure(rows, spacing_of, plan.data.ct_window, num_processes(), part)
        preprocess_groups(plan, rows, store, part)

        num_missing, num_all = store.num_missing(rows, spacing_of, plan.data.ct_window)
        log.info(
            "part %d of %d: %d cases are in the store, %d scans could not be preprocessed; of the "
            "whole run %d of %d cases are there",
            part.number,
            part.count,
            len(set(keys.values())),
            len(store.failures),
            num_all - num_missing,
            num_all,
        )
    return PartOutcome(len(store.failures), num_missing)


def preprocess_groups(plan: Plan, rows: list[ScanRow], store: Store, part: StorePart) -> None:
    """Preprocess this part's groups of contrasts, where the plan has contrast sequences."""
    if "contrast" not in wanted(plan):
        return
    training, validation = split(rows, plan.data.holdout_fraction, plan.run.seed)
    groups = [*contrast_groups(training), *contrast_groups(validation)]

    own_groups = []
    for group in groups:
        if part.takes(hashlib.sha256(group.name.encode()).hexdigest()):
            own_groups.append(group)
    log.info(
        "part %d of %d: %d of %d groups of contrasts",
        part.number,
        part.count,
        len(own_groups),
        len(groups),
    )
    store_groups(plan, store, own_groups, num_processes())
