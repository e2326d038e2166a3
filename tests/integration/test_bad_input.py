"""Bad input and rough handling, as a user types it: one clear line, the right exit code, and nothing lost."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DATASET = "Dataset004_Hippocampus"
ENCODER = ('encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":2,"eva_numheads":2,'
           '"init_values":0.1,"scale_attn_inner":true}')
SMALL = [ENCODER, "sequence.crop_size_vox=16,24,16", "run.checkpoint_every=1", "run.validate_every=1000", "run.log_every=1"]
STEPS = "4"
NUM_CASES = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared_data):
    """nnU-Net's folders, one real scan in a folder with a space and an umlaut, and the finished run 'base' on it."""
    home = tmp_path_factory.mktemp("bad input")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "größere Klinik"):
        (home / name).mkdir()
    image = min((shared_data / "nnUNet_raw" / DATASET / "imagesTr").glob("*.nii.gz"))
    shutil.copy(image, home / "größere Klinik" / "Kopf groß 1.nii.gz")
    done = pretrain(home, "base")
    assert done.returncode == 0, done.stderr
    return home


def environment(home, **changes):
    """The three folders below ``home``; a change to None removes a variable."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("autoreg_")}
    folders = {name: str(home / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    settings = {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    wanted = {**clean, **folders, **settings, **changes}
    return {k: str(v) for k, v in wanted.items() if v is not None}


def program(name):
    return str(Path(sys.executable).with_name(name))


def line(home, name, *arguments, settings=(), scans=None, steps=STEPS):
    """The arguments of one run on the one scan."""
    return [program("autoreg_pretrain"), "-i", str(scans or home / "größere Klinik"), "--name", name, "--steps", steps, "--batch", "2",
            "--device", "cpu", *arguments, "--set", *SMALL, *settings]


def typed(home, command, **changes):
    return subprocess.run(command, env=environment(home, **changes), capture_output=True, text=True, check=False)


def pretrain(home, name, *arguments, settings=(), scans=None, steps=STEPS, **changes):
    return typed(home, line(home, name, *arguments, settings=settings, scans=scans, steps=steps), **changes)


def folder(home, name="base"):
    return home / "nnUNet_results/autoreg_pretraining" / name


def refused(done, code, *said):
    """The last line on stderr is the command's own, it holds all of ``said``, and nothing else of the error is shown."""
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("autoreg_pretrain: ", "error: ")), done.stderr[-2000:]
    for words in said:
        assert words in last
    assert "next:" not in done.stdout
    return last


def bytes_of(path):
    """Content of every file of a run but the lock and the logs, by name."""
    return {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith((".lock", "training_log"))}


@pytest.fixture
def base(home):
    """The folder of the finished run; the test may damage it."""
    kept = bytes_of(folder(home))
    yield folder(home)
    for path in folder(home).iterdir():
        if path.name not in kept and not path.name.startswith((".lock", "training_log")):
            path.unlink()
    for name, content in kept.items():
        (folder(home) / name).write_bytes(content)


def test_an_edited_plan_with_an_unknown_key_or_a_wrong_type_is_refused_and_nothing_is_touched(home, base):
    original = (base / "plan.json").read_text()
    edits = (('"lr":', '"learning_rate":', "unknown key 'learning_rate'"), ('"batch_size": 2,', '"batch_size": "two",', "'two'"))
    for old, new, said in edits:
        (base / "plan.json").write_text(original.replace(old, new, 1))
        before = bytes_of(base)
        refused(pretrain(home, "base"), 2, "plan.json", said)
        assert bytes_of(base) == before


@pytest.mark.parametrize(("setting", "said"), [
    ("optim.learning_rate=1", "optim.learning_rate"),
    ("sequence.block_tokens=0,1,1", "sequence.block_tokens"),
    ("optim.betas=2,3", "optim.betas"),
    ("objective.name=autoregresive", "'autoregressive'"),
    ("encoder.arguments={}", "encoder.arguments"),
    ("encoder.token_size_vox=4,4,4", "encoder.token_size_vox"),
])
def test_a_nonsense_setting_is_refused_before_anything_is_planned_so_that_the_name_stays_free(home, setting, said):
    refused(pretrain(home, "nonsense", settings=[setting]), 2, said)
    assert not (folder(home, "nonsense") / "plan.json").exists()


def test_the_name_that_means_no_weights_is_refused(home):
    refused(pretrain(home, "none"), 2, "--name", "none")


def test_an_exclude_file_that_does_not_exist_is_refused(home):
    refused(pretrain(home, "excluded", "--exclude", "no such file.txt"), 2, "--exclude", "no such file.txt: does not exist")


def test_a_device_that_is_not_there_is_refused(home):
    refused(pretrain(home, "device", "--device", "cuda", CUDA_VISIBLE_DEVICES=""), 2, "--device cuda", "--device cpu")
    assert not folder(home, "device").exists()


class Harmful:
    """Unpickling this leaves a file behind."""

    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return Path.touch, (Path(self.witness),)


def with_card(target, home, weights, **changes):
    """``encoder.safetensors`` with any content, and a card that vouches for it."""
    target.mkdir()
    (target / "encoder.safetensors").write_bytes(weights)
    card = json.loads((folder(home) / "encoder.json").read_text())
    card.update(sha256=hashlib.sha256(weights).hexdigest(), **changes)
    (target / "encoder.json").write_text(json.dumps(card))
    return str(target / "encoder.safetensors")


def test_garbage_a_pickle_or_weights_with_an_edited_card_as_init_are_refused_before_anything_is_planned(home, tmp_path):
    import pickle

    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(bytes(range(256)) * 4)
    refused(pretrain(home, "init", "--init", str(garbage)), 1, "encoder.json")
    harmful = with_card(tmp_path / "pickle", home, pickle.dumps(Harmful(tmp_path / "witness")))
    refused(pretrain(home, "init", "--init", harmful), 1, harmful, "safetensors")
    assert not (tmp_path / "witness").exists()
    good = (folder(home) / "encoder.safetensors").read_bytes()
    edited = with_card(tmp_path / "edited", home, good, token_size_vox=[5, 5, 5])
    refused(pretrain(home, "init", "--init", edited), 1)
    assert not (folder(home, "init") / "plan.json").exists()


def test_a_truncated_checkpoint_is_refused_and_nothing_is_touched(home, base):
    latest = base / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:1000])
    before = bytes_of(base)
    refused(pretrain(home, "base", steps="5"), 1, "checkpoint_latest.pth", "move it away")
    assert bytes_of(base) == before


def test_what_a_kill_while_a_checkpoint_is_written_leaves_does_no_harm_and_is_swept(home, base):
    (base / "checkpoint_latest.pth").rename(base / ".checkpoint_latest.pth.1.tmp")
    (base / ".checkpoint_latest.pth.1.tmp").write_bytes(b"half")
    (base / "encoder.json").unlink()
    expected = (base / "encoder.safetensors").read_bytes()
    again = pretrain(home, "base")
    assert again.returncode == 0, again.stderr
    assert (base / "encoder.safetensors").read_bytes() == expected
    assert not list(base.glob(".*.tmp"))


def test_a_finished_run_whose_weights_were_deleted_writes_the_same_weights_again(home, base):
    expected = (base / "encoder.safetensors").read_bytes()
    (base / "encoder.safetensors").unlink()
    again = pretrain(home, "base")
    assert again.returncode == 0, again.stderr
    assert (base / "encoder.safetensors").read_bytes() == expected


def test_an_edited_encoder_json_of_a_finished_run_is_named_in_one_line(home, base):
    card = json.loads((base / "encoder.json").read_text())
    del card["num_steps"]
    (base / "encoder.json").write_text(json.dumps(card))
    before = bytes_of(base)
    refused(pretrain(home, "base"), 1, "encoder.json", "num_steps")
    assert bytes_of(base) == before


def test_a_checkpoint_whose_plan_was_removed_is_not_continued_with_other_settings(home, base):
    (base / "plan.json").unlink()
    before = bytes_of(base)
    refused(pretrain(home, "base", "--seed", "1"), 2, "seed: 0 -> 1")
    assert {name: content for name, content in bytes_of(base).items() if name in before and name.startswith(("checkpoint", "encoder"))} == {
        name: content for name, content in before.items() if name.startswith(("checkpoint", "encoder"))}


def test_a_lost_scans_csv_does_not_let_other_settings_continue_the_checkpoint(home, base):
    (base / "scans.csv").unlink()
    before = bytes_of(base)
    refused(pretrain(home, "base", "--seed", "1"), 2, "seed: 0 -> 1")
    assert {name: bytes_of(base)[name] for name in before} == before


def test_a_run_continues_after_its_scans_moved_away_because_the_store_has_them(home, base):
    away = (home / "größere Klinik").rename(home / "elsewhere")
    try:
        longer = pretrain(home, "base", steps="5")
    finally:
        away.rename(home / "größere Klinik")
    assert longer.returncode == 0, longer.stderr
    assert "continuing after step 4 of 5" in longer.stderr


def test_scans_that_vanish_before_preprocessing_end_the_run_and_it_goes_on_when_they_are_back(home, tmp_path):
    scans = tmp_path / "usb disk"
    scans.mkdir()
    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).normal(300, 90, size=(20, 28, 20)).astype(np.float32))
    SimpleITK.WriteImage(image, str(scans / "scan.nii.gz"))
    assert pretrain(home, "unplugged", "--dry-run", scans=scans).returncode == 0
    (scans / "scan.nii.gz").rename(tmp_path / "scan.nii.gz")
    refused(pretrain(home, "unplugged", scans=scans), 1, "none of 1 scans")
    (tmp_path / "scan.nii.gz").rename(scans / "scan.nii.gz")
    again = pretrain(home, "unplugged", scans=scans)
    assert again.returncode == 0, again.stderr
    assert (folder(home, "unplugged") / "encoder.safetensors").is_file()


def test_files_that_cannot_be_opened_are_left_out_with_their_reason(home, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(home / "größere Klinik", scans)
    (scans / "dangling.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    wanted = {"dangling": "link"}
    if os.geteuid() != 0:
        shutil.copy(scans / "Kopf groß 1.nii.gz", scans / "locked.nii.gz")
        (scans / "locked.nii.gz").chmod(0)
        wanted["locked"] = "permission denied"
    done = pretrain(home, "unreadable", "--dry-run", scans=scans)
    assert done.returncode == 0, done.stderr
    assert f"{len(wanted)} unreadable" in done.stderr
    with (folder(home, "unreadable") / "scans.csv").open(encoding="utf-8") as handle:
        rows = {Path(row["source"]).name.partition(".")[0]: row for row in csv.DictReader(handle)}
    assert rows["Kopf groß 1"]["status"] == "ok"
    assert all(rows[name]["status"] == "unreadable" and words in rows[name]["reason"] for name, words in wanted.items())


def test_folders_that_cannot_be_written_are_named_in_one_line(home, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/autoreg_pretraining").write_text("a file is in the way")
    refused(pretrain(home, "x", nnUNet_results=tmp_path / "results"), 1, "autoreg_pretraining", "cannot be written")
    (tmp_path / "preprocessed").mkdir()
    (tmp_path / "preprocessed/autoreg_store").write_text("a file is in the way")
    refused(pretrain(home, "no_store", nnUNet_preprocessed=tmp_path / "preprocessed"), 1, "autoreg_store", "File exists")
    assert (tmp_path / "preprocessed/autoreg_store").read_text() == "a file is in the way"


def started(home, command, log, until):
    """Start a command in a process group of its own and wait until ``until(text of stderr)``."""
    process = subprocess.Popen(command, env=environment(home), stdout=subprocess.DEVNULL, stderr=log.open("w"), start_new_session=True)
    deadline = time.monotonic() + 60
    while not until(log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    return process


def test_a_second_run_in_the_folder_is_refused_and_sigterm_in_the_first_steps_saves_the_state(home, tmp_path):
    quiet = ["run.checkpoint_every=100000", "run.log_every=100000"]
    command = line(home, "shared", steps="600", settings=quiet)
    process = started(home, command, tmp_path / "log", lambda text: "/600 [" in text)
    second = typed(home, command)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    refused(second, 1, "another process is working in", "another --name")
    text = (tmp_path / "log").read_text()
    assert code == 130, text[-2000:]
    assert "Traceback" not in text
    assert "the state is saved: type the same line again to continue" in text.splitlines()[-1]
    again = typed(home, command)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing after step" in again.stderr


def alive(group):
    """Process ids of a process group, zombies left out."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [row.split() for row in listed.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def test_a_kill_during_preprocessing_leaves_no_process_behind_and_the_same_line_goes_on(home, tmp_path):
    scans = tmp_path / "many"
    scans.mkdir()
    for number in range(3):
        image = SimpleITK.GetImageFromArray(np.random.default_rng(number).normal(300, 90, size=(48, 48, 48)).astype(np.float32))
        image.SetSpacing((1.0, 1.0, 1.0 + 0.1 * number))
        SimpleITK.WriteImage(image, str(scans / f"Größe {number}.nii"))
    store = home / "nnUNet_preprocessed/autoreg_store"
    before = set(store.rglob("*.b2nd"))
    command = line(home, "killed", scans=scans)
    process = started(home, command, tmp_path / "log", lambda _: set(store.rglob("*.b2nd")) - before)
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + 15
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = alive(process.pid)
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert left == []
    done = set(store.rglob("*.b2nd")) - before
    when = {path: path.stat().st_mtime_ns for path in done}
    again = typed(home, command)
    assert again.returncode == 0, again.stderr
    assert len(set(store.rglob("*.b2nd")) - before) == 3
    assert {path: path.stat().st_mtime_ns for path in done} == when


@pytest.fixture(scope="module")
def planned(home, shared_data):
    """A small labelled dataset, planned for the weights of 'base'; gives the plans file."""
    source, target = shared_data / "nnUNet_raw" / DATASET, home / "nnUNet_raw" / DATASET
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True)
    for image in sorted((source / "imagesTr").glob("*.nii.gz"))[:NUM_CASES]:
        shutil.copy(image, target / "imagesTr")
        shutil.copy(source / "labelsTr" / image.name.replace("_0000", ""), target / "labelsTr")
    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": NUM_CASES}))
    command = ["nnUNetv2_plan_and_preprocess", "-d", "4", "-pl", "AutoregPlanner", "-c", "3d_fullres", "-npfp", "1", "-np", "1"]
    done = typed(home, [program(command[0]), *command[1:]], autoreg_weights="base")
    assert done.returncode == 0, done.stderr
    file = home / "nnUNet_preprocessed" / DATASET / "AutoregPlans.json"
    plans = json.loads(file.read_text())
    plans["autoreg"]["recipe"].update(num_epochs=2, num_iterations_per_epoch=1, num_val_iterations_per_epoch=1)
    file.write_text(json.dumps(plans))
    return file


@pytest.fixture
def plans(planned):
    """The plans file; the test may damage it."""
    kept = planned.read_bytes()
    yield planned
    planned.write_bytes(kept)


def train(home, *arguments, plans="AutoregPlans"):
    command = [program("nnUNetv2_train"), "4", "3d_fullres", "0", "-tr", "AutoregPretrainedTrainer", "-device", "cpu", *arguments]
    return typed(home, [*command, "-p", plans] if plans else command)


def plan_again(home, weights):
    command = [program("nnUNetv2_plan_experiment"), "-d", "4", "-pl", "AutoregPlanner"]
    return typed(home, command, autoreg_weights=weights)


def test_planning_with_weights_whose_card_was_edited_ends_in_one_line(home, plans):
    before = plans.read_bytes()
    good = (folder(home) / "encoder.safetensors").read_bytes()
    odd = Path(with_card(home / "odd card", home, good, version="one", arguments={})).parent
    refused(plan_again(home, odd), 1, "encoder.json", "version")
    assert plans.read_bytes() == before


def test_training_with_an_impossible_patch_ends_in_one_line(home, plans):
    changed = json.loads(plans.read_text())
    changed["configurations"]["3d_fullres"]["patch_size"][0] = 41
    plans.write_text(json.dumps(changed))
    refused(train(home), 1, "41", "axis z", "multiple of the token size 8", "40 or 48")


def test_training_with_weights_of_another_shape_ends_in_one_line(home, plans, base):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(base / "encoder.safetensors")
    key = "eva.blocks.0.attn.q_proj.weight"
    save_file({**tensors, key: tensors[key][:40].copy()}, base / "encoder.safetensors")
    changed = json.loads(plans.read_text())
    changed["autoreg"]["weights"]["sha256"] = hashlib.sha256((base / "encoder.safetensors").read_bytes()).hexdigest()
    plans.write_text(json.dumps(changed))
    refused(train(home), 1, key, "(40, 48)", "(48, 48)")


def test_training_that_was_killed_and_training_that_is_finished_go_on_with_c(home, planned, tmp_path):
    fold = home / "nnUNet_results" / DATASET / "AutoregPretrainedTrainer__AutoregPlans__3d_fullres/fold_0"
    shutil.rmtree(fold, ignore_errors=True)
    command = [program("nnUNetv2_train"), "4", "3d_fullres", "0", "-tr", "AutoregPretrainedTrainer", "-p", "AutoregPlans", "-device", "cpu"]
    process = started(home, command, tmp_path / "log", lambda _: (fold / "checkpoint_best.pth").exists())
    process.kill()
    process.wait()
    continued = train(home, "--c")
    assert continued.returncode == 0, continued.stderr[-2000:]
    assert "Epoch 1" in continued.stdout
    assert "Epoch 0" not in continued.stdout
    assert "encoder weights from" not in continued.stdout
    finished = train(home, "--c")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "Epoch 1" not in finished.stdout
    assert "Mean Validation Dice" in finished.stdout
    assert (fold / "checkpoint_final.pth").is_file()
