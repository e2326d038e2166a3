"""A run's folder: its lock, its plan, its log, and whether a request continues the run in it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.private import PATH_FIELDS, hide_paths, show_paths, terminal_only
from nnunet_autoreg.errors import AutoregError, PlanError, UsageError
from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, WEIGHTS_NAME, read_card
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.records import (
    TEMPORARY_FILES,
    differences,
    from_jsonable,
    read_json,
    to_jsonable,
    write_json,
)

PLAN_NAME, INDEX_NAME, LOCK_NAME = "plan.json", "scans.csv", ".lock"
REPLACED_PLAN_NAME = "plan_replaced.json"

log = logging.getLogger(__name__)

MAY_CHANGE = {
    "data": ("min_scans",),
    "optim": ("num_steps",),
    "run": ("sharding", "min_token_variance", "min_effective_rank", "max_collapsed"),
}
"""Values of the plan that no step of training depends on."""

NO_LENGTH: dict[str, Any] = {"num_steps": None, "num_epochs": None, "num_hours": None}


def run_folder(results: Path, name: str) -> Path:
    """Return the folder of the run of this name below nnUNet_results."""
    return results / RUNS_FOLDER / name


@contextmanager
def locked(folder: Path, instead: str = "use another --name") -> Iterator[None]:
    """Hold the lock of the run's folder, which is created if needed; it ends with the process.

    Args:
        instead: what else the user can do where another process holds it.

    Raises:
        AutoregError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_NAME, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise AutoregError(
            f"another process is working in {folder}; wait for it, or {instead}",
            code="folder-locked",
        ) from error
    except NotImplementedError as error:
        raise AutoregError(
            f"{folder / LOCK_NAME} cannot be locked ({error}); use a file system with locks for "
            "nnUNet_results",
            code="folder-no-locks",
        ) from error
    except OSError as error:
        raise AutoregError(
            f"{folder} cannot be written ({error.strerror}); check the rights of nnUNet_results",
            code="folder-not-writable",
        ) from error

    try:
        # A process that was killed may have left half-written files behind.
        for torn in folder.glob(TEMPORARY_FILES):
            torn.unlink()
        yield
    finally:
        lock.release()


def read_plan(folder: Path) -> Plan:
    """Return the run's plan.

    Raises:
        PlanError: it cannot be read, or holds unknown or wrong values.
    """
    path = folder / PLAN_NAME
    plan = from_jsonable(Plan, read_json(path), str(path))
    return replace(plan, request=show_paths(plan.request, PATH_FIELDS, folder))


def public_plan(plan: Plan) -> Plan:
    """Return the plan as it is written: without the paths of the inputs."""
    request, _ = hide_paths(plan.request, PATH_FIELDS)
    return replace(plan, request=request)


def write_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.json``."""
    write_json(folder / PLAN_NAME, public_plan(plan))


def has_plan(folder: Path) -> bool:
    """Return whether the run is planned; a lost plan is restored from the newest checkpoint.

    Raises:
        CheckpointError: the plan is lost, and the checkpoint cannot be read.
    """
    path = folder / PLAN_NAME
    newest = None if path.exists() else checkpoint.load_newest(folder)
    if newest is not None:
        _, content = newest
        write_json(path, content["plan"])
    return path.exists()


def index_of(folder: Path) -> Path:
    """Return the path of the index of a planned run's scans.

    Raises:
        AutoregError: the file is missing.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        raise AutoregError(
            f"{index} is missing, so the run's scans are not known; put it back, or use another "
            "--name",
            code="folder-index-missing",
        )
    return index


def matching_plan(folder: Path, request: Request) -> Plan:
    """Return the plan on disk if it was made for the same request.

    More steps may be asked for than the plan has; the plan is returned as it is.

    Raises:
        UsageError: the request differs in anything else.
    """
    plan = read_plan(folder)
    changes = _changed_settings(folder, plan, request)
    if changes:
        raise UsageError(
            f"the run '{request.name}' exists with other settings ({'; '.join(changes)}); use "
            "another --name, or type the line it was started with (only --steps may grow)",
            code="run-other-settings",
        )
    return plan


def is_planned_anew(folder: Path, request: Request) -> bool:
    """Return whether a request with other settings replaces the plan on disk.

    It does so until there is a checkpoint, because nothing was trained by the plan yet. The user
    may have edited the old plan, so it is kept as ``plan_replaced.json``.
    """
    if checkpoint.exists(folder) or (folder / CARD_NAME).exists():
        return False
    changes = _changed_settings(folder, read_plan(folder), request)
    if not changes:
        return False

    shutil.copy(folder / PLAN_NAME, folder / REPLACED_PLAN_NAME)
    log.info(
        "planning again with other settings, as nothing was trained yet; the earlier plan is kept "
        "in %s",
        folder / REPLACED_PLAN_NAME,
        # The settings may be paths, which are kept out of the run's log.
        extra=terminal_only(f" ({'; '.join(changes)})"),
    )
    return True


def _changed_settings(folder: Path, plan: Plan, request: Request) -> list[str]:
    """Return how a request differs from the one that the plan was made for.

    A larger number of steps is no difference.
    """
    before = from_jsonable(Request, plan.request, f"{folder / PLAN_NAME}: request")
    changes = differences(replace(before, **NO_LENGTH), replace(request, **NO_LENGTH))

    is_longer = request.num_steps is not None and request.num_steps >= plan.optim.num_steps
    if not is_longer:
        lengths_before = {name: getattr(before, name) for name in NO_LENGTH}
        lengths_now = {name: getattr(request, name) for name in NO_LENGTH}
        for line in differences(lengths_before, lengths_now):
            if not line.startswith("num_steps"):
                changes.append(line)
        # Compared with the plan's number, because the request may have left it to be planned.
        if before.num_steps != request.num_steps:
            changes.append(f"num_steps: {plan.optim.num_steps} -> {request.num_steps}")
    return changes


def continued_plan(folder: Path, request: Request) -> Plan:
    """Return the plan on disk with the number of steps that is asked for now.

    Raises:
        UsageError: the request differs in anything else.
        PlanError: the plan was changed after training began.
    """
    plan = matching_plan(folder, request)
    newest = checkpoint.load_newest(folder)
    if newest is not None:
        path, content = newest
        # Reading it as a plan gives a plan of an older version the defaults of newer keys.
        trained = to_jsonable(from_jsonable(Plan, content["plan"], str(path)))
        changes = differences(_fixed_values(trained), _fixed_values(to_jsonable(plan)))
        if changes:
            raise PlanError(
                f"{folder / PLAN_NAME} was changed after training began ({'; '.join(changes)}); "
                "undo the change, or use another --name",
                code="plan-changed",
            )

    if request.num_steps is not None and request.num_steps > plan.optim.num_steps:
        optim = replace(plan.optim, num_steps=request.num_steps)
        plan = replace(plan, optim=optim, request=to_jsonable(request))
        write_plan(folder, plan)
    return plan


def _fixed_values(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a plan that may not change once training has begun."""
    fixed = {key: value for key, value in plan.items() if key not in ("request", "reasons")}
    # A run may be prolonged, and the limits of its health may be moved.
    for part, free_keys in MAY_CHANGE.items():
        fixed[part] = {key: value for key, value in fixed[part].items() if key not in free_keys}
    return fixed


def is_finished(folder: Path, plan: Plan) -> bool:
    """Return whether the folder holds the encoder, trained to the plan's last step.

    Raises:
        WeightsError: its card is damaged.
    """
    has_encoder = (folder / CARD_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
    return has_encoder and read_card(folder).num_steps >= plan.optim.num_steps


@contextmanager
def logged_to(folder: Path, name: str = "training_log") -> Iterator[None]:
    """Write everything that is logged inside to ``<name>_*.txt`` in the folder as well."""
    path = folder / f"{name}_{datetime.now():%Y_%m_%d_%H_%M_%S}.txt"
    # A call that logs nothing leaves no file.
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    logger = logging.getLogger("nnunet_autoreg")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
