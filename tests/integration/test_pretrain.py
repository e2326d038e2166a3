"""autoreg_pretrain on real scans, as a user types it: what it leaves, resuming bit for bit,
refusals, bad scans.
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
from nnunet_folders import environment_below, make_folders
from safetensors.numpy import load_file

from nnunet_autoreg.corpus.private import PRIVATE_NAME
from nnunet_autoreg.corpus.rows import read_index

pytestmark = pytest.mark.integration

COMMAND = str(Path(sys.executable).with_name("autoreg_pretrain"))
# Two narrow blocks: a step takes a fraction of a second.
ARGUMENTS = {
    "embed_dim": 48,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 2,
    "eva_numheads": 2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
SMALL_ENCODER = f"encoder.arguments={json.dumps(ARGUMENTS)}"
SMALL = [
    "--set",
    SMALL_ENCODER,
    "sequence.crop_size_vox=16,24,16",
    "run.checkpoint_every=5",
    "run.validate_every=5",
    "run.log_every=1",
]


@pytest.fixture
def workplace(tmp_path, shared_data):
    """Six real scans in a folder with a space and umlauts, and empty nnU-Net folders."""
    source = shared_data / "nnUNet_raw/Dataset004_Hippocampus/imagesTr"
    images = sorted(source.glob("*.nii.gz"))[:6]
    folder = tmp_path / "größere Klinik"
    folder.mkdir()
    for image in images:
        shutil.copy(image, folder)
    make_folders(tmp_path)
    return tmp_path


def environment(workplace):
    # With as many processes as a user has.
    return environment_below(workplace, nnUNet_n_proc_DA=None, nnUNet_def_n_proc=None)


def line(workplace, name, *arguments):
    return [
        COMMAND,
        "-i",
        str(workplace / "größere Klinik"),
        "--name",
        name,
        "--encoder",
        "primus_tiny",
        "--batch",
        "2",
        "--device",
        "cpu",
        *arguments,
    ]


def run(workplace, name, *arguments):
    return subprocess.run(
        line(workplace, name, *arguments),
        env=environment(workplace),
        capture_output=True,
        text=True,
        check=False,
    )


def metrics_of(folder):
    """Return the lines of metrics.jsonl."""
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def errors_of(lines):
    """Return (step, value) of the training errors among lines of metrics.jsonl."""
    return [(x["step"], x["value"]) for x in lines if x["name"] == "train_error"]


def folder_of(workplace, name):
    return workplace / "nnUNet_results/autoreg_pretraining" / name


def test_a_killed_run_continues_to_the_same_bytes(workplace):
    whole = run(workplace, "whole", "--steps", "12", *SMALL)

    assert whole.returncode == 0, whole.stderr
    # What comes next depends on whether the run has learnt something.
    following = whole.stdout.splitlines()[-1]
    assert following.startswith("next: ")
    assert "nnUNetv2_plan_and_preprocess -d ID -pl AutoregPlanner" in following
    left = folder_of(workplace, "whole")
    names = {
        "plan.json",
        "scans.csv",
        "fingerprint.json",
        "encoder.json",
        "encoder.safetensors",
        "checkpoint_latest.pth",
        "checkpoint_best.pth",
        "metrics.jsonl",
        "progress.png",
    }
    assert names <= {p.name for p in left.iterdir()}
    assert len(list(left.glob("training_log_*.txt"))) == 1
    lines = metrics_of(left)
    measured = {"train_error", "heldout_error", "heldout_mean", "heldout_copy", "lr", "step_time"}
    assert measured <= {x["name"] for x in lines}
    assert [step for step, _ in errors_of(lines)] == list(range(12))

    # Killed after the first of its checkpoints, which are written after 5, 10 and 12 steps.
    process = subprocess.Popen(
        line(workplace, "killed", "--steps", "12", *SMALL),
        env=environment(workplace),
        stderr=subprocess.DEVNULL,
    )
    killed = folder_of(workplace, "killed")
    while not (killed / "checkpoint_latest.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "encoder.json").exists()

    again = run(workplace, "killed", "--steps", "12", *SMALL)
    assert again.returncode == 0, again.stderr
    assert "continuing after step" in again.stderr
    weights = killed / "encoder.safetensors"
    assert weights.read_bytes() == (left / "encoder.safetensors").read_bytes()
    assert errors_of(metrics_of(killed)) == errors_of(lines)

    # A finished run is not made again.
    before = weights.stat().st_mtime_ns
    assert run(workplace, "killed", "--steps", "12", *SMALL).returncode == 0
    assert weights.stat().st_mtime_ns == before


def test_other_settings_are_refused_and_more_steps_are_not(workplace):
    assert run(workplace, "a", "--steps", "3", *SMALL).returncode == 0

    other = run(workplace, "a", "--steps", "3", "--seed", "1", *SMALL)
    assert other.returncode == 2
    assert "seed: 0 -> 1" in other.stderr

    fewer = run(workplace, "a", "--steps", "2", *SMALL)
    assert fewer.returncode == 2
    assert "num_steps: 3 -> 2" in fewer.stderr

    # More steps continue the run.
    longer = run(workplace, "a", "--steps", "5", *SMALL)
    assert longer.returncode == 0, longer.stderr
    assert json.loads((folder_of(workplace, "a") / "encoder.json").read_text())["num_steps"] == 5

    # A plan that was edited by hand differs from the one in the checkpoint.
    plan_file = folder_of(workplace, "a") / "plan.json"
    plan = plan_file.read_text()
    plan_file.write_text(plan.replace('"variance_floor": 0.01', '"variance_floor": 0.5'))
    edited = run(workplace, "a", "--steps", "5", *SMALL)
    assert edited.returncode == 2
    assert "objective.variance_floor: 0.01 -> 0.5" in edited.stderr


def test_a_dry_run_stops_after_plan_and_index_and_an_edited_plan_is_obeyed(workplace):
    dry = run(workplace, "dry", "--steps", "2", "--dry-run", *SMALL)
    assert dry.returncode == 0, dry.stderr

    left = folder_of(workplace, "dry")
    made = {p.name for p in left.iterdir() if not p.name.startswith((".", "training_log"))}
    assert made == {
        "plan.json",
        "scans.csv",
        PRIVATE_NAME,
        "licences.json",
        "fingerprint.json",
        "fingerprint.png",
    }

    # Nothing was trained yet, so the plan may still be edited.
    plan_file = left / "plan.json"
    plan_file.write_text(plan_file.read_text().replace('"lr": 0.0005', '"lr": 0.00025'))
    assert run(workplace, "dry", "--steps", "2", *SMALL).returncode == 0

    rates = [x["value"] for x in metrics_of(left) if x["name"] == "lr"]
    assert rates[0] == 0.00025


def test_existing_weights_start_a_run(workplace):
    assert run(workplace, "first", "--steps", "3", *SMALL).returncode == 0

    weights = folder_of(workplace, "first") / "encoder.safetensors"
    # A rate of 1e-12 shows the weights as they were loaded.
    init = ("--steps", "1", "--init", str(weights))
    second = run(workplace, "second", *init, *SMALL, "optim.lr=1e-12")
    assert second.returncode == 0, second.stderr
    assert "100.0 % of the encoder's parameters come from the file" in second.stderr

    a = load_file(weights)
    b = load_file(folder_of(workplace, "second") / "encoder.safetensors")
    assert all(np.allclose(a[key], b[key], atol=1e-9) for key in a)

    # The default encoder is larger than the one of the file.
    other = run(workplace, "third", *init, "--set", "run.log_every=1")
    assert other.returncode == 1
    assert len(other.stderr.strip().splitlines()[-1]) > 0
    assert "Traceback" not in other.stderr


def test_bad_scans_are_left_out_with_their_reason_and_the_run_continues(workplace):
    folder = workplace / "größere Klinik"
    good = sorted(folder.glob("*.nii.gz"))
    (folder / "empty.nii.gz").touch()
    (folder / "text.nii.gz").write_text("this is no image")
    (folder / "truncated.nii.gz").write_bytes(good[0].read_bytes()[:2000])
    shutil.copy(good[1], folder / "copy of it.nii.gz")
    arrays = {
        "nan": np.full((16, 16, 16), np.nan, np.float32),
        "constant": np.full((16, 16, 16), 7.0, np.float32),
        "flat": np.ones((16, 16), np.float32),
        "series": np.random.default_rng(0).normal(size=(3, 16, 16, 16)).astype(np.float32),
    }
    for name, array in arrays.items():
        image = SimpleITK.GetImageFromArray(array, isVector=False)
        SimpleITK.WriteImage(image, str(folder / f"{name}.nii.gz"))

    done = run(workplace, "bad", "--steps", "2", *SMALL)

    assert done.returncode == 0, done.stderr

    rows = read_index(folder_of(workplace, "bad") / "scans.csv")
    status = {Path(row.source).name: (row.status, row.reason) for row in rows}

    expected = {
        "empty": "unreadable",
        "text": "unreadable",
        "truncated": "unreadable",
        "nan": "nonfinite",
        "constant": "constant",
        "flat": "not3d",
        "series": "4d",
    }
    assert {name: status[f"{name}.nii.gz"][0] for name in expected} == expected
    # The six good scans; of the copy and its original, one is used.
    found = [s for s, _ in status.values()]
    assert found.count("ok") == 6
    assert found.count("duplicate") == 1
    assert all(reason for s, reason in status.values() if s != "ok")


def test_no_usable_scan_and_missing_variables_end_in_one_line(workplace):
    empty = workplace / "leer"
    empty.mkdir()
    # An empty folder, and an environment without nnU-Net's variables.
    command = [COMMAND, "-i", str(empty), "--name", "x", "--device", "cpu"]

    whole = environment(workplace)
    done = subprocess.run(command, env=whole, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "no scan was found; give other datasets" in done.stderr

    bare = {key: value for key, value in whole.items() if not key.startswith("nnUNet_")}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "export nnUNet_results=" in done.stderr
