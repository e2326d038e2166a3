"""Check the installation: Python, nnU-Net and its folders, packages, networks, device, runs.

Every check returns a line of the table of ``autoreg_doctor``, with a remedy if there is a problem.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_autoreg import __version__, bridge, nnunet_api
from nnunet_autoreg.errors import AutoregError, UsageError, WeightsError
from nnunet_autoreg.installation.fresh_process import NOT_CHECKED, PROBED_NETWORKS, probe
from nnunet_autoreg.machine import GIB, memory_bytes, usable_cores
from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, read_card
from nnunet_autoreg.requirements import Violation, checked_distributions, find_violations

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON_FROM = (3, 10)
NNUNET_FROM, NNUNET_BELOW = (2, 8, 1), (3,)
TRY_LATER = "run autoreg_doctor again when the computer and its file system are less busy"
RUNS = "pretraining runs"
FOLDERS: dict[str, Callable[[], Path]] = {
    "nnUNet_raw": nnunet_api.raw_folder,
    "nnUNet_preprocessed": nnunet_api.preprocessed_folder,
    "nnUNet_results": nnunet_api.results_folder,
}
"""Variable of nnU-Net -> function that returns its folder."""
REINSTALL_TORCH = (
    "torch and torchvision must come from the same registry: pip install --force-reinstall torch "
    "torchvision (a CPU-only torch and another build of torchvision do not work together)"
)


@dataclass(frozen=True)
class Check:
    """Hold one line of the table.

    Attributes:
        status: ``ok``, ``warn`` (it works with limits) or ``fail`` (it has to be fixed).
        remedy: what to do; empty if nothing has to be done.
    """

    name: str
    status: str
    finding: str
    remedy: str = ""


def all_checks() -> Iterator[Check]:
    """Yield the lines of the table.

    The quick checks come first. The later ones start an interpreter that imports torch, which takes
    seconds.
    """
    yield check_python()
    yield Check("nnunet-autoreg", OK, f"{__version__} in {Path(bridge.__file__).parent}")
    yield check_nnunet()
    for variable, get in FOLDERS.items():
        yield check_folder(variable, get)

    # From here on, the results of a new process are used.
    answer = probe()
    violations = find_violations()
    if NOT_CHECKED in answer:
        # A slow import is not a broken one.
        yield Check(NOT_CHECKED, WARN, answer[NOT_CHECKED], TRY_LATER)
        yield from check_requirements(violations)
    else:
        yield check_bridge(answer, os.environ.get(bridge.SWITCH))
        yield check_torch(answer)
        yield check_companion(answer, "torchvision")
        yield check_companion(answer, "timm")
        yield check_networks(answer, violations)
        yield from check_requirements(violations)
        yield check_device(answer)
    yield check_machine()
    yield check_runs()


def next_step(checks: Sequence[Check]) -> str:
    """Return what to type after these checks."""
    # The first problem may be the cause of the others.
    for check in checks:
        if check.status == FAIL:
            return f"fix '{check.name}': {check.remedy}"
    if any(check.name == NOT_CHECKED for check in checks):
        return f"autoreg_doctor   ({TRY_LATER.removeprefix('run autoreg_doctor ')})"
    for check in checks:
        if check.name == RUNS and check.finding.startswith("none"):
            return "autoreg_pretrain -d DATASET --name NAME   (or -i FOLDER)"
    return "nnUNetv2_plan_and_preprocess -d DATASET -pl AutoregPlanner -c 3d_fullres"


def check_python() -> Check:
    """Check that this Python is new enough."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < PYTHON_FROM:
        return Check(
            "python",
            FAIL,
            found,
            "nnunet-autoreg needs Python 3.10 or newer; make a new environment with it",
        )
    return Check("python", OK, found)


def check_nnunet() -> Check:
    """Check that nnU-Net is installed in a supported version."""
    supported = "pip install 'nnunetv2>=2.8.1,<3'"

    # Nothing is imported here: nnU-Net imports torch, which takes seconds.
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None:
        return Check("nnunetv2", FAIL, f"not installed for {sys.executable}", supported)

    location = next(iter(spec.submodule_search_locations or ()), spec.origin)
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "nnunetv2",
            WARN,
            f"of unknown version in {location}",
            f"install it with pip, so that its version is known: {supported}",
        )

    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not NNUNET_FROM <= numbers < NNUNET_BELOW:
        return Check(
            "nnunetv2",
            FAIL,
            f"{version} in {location} is outside the supported range 2.8.1 to <3",
            supported,
        )
    return Check("nnunetv2", OK, f"{version} in {location}")


def check_folder(variable: str, get: Callable[[], Path]) -> Check:
    """Check that one of nnU-Net's folders is set, exists and can be written."""
    try:
        folder = get()
    except AutoregError as error:
        # Our messages state the problem first, and then the remedy.
        finding, _, remedy = str(error).partition("; ")
        return Check(variable, FAIL, finding, remedy)

    if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Check(variable, OK, str(folder))

    # Raw data is only read, except by commands that convert a dataset.
    is_readable = os.access(folder, os.R_OK | os.X_OK)
    status = WARN if variable == "nnUNet_raw" and is_readable else FAIL
    remedy = f"give yourself write access, or set {variable} to another folder"
    return Check(variable, status, f"{folder} cannot be written by this user", remedy)


def check_bridge(answer: dict[str, Any], switch: str | None) -> Check:
    """Check that a fresh interpreter has the hook, and that nnU-Net finds planner and trainer."""
    name = "start-up bridge"
    if "error" in answer:
        return Check(
            name,
            FAIL,
            answer["error"],
            f"run '{sys.executable} -c \"import nnunetv2\"' and fix the error that it shows",
        )
    if switch == "0":
        return Check(name, FAIL, f"switched off by {bridge.SWITCH}=0", f"unset {bridge.SWITCH}")
    if not answer["live"]:
        return Check(
            name,
            FAIL,
            "nnU-Net does not find our classes: the .pth line is not read",
            "autoreg_doctor --link",
        )

    # A class of ours may fail to import although the hook is there.
    for key, class_name in (("planner", "AutoregPlanner"), ("trainer", "AutoregPretrainedTrainer")):
        if answer.get(key) is None:
            reason = answer.get(f"{key}_error", "nnU-Net's look-up returned nothing")
            remedy = (
                "fix the cause; if it is in nnunet-autoreg: pip install --force-reinstall "
                "--no-deps nnunet-autoreg"
            )
            return Check(
                name,
                FAIL,
                f"live, but {class_name} is not found: {_one_line(reason)}",
                remedy,
            )
    return Check(name, OK, "live; nnU-Net finds AutoregPlanner and AutoregPretrainedTrainer")


def check_torch(answer: dict[str, Any]) -> Check:
    """Check that torch can be imported."""
    if "torch" in answer:
        return Check("torch", OK, answer["torch"])
    return Check(
        "torch",
        FAIL,
        _why(answer, "torch"),
        "pip install torch torchvision, both from the same registry",
    )


def check_companion(answer: dict[str, Any], name: str) -> Check:
    """Check that torchvision or timm, which nnU-Net's Primus needs, works with this torch."""
    if name in answer:
        return Check(name, OK, answer[name])
    return Check(name, FAIL, _why(answer, name), REINSTALL_TORCH)


def check_networks(answer: dict[str, Any], violations: tuple[Violation, ...]) -> Check:
    """Check that one network of every family can be built with the installed packages."""
    name = "networks"
    failed = [encoder for encoder in PROBED_NETWORKS if f"network {encoder}" not in answer]
    if not failed:
        return Check(name, OK, f"built {', '.join(PROBED_NETWORKS)}")

    reason = _why(answer, f"network {failed[0]}")
    finding = f"cannot build {', '.join(failed)}: {reason}"

    # Several commands are joined, so that the user can copy them as one line.
    remedy = " && ".join(violation.remedy for violation in violations)
    if not remedy:
        remedy = (
            "pip install --force-reinstall --no-deps nnunet-autoreg dynamic-network-architectures"
        )
    return Check(name, FAIL, finding, remedy)


def check_requirements(violations: tuple[Violation, ...]) -> list[Check]:
    """Return one line for every package that violates a requirement, or one for all of them."""
    if not violations:
        return [Check("requirements", OK, f"those of {', '.join(checked_distributions())} are met")]

    checks = []
    for violation in violations:
        found = violation.installed or "not installed"
        finding = f"{violation.package} {found}, but {' and '.join(violation.required)}"
        checks.append(Check("requirements", WARN, finding, violation.remedy))
    return checks


def check_device(answer: dict[str, Any]) -> Check:
    """Return the device that training would use."""
    # The probe gives a list: the kind of device, then facts about it.
    kind, *details = answer.get("device") or ["none"]
    if kind == "cuda":
        gpu, total, count, free = details
        more = f", {count} of them" if count > 1 else ""
        return Check(
            "device",
            OK,
            f"cuda: {gpu}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free){more}",
        )
    if kind == "mps":
        return Check("device", OK, "mps (Apple GPU); give --device mps")
    if kind == "cpu" and details[0]:
        remedy = (
            "if this machine has a GPU, check its driver; without one, use small images and the "
            "tiny encoders only"
        )
        return Check(
            "device",
            WARN,
            f"cpu only (torch is built for GPUs, version {details[0]}, but finds no GPU)",
            remedy,
        )
    if kind == "cpu":
        remedy = (
            "if this machine has a GPU, install a build of torch for it; without one, use small "
            "images and the tiny encoders only"
        )
        return Check("device", WARN, "cpu only (this torch is a build for CPUs)", remedy)
    reason = _why(answer, "device")
    return Check("device", FAIL, f"unknown ({reason})", REINSTALL_TORCH)


def check_machine() -> Check:
    """Return the cores and the memory that this process may use."""
    total = memory_bytes()
    memory = f"{total / GIB:.0f} GiB of memory" if total else "memory unknown on this system"
    return Check("machine", OK, f"{usable_cores()} cores, {memory}")


def check_runs() -> Check:
    """Return how many finished pretraining runs a plan could use."""
    try:
        folder = nnunet_api.results_folder() / RUNS_FOLDER
    except UsageError:
        return Check(RUNS, WARN, "unknown without nnUNet_results", "set nnUNet_results")

    # A run of a newer version, or a damaged one, is not a problem of the installation. A folder
    # with a dot in front of its name is an import that was interrupted.
    cards, unreadable = [], []
    for path in sorted(folder.glob(f"[!.]*/{CARD_NAME}")):
        try:
            cards.append(read_card(path.parent))
        except WeightsError as error:
            unreadable.append(str(error))

    newest = max(cards, key=lambda card: card.finished_at, default=None)
    finding = "none yet"
    if newest is not None:
        finding = (
            f"{len(cards)} finished, newest: {newest.name} ({newest.encoder}, {newest.finished_at})"
        )

    if unreadable:
        return Check(
            RUNS,
            WARN,
            f"{finding}; {len(unreadable)} unreadable",
            _one_line(unreadable[0]),
        )
    return Check(RUNS, OK, finding)


def _why(answer: dict[str, Any], name: str) -> str:
    """Return the error of one part of the probe, or that of the whole process."""
    whole_process = answer.get("error", NOT_CHECKED)
    return _one_line(str(answer.get(f"{name}_error", whole_process)))


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + "..."
