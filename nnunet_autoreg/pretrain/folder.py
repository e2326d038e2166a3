"""A run's folder: its name, its lock, its files, and whether the line typed is the line it was made
with.
"""

import errno
import fcntl
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.private import PATH_FIELDS, hide_paths, show_paths
from nnunet_autoreg.corpus.spacing import MEDIAN, parse_policy
from nnunet_autoreg.errors import AutoregError, PlanError, UsageError, did_you_mean
from nnunet_autoreg.model.card import (
    CARD_NAME,
    RUNS_FOLDER,
    WEIGHTS_NAME,
    check_run_name,
    read_card,
)
from nnunet_autoreg.plan import OBJECTIVES, Plan
from nnunet_autoreg.presets import PRESETS
from nnunet_autoreg.records import (
    TEMPORARY_FILES,
    differences,
    from_jsonable,
    read_json,
    to_jsonable,
    write_json,
)

PLAN_NAME, INDEX_NAME, LOCK_NAME = "plan.json", "scans.csv", ".lock"
MAY_CHANGE = {
    "optim": ("num_steps",),
    "run": ("sharding", "min_token_variance", "min_effective_rank"),
}
"""Values of the plan that no step of training depends on."""
NO_LENGTH: dict[str, Any] = {"num_steps": None, "num_epochs": None, "num_hours": None}


@dataclass(frozen=True)
class Request:
    """What the user typed, less what may differ between a run and its continuation (device, dry
    run).

    Attributes:
        datasets, folders: inputs; folders as absolute paths.
        exclude, manifest, init: absolute paths of files, or None.
        num_steps, batch_size: None to have them planned.
        num_epochs, num_hours: the length in other words; at most one of the three.
        gpu_memory_gib: memory to plan for; None for all there is.
        spacing: policy of the target spacings, or "z,y,x" in mm.
        settings: the ``--set`` arguments.
        split_4d: every volume of a 4D file or series is a scan.
        sequences: kinds of sequences with their weights, e.g. "contrast=0.5"; empty to have them
            planned.
        boxes: absolute path of a CSV that says where structures lie, or None.
        objective: of ``plan.OBJECTIVES``.
        preset: of ``presets.PRESETS``, or "".
    """

    name: str
    datasets: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    encoder: str = "auto"
    num_steps: int | None = None
    batch_size: int | None = None
    seed: int = 0
    modality: str | None = None
    exclude: str | None = None
    manifest: str | None = None
    init: str | None = None
    settings: tuple[str, ...] = ()
    num_epochs: float | None = None
    num_hours: float | None = None
    gpu_memory_gib: float | None = None
    spacing: str = MEDIAN
    split_4d: bool = False
    sequences: tuple[str, ...] = ()
    boxes: str | None = None
    objective: str = "autoregressive"
    preset: str = ""

    def check(self) -> "Request":
        """Return the request if it makes sense.

        Raises:
            UsageError: no input, an impossible name or number.
        """
        if not self.datasets and not self.folders:
            raise UsageError(
                "no scans given; name nnU-Net datasets with -d and / or folders with -i"
            )
        check_run_name(self.name)
        for flag, value in (("--steps", self.num_steps), ("--batch", self.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value}: must be at least 1")
        self._check_length_and_memory()
        self._check_presets()
        parse_policy(self.spacing)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: must lie between 0 and {2**32 - 1}")
        return self

    def _check_presets(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(
                f"--objective {self.objective}: does not exist; "
                f"{did_you_mean(self.objective, OBJECTIVES)}"
            )
        if self.preset and self.preset not in PRESETS:
            raise UsageError(
                f"--preset {self.preset}: does not exist; {did_you_mean(self.preset, PRESETS)}"
            )
        if self.preset and self.objective != "autoregressive":
            raise UsageError(
                f"--preset {self.preset} is autoregressive and excludes --objective "
                f"{self.objective}; give one of them"
            )

    def _check_length_and_memory(self) -> None:
        lengths = {
            "--steps": self.num_steps,
            "--epochs": self.num_epochs,
            "--hours": self.num_hours,
        }
        given = [flag for flag, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both say how long to train; give one of them")
        if self.num_epochs is not None and any(
            setting.partition("=")[0].strip() == "optim.batch_size" for setting in self.settings
        ):
            raise UsageError(
                "--set optim.batch_size comes after --epochs have been counted in steps; give the "
                "batch as --batch"
            )
        for flag, value in {**lengths, "--gpu-memory": self.gpu_memory_gib}.items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{flag} {value:g}: must be a number greater than 0")


def run_folder(results: Path, name: str) -> Path:
    """Where the run of this name lives."""
    return results / RUNS_FOLDER / name


@contextmanager
def locked(folder: Path, instead: str = "use another --name") -> Iterator[None]:
    """Hold the run's folder.

    The lock is the process's own: it ends with it and no worker inherits it.

    Args:
        instead: what else the user can do where another process holds it.

    Raises:
        AutoregError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK_NAME).open("a+")
    except OSError as error:
        raise AutoregError(
            f"{folder} cannot be written ({error.strerror}); check the rights of nnUNet_results"
        ) from error
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise AutoregError(
                    f"another process is working in {folder}; wait for it, or {instead}"
                ) from error
            raise AutoregError(
                f"{folder / LOCK_NAME} cannot be locked ({error.strerror}); does this file system "
                "know locks?"
            ) from error
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        for torn in folder.glob(TEMPORARY_FILES):
            torn.unlink()
        yield


def read_plan(folder: Path) -> Plan:
    """The run's plan.

    Raises:
        PlanError: it cannot be read, or holds unknown or wrong values.
    """
    path = folder / PLAN_NAME
    plan = from_jsonable(Plan, read_json(path), str(path))
    return replace(plan, request=show_paths(plan.request, PATH_FIELDS, folder))


def public_plan(plan: Plan) -> Plan:
    """Return the plan as it is written: without the paths of the inputs."""
    return replace(plan, request=hide_paths(plan.request, PATH_FIELDS)[0])


def write_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.json``."""
    write_json(folder / PLAN_NAME, public_plan(plan))


def has_plan(folder: Path) -> bool:
    """Whether the run was planned; a plan that was lost comes back from the newest checkpoint.

    Raises:
        CheckpointError: the plan is lost, and so is the checkpoint.
    """
    path = folder / PLAN_NAME
    newest = None if path.exists() else checkpoint.load_newest(folder)
    if newest is not None:
        write_json(path, newest[1]["plan"])
    return path.exists()


def index_of(folder: Path) -> Path:
    """The index of a planned run's scans.

    Raises:
        AutoregError: it is lost.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        raise AutoregError(
            f"{index} is missing, so the run's scans are not known; put it back, or use another "
            "--name"
        )
    return index


def matching_plan(folder: Path, request: Request) -> Plan:
    """The plan on disk, for the same request; more steps may be asked for.

    Raises:
        UsageError: the request differs in anything else.
    """
    plan = read_plan(folder)
    before = from_jsonable(Request, plan.request, f"{folder / PLAN_NAME}: request")
    other = differences(replace(before, **NO_LENGTH), replace(request, **NO_LENGTH))
    fewer = request.num_steps is None or request.num_steps < plan.optim.num_steps
    if fewer:
        lengths = (
            {name: getattr(before, name) for name in NO_LENGTH},
            {name: getattr(request, name) for name in NO_LENGTH},
        )
        other += [line for line in differences(*lengths) if not line.startswith("num_steps")]
        if before.num_steps != request.num_steps:
            other.append(f"num_steps: {plan.optim.num_steps} -> {request.num_steps}")
    if other:
        raise UsageError(
            f"the run '{request.name}' exists with other settings ({'; '.join(other)}); use "
            "another --name, or type the line "
            "it was started with (only --steps may grow)"
        )
    return plan


def continued_plan(folder: Path, request: Request) -> Plan:
    """The plan on disk as ``matching_plan`` returns it, with the steps now asked for.

    Raises:
        UsageError: the request differs in anything else, or the plan was changed after training
            began.
    """
    plan = matching_plan(folder, request)
    _refuse_changed_plan(folder, plan)
    if request.num_steps is not None and request.num_steps > plan.optim.num_steps:
        plan = replace(
            plan,
            optim=replace(plan.optim, num_steps=request.num_steps),
            request=to_jsonable(request),
        )
        write_plan(folder, plan)
    return plan


def _refuse_changed_plan(folder: Path, plan: Plan) -> None:
    newest = checkpoint.load_newest(folder)
    if newest is None:
        return
    # Through the record, so that a plan of an older version gets the defaults of keys that are
    # newer.
    trained = to_jsonable(from_jsonable(Plan, newest[1]["plan"], str(newest[0])))
    changed = differences(_essence(trained), _essence(to_jsonable(plan)))
    if changed:
        raise PlanError(
            f"{folder / PLAN_NAME} was changed after training began ({'; '.join(changed)}); undo "
            "the change, or use another --name"
        )


def _essence(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what may not change once training has begun.

    What may change are the length, how weights are spread, which features count as collapsed, the
    request and the reasons.
    """
    kept = {key: value for key, value in plan.items() if key not in ("request", "reasons")}
    for room, free in MAY_CHANGE.items():
        kept[room] = {key: value for key, value in kept[room].items() if key not in free}
    return kept


def is_finished(folder: Path, plan: Plan) -> bool:
    """Whether the run left its encoder, trained to the plan's length.

    Raises:
        WeightsError: its card was damaged.
    """
    whole = (folder / CARD_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
    return whole and read_card(folder).num_steps >= plan.optim.num_steps


class log_file(logging.FileHandler):
    """While it is open, everything logged also goes to ``<name>_*.txt`` in the run's folder."""

    def __init__(self, folder: Path, name: str = "training_log"):
        super().__init__(
            folder / f"{name}_{datetime.now():%Y_%m_%d_%H_%M_%S}.txt", encoding="utf-8", delay=True
        )
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        # A log is sent along with a question; the terminal shows these lines.
        self.addFilter(lambda record: not getattr(record, "names_files", False))

    def __enter__(self) -> "log_file":
        logging.getLogger("nnunet_autoreg").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("nnunet_autoreg").removeHandler(self)
        self.close()
