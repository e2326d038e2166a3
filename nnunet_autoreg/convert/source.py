"""Other people's weight files, opened without running anything that is in them."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.ar_ssl4m import is_ar_ssl4m
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.model.card import CARD_NAME, WEIGHTS_NAME
from nnunet_autoreg.records import read_json
from nnunet_autoreg.safe_load import load_plain

log = logging.getLogger(__name__)

RUN, NNSSL, AR_SSL4M, NO_PLAN, UNKNOWN = (
    "run",
    "nnssl",
    "AR-SSL4M",
    "checkpoint without a plan",
    "unknown",
)
TRAINED = "trained nnU-Net model"
CHECKPOINT_NAME, ADAPTATION_NAME = "checkpoint_final.pth", "adaptation_plan.json"
PLAN_KEY, WEIGHTS_KEY = "nnssl_adaptation_plan", "network_weights"
MAX_NAMES, MAX_VALUES = 3, 2_000_000
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before a key."""


@dataclass(frozen=True)
class Source:
    """A weights file and what is in it.

    Attributes:
        kind: one of the constants above.
        file: the file itself.
        tensors: on the CPU, wrappers stripped from the keys; empty where the kind is unknown.
        plan: nnssl's adaptation plan, from the file if it holds one.
        plan_beside: the one from ``adaptation_plan.json``.
        rest: everything else that the file holds.
    """

    kind: str
    file: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    plan_beside: dict[str, Any] | None = None
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def adaptation_plan(self) -> dict[str, Any]:
        """The plan of the file, else the one beside it.

        Raises:
            WeightsError: there is neither.
        """
        found = self.plan if self.plan is not None else self.plan_beside
        if found is None:
            raise WeightsError(
                f"{self.file} holds no {PLAN_KEY}; add --adaptation-plan FILE, or put "
                f"{ADAPTATION_NAME} beside it"
            )
        return found


def open_source(path: Path, plan_file: Path | None = None) -> Source:
    """Open a file, or the weights that a folder holds, and say of what kind it is.

    Args:
        plan_file: an ``adaptation_plan.json``; None looks beside the weights.

    Raises:
        WeightsError: it does not exist, cannot be read, or holds more than tensors and plain
            values.
    """
    file = _weights_of(path)
    if file.name == WEIGHTS_NAME and (file.parent / CARD_NAME).is_file():
        return Source(RUN, file)
    content = read_content(file)
    beside = plan_file or file.parent / ADAPTATION_NAME
    if plan_file is not None and not plan_file.is_file():
        raise WeightsError(f"--adaptation-plan {plan_file} does not exist")
    plan_beside = _as_plan(read_json(beside), beside) if beside.is_file() else None
    return _sorted(file, content, plan_beside)


def _weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist")
    known = [path / name for name in (WEIGHTS_NAME, CHECKPOINT_NAME) if (path / name).is_file()]
    found = known or sorted(
        f for f in path.iterdir() if f.suffix in (".safetensors", ".pth", ".pt", ".ckpt")
    )
    if len(found) != 1 and not known:
        names = names_text([file.name for file in found], MAX_NAMES)
        raise WeightsError(
            f"{path} holds {len(found)} weights files{f' ({names})' if names else ''}; name one "
            "file"
        )
    return found[0]


def read_content(file: Path) -> dict[str, Any]:
    """The content of a ``torch.save`` or safetensors file, tensors on the CPU.

    Raises:
        WeightsError: it is damaged, or reading it would run code: nothing of it is run.
    """
    if file.suffix == ".safetensors":
        from nnunet_autoreg.finetune.load import read_tensors

        return dict(read_tensors(file))
    content = load_plain(file)
    _refuse_endless(content, file)
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds {type(content).__name__}, no dictionary of tensors")
    return content


def _refuse_endless(content: Any, file: Path) -> None:
    """Refuse lists that hold one another many times: a few hundred bytes of them become gigabytes
    when they are written out.

    Raises:
        WeightsError: there are more values than any checkpoint has.
    """
    pending, num_seen = [content], 0
    while pending:
        value = pending.pop()
        num_seen += 1
        if num_seen > MAX_VALUES:
            raise WeightsError(
                f"{file} holds more than {MAX_VALUES:,} values, or lists inside one another "
                "without end; use another file"
            )
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            pending.extend(value)


def _as_plan(data: Any, where: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise WeightsError(f"{where} holds no adaptation plan but {type(data).__name__}")
    return data


def _sorted(file: Path, content: dict[str, Any], plan_beside: dict[str, Any] | None) -> Source:
    rest = {
        key: value
        for key, value in content.items()
        if key not in (WEIGHTS_KEY, PLAN_KEY, "state_dict")
    }
    plan = content.get(PLAN_KEY)
    if plan is not None:
        plan = _as_plan(plan, file)
    for key in (WEIGHTS_KEY, "state_dict", None):
        candidate = content if key is None else content.get(key)
        tensors = _only_tensors(candidate)
        if not tensors:
            continue
        if is_ar_ssl4m(tensors):
            return Source(AR_SSL4M, file, tensors, rest={} if key is None else rest)
        if plan is None and key == WEIGHTS_KEY and _is_trained(content):
            return Source(TRAINED, file, tensors, rest=rest)
        if plan is not None or plan_beside is not None:
            return Source(NNSSL, file, tensors, plan, plan_beside, rest)
        return Source(
            NO_PLAN if key == WEIGHTS_KEY else UNKNOWN,
            file,
            tensors,
            rest={} if key is None else rest,
        )
    return Source(UNKNOWN, file, rest=content)


def _is_trained(content: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is of nnU-Net's trainer: those of pretraining know no labelled
    dataset.
    """
    arguments = content.get("init_args")
    return (
        isinstance(arguments, Mapping) and "dataset_json" in arguments and "trainer_name" in content
    )


def trained_model_line(source: Source) -> str:
    """Return what a trained nnU-Net model is, in one line."""
    arguments = source.rest["init_args"]
    plans = arguments.get("plans")
    named = plans if isinstance(plans, Mapping) else {}
    words = (
        source.rest["trainer_name"],
        named.get("plans_name"),
        arguments.get("configuration"),
        named.get("dataset_name"),
    )
    described = ", ".join(str(word)[:80] for word in words if word)
    return (
        f"a trained nnU-Net model ({described}): it segments already and is no pretrained encoder"
    )


def trained_model_next(source: Source) -> str:
    """Return what to type to start from a trained nnU-Net model."""
    return (
        "nnUNetv2_train DATASET CONFIGURATION FOLD -p PLANS_OF_THE_SAME_NETWORK "
        f"-pretrained_weights {shlex.quote(str(source.file))}"
    )


def _only_tensors(candidate: Any) -> dict[str, Tensor]:
    """The tensors of a state dict under their own names; empty where it is none."""
    if not isinstance(candidate, Mapping) or not candidate:
        return {}
    tensors = {str(key): value for key, value in candidate.items() if isinstance(value, Tensor)}
    if len(tensors) < len(candidate) / 2:
        return {}
    return {_unwrapped(key): value for key, value in tensors.items()}


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.removeprefix(WRAPPERS[0]).removeprefix(WRAPPERS[1])
    # torch.compile of a part of a network leaves its mark inside the key.
    return key.replace("._orig_mod.", ".")


def plain(value: Any) -> Any:
    """``value`` if it is JSON-able, else its text: for what other people's files hold besides
    tensors.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value
