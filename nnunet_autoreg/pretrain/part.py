"""One share of a run's preprocessing, for job arrays: parts on any machines meet in one store,
without a coordinator.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial

from nnunet_autoreg import nnunet_api
from nnunet_autoreg.corpus.fingerprint import row_spacing
from nnunet_autoreg.corpus.groups import contrast_groups
from nnunet_autoreg.corpus.rows import ScanRow, read_index
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.folder import (
    INDEX_NAME,
    PLAN_NAME,
    Request,
    index_of,
    log_file,
    matching_plan,
    run_folder,
)
from nnunet_autoreg.pretrain.machine import num_processes
from nnunet_autoreg.pretrain.material import stored_groups
from nnunet_autoreg.pretrain.run import split, usable
from nnunet_autoreg.sampling.kinds import wanted
from nnunet_autoreg.store.store import Part, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartOutcome:
    """What a part left: scans that it could not preprocess, and cases of the whole run that the
    store lacks.
    """

    num_failed: int
    num_missing: int


def preprocess_part(request: Request, part: Part) -> PartOutcome:
    """Preprocess one share of a planned run.

    The run's folder is only read, so that no part waits for another.

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
            f"{INDEX_NAME} yet, which all "
            "parts share; type the same line once with --dry-run instead of --part"
        )
    with log_file(folder, f"preprocessing_log_{part.number}of{part.count}"):
        plan = check(matching_plan(folder, request))
        rows, spacing_of = (
            usable(read_index(index_of(folder))),
            partial(row_spacing, data=plan.data),
        )
        done = store.ensure(rows, spacing_of, plan.data.ct_window, num_processes(), part)
        align_groups(plan, rows, store, part)
        num_missing, num_all = store.num_missing(rows, spacing_of, plan.data.ct_window)
        log.info(
            "part %d of %d: %d cases are in the store, %d scans could not be preprocessed; of the "
            "whole run %d of %d cases are there",
            part.number,
            part.count,
            len(set(done.values())),
            len(store.failures),
            num_all - num_missing,
            num_all,
        )
    return PartOutcome(len(store.failures), num_missing)


def align_groups(plan: Plan, rows: list[ScanRow], store: Store, part: Part) -> None:
    """Preprocess this part's groups of contrasts, where the plan wants contrast sequences."""
    if "contrast" not in wanted(plan):
        return
    training, heldout = split(rows, plan.data.holdout_fraction, plan.run.seed)
    groups = [*contrast_groups(training), *contrast_groups(heldout)]
    mine = [
        group for group in groups if part.takes(hashlib.sha256(group.name.encode()).hexdigest())
    ]
    log.info(
        "part %d of %d: %d of %d groups of contrasts",
        part.number,
        part.count,
        len(mine),
        len(groups),
    )
    stored_groups(plan, store, mine, num_processes())
