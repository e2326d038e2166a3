"""Child processes that never outlive the process that started them. Standard library only.

Two ways lead there. A command that ends calls ``end_children``, which kills all of its descendants.
A command that is killed cannot do so, therefore ``start_guarded`` puts a small guard process
between it and the program that it runs: the guard notices within half a second that its parent is
gone and ends everything below itself.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO

LOOK_EVERY_S = 0.5
"""How often a guard looks whether its parent is still there."""

END_WITHIN_S = 4.0
"""How long a program may take to save its state after SIGTERM, before it is killed."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOPPED = 130


def descendants(pid: int | None = None) -> list[int]:
    """Return the ids of all processes below ``pid`` (default: this process), parents first."""
    # (process, its parent) of all running processes. Those that have ended, but that nobody has
    # waited for, are left out.
    running: list[tuple[int, int]] = []
    if Path("/proc/self/stat").exists():
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                # The program's name is in parentheses, and may hold spaces and parentheses itself.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # It ended meanwhile.
            if fields[0] != "Z":
                running.append((int(folder.name), int(fields[1])))
    else:
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat="],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for line in listed.splitlines():
            child, parent, state = line.split()
            if not state.startswith("Z"):
                running.append((int(child), int(parent)))

    children: dict[int, list[int]] = {}
    for number, of_parent in running:
        children.setdefault(of_parent, []).append(number)

    found: list[int] = []
    waiting = [os.getpid() if pid is None else pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def end_children(pid: int | None = None) -> None:
    """Kill every process below ``pid`` (default: this process).

    The resource tracker of ``multiprocessing`` is spared: it removes the semaphores of the killed
    processes and then ends by itself.
    """
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)

    # A process may have started another one after the list was made.
    for _ in range(5):
        below = [child for child in descendants(pid) if child != tracker]
        if not below:
            return
        for child in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def start_guarded(
    line: Sequence[str],
    environment: Mapping[str, str],
    output: IO[str],
) -> "subprocess.Popen[bytes]":
    """Start a program below a guard process, in a separate session.

    Ctrl-C therefore reaches it only through this process.
    """
    guard = [sys.executable, "-m", __name__, str(os.getpid()), *line]
    return subprocess.Popen(
        guard,
        env=dict(environment),
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_guarded(line: Sequence[str], environment: Mapping[str, str], output: IO[str]) -> int:
    """Run a program below a guard and return its exit code.

    An exception in this process, such as an interruption, ends the program.
    """
    guard = start_guarded(line, environment, output)
    try:
        return guard.wait()
    except BaseException:
        guard.terminate()
        with suppress(subprocess.TimeoutExpired):
            guard.wait(END_WITHIN_S + 1)
        end_children(guard.pid)
        guard.kill()
        guard.wait()
        raise


def guard_program(parent: int, line: Sequence[str]) -> int:
    """Run ``line`` and return its exit code.

    It is ended, with all processes below it, on SIGTERM and when ``parent`` is gone.
    """
    if sys.platform == "linux":
        # What loses its parent becomes a child of the guard, which therefore still finds it.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    # Between fork and exec Python code is safe only if there is one thread, as here.
    program = subprocess.Popen(line, preexec_fn=_end_with_guard)  # noqa: PLW1509

    while True:
        try:
            code = program.wait(LOOK_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            if signals or os.getppid() != parent:
                _end_program(program)
                return STOPPED

    # What the program left behind, if it was killed, say, ends with it.
    end_children()
    return code if code >= 0 else 128 - code


def _end_program(program: "subprocess.Popen[bytes]") -> None:
    """Let the program save its state for a moment, then kill it and everything below it."""
    below = descendants()
    program.terminate()
    with suppress(subprocess.TimeoutExpired):
        program.wait(END_WITHIN_S)

    end_children()
    # Those whose parent has ended are nobody's descendants if the guard cannot take them over.
    for child in below:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)
    program.wait()


def _end_with_guard() -> None:
    """Have the kernel kill this process if the guard is killed, which only Linux can.

    It is called in the program's process before the program begins.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard_program(int(sys.argv[1]), sys.argv[2:]))
