"""kill -9 at named points: the same line typed again leaves the same bytes as a run that nobody
disturbed.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from phantom_runs import PhantomRuns

from nnunet_autoreg.checkpoint import LATEST_NAME, RESUMABLE, damage_of, load_checkpoint
from nnunet_autoreg.records import TEMPORARY_FILES

pytestmark = pytest.mark.integration

RUNNER = Path(__file__).with_name("kill_runner.py")
ALICE = [
    # Two of the five scans, because pairs for validation need two patients.
    "data.holdout_fraction=0.4",
    "objective.width=16",
    "objective.hidden=24",
    "objective.num_prototypes=32",
    "--objective",
    "alice",
]
# Small slabs and few of their clusters, so that all happens within eight steps.
JOINT = [
    "data.holdout_fraction=0.4",
    "objective.width=16",
    "objective.num_heads=2",
    "objective.depth=1",
    "objective.slabs_first=0.3",
    "objective.slab_vox=8",
    "objective.slab_step_vox=4",
    "--objective",
    "joint",
]
# Metrics that only these objectives have.
OF_ALICE = ("train_classes", "train_patches", "centre_norm_patches", "teacher_entropy_patches")
OF_JOINT = ("train_slabs", "train_volumes", "train_hidden", "cluster_entropy", "bank_filled")
# What a run that was killed and typed again must reproduce exactly: everything but times.
REPRODUCED = (
    *OF_ALICE,
    *OF_JOINT,
    "train_error",
    "gradient_norm",
    "lr",
    "heldout_error",
    "token_variance",
    "effective_rank",
)


class KilledRuns(PhantomRuns):
    """Runs that end themselves with SIGKILL at a named point."""

    def __init__(self, root):
        super().__init__(root, RUNNER, "KILL_")

    def run(self, name, point=None, store="nnUNet_preprocessed", options=()):
        """Type the line; return its exit status, negative for a signal."""
        self.start(name, store, options, point=point)
        return self.status()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = KilledRuns(tmp_path_factory.mktemp("kill"))
    yield place
    place.server.close()


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run that nobody disturbed."""
    assert place.run("whole") == 0, place.output("whole")[-2000:]
    return place.folder("whole")


def reproduced(folder):
    """Return the metrics of a run that do not depend on the speed of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["name"], x["value"]) for x in lines if x["name"] in REPRODUCED]


# Where a line is killed, and its exit status: the main process survives the death of a worker.
def weights_of(folder):
    """Return the bytes of the exported weights of a run."""
    return (folder / "encoder.safetensors").read_bytes()


POINTS = {
    "indexing": -signal.SIGKILL,
    "preprocessing": -signal.SIGKILL,
    "in a worker": 1,
    "in the middle of a step": -signal.SIGKILL,
    "validation": -signal.SIGKILL,
    "while a checkpoint is written": -signal.SIGKILL,
    "between writing and renaming a checkpoint": -signal.SIGKILL,
    "between the two renames of a checkpoint": -signal.SIGKILL,
    "while writing metrics.jsonl": -signal.SIGKILL,
    "export": -signal.SIGKILL,
    "after the export, before the finished mark": -signal.SIGKILL,
}
# In the store of the other runs everything is preprocessed already.
NEED_AN_EMPTY_STORE = ("preprocessing", "in a worker")


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_this_point_and_typed_again_leaves_the_same_bytes(place, whole, point):
    name = point.replace(" ", "_").replace(",", "")
    store = "nnUNet_preprocessed"
    if point in NEED_AN_EMPTY_STORE:
        store = f"store {point}"

    assert place.run(name, point, store) == POINTS[point], place.output(name)[-2000:]

    folder = place.folder(name)
    assert not (folder / "encoder.json").exists()

    killed = place.output(name)
    assert "Traceback" not in killed, killed[-2000:]

    if point == "in a worker":
        assert "a worker process died" in killed.splitlines()[-1]

    assert place.run(name, None, store) == 0, place.output(name)[-2000:]

    again = place.output(name)[len(killed) :]
    assert "Traceback" not in again
    assert weights_of(folder) == weights_of(whole)
    assert reproduced(folder) == reproduced(whole)
    # Neither files that were half written nor damaged checkpoints are left.
    assert not list(folder.glob(TEMPORARY_FILES))
    assert {path: damage_of(folder / path) for path in RESUMABLE} == dict.fromkeys(RESUMABLE, "")


def test_a_flipped_bit_in_a_checkpoint_falls_back_to_the_one_before(place, whole):
    # Killed during the export, so that all checkpoints exist: after 3, 6 and 8 steps.
    assert place.run("flipped", "export") == -signal.SIGKILL

    latest = place.folder("flipped") / "checkpoint_latest.pth"
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 4
    latest.write_bytes(data)

    assert place.run("flipped") == 0, place.output("flipped")[-2000:]

    shown = place.output("flipped").splitlines()
    (found,) = [line for line in shown if "its checksum differs" in line]
    now = "is now checkpoint_latest.pth.damaged; continuing from checkpoint_previous.pth, step 6"
    assert found.endswith(now)
    assert weights_of(place.folder("flipped")) == weights_of(whole)


def test_two_kills_in_a_row_and_foreign_files_change_nothing(place, whole):
    assert place.run("twice", "in the middle of a step") == -signal.SIGKILL

    theirs = place.folder("twice") / "my notes.txt"
    theirs.write_text("keep")

    assert place.run("twice", "while writing metrics.jsonl") == -signal.SIGKILL
    assert place.run("twice") == 0
    assert weights_of(place.folder("twice")) == weights_of(whole)
    assert theirs.read_text() == "keep"


def test_a_loader_process_ends_with_the_main_process(tmp_path):
    # The main process starts a loader, prints its process id, and dies without ending it.
    script = tmp_path / "main.py"
    script.write_text(
        "import os, signal, multiprocessing\n"
        "from nnunet_autoreg.pretrain.data import training_batches\n"
        "batches = training_batches(list(range(1000)), range(1000), 1, False)\n"
        "next(batches)\n"
        "print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    worker = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10

    def has_ended():
        """Return whether the process is gone or a zombie, which nobody has waited for."""
        return not worker.exists() or "Z" in (worker / "stat").read_text().split()[2]

    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert has_ended()

    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def whole_alice(place):
    """The folder of a run of Alice that nobody disturbed."""
    assert place.run("whole_alice", options=ALICE) == 0, place.output("whole_alice")[-2000:]
    return place.folder("whole_alice")


@pytest.mark.parametrize(
    "point",
    ["in the middle of a step", "between the two renames of a checkpoint", "export"],
)
def test_a_killed_run_of_alice_continues_with_the_same_teacher(place, whole_alice, point):
    name = f"alice_{point}".replace(" ", "_")
    assert place.run(name, point, options=ALICE) == POINTS[point], place.output(name)[-2000:]

    assert place.run(name, options=ALICE) == 0, place.output(name)[-2000:]

    folder = place.folder(name)
    assert weights_of(folder) == weights_of(whole_alice)
    assert reproduced(folder) == reproduced(whole_alice)
    assert set(OF_ALICE) <= {metric for _, metric, _ in reproduced(folder)}

    # The teacher is not exported here, but it decides what later steps learn.
    found, expected = (load_checkpoint(f / LATEST_NAME)["extra"] for f in (folder, whole_alice))
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in found)


def test_a_killed_joint_run_on_volumes_and_pictures_leaves_the_same_bytes(place):
    pictures = place.root / "pictures"
    pictures.mkdir()
    # Four pictures beside the five volumes of the place.
    for number in range(4):
        values = np.random.default_rng(number).integers(1, 250, (24, 30), dtype=np.uint8)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(pictures / f"{number}.png"))
    options = [*JOINT, "-i", str(place.root / "scans"), str(pictures)]
    point = "in the middle of a step"
    assert place.run("whole_joint", options=options) == 0, place.output("whole_joint")[-2000:]
    assert place.run("joint", point, options=options) == POINTS[point]

    assert place.run("joint", options=options) == 0, place.output("joint")[-2000:]

    whole = place.folder("whole_joint")
    folder = place.folder("joint")
    assert weights_of(folder) == weights_of(whole)
    assert reproduced(folder) == reproduced(whole)
    assert set(OF_JOINT) <= {metric for _, metric, _ in reproduced(folder)}
    # Half as many samples of images as views of volumes.
    weights = json.loads((folder / "plan.json").read_text())["sequence"]["weights"]
    assert weights == {"views": 1.0, "images": 0.5}

    # Banks and balance decide what later steps learn.
    found, expected = (load_checkpoint(f / LATEST_NAME)["extra"] for f in (folder, whole))
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in found)
    assert found["volume_known"].any()
    assert found["slab_known"].any()
