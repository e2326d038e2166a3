"""What the commands of ``evidence.py`` share.

The result_file of JSON lines, the deadline of a slice, clocks, and what every line states.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.records import append_json_line, whole_lines

Line = dict[str, Any]

IDENTITY = (
    "command",
    "set",
    "arm",
    "pretraining_seed",
    "encoder",
    "labels",
    "draw",
    "split",
    "settings",
)
"""What makes two lines results of the same run; a run that has a line is not done again."""


class Deadline:
    """The end of a slice of time, in minutes from now; None never comes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = None if minutes is None else clock() + 60 * minutes

    def has_passed(self) -> bool:
        """Return whether it is time to stop."""
        return self.end is not None and self.clock() >= self.end


class Stopwatch:
    """Seconds and seconds of processor time, which a busy machine does not stretch.

    Args:
        seconds, process_seconds: what an earlier slice took.
    """

    def __init__(self, seconds: float = 0.0, process_seconds: float = 0.0):
        self.started = time.monotonic() - seconds
        self.process_started = time.process_time() - process_seconds

    def read(self) -> dict[str, float]:
        """Return both, by the names that lines give them."""
        return {
            "seconds": round(time.monotonic() - self.started, 2),
            "process_seconds": round(time.process_time() - self.process_started, 2),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still while the block runs."""
        before, process_before = time.monotonic(), time.process_time()
        yield
        self.started += time.monotonic() - before
        self.process_started += time.process_time() - process_before


class ResultFile:
    """A file of JSON lines, one per finished run, each on the disk at once."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[Line]:
        """Return all whole lines. A line that a killed process tore is left out."""
        found = []
        for text in whole_lines(self.path):
            try:
                line = json.loads(text)
            except ValueError:
                # Files of earlier versions keep torn lines in the middle.
                continue
            if isinstance(line, dict):
                found.append(line)
        return found

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        append_json_line(self.path, dict(line), allow_nan=True)

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the run of this identity has a line already."""
        wanted = key_of(identity)
        return any(key_of(line) == wanted for line in self.lines())


def key_of(line: Mapping[str, Any]) -> str:
    """Return the identity of a line as one comparable text."""
    # Through JSON and back, so that a tuple and the list that it is stored as are the same.
    chosen = {name: line.get(name) for name in IDENTITY}
    return json.dumps(json.loads(json.dumps(chosen)), sort_keys=True)


def circumstances(device: torch.device) -> Line:
    """Return what every line states of the program and the machine."""
    folder = Path(__file__).parent
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = ("torch", "nnunetv2", "nnunet-autoreg")
    return {
        "commit": commit + ("+changes" if changed else ""),
        "versions": {package: version(package) for package in packages},
        "device": name,
        "threads": torch.get_num_threads(),
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def half_precision(device: torch.device, is_wanted: bool) -> AbstractContextManager[None]:
    """Return the context in which networks compute.

    It is bfloat16 where the project uses that, on GPUs, and where it is wanted. The project
    computes in float32 on CPUs; those with bfloat16 products in hardware are about twice as fast
    in it.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=is_wanted or has_bf16(device))
