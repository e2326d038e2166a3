"""The launcher of the processes that train together, and its messages when one of them ends."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from nnunet_autoreg.cli.common import command
from nnunet_autoreg.cli.pretrain import parser
from nnunet_autoreg.errors import InterruptedRunError, StoreError, UsageError
from nnunet_autoreg.pretrain import distributed, launcher
from nnunet_autoreg.pretrain.launcher import (
    FAILED,
    GO,
    OUR_LAUNCHER,
    TRAIN,
    Launch,
    Launcher,
    exit_reason,
    launch_of,
    launch_processes,
    wait_and_train,
)
from nnunet_autoreg.stopping import stoppable

# The second process of the second of two nodes with eight processes each.
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1",
}


class LocalStore(dict):
    """A store in this process."""

    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value


def test_one_process_is_started_unless_more_are_asked_for():
    assert launch_of(None, "cpu", {}) == launch_of(1, "cpu", {}) == Launch()
    assert launch_of(3, "cpu", {}) == Launch(0, 3, 0, 3)
    assert parser().parse_args(["--name", "x", "--num-gpus", "3"]).num_gpus == 3


def test_torchruns_environment_gives_the_ranks_of_a_process():
    expected = Launch(9, 16, 1, 8, launcher="torchrun")
    assert launch_of(None, "cpu", TORCHRUN) == expected
    assert launch_of(16, "cpu", TORCHRUN) == expected
    # torchrun with a single process is training without others.
    assert launch_of(None, "cpu", {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) == Launch()


@pytest.mark.parametrize(
    ("num_gpus", "device", "environ", "code", "values"),
    [
        (0, "cpu", {}, "launch-num-gpus", ["--num-gpus 0"]),
        (2, "mps", {}, "launch-too-few-devices", ["2 processes", "--device mps"]),
        (2, "cpu", TORCHRUN, "launch-torchrun", ["--num-gpus 2", "16 processes"]),
    ],
)
def test_an_impossible_number_of_processes_is_refused(num_gpus, device, environ, code, values):
    with refused(UsageError, code, *values):
        launch_of(num_gpus, device, environ)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    with refused(UsageError, "launch-too-few-devices", "4 processes", "2 GPUs", "--num-gpus 2"):
        launch_of(4, "cuda", {})
    assert launch_of(2, "cuda", {}) == Launch(0, 2, 0, 2)
    # Our own launcher uses the same variables, and says that it did.
    launched = {**TORCHRUN, OUR_LAUNCHER: "1"}
    assert launch_of(16, "cpu", launched).launcher == "--num-gpus"


@pytest.mark.parametrize(
    ("rank", "code", "values"),
    [
        # It has explained itself in its own line, or was stopped with the others.
        (0, 2, []),
        (1, InterruptedRunError.exit_code, []),
        # Linux ends a process with SIGKILL when memory runs out.
        (2, -signal.SIGKILL, ["process 2 of 3", "SIGKILL", "memory", "checkpoint", "same line"]),
        (1, -signal.SIGSEGV, ["process 1 of 3", "SIGSEGV", "checkpoint", "same line"]),
        (0, -signal.SIGKILL, ["process 0 of 3", "SIGKILL", "memory", "same line"]),
        (1, 3, ["process 1 of 3", "exit code 3", "checkpoint", "same line"]),
    ],
)
def test_the_exit_reason_names_process_signal_and_remedy(rank, code, values):
    reason = exit_reason(rank, 3, code)

    assert bool(reason) is bool(values)
    for value in values:
        assert value in reason


def test_the_message_of_a_worker_goes_before_its_exit_code():
    message = "process 1 of 2: the case is damaged"

    assert exit_reason(0, 2, -signal.SIGKILL, message).startswith(f"{message}; ")


def test_a_lost_peer_is_reported_with_the_message_of_the_worker(monkeypatch):
    store = LocalStore({FAILED: b"process 1 of 2: the case is damaged"})
    monkeypatch.setattr(launcher, "open_store", lambda _: store)

    message = Launcher(Launch(0, 2, 0, 2, "--num-gpus")).lost_message()

    assert message.startswith("process 1 of 2: the case is damaged; ")


def end_as(case):
    """End as each of two launched processes shall, in ``test_launched_processes_end...``."""
    is_main = os.environ["RANK"] == "0"
    if case == "usage error" and is_main:
        raise UsageError("--steps 0: must be at least 1")
    if case == "bug" and is_main:
        raise ZeroDivisionError
    if case == "killed" and not is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "stopped" and is_main:
        os.kill(os.getppid(), signal.SIGTERM)
    # The others wait for it, and must be ended by the launcher long before this.
    time.sleep(60)
    return 0


@command
def stand_in(argv=None):
    """A command that the launcher starts."""
    return end_as(sys.argv[1])


@pytest.mark.parametrize(
    ("case", "code", "lines"),
    [
        ("usage error", 2, ["--steps 0"]),
        ("killed", 1, ["process 1 of 2 ended by SIGKILL"]),
        ("stopped", 130, ["stopped by SIGTERM"]),
        ("bug", 1, ["ZeroDivisionError"]),
    ],
)
def test_launched_processes_end_with_one_line_and_exit_code(case, code, lines):
    """The launcher is another process, and this file is its program."""
    beside = str(Path(__file__).resolve().parents[1])
    # torchvision warns at its import.
    settings = {"PYTHONPATH": beside, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, __file__, case],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == code, done.stderr
    printed = done.stderr.strip().splitlines()
    assert lines[0] in printed[-1], done.stderr
    # Only a bug in the program shows where it happened.
    if case == "bug":
        assert len(printed) > 1
    else:
        assert len(printed) == 1, done.stderr


def test_without_a_reason_the_message_says_that_a_process_is_gone(monkeypatch):
    monkeypatch.setattr(launcher, "LOST_PEER_GRACE_S", 0.0)
    monkeypatch.setattr(launcher, "open_store", lambda _: LocalStore())

    message = Launcher(Launch(0, 2, 0, 1, launcher="torchrun")).lost_message()

    assert "one of 2 processes has ended" in message
    assert "torchrun" in message


def test_sigterm_by_torchrun_does_not_change_the_message(monkeypatch):
    def sigterm(_):
        raise InterruptedRunError("stopped by SIGTERM")

    # torchrun stops the others with SIGTERM while this one waits for the reason.
    monkeypatch.setattr(launcher.time, "sleep", sigterm)
    monkeypatch.setattr(launcher, "open_store", lambda _: LocalStore())

    message = Launcher(Launch(0, 2, 0, 2, launcher="torchrun")).lost_message()

    assert "one of 2 processes has ended" in message
    assert "same line" in message


@pytest.mark.parametrize(("error", "order"), [(None, b"end 0"), (UsageError("wrong"), b"end 1")])
def test_torchruns_workers_end_if_there_is_nothing_to_train(monkeypatch, error, order):
    store = LocalStore()
    monkeypatch.setattr(launcher, "open_store", lambda _: store)

    try:
        # The main process leaves without training, because nothing is left to do or by an error.
        with Launcher(Launch(0, 2, 0, 2, launcher="torchrun")):
            if error:
                raise error
    except UsageError:
        pass

    assert store == {GO: order}
    worker = Launch(1, 2, 1, 2, launcher="torchrun")
    assert wait_and_train(worker, "cpu") == int(order.split()[1])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        # A message has one line. A lost connection is the consequence of another process's failure,
        # and a stop concerns all of them.
        (StoreError("the case is damaged\nmore"), 1, b"process 1 of 2: the case is damaged"),
        (MemoryError(), 1, b"process 1 of 2: MemoryError"),
        (RuntimeError("gloo: Connection closed by peer"), 1, None),
        (InterruptedRunError("stopped"), 130, None),
    ],
)
def test_a_worker_reports_its_failure_but_not_a_lost_peer(monkeypatch, error, code, message):
    def fails(*_):
        raise error

    monkeypatch.setattr(distributed, "join", fails)
    monkeypatch.setattr(distributed, "share_cores", lambda _: None)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launcher.traceback, "print_exc", lambda: None)
    level = logging.getLogger("nnunet_autoreg").level
    store = LocalStore({GO: TRAIN})
    monkeypatch.setattr(launcher, "LOST_PEER_GRACE_S", 0.0)
    monkeypatch.setattr(launcher, "open_store", lambda _: store)

    try:
        assert wait_and_train(Launch(1, 2, 1, 2, "--num-gpus"), "cpu") == code
    finally:
        logging.getLogger("nnunet_autoreg").setLevel(level)

    assert store.get(FAILED) == message


if __name__ == "__main__":
    with stoppable("autoreg_stand_in"):
        sys.exit(launch_processes(stand_in, sys.argv[1:], 2))
