"""What the user typed for a pretraining, and the folder of the run that it describes.

File 2 of 11 in reading order.

The first half refuses what can be refused before any scan is read. The second half is the run's
folder: its lock, its plan, its log, and whether a request continues the run that lies in it.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.private import PATH_FIELDS, hide_paths, show_paths, terminal_only
from nnunet_autoreg.corpus.spacing import MEDIAN, parse_policy
from nnunet_autoreg.errors import AutoregError, PlanError, UsageError, WeightsError, did_you_mean
from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.io.addresses import HUB, advice_for, is_address
from nnunet_autoreg.model.card import (
    CARD_NAME,
    RUNS_FOLDER,
    WEIGHTS_NAME,
    EncoderCard,
    check_run_name,
    read_card,
)
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.nnunet_api import dataset_number
from nnunet_autoreg.objective_kinds import objective_kinds, presets, with_objective
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE, KINDS, Plan, literal, override
from nnunet_autoreg.plan_check import check_names
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.records import (
    differences,
    from_jsonable,
    read_json,
    remove_temporary,
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

WIDTHS = ("features_per_stage", "n_blocks_per_stage")
"""Arguments of a CNN by which its encoder is recognised; strides and kernels may differ."""


@dataclass(frozen=True)
class Request:
    """The options of the user, except those that may change when a run is continued (device, dry
    run).

    Attributes:
        datasets, folders: inputs; folders as absolute paths.
        exclude, manifest: absolute paths of files, or None.
        init: absolute path of weights, or the address of a repository on Hugging Face, or None.
        num_steps, batch_size: None to have them planned.
        num_epochs, num_hours: other ways to say how long to train; at most one of the three.
        gpu_memory_gib: memory to plan for; None for all there is.
        spacing: policy of the target spacings, or "z,y,x" in mm.
        settings: the ``--set`` arguments.
        split_4d: every volume of a 4D file or series is a scan.
        sequences: kinds of sequences with their weights, e.g. "contrast=0.5"; empty to have them
            planned.
        boxes: absolute path of a CSV that says where structures lie, or None.
        objective: name of an objective (``objective_kinds``).
        preset: name of one of its presets, or "".
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
    objective: str = DEFAULT_OBJECTIVE
    preset: str = ""

    def check(self) -> "Request":
        """Return the request if it makes sense.

        Raises:
            UsageError: there is no input, or a name or number is impossible.
        """
        if not self.datasets and not self.folders:
            raise UsageError(
                "no scans given; name nnU-Net datasets with -d and / or folders with -i",
                code="request-no-scans",
            )
        check_run_name(self.name)
        self._check_numbers()
        self._check_presets()
        parse_policy(self.spacing)
        return self

    def _check_numbers(self) -> None:
        lengths = {
            "--steps": self.num_steps,
            "--epochs": self.num_epochs,
            "--hours": self.num_hours,
        }
        given = [flag for flag, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)} both say how long to train; give one of them",
                code="request-two-lengths",
            )

        # Epochs are turned into steps by the batch size, before --set is applied.
        keys = [setting.partition("=")[0].strip() for setting in self.settings]
        if self.num_epochs is not None and "optim.batch_size" in keys:
            raise UsageError(
                "--set optim.batch_size cannot be combined with --epochs, because epochs are "
                "counted in steps before it is applied; give the batch size as --batch",
                code="request-epochs-batch",
            )

        for flag, count in (("--steps", self.num_steps), ("--batch", self.batch_size)):
            if count is not None and count < 1:
                raise UsageError(f"{flag} {count}: must be at least 1", code="request-number")

        for flag, value in {**lengths, "--gpu-memory": self.gpu_memory_gib}.items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(
                    f"{flag} {value:g}: must be a number greater than 0",
                    code="request-number",
                )

        if not 0 <= self.seed < 2**32:
            raise UsageError(
                f"--seed {self.seed}: must lie between 0 and {2**32 - 1}",
                code="request-number",
            )

    def _check_presets(self) -> None:
        known_objectives = objective_kinds()
        if self.objective not in known_objectives:
            raise UsageError(
                f"--objective {self.objective}: does not exist; "
                f"{did_you_mean(self.objective, known_objectives)}",
                code="request-unknown-objective",
            )
        if not self.preset:
            return
        known_presets = presets()
        if self.preset not in known_presets:
            raise UsageError(
                f"--preset {self.preset}: does not exist; "
                f"{did_you_mean(self.preset, known_presets)}",
                code="request-unknown-preset",
            )
        kind, _ = known_presets[self.preset]
        if self.objective != kind.name:
            raise UsageError(
                f"--preset {self.preset} is {kind.name} and cannot be combined with "
                f"--objective {self.objective}; give one of them",
                code="request-preset-objective",
            )


def check_inputs(request: Request, card: EncoderCard | None = None) -> None:
    """Refuse wrong inputs before any scan is read.

    Args:
        card: card of the weights that ``--init`` names.

    Raises:
        UsageError: a path does not exist.
        PlanError: a setting is unknown, mistyped, or has an unknown name as its value.
    """
    parse_kinds(request.sequences)
    check_paths(request)

    # A plan for one imaginary scan shows whether the settings have known names and fitting types.
    one_scan = Pool(1, (1.0, 1.0, 1.0), (64, 64, 64), 64**3, None)
    hardware = Hardware("cpu", 1.0)
    overrides = overrides_of(request, card)

    # Which family will suit the scans is not known yet, and a setting may be of either.
    is_open = overrides.encoder == "auto"
    encoders = ("resenc_tiny", "primus_tiny") if is_open else (overrides.encoder,)
    errors = []
    for encoder in encoders:
        try:
            plan = make_plan(
                request.name,
                one_scan,
                hardware,
                replace(overrides, encoder=encoder),
                request.seed,
                {},
                lambda *_: (0.0, 0.0),
            )
            check_names(override(with_presets(plan, request), list(request.settings)))
            return
        except PlanError as error:
            errors.append(error)
    raise errors[-1]


def check_paths(request: Request) -> None:
    """Refuse inputs that do not exist.

    Raises:
        UsageError: a path does not exist, is neither a file nor a folder, or is an address on the
            web.
    """
    paths = [("-i", folder) for folder in request.folders]
    paths += [
        ("--exclude", request.exclude or ""),
        ("--manifest", request.manifest or ""),
        ("--init", request.init or ""),
        ("--boxes", request.boxes or ""),
    ]
    for flag, path in paths:
        if not path or (flag == "--init" and path.startswith(HUB)):
            continue
        if is_address(path):
            raise UsageError(f"{flag} {advice_for(path)}", code="request-path-address")
        if not Path(path).exists():
            raise UsageError(f"{flag} {path}: does not exist", code="request-path-missing")
        # Reading a pipe would wait for its other end forever.
        if not (Path(path).is_file() or Path(path).is_dir()):
            raise UsageError(
                f"{flag} {path}: is neither a file nor a folder",
                code="request-path-kind",
            )


def parse_kinds(words: Sequence[str]) -> dict[str, float]:
    """Return the weights that ``--sequences`` words such as ``spatial`` or ``contrast=0.5`` give.

    Raises:
        UsageError: a kind is unknown or named twice, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for word in words:
        kind, equals, number = word.partition("=")
        if kind not in KINDS:
            raise UsageError(
                f"--sequences {word}: there are no '{kind}' sequences; {did_you_mean(kind, KINDS)}",
                code="request-unknown-kind",
            )
        if kind in weights:
            raise UsageError(
                f"--sequences {word}: '{kind}' is named twice",
                code="request-repeated-kind",
            )
        try:
            weights[kind] = float(number) if equals else 1.0
        except ValueError as error:
            raise UsageError(
                f"--sequences {word}: '{number}' is not a number; write it like {kind}=0.5",
                code="request-kind-weight",
            ) from error
        if not 0 < weights[kind] < math.inf:
            raise UsageError(
                f"--sequences {word}: the weight must be greater than 0",
                code="request-kind-weight",
            )
    return weights


def with_presets(plan: Plan, request: Request) -> Plan:
    """Return the plan for the requested objective and preset.

    Values that the user typed beside a preset take precedence over it.
    """
    plan = with_objective(plan, request.objective)
    if not request.preset:
        return plan
    _, preset = presets()[request.preset]
    typed = {"sequence.weights": request.sequences, "optim.batch_size": request.batch_size}
    return preset.apply(plan, [key for key, value in typed.items() if value])


def overrides_of(request: Request, card: EncoderCard | None = None) -> Overrides:
    """Return the values that the user fixed and that must not be planned.

    The encoder and its token size are those of the weights that training starts from, where none
    is named. The batch size of a preset is included, because the number of steps follows from it.

    Args:
        card: card of the weights that ``--init`` names.
    """
    encoder, arguments = request.encoder, None
    token_size = typed_token_size(request.settings)
    if card is not None and encoder in ("auto", plannable_name(card)):
        encoder = plannable_name(card)
        token_size = token_size or card.token_size_vox
        # A CNN keeps the strides, kernels and depth that it was trained with.
        if family_of(card.class_path) == RESENC:
            arguments = card.arguments

    _, preset = presets()[request.preset] if request.preset else (None, None)
    preset_batch = None if preset is None else preset.batch_size
    return Overrides(
        encoder=encoder,
        batch_size=request.batch_size or preset_batch,
        num_steps=request.num_steps,
        num_epochs=request.num_epochs,
        num_hours=request.num_hours,
        single_tokens=preset is not None and preset.single_tokens,
        token_size_vox=token_size,
        arguments=arguments,
    )


def plannable_name(card: EncoderCard) -> str:
    """Return the value of ``--encoder`` for a network of this size.

    A CNN of other strides, kernels or depth has the name of the encoder of the same widths.

    Raises:
        WeightsError: no encoder has these widths (code "weights-other-encoder").
    """
    if card.encoder in ENCODERS:
        return card.encoder

    if family_of(card.class_path) == RESENC:
        for size in ENCODERS.values():
            if size.family == RESENC and _begins_alike(size.arguments, card.arguments):
                return size.name
    raise WeightsError(
        f"--init: no encoder has the widths of '{card.encoder}' ({card.arguments}), so it cannot "
        "be pretrained further; to fine-tune it as it is, use autoreg_weights import",
        code="weights-other-encoder",
    )


def _begins_alike(ours: dict[str, object], theirs: dict[str, object]) -> bool:
    """Return whether two CNNs have the same widths and blocks in the stages that both have."""
    for key in WIDTHS:
        first, second = ours[key], theirs[key]
        if not isinstance(first, list) or not isinstance(second, list):
            return False
        if any(a != b for a, b in zip(first, second, strict=False)):
            return False
    return True


def typed_token_size(settings: Sequence[str]) -> Size | None:
    """Return the token size (z, y, x) that ``--set`` gives among an encoder's arguments.

    Crop and blocks are then planned for it. A value that is not a size gives None: the check of
    the plan refuses it and names it.
    """
    found: object = None
    for setting in settings:
        key, _, text = setting.partition("=")
        value = literal(text.strip())
        if key.strip() == "encoder.arguments" and isinstance(value, dict):
            found = value.get("patch_embed_size", found)
        elif key.strip() == "encoder.arguments.patch_embed_size":
            found = value

    if not isinstance(found, list) or len(found) != 3:
        return None
    # In Python True is an int as well.
    is_size = all(type(side) is int and side > 0 for side in found)
    return as_size(found) if is_size else None


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
        remove_temporary(folder)
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
        "planning again with other settings, because nothing was trained yet; the earlier plan is "
        "kept in %s",
        folder / REPLACED_PLAN_NAME,
        # The settings may be paths, which are kept out of the run's log.
        extra=terminal_only(f" ({'; '.join(changes)})"),
    )
    return True


def _changed_settings(folder: Path, plan: Plan, request: Request) -> list[str]:
    """Return how a request differs from the one that the plan was made for.

    A larger number of steps is not a difference.
    """
    before = from_jsonable(Request, plan.request, f"{folder / PLAN_NAME}: request")
    # The same datasets may be given by name or by number.
    if list(map(dataset_number, before.datasets)) == list(map(dataset_number, request.datasets)):
        before = replace(before, datasets=request.datasets)

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
    # A call that logs nothing leaves no file. Names of files may not be valid text.
    handler = logging.FileHandler(path, encoding="utf-8", delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    logger = logging.getLogger("nnunet_autoreg")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
