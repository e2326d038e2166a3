"""What the commands of ``evidence.py`` share: the journal of JSON lines, the deadline of a slice, and what every line states."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]

IDENTITY = ("command", "set", "arm", "pretraining_seed", "encoder", "labels", "draw", "split", "settings")
"""What makes two lines results of the same run; a run that has a line is not done again."""


class Deadline:
    """The end of a slice of time, in minutes from now; None never comes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = None if minutes is None else clock() + 60 * minutes

    def has_passed(self) -> bool:
        """Return whether it is time to stop."""
        return self.end is not None and self.clock() >= self.end


class Journal:
    """A file of JSON lines, one per finished run, each written and flushed at once."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[Line]:
        """Return all whole lines. A line that a killed process tore is left out."""
        if not self.path.is_file():
            return []
        return list(_whole_lines(self.path.read_text(encoding="utf-8")))

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, on a line of its own even after a torn one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        separator = "" if not text or text.endswith("\n") else "\n"
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(separator + json.dumps(line) + "\n")
            handle.flush()

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the run of this identity has a line already."""
        wanted = key_of(identity)
        return any(key_of(line) == wanted for line in self.lines())


def _whole_lines(text: str) -> Iterator[Line]:
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


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
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return numbers as a line keeps them."""
    return [round(float(value), digits) for value in values]
