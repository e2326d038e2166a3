"""Open weights files of other projects without running any code in them."""

import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.ar_ssl4m import is_ar_ssl4m
from nnunet_autoreg.errors import WeightsError, shell_quoted
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.io.archive import DAMAGED, would_fill_the_disk
from nnunet_autoreg.machine import is_whole_number
from nnunet_autoreg.model.card import CARD_NAME, MAX_CARD_BYTES, WEIGHTS_NAME
from nnunet_autoreg.records import MEND_YOURS, read_json
from nnunet_autoreg.safe_load import load_plain

log = logging.getLogger(__name__)

RUN, NNSSL, AR_SSL4M = "run", "nnssl", "AR-SSL4M"
NO_PLAN, UNKNOWN = "checkpoint without a plan", "unknown"
OWN_KEY = "nnunet_autoreg"
"""The key that our own exports add to a file of a common format."""
TRAINED, HUGGING_FACE = "trained nnU-Net model", "Hugging Face"
ARCHIVE_SUFFIX, FOLD = ".zip", "fold_"
MAX_UNPACKED = 2**35
"""Bytes of the largest checkpoint that is unpacked from an archive."""
MODEL_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Checkpoints of a trained nnU-Net model, the most useful first."""
CHECKPOINT_NAME, ADAPTATION_NAME = "checkpoint_final.pth", "adaptation_plan.json"
MODEL_NAME, CONFIG_NAME = "model.safetensors", "config.json"
"""Weights and description in a repository on Hugging Face."""
PLAN_KEY, WEIGHTS_KEY = "nnssl_adaptation_plan", "network_weights"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
MAX_NAMES, MAX_VALUES = 3, 2_000_000
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DDP and torch.compile put before a key."""


@dataclass(frozen=True)
class WeightsFile:
    """Hold a weights file and its content.

    Attributes:
        kind: one of the constants above.
        file: the file itself.
        tensors: on the CPU, without the prefixes of wrappers; empty if there is no state dict.
        plan: nnssl's adaptation plan that the file holds, or None.
        plan_beside: nnssl's adaptation plan from ``adaptation_plan.json``, or None.
        rest: everything else that the file holds.
        member: name of the checkpoint inside an archive; "" if ``file`` is the checkpoint.
    """

    kind: str
    file: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    plan_beside: dict[str, Any] | None = None
    rest: dict[str, Any] = field(default_factory=dict)
    member: str = ""

    @property
    def adaptation_plan(self) -> dict[str, Any]:
        """Return the plan in the file, or else the plan beside it.

        Raises:
            WeightsError: there is neither (code "weights-no-adaptation-plan").
        """
        found = self.plan if self.plan is not None else self.plan_beside
        if found is None:
            raise WeightsError(
                f"{self.file} holds no {PLAN_KEY}; add --adaptation-plan FILE, or put "
                f"{ADAPTATION_NAME} beside it",
                code="weights-no-adaptation-plan",
            )
        return found


def open_source(path: Path, plan_file: Path | None = None) -> WeightsFile:
    """Open a weights file, or the one in a folder, and find out its kind.

    Args:
        plan_file: an ``adaptation_plan.json``; None looks for one beside the weights.

    Raises:
        WeightsError: the file does not exist (code "weights-missing"), is one of several in the
            folder (code "weights-ambiguous"), cannot be read, or holds more than tensors and plain
            values.
    """
    file = _weights_of(path)
    # Finished runs are read by their card, when their tensors are wanted.
    if file.name == WEIGHTS_NAME and (file.parent / CARD_NAME).is_file():
        return WeightsFile(RUN, file)

    # ``config.json`` beside the weights shows that they are our own export for Hugging Face.
    config_file = file.parent / CONFIG_NAME
    if file.suffix == ".safetensors" and config_file.is_file():
        config = read_json(config_file, MEND_YOURS, MAX_CARD_BYTES)
        if isinstance(config, dict) and OWN_KEY in config:
            return WeightsFile(HUGGING_FACE, file, _only_tensors(read_content(file)), rest=config)

    is_archive = file.suffix == ARCHIVE_SUFFIX
    content, member = _read_archive(file) if is_archive else (read_content(file), "")

    # nnssl's plan: the one in the file, and the one that the user names or that is beside it.
    if plan_file is not None and not plan_file.is_file():
        raise WeightsError(f"--adaptation-plan {plan_file} does not exist", code="weights-missing")
    beside = plan_file or file.parent / ADAPTATION_NAME
    plan_beside = _as_plan(read_json(beside), beside) if beside.is_file() else None
    plan = content.get(PLAN_KEY)
    if plan is not None:
        plan = _as_plan(plan, file)

    rest = dict(content)
    for known_key in (WEIGHTS_KEY, PLAN_KEY, "state_dict"):
        rest.pop(known_key, None)

    # nnU-Net's trainer wrote this file: checkpoints of pretraining know no labelled dataset.
    init_arguments = content.get("init_args")
    is_trained = (
        isinstance(init_arguments, Mapping)
        and "dataset_json" in init_arguments
        and "trainer_name" in content
    )

    # The state dict is one value of a checkpoint, or the whole file (None).
    for key in (WEIGHTS_KEY, "state_dict", None):
        tensors = _only_tensors(content if key is None else content.get(key))
        if not tensors:
            continue

        others = {} if key is None else rest
        if is_ar_ssl4m(tensors):
            return WeightsFile(AR_SSL4M, file, tensors, rest=others)
        if plan is None and key == WEIGHTS_KEY and is_trained:
            return WeightsFile(TRAINED, file, tensors, rest=rest, member=member)
        if plan is not None or plan_beside is not None:
            return WeightsFile(NNSSL, file, tensors, plan, plan_beside, rest)
        kind = NO_PLAN if key == WEIGHTS_KEY else UNKNOWN
        return WeightsFile(kind, file, tensors, rest=others)
    return WeightsFile(UNKNOWN, file, rest=content)


def _weights_of(path: Path) -> Path:
    """Return the file itself, or the weights file in a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist", code="weights-missing")

    # The names of finished runs, and of the formats that are exported, come before all others.
    for name in (WEIGHTS_NAME, CHECKPOINT_NAME, MODEL_NAME):
        if (path / name).is_file():
            return path / name

    # The folder of a trained nnU-Net model has a folder for each fold.
    relative = [file.relative_to(path).as_posix() for file in path.glob(f"{FOLD}*/*.pth")]
    if relative:
        return path / checkpoint_of_model(relative, path)

    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = names_text([file.name for file in found], MAX_NAMES)
        listed = f" ({names})" if names else ""
        raise WeightsError(
            f"{path} holds {len(found)} weights files{listed}; give the path of one file",
            code="weights-ambiguous",
        )
    return found[0]


def checkpoint_of_model(names: Iterable[str], where: Path) -> str:
    """Return the name of the checkpoint that represents a trained nnU-Net model.

    It is the final one, or else the best one, of the fold ``all`` or else of the lowest fold.

    Args:
        names: names of files, with slashes, below the model's folder or in an archive.

    Raises:
        WeightsError: there is no checkpoint of a fold (code "weights-missing"), or there are
            several models (code "weights-ambiguous").
    """
    candidates: dict[tuple[int, int], str] = {}
    models = set()
    for name in sorted(names):
        path = PurePosixPath(name)
        fold = path.parent.name.removeprefix(FOLD)
        if path.name not in MODEL_CHECKPOINTS or not path.parent.name.startswith(FOLD):
            continue
        models.add(path.parent.parent.as_posix())
        # "all" comes before every number.
        number = int(fold) if is_whole_number(fold) else -1
        candidates[MODEL_CHECKPOINTS.index(path.name), number] = name

    if not candidates:
        raise WeightsError(
            f"{where} holds no {' or '.join(MODEL_CHECKPOINTS)} of a fold; give the folder or the "
            "zip of a trained nnU-Net model",
            code="weights-missing",
        )
    if len(models) > 1:
        raise WeightsError(
            f"{where} holds {len(models)} models ({names_text(sorted(models), MAX_NAMES)}); unpack "
            "it, and give the folder of one of them",
            code="weights-ambiguous",
        )
    return candidates[min(candidates)]


def _read_archive(file: Path) -> tuple[dict[str, Any], str]:
    """Return the content and the name of the checkpoint in a zip of a trained nnU-Net model.

    Nothing else is unpacked, and the name inside the archive is not a path on the disk.

    Raises:
        WeightsError: the archive is damaged or far too large (code "weights-unreadable"), holds no
            checkpoint or several models, or its checkpoint cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / CHECKPOINT_NAME
        try:
            with zipfile.ZipFile(file) as archive:
                member = checkpoint_of_model(archive.namelist(), file)
                info = archive.getinfo(member)
                if info.file_size > MAX_UNPACKED or would_fill_the_disk(info):
                    raise OSError(f"{member} would unpack to more than any checkpoint")
                with archive.open(member) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target)
        except DAMAGED as error:
            raise WeightsError(
                f"{file} cannot be unpacked ({error}); export the model again",
                code="weights-unreadable",
            ) from error

        try:
            content = read_content(unpacked)
        except WeightsError as error:
            # The user does not know the unpacked file.
            message = str(error).replace(str(unpacked), f"{file} ({member})")
            raise WeightsError(message, code=error.code) from error
    return content, member


def read_content(file: Path) -> dict[str, Any]:
    """Return the content of a ``torch.save`` or safetensors file, with tensors on the CPU.

    Raises:
        WeightsError: the file is damaged, or reading it would run code. No code is run.
    """
    if file.suffix == ".safetensors":
        # A safetensors file holds nothing but tensors.
        from nnunet_autoreg.finetune.load import read_tensors

        return dict(read_tensors(file))

    content = load_plain(file)
    _refuse_endless(content, file)
    if not isinstance(content, dict):
        raise WeightsError(
            f"{file} holds a {type(content).__name__} instead of a dictionary of tensors",
            code="weights-no-dictionary",
        )
    return content


def _refuse_endless(content: Any, file: Path) -> None:
    """Refuse lists that contain one another many times.

    A few hundred bytes of such lists would become gigabytes when they are written out.

    Raises:
        WeightsError: there are more values than any checkpoint has (code "weights-endless").
    """
    # Every list is looked at once, however often it occurs. By its id: how many values it holds.
    num_values: dict[int, int] = {}
    pending: list[tuple[Any, bool]] = [(content, False)]
    while pending:
        value, is_counted = pending.pop()
        if isinstance(value, Mapping):
            inner = list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            inner = list(value)
        else:
            continue

        if is_counted:
            total = 1 + sum(num_values.get(id(item), 1) for item in inner)
            num_values[id(value)] = min(total, MAX_VALUES + 1)
        elif id(value) not in num_values:
            # A list that leads back to itself has no end.
            num_values[id(value)] = MAX_VALUES + 1
            pending.append((value, True))
            pending.extend((item, False) for item in inner)

    if num_values.get(id(content), 1) > MAX_VALUES:
        raise WeightsError(
            f"{file} holds more than {MAX_VALUES:,} values, or lists that contain one another "
            "without end; use another file",
            code="weights-endless",
        )


def _as_plan(data: Any, where: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise WeightsError(
            f"{where} holds a {type(data).__name__} instead of an adaptation plan",
            code="weights-bad-adaptation-plan",
        )
    return data


def trained_model_line(source: WeightsFile) -> str:
    """Return one line that describes a trained nnU-Net model."""
    arguments = source.rest["init_args"]
    plans = arguments.get("plans")
    named = plans if isinstance(plans, Mapping) else {}

    # The file comes from anywhere, so each part may be missing or very long.
    parts = (
        source.rest["trainer_name"],
        named.get("plans_name"),
        arguments.get("configuration"),
        named.get("dataset_name"),
    )
    description = ", ".join(str(part)[:80] for part in parts if part)
    return f"a trained nnU-Net model ({description})"


def trained_model_next(source: WeightsFile) -> str:
    """Return the command that starts a training from a trained nnU-Net model."""
    return (
        "nnUNetv2_train DATASET CONFIGURATION FOLD -p PLANS_OF_THE_SAME_NETWORK "
        f"-pretrained_weights {shell_quoted(str(source.file))}"
    )


def _only_tensors(candidate: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict without prefixes; empty if it is not a state dict."""
    if not isinstance(candidate, Mapping) or not candidate:
        return {}
    named = {}
    for key, value in candidate.items():
        if isinstance(value, Tensor):
            named[str(key)] = value
    # A few values beside the tensors are common; a dictionary of anything else is not a state dict.
    if len(named) < len(candidate) / 2:
        return {}

    tensors = {}
    for name, value in named.items():
        key = name
        while key.startswith(WRAPPERS):
            key = key.removeprefix(WRAPPERS[0]).removeprefix(WRAPPERS[1])
        # If only a part of a network was compiled, the mark is inside the key.
        tensors[key.replace("._orig_mod.", ".")] = value
    return tensors


def plain(value: Any) -> Any:
    """Return ``value`` if it can be written as JSON, else its text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value
