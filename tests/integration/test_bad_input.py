"""Bad input and rough handling of pretraining, as a user types it: one clear line, the right exit
code, and nothing lost.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from traps import Trap

from nnunet_autoreg.corpus.rows import read_index

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_an_edited_plan_with_a_wrong_key_or_type_is_refused(home, base):
    original = (base / "plan.json").read_text()
    # A key that does not exist, and a value of another type.
    edits = (
        ('"lr":', '"learning_rate":', "unknown key 'learning_rate'"),
        ('"batch_size": 2,', '"batch_size": "two",', "'two'"),
    )
    for old, new, said in edits:
        (base / "plan.json").write_text(original.replace(old, new, 1))
        before = home.bytes_of(base)

        home.refused(home.pretrain("base"), 2, "plan.json", said)

        assert home.bytes_of(base) == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.learning_rate=1", "optim.learning_rate"),
        ("sequence.block_tokens=0,1,1", "sequence.block_tokens"),
        ("optim.betas=2,3", "optim.betas"),
        # A typing error, for which the closest name is shown.
        ("objective.name=autoregresive", "'autoregressive'"),
        ("encoder.arguments={}", "encoder.arguments"),
        ("encoder.token_size_vox=4,4,4", "encoder.token_size_vox"),
    ],
)
def test_a_nonsense_setting_is_refused_before_anything_is_planned(home, setting, said):
    home.refused(home.pretrain("nonsense", settings=[setting]), 2, said)
    assert not (home.folder("nonsense") / "plan.json").exists()


def test_the_name_that_means_no_weights_is_refused(home):
    # "none" means for "no weights" in the variable autoreg_weights.
    home.refused(home.pretrain("none"), 2, "--name", "none")


def test_an_exclude_file_that_does_not_exist_is_refused(home):
    home.refused(
        home.pretrain("excluded", "--exclude", "no such file.txt"),
        2,
        "--exclude",
        "no such file.txt: does not exist",
    )


def test_a_device_that_is_not_there_is_refused(home):
    home.refused(
        # On a machine with a GPU too: the variable hides it.
        home.pretrain("device", "--device", "cuda", CUDA_VISIBLE_DEVICES=""),
        2,
        "--device cuda",
        "--device cpu",
    )
    assert not home.folder("device").exists()


def test_bad_weights_as_init_are_refused_before_planning(home, tmp_path):
    import pickle

    # Bytes that are not safetensors.
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(bytes(range(256)) * 4)
    home.refused(home.pretrain("init", "--init", str(garbage)), 1, str(garbage), "safetensors")

    # A pickle that would run code; the card beside it states its right hash.
    harmful = home.with_card(tmp_path / "pickle", pickle.dumps(Trap(tmp_path / "witness")))
    home.refused(home.pretrain("init", "--init", harmful), 1, harmful, "safetensors")
    assert not (tmp_path / "witness").exists()

    # Right weights with a wrong card.
    good = (home.folder() / "encoder.safetensors").read_bytes()
    edited = home.with_card(tmp_path / "edited", good, token_size_vox=[5, 5, 5])
    home.refused(home.pretrain("init", "--init", edited), 1)

    assert not (home.folder("init") / "plan.json").exists()


def test_a_truncated_checkpoint_is_named_and_the_one_before_continued(home, base):
    latest = base / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:1000])

    longer = home.pretrain("base", steps="5")

    assert longer.returncode == 0, longer.stderr
    # Four steps with a checkpoint after each: the one before is that of step 3.
    continuing = "checkpoint_latest.pth.damaged; continuing from checkpoint_previous.pth, step 3"
    assert continuing in longer.stderr
    assert "continuing after step 3 of 5" in longer.stderr


def test_a_run_with_only_truncated_checkpoints_is_refused_untouched(home, base):
    for path in base.glob("checkpoint_*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    before = home.bytes_of(base)

    home.refused(
        home.pretrain("base", steps="5"),
        1,
        "checkpoint_latest.pth",
        "move the checkpoints away",
    )
    assert home.bytes_of(base) == before


def test_half_written_checkpoints_of_a_killed_run_are_harmless_and_removed(home, base):
    # As a kill leaves it while the last checkpoint is written, before the weights are exported.
    (base / "checkpoint_latest.pth").rename(base / ".checkpoint_latest.pth.1.tmp")
    (base / ".checkpoint_latest.pth.1.tmp").write_bytes(b"half")
    (base / "encoder.json").unlink()
    expected = (base / "encoder.safetensors").read_bytes()

    again = home.pretrain("base")

    assert again.returncode == 0, again.stderr
    assert (base / "encoder.safetensors").read_bytes() == expected
    assert not list(base.glob(".*.tmp"))


def test_a_finished_run_writes_deleted_weights_again(home, base):
    expected = (base / "encoder.safetensors").read_bytes()
    (base / "encoder.safetensors").unlink()

    again = home.pretrain("base")

    assert again.returncode == 0, again.stderr
    assert (base / "encoder.safetensors").read_bytes() == expected


def test_an_edited_encoder_json_of_a_finished_run_is_named_in_one_line(home, base):
    card = json.loads((base / "encoder.json").read_text())
    del card["num_steps"]
    (base / "encoder.json").write_text(json.dumps(card))

    before = home.bytes_of(base)

    home.refused(home.pretrain("base"), 1, "encoder.json", "num_steps")
    assert home.bytes_of(base) == before


def test_a_checkpoint_without_its_plan_keeps_its_settings(home, base):
    (base / "plan.json").unlink()
    kept = {
        name: content
        for name, content in home.bytes_of(base).items()
        if name.startswith(("checkpoint", "encoder"))
    }

    # The checkpoint holds the plan as well, so another seed is noticed.
    home.refused(home.pretrain("base", "--seed", "1"), 2, "seed: 0 -> 1")
    assert {name: content for name, content in home.bytes_of(base).items() if name in kept} == kept


def test_without_scans_csv_other_settings_cannot_continue_a_checkpoint(home, base):
    (base / "scans.csv").unlink()
    before = home.bytes_of(base)

    home.refused(home.pretrain("base", "--seed", "1"), 2, "seed: 0 -> 1")
    # Files may be added (a log), but none of those that existed may change.
    assert {name: home.bytes_of(base)[name] for name in before} == before


def test_a_run_continues_from_the_store_after_its_scans_moved_away(home, base):
    # The preprocessed scans are in the store, so the files are not needed any more.
    away = (home.root / "größere Klinik").rename(home.root / "elsewhere")
    try:
        longer = home.pretrain("base", steps="5")
    finally:
        away.rename(home.root / "größere Klinik")

    assert longer.returncode == 0, longer.stderr
    assert "continuing after step 4 of 5" in longer.stderr


def test_a_run_without_its_scans_ends_and_continues_when_they_are_back(home, tmp_path):
    scans = tmp_path / "usb disk"
    scans.mkdir()
    image = SimpleITK.GetImageFromArray(
        np.random.default_rng(0).normal(300, 90, size=(20, 28, 20)).astype(np.float32),
    )
    SimpleITK.WriteImage(image, str(scans / "scan.nii.gz"))
    # A dry run plans and stores nothing but the plan.
    assert home.pretrain("unplugged", "--dry-run", scans=scans).returncode == 0

    # The disk is unplugged after planning.
    (scans / "scan.nii.gz").rename(tmp_path / "scan.nii.gz")
    home.refused(home.pretrain("unplugged", scans=scans), 1, "none of 1 scans")

    (tmp_path / "scan.nii.gz").rename(scans / "scan.nii.gz")
    again = home.pretrain("unplugged", scans=scans)
    assert again.returncode == 0, again.stderr
    assert (home.folder("unplugged") / "encoder.safetensors").is_file()


def test_files_that_cannot_be_opened_are_left_out_with_their_reason(home, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(home.root / "größere Klinik", scans)
    (scans / "dangling.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    wanted = {"dangling": "link"}
    # root may read everything.
    if os.geteuid() != 0:
        shutil.copy(scans / "Kopf groß 1.nii.gz", scans / "locked.nii.gz")
        (scans / "locked.nii.gz").chmod(0)
        wanted["locked"] = "permission denied"

    done = home.pretrain("unreadable", "--dry-run", scans=scans)

    assert done.returncode == 0, done.stderr
    assert f"{len(wanted)} unreadable" in done.stderr

    found = read_index(home.folder("unreadable") / "scans.csv")
    rows = {Path(row.source).name.partition(".")[0]: row for row in found}

    assert rows["Kopf groß 1"].status == "ok"
    assert all(
        rows[name].status == "unreadable" and words in rows[name].reason
        for name, words in wanted.items()
    )


def test_folders_that_cannot_be_written_are_named_in_one_line(home, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/autoreg_pretraining").write_text("a file is in the way")

    home.refused(
        home.pretrain("x", nnUNet_results=tmp_path / "results"),
        1,
        "autoreg_pretraining",
        "cannot be written",
    )

    (tmp_path / "preprocessed").mkdir()
    (tmp_path / "preprocessed/autoreg_store").write_text("a file is in the way")

    home.refused(
        home.pretrain("no_store", nnUNet_preprocessed=tmp_path / "preprocessed"),
        2,
        "autoreg_store cannot be made (File exists)",
    )
    assert (tmp_path / "preprocessed/autoreg_store").read_text() == "a file is in the way"


def test_a_second_run_in_the_folder_is_refused_and_sigterm_saves_the_state(home, tmp_path):
    quiet = ["run.checkpoint_every=100000", "run.log_every=100000"]
    # No checkpoint before the signal: the state that is saved is that of the stop itself.
    command = home.line("shared", steps="1500", settings=quiet)
    # There is no progress bar without a terminal; training begins right after the dry step.
    process = home.started(command, tmp_path / "log", lambda text: "dry step:" in text)
    second = home.typed(command)
    process.send_signal(signal.SIGTERM)
    code = process.wait()

    home.refused(second, 1, "another process is working in", "another --name")

    text = (tmp_path / "log").read_text()
    assert code == 130, text[-2000:]
    assert "Traceback" not in text
    assert "the state is saved: type the same line again to continue" in text.splitlines()[-1]

    again = home.typed(command)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing after step" in again.stderr


def alive(group):
    """Process ids of a process group, zombies left out."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,pgid=,stat="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [row.split() for row in listed.splitlines()]
    return [
        int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")
    ]


def test_a_kill_during_preprocessing_leaves_no_process_behind(home, tmp_path):
    scans = tmp_path / "many"
    scans.mkdir()
    # Three scans with different voxel sizes, so that resampling takes some seconds.
    for number in range(3):
        image = SimpleITK.GetImageFromArray(
            np.random.default_rng(number).normal(300, 90, size=(48, 48, 48)).astype(np.float32),
        )
        image.SetSpacing((1.0, 1.0, 1.0 + 0.1 * number))
        SimpleITK.WriteImage(image, str(scans / f"Größe {number}.nii"))
    store = home.root / "nnUNet_preprocessed/autoreg_store"
    before = set(store.rglob("*.b2nd"))
    command = home.line("killed", scans=scans)
    # A case is finished when its record is written, after its voxels.
    records = set(store.rglob("*.json"))
    process = home.started(
        command,
        tmp_path / "log",
        lambda _: set(store.rglob("*.json")) - records,
    )
    process.kill()
    process.wait()
    try:
        # Workers notice the death of the main process by themselves, which takes a moment.
        deadline = time.monotonic() + 15
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = alive(process.pid)
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)

    assert left == []

    finished = set(store.rglob("*.json")) - records
    done = {path.with_suffix(".b2nd") for path in finished}
    when = {path: path.stat().st_mtime_ns for path in done}
    again = home.typed(command)

    assert again.returncode == 0, again.stderr
    assert len(set(store.rglob("*.b2nd")) - before) == 3
    # Cases that were finished before the kill are not made again.
    assert {path: path.stat().st_mtime_ns for path in done} == when
