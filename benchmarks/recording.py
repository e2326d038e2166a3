"""Keep the results of measurements even if a later one fails.

Every line is on disk before the next measurement begins, and no part can run longer than its limit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Line = dict[str, object]

GRACE_S = 10
"""A part that ran out of time has this long to end by itself before it is killed."""


@dataclass(frozen=True)
class Recorder:
    """Prints lines and appends them to a file as JSON, each on disk before the next is measured.

    Attributes:
        path: the file; None to print only.
        common: content that is added to every line: device, commit, versions.
    """

    path: Path | None
    common: Line

    def add(self, line: Line) -> None:
        """Record one line."""
        print(in_words(line), flush=True)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({**line, **self.common}) + "\n")
            handle.flush()
            # If the machine stops, lines that are only in the cache of the system are lost.
            os.fsync(handle.fileno())

    def add_all(self, part: Line, lines: Iterable[Line]) -> bool:
        """Record lines as they are made; an exception becomes the last line.

        Args:
            part: content of that last line, e.g. {"part": "attention"}.

        Returns:
            whether there was no exception.
        """
        started = time.monotonic()
        try:
            for line in lines:
                self.add(line)
        except Exception as error:
            seconds = round(time.monotonic() - started, 1)
            message = f"{type(error).__name__}: {error}"
            self.add({**part, "failed": message, "after_s": seconds, "ok": False})
            return False
        return True


def in_words(line: Line) -> str:
    """Return a line as one row of the table on the screen."""
    verdict = {True: "ok", False: "WRONG"}.get(line.get("ok"), "")  # type: ignore[call-overload]
    shown = []
    for key, value in line.items():
        if key in ("part", "ok") or value is None:
            continue
        shown.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    return f"{line.get('part', ''):<11} {verdict:<6} {'  '.join(shown)}"


def read_lines(path: Path | None) -> list[Line]:
    """Return the lines that a file holds; none if there is no file."""
    if path is None or not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def run_bounded(command: Sequence[str], limit_s: float) -> str | None:
    """Run a command and everything that it starts for at most ``limit_s`` seconds.

    Returns:
        None if it ended with exit code 0, else a message.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        return f"not done after {limit_s:.0f} s, the limit; it was ended"
    except BaseException:
        end_group(process)
        raise
    if code == 0:
        return None
    if code > 0:
        return f"ended with exit code {code}"
    return f"killed by {signal.Signals(-code).name}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all processes that it started."""
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    # Processes that the leader left behind, and the leader if it ignored the first signal.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def commit_of(folder: Path) -> str:
    """Return the short commit of a checkout; "" if the folder is not one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def python_command(script: Path, *arguments: str) -> list[str]:
    """Return the command that runs a script with this interpreter, without torch's warnings about
    future versions.
    """
    return [sys.executable, "-u", "-W", "ignore::FutureWarning", str(script), *arguments]
