"""Who starts the processes that train together, and what is said when one of them ends."""

import logging
import signal
from datetime import timedelta

import pytest

from nnunet_autoreg.cli.pretrain import parser
from nnunet_autoreg.errors import StoreError, UsageError
from nnunet_autoreg.pretrain import distributed, job, launch
from nnunet_autoreg.pretrain.launch import (
    FAILED,
    GO,
    Crew,
    Launch,
    help_to_train,
    launch_of,
    stand_by,
)
from nnunet_autoreg.pretrain.signals import InterruptedRunError

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1",
}


class Kept(dict):
    """A store in this process."""

    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value


class Ended:
    """A helper that ended."""

    def __init__(self, rank, exitcode):
        self.name, self.exitcode = f"process {rank}", exitcode


def test_one_process_is_what_is_started_unless_more_are_asked_for():
    assert launch_of(None, "cpu", {}) == launch_of(1, "cpu", {}) == Launch()
    assert launch_of(3, "cpu", {}) == Launch(0, 3, 0, 3)
    assert parser().parse_args(["--name", "x", "--num-gpus", "3"]).num_gpus == 3


def test_torchruns_environment_says_where_a_process_stands():
    assert (
        launch_of(None, "cpu", TORCHRUN)
        == launch_of(16, "cpu", TORCHRUN)
        == Launch(9, 16, 1, 8, by_torchrun=True)
    )
    assert launch_of(None, "cpu", {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) == Launch()


@pytest.mark.parametrize(
    ("num_gpus", "device", "environ", "said"),
    [
        (0, "cpu", {}, "--num-gpus 0: must be at least 1"),
        (2, "mps", {}, "2 processes on --device mps: there is one such device only"),
        (2, "cpu", TORCHRUN, "torchrun started 16 processes already.*leave --num-gpus away"),
    ],
)
def test_a_number_that_cannot_be_is_refused(num_gpus, device, environ, said):
    with pytest.raises(UsageError, match=said):
        launch_of(num_gpus, device, environ)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        UsageError, match=r"4 processes on this machine, which has 2 GPUs.*use --num-gpus 2"
    ):
        launch_of(4, "cuda", {})
    assert launch_of(2, "cuda", {}) == Launch(0, 2, 0, 2)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ((None, 0), ""),
        ((InterruptedRunError.exit_code, None), ""),
        (
            (1, -signal.SIGKILL),
            "process 2 of 3 ended by SIGKILL, most likely for want of memory; all processes were "
            "stopped, and the last "
            "checkpoint is kept: type the same line again to go on",
        ),
        ((None, -signal.SIGSEGV), "process 2 of 3 ended by SIGSEGV; all processes were stopped"),
        ((3, None), "process 1 of 3 ended with exit code 3; all processes were stopped"),
    ],
)
def test_what_became_of_a_process_is_told_in_one_line(codes, said):
    crew = Crew(Launch(0, 3, 0, 3))
    crew.store, crew.helpers = (
        Kept(),
        [Ended(rank, code) for rank, code in enumerate(codes, start=1)],
    )
    assert crew.cause().startswith(said) and bool(crew.cause()) is bool(said)


def test_what_a_process_says_itself_goes_before_how_it_ended():
    crew = Crew(Launch(0, 2, 0, 2))
    crew.store, crew.helpers = Kept({FAILED: b"process 1 of 2: the case is damaged"}), [Ended(1, 1)]
    assert crew.fate().startswith("process 1 of 2: the case is damaged; all processes were stopped")


def test_a_process_that_fails_before_it_comes_is_noticed_while_the_main_one_waits_for_it(
    monkeypatch, capsys
):
    from torch.distributed import TCPStore

    crew = Crew(Launch(0, 2, 0, 2))
    crew.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    crew.store.set(FAILED, b"process 1 of 2: no such device")
    monkeypatch.setattr(launch, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(launch, "GRACE_S", 0.0)
    monkeypatch.setattr(launch.os, "_exit", lambda code: watch.store.set("ended", str(code)))
    watch = launch.Watch(crew)
    crew.store.wait(["ended"], timedelta(seconds=30))
    watch.join()
    assert crew.store.get("ended") == b"1"
    assert capsys.readouterr().err.startswith(
        "autoreg_pretrain: process 1 of 2: no such device; all processes were stopped"
    )


def test_of_a_process_on_another_machine_one_knows_only_that_it_is_gone(monkeypatch):
    monkeypatch.setattr(launch, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(launch, "open_store", lambda _: Kept())
    assert (
        Crew(Launch(0, 2, 0, 1, by_torchrun=True))
        .fate()
        .startswith("one of 2 processes is gone, or cannot be reached any more")
    )


def test_what_is_said_of_a_lost_process_does_not_change_where_torchrun_ends_this_one_for_it(
    monkeypatch,
):
    def sigterm(_):
        raise InterruptedRunError("stopped by SIGTERM")

    monkeypatch.setattr(launch.time, "sleep", sigterm)
    monkeypatch.setattr(launch, "open_store", lambda _: Kept())
    said = Crew(Launch(0, 2, 0, 2, by_torchrun=True)).fate()
    assert said == (
        "one of 2 processes is gone, or cannot be reached any more; torchrun says which; the last "
        "checkpoint is kept: type the "
        "same line again to go on"
    )


@pytest.mark.parametrize(("error", "told"), [(None, b"end 0"), (UsageError("wrong"), b"end 1")])
def test_processes_that_torchrun_started_are_sent_home_where_there_is_nothing_to_train(
    monkeypatch, error, told
):
    store = Kept()
    monkeypatch.setattr(launch, "open_store", lambda _: store)
    try:
        with Crew(Launch(0, 2, 0, 2, by_torchrun=True)):
            if error:
                raise error
    except UsageError:
        pass
    assert store == {GO: told}
    assert stand_by(Launch(1, 2, 1, 2, by_torchrun=True), "cpu") == int(told.split()[1])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StoreError("the case is damaged\nmore"), 1, b"process 1 of 2: the case is damaged"),
        (MemoryError(), 1, b"process 1 of 2: MemoryError"),
        (RuntimeError("gloo: Connection closed by peer"), 1, None),
        (InterruptedRunError("stopped"), 130, None),
    ],
)
def test_a_failure_of_a_process_beside_the_main_one_is_told_there_and_the_loss_of_another_is_not(
    monkeypatch, error, code, said
):
    def fails(*_):
        raise error

    monkeypatch.setattr(distributed, "join", fails)
    monkeypatch.setattr(job, "share_cores", lambda _: None)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launch.traceback, "print_exc", lambda: None)
    level, store = logging.getLogger("nnunet_autoreg").level, Kept()
    try:
        assert help_to_train(Launch(1, 2, 1, 2), "cpu", store) == code
    finally:
        logging.getLogger("nnunet_autoreg").setLevel(level)
    assert store.get(FAILED) == said
