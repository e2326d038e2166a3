"""Run ``autoreg_doctor``: check the installation, and name a remedy for every problem."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg import __version__, bridge, nnunet_api
from nnunet_autoreg.children import PR_SET_PDEATHSIG
from nnunet_autoreg.cli.common import CommandParser, command, print_next
from nnunet_autoreg.errors import AutoregError, UsageError, WeightsError
from nnunet_autoreg.machine import GIB, memory_bytes, usable_cores
from nnunet_autoreg.requirements import Violation, checked_distributions, find_violations

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON_FROM = (3, 10)
NNUNET_FROM, NNUNET_BELOW = (2, 8, 1), (3,)
PROBE_LIMIT_S = 300
ANSWER = "autoreg_doctor:"
NOT_CHECKED = "not checked"
TOO_SLOW = (
    f"a new Python process took longer than {PROBE_LIMIT_S} s to import torch and nnunetv2, so the "
    "bridge, torch, torchvision, timm, networks and device were not checked; they may work"
)
TRY_LATER = "run autoreg_doctor again when the computer and its file system are less busy"

LINK_NAME = "nnunet_autoreg_link.pth"
LINK_HEAD = "# Made by autoreg_doctor --link; remove with autoreg_doctor --unlink.\n"

REINSTALL_TORCH = (
    "torch and torchvision must come from the same registry: pip install --force-reinstall torch "
    "torchvision (a CPU-only torch and another build of torchvision do not work together)"
)

PROBED_NETWORKS = ("resenc_tiny", "primus_tiny", "primus_v3_tiny", "vit_b16")
"""One encoder of every kind of building blocks, which another version of timm may break."""

# The probe runs in a fresh interpreter, because modules that this one has imported already could
# hide a problem.
PROBE = f"""
import ctypes, importlib, json, sys
if sys.platform == "linux":
    # Ended by the kernel if the process that started it is.
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGKILL:d})
answer = {{"live": any(hasattr(f, "is_autoreg_bridge") for f in sys.meta_path)}}

def attempt(key, action):
    try:
        answer[key] = action()
    except Exception as error:
        answer[key + "_error"] = f"{{type(error).__name__}}: {{error}}"

def device():
    import torch
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        return ["cuda", torch.cuda.get_device_name(0), total, torch.cuda.device_count(), free]
    if torch.backends.mps.is_available():
        return ["mps"]
    return ["cpu", torch.version.cuda or torch.version.hip]

def planner():
    from os.path import join
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    package = "nnunetv2.experiment_planning"
    found = find(join(nnunetv2.__path__[0], "experiment_planning"), "AutoregPlanner", package)
    return None if found is None else found.__module__

def trainer():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
    return find("AutoregPretrainedTrainer").__module__

def network(name):
    import torch
    from nnunet_autoreg.model.encoders import build_network
    from nnunet_autoreg.model.sizes import encoder_size
    size = encoder_size(name)
    with torch.device("meta"):
        build_network(size.class_path, size.arguments, (64, 64, 64), 1, 2)
    return "built"

for name in ("torch", "torchvision", "timm"):
    attempt(name, lambda: importlib.import_module(name).__version__)
for name in {PROBED_NETWORKS!r}:
    attempt("network " + name, lambda: network(name))
attempt("device", device)
attempt("planner", planner)
attempt("trainer", trainer)
print({ANSWER!r} + json.dumps(answer))
"""


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


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = CommandParser(
        examples=[
            "autoreg_doctor",
            "autoreg_doctor --link",
        ],
        prog="autoreg_doctor",
        description="Check that nnunet-autoreg and nnU-Net find each other, show the GPU and the "
        "folders that are used, and explain how to fix every problem. Exit code 0: no problem was "
        "found; 1: something has to be fixed.",
    )
    fixing = p.add_mutually_exclusive_group()
    fixing.add_argument(
        "--link",
        action="store_true",
        help=f"write {LINK_NAME} into site-packages of this environment if nnU-Net does not find "
        "our classes. This is needed after 'pip install -e' of nnunet-autoreg, or if it is found "
        "through PYTHONPATH",
    )
    fixing.add_argument(
        "--unlink",
        action="store_true",
        help="remove the file that --link has written",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table, or write or remove the link.

    Return 0 if no problem was found, 1 if something has to be fixed.
    """
    arguments = parser().parse_args(argv)
    if arguments.link:
        return _link(_site_packages())
    if arguments.unlink:
        return _unlink(_site_packages())

    checks = []
    for check in all_checks():
        checks.append(check)

        # At once, because the later checks take seconds.
        print(f"{check.status:<5} {check.name:<19} {check.finding}", flush=True)
        if check.remedy:
            print(f"      -> {check.remedy}", flush=True)

    print_next(_next(checks))
    return int(any(check.status == FAIL for check in checks))


def all_checks() -> Iterator[Check]:
    """Yield the lines of the table.

    The quick checks come first. The later ones start an interpreter that imports torch, which takes
    seconds.
    """
    yield check_python()
    yield Check("nnunet-autoreg", OK, f"{__version__} in {Path(bridge.__file__).parent}")
    yield check_nnunet()
    yield from (check_folder(variable, get) for variable, get in FOLDERS.items())
    answer = probe()
    violations = find_violations()
    if NOT_CHECKED in answer:
        # A slow import is not a broken one.
        yield Check(NOT_CHECKED, WARN, answer[NOT_CHECKED], TRY_LATER)
        yield from check_requirements(violations)
    else:
        yield check_bridge(answer, os.environ.get(bridge.SWITCH))
        yield check_torch(answer)
        yield from (check_companion(answer, name) for name in ("torchvision", "timm"))
        yield check_networks(answer, violations)
        yield from check_requirements(violations)
        yield check_device(answer)
    yield check_machine()
    yield check_runs()


def _next(checks: list[Check]) -> str:
    # The first problem may be the cause of the others.
    for check in checks:
        if check.status == FAIL:
            return f"fix '{check.name}': {check.remedy}"
    if any(check.name == NOT_CHECKED for check in checks):
        return f"autoreg_doctor   ({TRY_LATER.removeprefix('run autoreg_doctor ')})"
    for check in checks:
        if check.name == "pretraining runs" and check.finding.startswith("none"):
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


FOLDERS: dict[str, Callable[[], Path]] = {
    "nnUNet_raw": nnunet_api.raw_folder,
    "nnUNet_preprocessed": nnunet_api.preprocessed_folder,
    "nnUNet_results": nnunet_api.results_folder,
}


def check_folder(variable: str, get: Callable[[], Path]) -> Check:
    """Check that one of nnU-Net's folders is set, exists and can be written."""
    try:
        folder = get()
    except AutoregError as error:
        finding, _, remedy = str(error).partition("; ")
        return Check(variable, FAIL, finding, remedy)

    if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Check(variable, OK, str(folder))

    # Raw data is only read, except by commands that convert a dataset.
    is_readable = os.access(folder, os.R_OK | os.X_OK)
    status = WARN if variable == "nnUNet_raw" and is_readable else FAIL
    remedy = f"give yourself write access, or set {variable} to another folder"
    return Check(variable, status, f"{folder} cannot be written by this user", remedy)


def probe() -> dict[str, Any]:
    """Return what a new Python process finds, started like nnU-Net's own commands.

    The key ``error`` is set if the interpreter failed, and "not checked" if it took too long.
    """
    # In a folder without code of ours, which would otherwise be found first.
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            cwd=Path(sys.executable).parent,
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"live": False, NOT_CHECKED: TOO_SLOW}

    # Packages may print while they are imported.
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {
            "live": False,
            "error": f"a fresh interpreter ended with exit code {done.returncode}: {last}",
        }
    return dict(json.loads(lines[-1].removeprefix(ANSWER)))


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

    # The hook may be there, and a class of ours still fail to import.
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
        _one_line(_why(answer, "torch")),
        "pip install torch torchvision, both from the same registry",
    )


def check_companion(answer: dict[str, Any], name: str) -> Check:
    """Check that torchvision or timm, which nnU-Net's Primus needs, works with this torch."""
    if name in answer:
        return Check(name, OK, answer[name])
    return Check(name, FAIL, _one_line(_why(answer, name)), REINSTALL_TORCH)


def check_networks(answer: dict[str, Any], violations: tuple[Violation, ...]) -> Check:
    """Check that one network of every family can be built with the installed packages."""
    name = "networks"
    failed = [encoder for encoder in PROBED_NETWORKS if f"network {encoder}" not in answer]
    if not failed:
        return Check(name, OK, f"built {', '.join(PROBED_NETWORKS)}")

    reason = _one_line(_why(answer, f"network {failed[0]}"))
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


def _why(answer: dict[str, Any], name: str) -> str:
    return str(answer.get(f"{name}_error", answer.get("error", "not checked")))


def check_device(answer: dict[str, Any]) -> Check:
    """Return the device that training would use."""
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
    return Check("device", FAIL, f"unknown ({_one_line(_why(answer, 'device'))})", REINSTALL_TORCH)


def check_machine() -> Check:
    """Return the cores and the memory that this process may use."""
    total = memory_bytes()
    memory = f"{total / GIB:.0f} GiB of memory" if total else "memory unknown on this system"
    return Check("machine", OK, f"{usable_cores()} cores, {memory}")


def check_runs() -> Check:
    """Return how many finished pretraining runs a plan could use."""
    from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, read_card

    name = "pretraining runs"
    try:
        folder = nnunet_api.results_folder() / RUNS_FOLDER
    except UsageError:
        return Check(name, WARN, "unknown without nnUNet_results", "set nnUNet_results")

    # A run of a newer version, or a damaged one, is not a problem of the installation.
    cards, unreadable = [], []

    # A name with a dot in front is an import that was interrupted.
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
            name,
            WARN,
            f"{finding}; {len(unreadable)} unreadable",
            _one_line(unreadable[0]),
        )
    return Check(name, OK, finding)


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + "..."


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _live_in_fresh_interpreter() -> bool:
    script = "import sys; sys.exit(not any(hasattr(f, 'is_autoreg_bridge') for f in sys.meta_path))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(sys.executable).parent,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _link(folder: Path) -> int:
    """Write the guarded ``.pth`` line, unless the bridge works without it.

    Raises:
        AutoregError: the bridge is switched off, another file has this name (code
            "doctor-foreign-file"), or the file has no effect (code "doctor-link-without-effect").
    """
    target = folder / LINK_NAME
    if os.environ.get(bridge.SWITCH) == "0":
        raise UsageError(
            f"the start-up bridge is switched off by {bridge.SWITCH}=0; unset {bridge.SWITCH}, and "
            "try again",
            code="usage-bridge-switched-off",
        )
    if _live_in_fresh_interpreter():
        print("the start-up bridge works already; nothing was written")
        print_next("autoreg_doctor")
        return 0
    if target.exists() and not _is_our_link(target):
        raise AutoregError(
            f"{target} was not made by autoreg_doctor and is not changed; move it away, and try "
            "again",
            code="doctor-foreign-file",
        )

    try:
        target.write_text(LINK_HEAD + bridge.PTH_LINE, encoding="ascii")
    except OSError as error:
        raise AutoregError(
            f"{target} cannot be written ({error.strerror}); activate an environment of your own",
            code="doctor-not-writable",
        ) from error

    print(f"wrote {target}")

    # A file in a folder that Python does not read as site-packages has no effect.
    if not _live_in_fresh_interpreter():
        raise AutoregError(
            f"{target} was written, but a new Python process does not read it, or does not find "
            f"nnunet_autoreg; add {Path(bridge.__file__).parents[1]} to PYTHONPATH, or install "
            "nnunet-autoreg with pip",
            code="doctor-link-without-effect",
        )

    print_next("autoreg_doctor")
    return 0


def _unlink(folder: Path) -> int:
    """Remove the file that ``--link`` wrote.

    Raises:
        AutoregError: another file has this name, or it cannot be removed.
    """
    target = folder / LINK_NAME
    if not target.exists():
        print(f"there is no {target}; nothing was removed")
    elif not _is_our_link(target):
        raise AutoregError(
            f"{target} was not made by autoreg_doctor and is not changed",
            code="doctor-foreign-file",
        )
    else:
        try:
            target.unlink()
        except OSError as error:
            raise AutoregError(
                f"{target} cannot be removed ({error.strerror})",
                code="doctor-not-writable",
            ) from error
        print(f"removed {target}")
    print_next("autoreg_doctor")
    return 0


def _is_our_link(target: Path) -> bool:
    return target.is_file() and target.read_text(encoding="utf-8", errors="replace").startswith(
        LINK_HEAD,
    )


if __name__ == "__main__":
    sys.exit(main())
