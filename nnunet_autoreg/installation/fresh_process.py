"""Ask a new Python process whether torch, nnU-Net and the start-up bridge work.

It is started like nnU-Net's own commands. Modules that this process has imported already could hide
a problem.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nnunet_autoreg.children import PR_SET_PDEATHSIG

PROBE_LIMIT_S = 300
ANSWER = "autoreg_doctor:"
NOT_CHECKED = "not checked"
TOO_SLOW = (
    f"a new Python process took longer than {PROBE_LIMIT_S} s to import torch and nnunetv2, so the "
    "bridge, torch, torchvision, timm, networks and device were not checked; they may work"
)

PROBED_NETWORKS = ("resenc_tiny", "primus_tiny", "primus_v3_tiny", "vit_b16")
"""One encoder of every kind of building blocks, which another version of timm may break."""

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


def probe() -> dict[str, Any]:
    """Return what a new Python process finds, started like nnU-Net's own commands.

    The key ``error`` is set if the interpreter failed, and "not checked" if it took too long.
    """
    try:
        done = _run(PROBE, PROBE_LIMIT_S)
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


def has_bridge() -> bool:
    """Return whether a new Python process has the start-up hook."""
    script = "import sys; sys.exit(not any(hasattr(f, 'is_autoreg_bridge') for f in sys.meta_path))"
    return _run(script).returncode == 0


def _run(script: str, limit_s: float | None = None) -> "subprocess.CompletedProcess[str]":
    # In a folder without code of ours, which would otherwise be found first.
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )
