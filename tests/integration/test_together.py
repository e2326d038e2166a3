"""Two processes on one training, through the command: killed, stopped, started by torchrun; the
same line continues to the same bytes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import phantom_place
import pytest

from nnunet_autoreg.checkpoint import LATEST_NAME, damage_of

pytestmark = pytest.mark.integration

SETTINGS = [*phantom_place.SETTINGS, "run.checkpoint_every=10", "run.validate_every=10"]
# 30 steps with a checkpoint after every tenth; a busy machine gets 5 minutes.
STEPS, PATIENCE_S = 30, 300
COMMAND = "nnunet_autoreg.cli.pretrain"


class Place(phantom_place.PhantomPlace):
    """Lines typed on the phantoms."""

    def start(
        self,
        name,
        *words,
        by=(sys.executable, "-m", COMMAND),
        sharding="none",
        length=("--steps", str(STEPS)),
    ):
        line = [
            *by,
            "-i",
            str(self.root / "scans"),
            "--name",
            name,
            *length,
            "--batch",
            "4",
            "--device",
            "cpu",
            *words,
            "--encoder",
            "primus_tiny",
            "--set",
            *SETTINGS,
            f"run.sharding={sharding}",
        ]
        # Variables of a launcher above would make this process one of several.
        clean = dict(os.environ)
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            clean.pop(key, None)
        with self.log(name).open("a") as log:
            return subprocess.Popen(
                line,
                env={**clean, "OMP_NUM_THREADS": "1", **self.folders()},
                stdout=log,
                stderr=log,
            )

    def run(self, name, *words, **how):
        code = self.start(name, *words, **how).wait(PATIENCE_S)
        assert code == 0, self.log(name).read_text()[-2000:]

    def encoder(self, name):
        return (self.folder(name) / "encoder.safetensors").read_bytes()

    def errors(self, name):
        """Return the metrics that do not depend on speed, by step and name."""
        text = (self.folder(name) / "metrics.jsonl").read_text()
        found = {}
        for line in text.splitlines():
            entry = json.loads(line)
            if entry["name"] in ("train_error", "heldout_error", "gradient_norm"):
                found[entry["step"], entry["name"]] = entry["value"]
        return found

    def wait_for_step(self, name, process, step):
        """Wait until this step was logged."""
        deadline = time.monotonic() + PATIENCE_S
        metrics = self.folder(name) / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
            is_running = process.poll() is None and time.monotonic() < deadline
            assert is_running, self.log(name).read_text()[-2000:]
            time.sleep(0.05)


def processes_of(process):
    """Process ids by rank of the training processes that ``--num-gpus`` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for pid in children:
        # Other children only watch over resources.
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def ranks_of(process):
    """Process ids by rank of the training processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK="):
                found[int(setting.removeprefix(b"RANK="))] = int(pid)
    return found


def gone(pid):
    """Wait until a process is no more."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            # The state follows the name in brackets, which may hold blanks.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def torchrun(num_processes=2):
    """Return the words before a command that run it in several processes on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={num_processes}",
        f"--master-port={port}",
        "-m",
        COMMAND,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def whole(place):
    """A run of two processes that nobody disturbed."""
    place.run("whole", "--num-gpus", "2")
    return "whole"


def test_number_of_processes_and_sharding_do_not_change_the_errors(place, whole):
    place.run("alone")
    process = place.start("changing", "--num-gpus", "2")
    place.wait_for_step("changing", process, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 130

    plan = place.folder("changing") / "plan.json"
    # Two processes with whole weights, then two with sharded weights, then one.
    plan.write_text(plan.read_text().replace('"sharding": "none"', '"sharding": "full"'))
    process = place.start("changing", by=torchrun())
    place.wait_for_step("changing", process, 14)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0

    said = place.log("changing").read_text().split("continuing after step")[1]
    (line,) = (line for line in said.splitlines() if line.startswith("autoreg_pretrain: "))
    # On a busy machine, a step and its checkpoint may take longer than a stop may.
    assert "the state is saved" in line or "takes too long to finish" in line

    place.run("changing")

    errors = place.errors(whole)
    assert set(errors) == set(place.errors("alone")) == set(place.errors("changing"))
    for name in ("alone", "changing"):
        found = [place.errors(name)[key] for key in errors]
        # Sums over processes are made in another order.
        assert found == pytest.approx(list(errors.values()), rel=1e-5)


def test_a_killed_process_stops_the_others_and_the_run_resumes_exactly(place, whole):
    process = place.start("killed", "--num-gpus", "2")
    place.wait_for_step("killed", process, 12)
    main, worker = processes_of(process)
    # As the kernel does when memory runs out.
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) == 1
    assert gone(main)

    said = place.log("killed").read_text()
    expected = "process 1 of 2 ended by SIGKILL, most likely for lack of memory; all "
    assert said.splitlines()[-1].startswith(f"autoreg_pretrain: {expected}")
    assert "Traceback" not in said
    assert damage_of(place.folder("killed") / LATEST_NAME) == ""

    place.run("killed", "--num-gpus", "2")
    assert "continuing after step 10 of 30" in place.log("killed").read_text()
    assert place.encoder("killed") == place.encoder(whole)


def test_sigterm_saves_once_ends_all_and_the_run_resumes_exactly(place, whole):
    process = place.start("stopped", "--num-gpus", "2")
    place.wait_for_step("stopped", process, 3)
    main, worker = processes_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert gone(main)
    assert gone(worker)

    said = place.log("stopped").read_text()
    assert "the state is saved: type the same line again to continue" in said.splitlines()[-1]
    assert "Traceback" not in said

    place.run("stopped", "--num-gpus", "2")
    assert place.encoder("stopped") == place.encoder(whole)


def test_a_killed_launcher_or_main_process_ends_all_and_leaves_no_lock(place, whole):
    # First the launcher is killed, then, in the next try, the main training process.
    process = place.start("headless", "--num-gpus", "2")
    place.wait_for_step("headless", process, 3)
    main, worker = processes_of(process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert gone(main)
    assert gone(worker)

    process = place.start("headless", "--num-gpus", "2")
    place.wait_for_step("headless", process, 12)
    main, worker = processes_of(process)
    os.kill(main, signal.SIGKILL)
    assert process.wait(60) == 1
    assert gone(worker)
    last = place.log("headless").read_text().splitlines()[-1]
    assert last.startswith("autoreg_pretrain: process 0 of 2 ended by SIGKILL")

    place.run("headless", "--num-gpus", "2")

    assert place.encoder("headless") == place.encoder(whole)


def test_under_torchrun_a_killed_process_stops_the_run(place, whole):
    process = place.start("lost", by=torchrun())
    place.wait_for_step("lost", process, 12)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(90) != 0
    assert gone(ranks[0])

    lines = place.log("lost").read_text().splitlines()
    own = [line for line in lines if line.startswith("autoreg_pretrain: ")]
    assert own == [
        "autoreg_pretrain: one of 2 processes has ended, or cannot be reached any more; torchrun "
        "says which; the last checkpoint "
        "is kept: type the same line again to continue",
    ]
    assert damage_of(place.folder("lost") / LATEST_NAME) == ""

    place.run("lost", by=torchrun())
    assert "continuing after step 10 of 30" in place.log("lost").read_text()
    assert place.encoder("lost") == place.encoder(whole)


def test_hours_are_turned_into_steps_once_by_two_processes(
    place,
):
    hours = ("--hours", "0.001")

    process = place.start("timed", "--num-gpus", "2", length=hours)
    place.wait_for_step("timed", process, 1)
    plan = json.loads((place.folder("timed") / "plan.json").read_text())
    # 0.001 h are 3.6 s, of which 5 % are left for validation and checkpoints.
    steps = plan["optim"]["num_steps"]
    seconds = plan["run"]["seconds_per_step"]
    assert steps == int(0.95 * 3.6 / seconds)
    assert "95 % of 0.001 h at " in plan["reasons"]["optim.num_steps"]

    process.send_signal(signal.SIGTERM)
    # The run is so short that it may end before the signal arrives.
    assert process.wait(60) in (0, 130)

    place.run("timed", "--num-gpus", "2", length=hours)
    after = json.loads((place.folder("timed") / "plan.json").read_text())
    # The second line does not measure the pace again.
    assert (after["optim"], after["run"]) == (plan["optim"], plan["run"])
    assert max(step for step, _ in place.errors("timed")) == steps - 1
    assert json.loads((place.folder("timed") / "encoder.json").read_text())["num_steps"] == steps


def test_under_torchrun_an_impossible_line_ends_all_processes(place):
    process = place.start("impossible", "--num-gpus", "3", by=torchrun())

    assert process.wait(PATIENCE_S) != 0
    assert "--num-gpus 3: torchrun" in place.log("impossible").read_text()

    process = place.start("lacking", "--exclude", str(place.root / "no such file"), by=torchrun())

    assert process.wait(PATIENCE_S) != 0
    # Both processes find the fault, and only the main one prints it.
    assert place.log("lacking").read_text().count("no such file: does not exist") == 1
