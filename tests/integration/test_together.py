"""Two processes on one training, through the command: killed, stopped, started by torchrun; the
same line goes on to the same bytes.
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
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")
        }
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
        lines = [
            json.loads(line)
            for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        ]
        return {
            (x["step"], x["name"]): x["value"]
            for x in lines
            if x["name"] in ("train_error", "heldout_error", "gradient_norm")
        }

    def wait_for_step(self, name, process, step):
        """Until this step was logged."""
        deadline, metrics = time.monotonic() + PATIENCE_S, self.folder(name) / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, self.log(
                name,
            ).read_text()[-2000:]
            time.sleep(0.05)


def processes_of(process):
    """Process ids by rank of the training processes that ``--num-gpus`` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def ranks_of(process):
    """Process ids by rank of the training processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    settings = {
        int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children
    }
    return {
        int(value[5:]): pid
        for pid, values in settings.items()
        for value in values
        if value.startswith(b"RANK=")
    }


def gone(pid):
    """Wait until a process is no more."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def torchrun(num_processes=2):
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
        assert [place.errors(name)[key] for key in errors] == pytest.approx(
            list(errors.values()),
            rel=1e-5,
        )


def test_a_killed_process_stops_the_others_and_the_run_resumes_exactly(place, whole):
    process = place.start("killed", "--num-gpus", "2")
    place.wait_for_step("killed", process, 12)
    main, worker = processes_of(process)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) == 1
    assert gone(main)

    said = place.log("killed").read_text()
    assert said.splitlines()[-1].startswith(
        "autoreg_pretrain: process 1 of 2 ended by SIGKILL, most likely for lack of memory; all ",
    )
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
    assert gone(main) and gone(worker)

    said = place.log("stopped").read_text()
    assert "the state is saved: type the same line again to continue" in said.splitlines()[-1]
    assert "Traceback" not in said

    place.run("stopped", "--num-gpus", "2")
    assert place.encoder("stopped") == place.encoder(whole)


def test_a_killed_launcher_or_main_process_ends_all_and_leaves_no_lock(place, whole):
    process = place.start("headless", "--num-gpus", "2")
    place.wait_for_step("headless", process, 3)
    main, worker = processes_of(process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert gone(main) and gone(worker)

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

    own = [
        line
        for line in place.log("lost").read_text().splitlines()
        if line.startswith("autoreg_pretrain: ")
    ]
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
    steps, seconds = plan["optim"]["num_steps"], plan["run"]["seconds_per_step"]
    assert (
        steps == int(0.95 * 3.6 / seconds)
        and "95 % of 0.001 h at " in plan["reasons"]["optim.num_steps"]
    )

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, 130)

    place.run("timed", "--num-gpus", "2", length=hours)
    after = json.loads((place.folder("timed") / "plan.json").read_text())
    assert (after["optim"], after["run"]) == (plan["optim"], plan["run"])
    assert max(step for step, _ in place.errors("timed")) == steps - 1
    assert json.loads((place.folder("timed") / "encoder.json").read_text())["num_steps"] == steps


def test_under_torchrun_an_impossible_line_ends_all_processes(place):
    process = place.start("impossible", "--num-gpus", "3", by=torchrun())

    assert process.wait(PATIENCE_S) != 0
    assert "--num-gpus 3: torchrun" in place.log("impossible").read_text()

    process = place.start("lacking", "--exclude", str(place.root / "no such file"), by=torchrun())

    assert process.wait(PATIENCE_S) != 0
    assert place.log("lacking").read_text().count("no such file: does not exist") == 1
