"""Checkpoints: the hash, what a torn, flipped or missing file leads to, and a disk that is full."""

import logging
import resource
import zipfile

import pytest
import torch
from refusals import refused
from traps import Trap

from nnunet_autoreg import checkpoint
from nnunet_autoreg.checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    PREVIOUS_NAME,
    damage_of,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from nnunet_autoreg.errors import CheckpointError


def save(folder, step, size=100):
    save_checkpoint(
        folder / LATEST_NAME,
        {"step": step, "weights": torch.full((size,), float(step))},
        folder / PREVIOUS_NAME,
    )


def flip_a_bit(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_comes_back_and_stays_a_zip_that_torch_reads(tmp_path):
    save(tmp_path, 3)
    latest = tmp_path / LATEST_NAME

    assert load_checkpoint(latest)["step"] == 3
    weights = torch.load(latest, weights_only=True)["weights"]
    assert bool((weights == 3).all())
    # The hash is the comment of the zip, which torch ignores.
    assert zipfile.ZipFile(latest).comment.startswith(b"sha256=")


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LATEST_NAME, PREVIOUS_NAME])
    assert load_checkpoint(tmp_path / LATEST_NAME)["step"] == 3
    assert load_checkpoint(tmp_path / PREVIOUS_NAME)["step"] == 2


# The header of the zip, the weights, the table of its files, and the comment with the hash itself
# (the last 71 bytes: "sha256=" and 64 digits).
@pytest.mark.parametrize("place", [0, 1, 700, -140, -100, -72, -64, -1])
def test_a_flipped_bit_anywhere_is_found(tmp_path, place):
    save(tmp_path, 1)

    flip_a_bit(tmp_path / LATEST_NAME, place)
    assert damage_of(tmp_path / LATEST_NAME) != ""


# Nothing at all, less than the comment, and all bytes except the last one.
@pytest.mark.parametrize("length", [0, 10, 80, 700, -1])
def test_a_torn_file_is_found(tmp_path, length):
    save(tmp_path, 1)
    data = (tmp_path / LATEST_NAME).read_bytes()
    (tmp_path / LATEST_NAME).write_bytes(data[:length])

    with refused(CheckpointError, "checkpoint-damaged", tmp_path / LATEST_NAME):
        load_checkpoint(tmp_path / LATEST_NAME)


def test_a_damaged_newest_one_is_set_aside_once_with_one_line(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip_a_bit(tmp_path / LATEST_NAME, 500)
    flipped = (tmp_path / LATEST_NAME).read_bytes()

    with caplog.at_level(logging.WARNING):
        path, content = load_newest(tmp_path)
        # Found damaged again, but already set aside: no second line.
        load_newest(tmp_path)

    assert (path.name, content["step"]) == (PREVIOUS_NAME, 1)
    assert len(caplog.messages) == 1
    assert "its checksum differs" in caplog.messages[0]
    assert "continuing from checkpoint_previous.pth, step 1" in caplog.messages[0]
    assert (tmp_path / f"{LATEST_NAME}.damaged").read_bytes() == flipped

    # The damaged file has moved, so the next one to be saved does not overwrite the good one.
    save(tmp_path, 2)

    assert load_checkpoint(tmp_path / LATEST_NAME)["step"] == 2
    assert load_checkpoint(tmp_path / PREVIOUS_NAME)["step"] == 1


def test_after_a_kill_between_the_two_renames_the_one_before_is_found(tmp_path):
    save(tmp_path, 1)
    # Saving first renames the newest to "previous", then the new file to "latest".
    (tmp_path / LATEST_NAME).replace(tmp_path / PREVIOUS_NAME)

    assert checkpoint.exists(tmp_path)
    assert load_newest(tmp_path)[1]["step"] == 1

    save(tmp_path, 2)

    assert load_checkpoint(tmp_path / PREVIOUS_NAME)["step"] == 1


def test_if_all_are_damaged_nothing_is_touched_and_all_are_named(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    save_checkpoint(tmp_path / BEST_NAME, {"step": 1})
    for path in tmp_path.iterdir():
        flip_a_bit(path, 300)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    with refused(CheckpointError, "checkpoint-all-damaged", LATEST_NAME, PREVIOUS_NAME, BEST_NAME):
        load_newest(tmp_path)

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_missing_checkpoint_is_not_an_error(tmp_path):
    assert not checkpoint.exists(tmp_path)
    assert load_newest(tmp_path) is None


def test_a_disk_that_takes_no_more_bytes_is_named_and_the_files_stay(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    # A limit on the size of a file acts like a full disk; 100 000 floats are 400 kB.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with refused(CheckpointError, "checkpoint-unwritable", "File too large") as caught:
            save(tmp_path, 3, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_code_in_a_checkpoint_is_not_run_even_under_a_good_hash(tmp_path):
    # Trap writes the witness when it is unpickled. The hash is right: it protects against damage,
    # not
    # against an attacker.
    save_checkpoint(tmp_path / LATEST_NAME, {"step": Trap(tmp_path / "witness")})

    with refused(CheckpointError, "checkpoint-not-plain", tmp_path / LATEST_NAME):
        load_checkpoint(tmp_path / LATEST_NAME)
    assert not (tmp_path / "witness").exists()
