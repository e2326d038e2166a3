"""Signals that stop a command, signs of life, and children that end with their parents."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from refusals import refused

from nnunet_autoreg import phases, stopping
from nnunet_autoreg.children import descendants, end_children, run_guarded, start_guarded
from nnunet_autoreg.corpus import parallel
from nnunet_autoreg.corpus.parallel import parallel_map
from nnunet_autoreg.errors import InterruptedRunError, UsageError
from nnunet_autoreg.machine import num_processes
from nnunet_autoreg.phases import current_phase, phase, signs_of_life, visible_bars
from nnunet_autoreg.stopping import (
    AGAIN,
    START_OVER,
    raise_if_stopped,
    stop_requested,
    stoppable,
    stops_noted,
    stops_raised,
    writes_at_the_end,
)
from nnunet_autoreg.terminal import ProgressBar


def press(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def is_gone(pid: int) -> bool:
    """Return whether a process ends within 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            # The name of the program may contain spaces and brackets; its state comes after it.
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        # A zombie has ended, and waits for its parent to ask for its exit code.
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_an_error_that_except_exception_does_not_catch(number: int) -> None:
    usual = signal.getsignal(number)

    with pytest.raises(InterruptedRunError) as caught, stoppable():
        try:
            press(number)
        except Exception:
            pytest.fail("it was taken for an error")

    assert caught.value.exit_code == 130
    assert not isinstance(caught.value, Exception)
    assert signal.getsignal(number) is usual
    assert not stop_requested()


def test_an_interruption_that_was_swallowed_can_be_asked_for() -> None:
    with stoppable():
        try:
            press()
        except BaseException:
            assert stop_requested()

        with pytest.raises(InterruptedRunError):
            raise_if_stopped()

    raise_if_stopped()


def test_a_swallowed_interruption_is_raised_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "NUDGE_S", 0.1)

    # A library that catches everything and keeps going would run on for ever.
    with pytest.raises(InterruptedRunError), stoppable():
        try:
            press()
        except BaseException:
            time.sleep(60)


def test_noted_stops_raise_nothing_until_the_block_ends() -> None:
    with stoppable(), stops_noted(lambda: "kept") as is_stopped:
        assert not is_stopped()
        press()
        press()
        raise_if_stopped()
        assert is_stopped()


def test_the_line_that_ends_noted_work_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second signal could once replace "the state is saved" by a line that said less.
    monkeypatch.setattr(stopping, "NUDGE_S", 0.05)

    with pytest.raises(InterruptedRunError) as caught, stoppable():
        try:
            with stops_noted(lambda: "kept"):
                press()
                raise InterruptedRunError("saved")
        finally:
            # On the way to the end come another signal and the watch over the process.
            press()
            time.sleep(0.3)

    assert str(caught.value) == "saved"


# The program writes how many tenths of a second passed until it was ended by force.
FORCED = """
import os, signal, sys, time
from nnunet_autoreg import stopping

stopping.GRACE_S, stopping.WORKER_GRACE_S = 0.2, 0.8
with stopping.stoppable("a_command", until_exit=True):
    if sys.argv[1] == "worker":
        stopping.keep_silent()
    began = time.monotonic()
    with stopping.stops_noted(lambda: os.write(1, b"%d" % (10 * (time.monotonic() - began)))):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""


@pytest.mark.parametrize(("role", "lowest"), [("main", 2), ("worker", 8)])
def test_a_worker_is_ended_by_force_after_the_main_process(role: str, lowest: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORCED, role],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 130
    assert int(done.stdout) >= lowest


def test_noted_stops_end_at_once_what_has_nothing_to_save() -> None:
    with stoppable(), stops_noted(lambda: "kept") as is_stopped:
        with pytest.raises(InterruptedRunError), stops_raised():
            press()
            pytest.fail("the signal was only noted")
        assert is_stopped()

        # Outside it, signals are noted again; inside, an earlier one counts.
        press()
        with pytest.raises(InterruptedRunError), stops_raised():
            pytest.fail("the signal was forgotten")


def test_a_command_that_writes_at_its_end_does_not_promise_to_continue() -> None:
    # autoreg_embed once promised to continue, and started over.
    lines = []
    for begin in (writes_at_the_end, lambda: None):
        with pytest.raises(InterruptedRunError) as caught, stoppable("x"):
            begin()
            press()
            # The signal comes before this sleep ends.
            time.sleep(5)
        lines.append(str(caught.value))

    assert lines == [f"stopped by SIGTERM; {advice}" for advice in (START_OVER, AGAIN)]


def test_the_line_names_the_innermost_phase() -> None:
    with stoppable(), phase("planning"), phase("checking scans") as doing:
        doing.progress = "3 of 40"
        with pytest.raises(InterruptedRunError) as caught:
            press()
    assert "checking scans, 3 of 40" in str(caught.value)


@pytest.mark.parametrize("lost", ["__cause__", "__context__", "inner_exception"])
def test_an_interruption_in_the_compiler_is_not_a_failure_to_compile(lost: str) -> None:
    import torch

    from nnunet_autoreg.model.compilation import cannot_compile

    wrapped = torch._dynamo.exc.TorchDynamoException("backend failed")
    assert cannot_compile(wrapped)

    outer = torch._dynamo.exc.TorchDynamoException("backend failed")
    setattr(wrapped, lost, InterruptedRunError("stopped by SIGTERM"))
    outer.__cause__ = wrapped
    with pytest.raises(InterruptedRunError):
        cannot_compile(outer)


def test_a_swallowed_interruption_is_not_a_failure_to_compile_either() -> None:
    import torch

    from nnunet_autoreg.model.compilation import cannot_compile

    with stoppable():
        with contextlib.suppress(BaseException):
            press()

        with pytest.raises(InterruptedRunError):
            cannot_compile(torch._dynamo.exc.TorchDynamoException("no compiler"))


def test_a_forked_child_keeps_signals_to_itself() -> None:
    with stoppable():
        child = os.fork()
        if child == 0:
            press()
            os._exit(0)
        _, status = os.waitpid(child, 0)

        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        time.sleep(0.2)
        assert not stop_requested()


def heard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == phases.__name__]


def wait_until_heard(caplog: pytest.LogCaptureFixture, number: int = 1) -> None:
    deadline = time.monotonic() + 20
    while len(heard(caplog)) < number and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(phases, "LOOK_EVERY_S", 0.02)
    caplog.set_level(logging.INFO, "nnunet_autoreg")


@pytest.mark.usefixtures("quick")
def test_a_long_silence_is_broken_by_naming_the_phase(caplog: pytest.LogCaptureFixture) -> None:
    with signs_of_life(0.1), phase("outer"), phase("compiling the block") as doing:
        wait_until_heard(caplog)
        doing.progress = "2 of 3"
        wait_until_heard(caplog, 2)

    assert heard(caplog)[0].startswith("compiling the block (")
    assert "2 of 3" in heard(caplog)[1]
    assert current_phase() is None


@pytest.mark.usefixtures("quick")
def test_phases_are_silent_while_other_lines_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with signs_of_life(2.0), phase("training"):
        for _ in range(30):
            logging.getLogger("nnunet_autoreg.other").info("a line")
            time.sleep(0.1)

    assert heard(caplog) == []


@pytest.mark.usefixtures("quick")
def test_phases_are_silent_beside_a_bar_that_moves(caplog: pytest.LogCaptureFixture) -> None:
    from tqdm import tqdm

    with (
        signs_of_life(0.3),
        phase("training"),
        tqdm(total=100, disable=False, file=io.StringIO()) as bar,
    ):
        for _ in range(5):
            bar.update()
            time.sleep(0.1)
        # Twice the silence that is allowed: a bar that stops for a moment is still a sign of life.
        time.sleep(0.6)

    assert heard(caplog) == []


@pytest.mark.usefixtures("quick")
def test_a_bar_that_has_not_moved_yet_is_not_a_sign_of_life(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tqdm import tqdm

    with signs_of_life(0.2), phase("training"), tqdm(total=100, disable=False, file=io.StringIO()):
        wait_until_heard(caplog)

    assert heard(caplog)


@pytest.mark.usefixtures("quick")
def test_a_bar_whose_set_up_was_interrupted_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    # The thread that gives signs of life once ended with a traceback.
    from tqdm import tqdm

    # tqdm lists a bar before it sets it up; until then, or for ever, it has no attributes.
    bar = tqdm.__new__(tqdm)
    ours = ProgressBar.__new__(ProgressBar)
    assert {bar, ours} <= set(tqdm._instances)
    assert not hasattr(bar, "disable")

    with signs_of_life(0.2), phase("training"):
        wait_until_heard(caplog)

    assert heard(caplog)
    assert visible_bars() == []
    # What Python does with a bar that nobody has any more.
    ours.close()
    bar.disable = True


@pytest.mark.usefixtures("quick")
def test_without_signs_of_life_phases_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with phase("training"):
        time.sleep(0.3)

    assert heard(caplog) == []


def test_workers_end_at_once_if_their_results_are_not_wanted() -> None:
    results = parallel_map(time.sleep, [0.0, 300.0, 300.0, 300.0], 2, "testing")
    assert next(results) is None
    busy = descendants()

    results.close()  # type: ignore[attr-defined]

    # multiprocessing keeps one more process, which outlives its pools.
    assert len(busy) >= 2
    for pid in busy:
        if "resource_tracker" not in commandline(pid):
            assert is_gone(pid)


def commandline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""


GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    "print(child.pid, flush=True)\n"
)


def test_descendants_are_found_and_ended_with_their_children() -> None:
    line = [sys.executable, "-c", f"{GRANDCHILD}time.sleep(300)"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert descendants(child.pid) == [grandchild]

        end_children(child.pid)
        assert is_gone(grandchild)
        assert child.poll() is None
        child.kill()


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_a_guarded_program_keeps_its_exit_code(tmp_path: Path, program: str, code: int) -> None:
    with (tmp_path / "log").open("w") as log:
        assert run_guarded([sys.executable, "-c", program], os.environ, log) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guarded_program_and_its_children_end_with_the_command(
    tmp_path: Path,
    number: int,
) -> None:
    """Killed, a command can do nothing any more; the guard notices."""
    log = tmp_path / "log"
    script = (
        "import os, sys\nfrom nnunet_autoreg.children import run_guarded\n"
        "from nnunet_autoreg.stopping import stoppable\n"
        f"with stoppable(), open({str(log)!r}, 'w') as log:\n"
        f"    run_guarded([sys.executable, '-c', {(GRANDCHILD + 'time.sleep(300)')!r}], "
        "os.environ, log)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The guard, the program, and the program's child.
    below = descendants(command.pid)
    assert int(log.read_text()) in below
    assert len(below) == 3

    command.send_signal(number)
    command.wait(30)

    assert all(is_gone(pid) for pid in below)


def test_a_program_whose_guard_is_killed_ends_too(tmp_path: Path) -> None:
    # A stopped benchmark once left its training running.
    with (tmp_path / "log").open("w") as log:
        guard = start_guarded(
            [sys.executable, "-c", "import time; time.sleep(300)"],
            os.environ,
            log,
        )
        deadline = time.monotonic() + 30
        while not (below := descendants(guard.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)

        guard.kill()
        guard.wait()

    # The system ends the program some moments after its guard.
    while not all(is_gone(pid) for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.02)


POOL = """
import os, pathlib, sys, time
from nnunet_autoreg.detection.objects import in_parallel

def sleep(number):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(300)

if __name__ == "__main__":
    in_parallel(sleep, range(16), 2)
"""
PROBE_OF_DOCTOR = """
import subprocess, sys
from nnunet_autoreg.installation.fresh_process import PROBE
begin = PROBE.partition("answer =")[0]
mark = "import os, pathlib, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch()"
rest = f"{mark}; time.sleep(300)"
subprocess.run([sys.executable, "-c", begin + rest, sys.argv[1]])
"""


@pytest.mark.parametrize(("script", "number"), [(POOL, 2), (PROBE_OF_DOCTOR, 1)])
def test_children_end_with_a_program_that_is_killed(
    tmp_path: Path,
    script: str,
    number: int,
) -> None:
    # These workers once continued without their parent.
    (tmp_path / "marks").mkdir()
    (tmp_path / "program.py").write_text(script)
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "marks")],
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "marks").iterdir())) < number:
        assert program.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)

    program.kill()
    program.wait()

    assert all(is_gone(int(mark.name)) for mark in (tmp_path / "marks").iterdir())


def test_outside_the_main_thread_nothing_changes() -> None:
    usual = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [usual]


# Scans are given by the side of a cube. The largest ones may come at the same time, so as many
# workers are started as scans fit together, from the largest on. 0 GB: not known.
@pytest.mark.parametrize(
    ("free_gb", "sides", "workers"),
    [
        (1000, [600] * 8, 8),
        (24, [600] * 8, 2),
        (5, [600] * 8, 1),
        (24, [600, 600, 600, 100, 100], 2),
        (24, [600, 100, 100, 100], 4),
        (24, [100] * 20, 8),
        (0, [600] * 8, 8),
    ],
)
def test_workers_are_as_many_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
    free_gb: int,
    sides: list[int],
    workers: int,
) -> None:
    # Eight workers for large scans once took 7.5 GB each.
    monkeypatch.setattr(parallel, "free_memory_bytes", lambda: free_gb * 10**9)

    fitting = parallel.workers_for(8, [side**3 for side in sides])

    assert min(fitting, len(sides)) == workers


def test_the_free_memory_of_this_machine_is_known() -> None:
    assert 2**20 < parallel.free_memory_bytes() < 2**50


def test_a_large_scan_is_read_in_a_worker_even_if_it_is_the_only_one() -> None:
    # If memory runs out, the worker is lost, and not the command.
    pid = ["__import__('os').getpid()"]
    (here,) = parallel_map(eval, pid, 1, "testing")
    (apart,) = parallel_map(eval, pid, 1, "testing", apart=True)

    assert here == os.getpid()
    assert apart != os.getpid()
    assert parallel.is_large([600**3, 1])
    assert not parallel.is_large([200**3])
    assert not parallel.is_large([])


@pytest.mark.parametrize(("value", "processes"), [("1", 1), ("3", 3), ("64", 4), (None, 4)])
def test_nnunets_number_of_processes_is_respected(
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    processes: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    if value is not None:
        monkeypatch.setenv("nnUNet_def_n_proc", value)

    assert num_processes() == processes


@pytest.mark.parametrize("value", ["many", "0", "²", "9" * 5000])
def test_a_wrong_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    value: str,
) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", value)
    with refused(UsageError, "machine-num-processes", f"nnUNet_def_n_proc={value}"):
        num_processes()
