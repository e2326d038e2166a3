"""A command that is stopped while its modules are still imported ends with one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_autoreg.cli import starting

SLOW = '''
import pathlib, time

class Slow:
    """Makes the import of numpy take minutes, as on a cold disk."""

    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            pathlib.Path("MARK").touch()
            # A signal that comes just before a sleep does not shorten it, so the sleeps are short.
            for _ in range(3000):
                time.sleep(0.1)

import sys
sys.meta_path.insert(0, Slow())
'''


@pytest.mark.parametrize(
    ("program", "name"),
    [
        # A script of ours, and a module of ours that is run as a file.
        ("/env/bin/autoreg_weights", "autoreg_weights"),
        (str(starting.COMMANDS_FOLDER / "pretrain.py"), "autoreg_pretrain"),
        # Programs that only import us must end as they always do.
        ("/env/bin/nnUNetv2_train", ""),
        ("/env/bin/pytest", ""),
        ("-c", ""),
        ("", ""),
    ],
)
def test_only_our_own_commands_are_ended_by_us(program: str, name: str) -> None:
    assert starting.command_of(program) == name


def started(tmp_path: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """Start a command, and wait until it has begun to import numpy."""
    mark = tmp_path / "mark"
    (tmp_path / "sitecustomize.py").write_text(SLOW.replace("MARK", str(mark)))
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_autoreg.cli.pretrain", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")],
)
def test_a_stop_while_modules_are_imported_gives_one_line_and_130(
    tmp_path: Path,
    number: int,
    cause: str,
) -> None:
    # Importing torch takes seconds, in which a stop gave a traceback or no line.
    process = started(tmp_path, {})

    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert out == ""
    assert err == f"autoreg_pretrain: {cause} before it began; type the same line again\n"


def test_a_worker_of_torchrun_says_nothing_when_it_is_stopped(tmp_path: Path) -> None:
    # The main process, number 0, speaks for all of them.
    process = started(tmp_path, {"RANK": "1"})

    process.terminate()
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")
