"""SIGTERM and Ctrl-C in every phase: exit code 130, one line, no process left behind, and the same
line continues.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from phantom_runs import PhantomRuns

from nnunet_autoreg.records import TEMPORARY_FILES

pytestmark = pytest.mark.integration

RUNNER = Path(__file__).with_name("stop_runner.py")
# A busy machine may take minutes to import everything.
PATIENCE_S = 300


class StoppedRuns(PhantomRuns):
    """Runs that are stopped while they do slow work at a named point."""

    def __init__(self, root):
        super().__init__(root, RUNNER, "STOP_")
        self.pid = 0

    def begin(self, name, point=None, way=""):
        """Type the line and wait until the slow work at ``point`` has begun."""
        mark = self.root / f"{name}.mark"
        self.pid = self.start(name, f"store {name}", point=point, way=way, mark=str(mark))

        deadline = time.monotonic() + PATIENCE_S
        while point and not mark.exists():
            if time.monotonic() > deadline:
                # The runner waits for this line: left alive, it would keep every later test
                # waiting.
                os.kill(self.pid, signal.SIGKILL)
                self.status()
                pytest.fail(self.output(name)[-2000:])
            time.sleep(0.02)

    def left(self):
        """Process ids of the line's session, ended ones left out."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,sess=,stat="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        left = []
        for row in listed.splitlines():
            pid, session, state = row.split()
            # Z: a zombie, which has ended.
            if int(session) == self.pid and not state.startswith("Z"):
                left.append(int(pid))
        return left

    def last_of_all(self):
        """What is left after the moment that helpers of Python take to end by themselves."""
        deadline = time.monotonic() + 5
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.left()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = StoppedRuns(tmp_path_factory.mktemp("stop"))
    yield place
    place.server.close()


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run that nobody disturbed."""
    place.begin("whole")
    assert place.status() == 0, place.output("whole")[-2000:]
    return place.folder("whole")


# Phase, and how the work behaves: Python code, code that ignores exceptions, a call of compiled
# code that no signal interrupts, the same in worker processes, and a compiler.
STOPS = [
    ("indexing", "python"),
    ("indexing", "c"),
    ("indexing", "workers"),
    ("planning", "ignoring"),
    ("preprocessing", "python"),
    ("preprocessing", "workers"),
    ("sampling pool", "python"),
    ("dry step", "ignoring"),
    ("dry step", "c"),
    ("compilation", "compiler"),
    ("training", "c"),
    ("validation", "c"),
    ("export", "python"),
    ("export", "c"),
]


@pytest.mark.parametrize(("point", "way"), STOPS)
def test_sigterm_ends_every_phase_with_one_line_and_no_child(place, point, way):
    name = f"{point} {way}".replace(" ", "_")
    place.begin(name, point, way)
    before = place.output(name)

    os.kill(place.pid, signal.SIGTERM)
    status = place.status()
    left = place.last_of_all()

    # Only what was printed after the signal.
    last = place.output(name)[len(before) :].strip().splitlines()
    assert status == 130, last
    assert [line.startswith("autoreg_pretrain: ") for line in last] == [True], last
    assert left == []
    # No half-written checkpoint.
    assert not list(place.folder(name).glob("*.pth.*.tmp"))


@pytest.mark.parametrize(
    ("point", "way"),
    [
        ("indexing", "workers"),
        ("compilation", "compiler"),
        ("validation", "c"),
    ],
)
def test_ctrl_c_that_reaches_all_processes_ends_them_with_one_line(place, point, way):
    name = f"pressed {point}".replace(" ", "_")
    place.begin(name, point, way)
    before = place.output(name)

    # As a terminal does: Ctrl-C reaches the whole group at once.
    os.killpg(place.pid, signal.SIGINT)
    status = place.status()
    left = place.last_of_all()

    last = place.output(name)[len(before) :].strip().splitlines()
    assert status == 130, last
    assert [line.startswith("autoreg_pretrain: ") for line in last] == [True], last
    assert left == []


def test_a_line_stopped_in_a_long_step_continues_its_checkpoint(place, whole):
    # The seventh step never ends, so the checkpoint of step 3 is the last one.
    place.begin("long", "training", "c")
    os.kill(place.pid, signal.SIGTERM)
    assert place.status() == 130
    assert "the checkpoint of step 3 is kept" in place.output("long").splitlines()[-1]

    place.begin("long")
    assert place.status() == 0, place.output("long")[-2000:]
    assert "continuing after step 3 of 8" in place.output("long")
    weights = (place.folder("long") / "encoder.safetensors").read_bytes()
    assert weights == (whole / "encoder.safetensors").read_bytes()
    assert not list(place.folder("long").glob(TEMPORARY_FILES))
