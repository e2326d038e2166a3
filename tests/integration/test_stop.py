"""SIGTERM and Ctrl-C in every phase: exit code 130, one line, no process left behind, and the same
line goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import phantom_place
import pytest

from nnunet_autoreg.records import TEMPORARY_FILES

pytestmark = pytest.mark.integration

RUNNER = Path(__file__).with_name("stop_runner.py")
SETTINGS = [*phantom_place.SETTINGS, "run.checkpoint_every=3", "run.validate_every=4"]
PATIENCE_S = 300


class Place(phantom_place.PhantomPlace):
    """A process that runs lines on the phantoms."""

    def __init__(self, root):
        super().__init__(root)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("autoreg_", "STOP_"))}
        environment = {**clean, "OMP_NUM_THREADS": "1", "nnUNet_raw": str(root / "nnUNet_raw")}
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = 0

    def start(self, name, point=None, way=""):
        """Type the line and wait until the slow work at ``point`` has begun."""
        argv = [
            "-i",
            str(self.root / "scans"),
            "--name",
            name,
            "--steps",
            "8",
            "--batch",
            "2",
            "--encoder",
            "primus_tiny",
            "--device",
            "cpu",
            "--set",
            *SETTINGS,
        ]
        mark = self.root / f"{name}.mark"
        folders = {**self.folders(), "nnUNet_preprocessed": str(self.root / f"store {name}")}
        Path(folders["nnUNet_preprocessed"]).mkdir(exist_ok=True)
        request = {
            "argv": argv,
            "point": point,
            "way": way,
            "mark": str(mark),
            "log": str(self.log(name)),
            "env": folders,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

        deadline = time.monotonic() + PATIENCE_S
        while point and not mark.exists():
            if time.monotonic() > deadline:
                # The runner waits for this line: left alive, it would keep every later test
                # waiting.
                os.kill(self.pid, signal.SIGKILL)
                self.status()
                pytest.fail(self.log(name).read_text()[-2000:])
            time.sleep(0.02)

    def status(self):
        """Exit status of the line, negative for a signal."""
        return int(self.process.stdout.readline())

    def left(self):
        """Process ids of the line's session, ended ones left out."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True, check=True
        ).stdout
        rows = [row.split() for row in listed.splitlines()]
        return [
            int(pid)
            for pid, session, state in rows
            if int(session) == self.pid and not state.startswith("Z")
        ]

    def last_of_all(self):
        """What is left after the moment that helpers of Python take to end by themselves."""
        deadline = time.monotonic() + 5
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.left()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("stop"))
    yield place
    place.process.stdin.close()
    place.process.wait()


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run that nobody disturbed."""
    place.start("whole")
    assert place.status() == 0, place.log("whole").read_text()[-2000:]
    return place.folder("whole")


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
    place.start(name, point, way)
    before = place.log(name).read_text()

    os.kill(place.pid, signal.SIGTERM)
    status, left = place.status(), place.last_of_all()

    last = place.log(name).read_text()[len(before) :].strip().splitlines()
    assert status == 130, last
    assert [line.startswith("autoreg_pretrain: ") for line in last] == [True], last
    assert left == []
    assert not list(place.folder(name).glob("*.pth.*.tmp"))


@pytest.mark.parametrize(
    ("point", "way"), [("indexing", "workers"), ("compilation", "compiler"), ("validation", "c")]
)
def test_ctrl_c_that_reaches_all_processes_ends_them_with_one_line(place, point, way):
    name = f"pressed {point}".replace(" ", "_")
    place.start(name, point, way)
    before = place.log(name).read_text()

    os.killpg(place.pid, signal.SIGINT)
    status, left = place.status(), place.last_of_all()

    last = place.log(name).read_text()[len(before) :].strip().splitlines()
    assert status == 130, last
    assert [line.startswith("autoreg_pretrain: ") for line in last] == [True], last
    assert left == []


def test_a_line_stopped_in_a_long_step_goes_on_from_its_checkpoint(place, whole):
    place.start("long", "training", "c")
    os.kill(place.pid, signal.SIGTERM)
    assert place.status() == 130
    assert "the checkpoint of step 3 is kept" in place.log("long").read_text().splitlines()[-1]

    place.start("long")
    assert place.status() == 0, place.log("long").read_text()[-2000:]
    assert "continuing after step 3 of 8" in place.log("long").read_text()
    assert (place.folder("long") / "encoder.safetensors").read_bytes() == (
        whole / "encoder.safetensors"
    ).read_bytes()
    assert not list(place.folder("long").glob(TEMPORARY_FILES))
