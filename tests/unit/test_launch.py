"""The launcher of the processes that train together, and its messages when one of them ends."""

import logging
import signal
from datetime import timedelta

import pytest
from refusals import refused

from nnunet_autoreg.cli.pretrain import parser
from nnunet_autoreg.errors import InterruptedRunError, StoreError, UsageError
from nnunet_autoreg.pretrain import distributed, launcher
from nnunet_autoreg.pretrain.launcher import (
    FAILED,
    GO,
    Launch,
    Launcher,
    launch_of,
    train_as_worker,
    wait_and_train,
)

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


class EndedWorker:
    """A worker that has ended, or still runs (exit code None)."""

    def __init__(self, rank, exitcode):
        self.name = f"process {rank}"
        self.exitcode = exitcode


def launcher_of(codes, **messages):
    """The launcher of workers with these exit codes."""
    size = len(codes) + 1
    made = Launcher(Launch(0, size, 0, size))
    made.store = LocalStore(messages)
    made.workers = [EndedWorker(rank, code) for rank, code in enumerate(codes, start=1)]
    return made


def test_one_process_is_started_unless_more_are_asked_for():
    assert launch_of(None, "cpu", {}) == launch_of(1, "cpu", {}) == Launch()
    assert launch_of(3, "cpu", {}) == Launch(0, 3, 0, 3)
    assert parser().parse_args(["--name", "x", "--num-gpus", "3"]).num_gpus == 3


def test_torchruns_environment_gives_the_ranks_of_a_process():
    expected = Launch(9, 16, 1, 8, by_torchrun=True)
    assert launch_of(None, "cpu", TORCHRUN) == expected
    assert launch_of(16, "cpu", TORCHRUN) == expected
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


@pytest.mark.parametrize(
    ("codes", "values"),
    [
        ((None, 0), []),
        ((InterruptedRunError.exit_code, None), []),
        ((1, -signal.SIGKILL), ["process 2 of 3", "SIGKILL", "memory", "checkpoint", "same line"]),
        ((None, -signal.SIGSEGV), ["process 2 of 3", "SIGSEGV", "checkpoint", "same line"]),
        ((3, None), ["process 1 of 3", "exit code 3", "checkpoint", "same line"]),
    ],
)
def test_the_exit_reason_names_process_signal_and_remedy(codes, values):
    reason = launcher_of(codes).exit_reason()

    assert bool(reason) is bool(values)
    assert not [value for value in values if value not in reason]


def test_the_message_of_a_worker_goes_before_its_exit_code():
    message = launcher_of((1,), **{FAILED: b"process 1 of 2: the case is damaged"}).lost_message()

    assert message.startswith("process 1 of 2: the case is damaged; ")


def test_a_worker_that_fails_before_the_meeting_is_noticed(monkeypatch, capsys):
    from torch.distributed import TCPStore

    made = Launcher(Launch(0, 2, 0, 2))
    made.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made.store.set(FAILED, b"process 1 of 2: no such device")
    monkeypatch.setattr(launcher, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(launcher, "GRACE_S", 0.0)
    monkeypatch.setattr(launcher.os, "_exit", lambda code: monitor.store.set("ended", str(code)))

    # The main process waits in the store meanwhile.
    monitor = launcher.WorkerMonitor(made)
    made.store.wait(["ended"], timedelta(seconds=30))
    monitor.join()

    assert made.store.get("ended") == b"1"
    assert capsys.readouterr().err.startswith("autoreg_pretrain: process 1 of 2: no such device; ")


def test_without_a_reason_the_message_says_that_a_process_is_gone(monkeypatch):
    monkeypatch.setattr(launcher, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(launcher, "open_store", lambda _: LocalStore())

    message = Launcher(Launch(0, 2, 0, 1, by_torchrun=True)).lost_message()

    assert "one of 2 processes is gone" in message and "torchrun" in message


def test_sigterm_by_torchrun_does_not_change_the_message(monkeypatch):
    def sigterm(_):
        raise InterruptedRunError("stopped by SIGTERM")

    monkeypatch.setattr(launcher.time, "sleep", sigterm)
    monkeypatch.setattr(launcher, "open_store", lambda _: LocalStore())

    message = Launcher(Launch(0, 2, 0, 2, by_torchrun=True)).lost_message()

    assert "one of 2 processes is gone" in message and "same line" in message


@pytest.mark.parametrize(("error", "order"), [(None, b"end 0"), (UsageError("wrong"), b"end 1")])
def test_torchruns_workers_end_where_there_is_nothing_to_train(monkeypatch, error, order):
    store = LocalStore()
    monkeypatch.setattr(launcher, "open_store", lambda _: store)

    try:
        with Launcher(Launch(0, 2, 0, 2, by_torchrun=True)):
            if error:
                raise error
    except UsageError:
        pass

    assert store == {GO: order}
    worker = Launch(1, 2, 1, 2, by_torchrun=True)
    assert wait_and_train(worker, "cpu") == int(order.split()[1])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
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
    store = LocalStore()

    try:
        assert train_as_worker(Launch(1, 2, 1, 2), "cpu", store) == code
    finally:
        logging.getLogger("nnunet_autoreg").setLevel(level)

    assert store.get(FAILED) == message
