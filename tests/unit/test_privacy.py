"""No output but the one private file holds a name: a run on scans with telling names, searched byte
by byte.
"""

import json
import logging
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import dicom_files
import numpy as np
import pytest
import SimpleITK
from refusals import refused

from nnunet_autoreg.corpus.private import (
    PRIVATE_NAME,
    is_harmless_word,
    public_dataset,
    without_names,
)
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.pretrain.pipeline import pretrain
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.pretrain.run_folder import matching_plan, read_plan

SENTINEL = "DOEJOHN"
BIRTH, UID = "19601231", "1.2.840.999666333"
SECRETS = (SENTINEL, BIRTH, UID)
ARGUMENTS = {
    "embed_dim": 48,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 2,
    "eva_numheads": 2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}


def write_nifti(file: Path, seed: int, shape: tuple[int, int, int] = (24, 24, 24)) -> None:
    noise = np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise), str(file))


def write_inputs(root: Path) -> Path:
    """Scans of every form whose folders, files, tags and members are called after patients; some of
    them unusable.
    """
    pool = root / f"{SENTINEL}^ward_{BIRTH}"
    for seed in range(3):
        write_nifti(pool / f"{SENTINEL}{seed}" / f"ct_{SENTINEL}{seed}_{BIRTH}.nii.gz", seed)
    write_nifti(pool / f"copy_of_{SENTINEL}.nii.gz", 0)
    (pool / f"damaged_{SENTINEL}.nii.gz").write_bytes(b"nothing")
    write_nifti(pool / f"excluded_{SENTINEL}.nii.gz", 50)
    (pool / f"{SENTINEL}.txt").write_text(SENTINEL)

    generator = np.random.default_rng(7)
    changes = {
        "t00100010": ("PN", f"{SENTINEL}^J"),
        "t00100020": ("LO", SENTINEL),
        "t00100030": ("DA", BIRTH),
        "t0008103e": ("LO", f"T1 {SENTINEL}"),
        "t00180015": ("CS", SENTINEL),
        "t00091010": ("LO", SENTINEL),
    }
    for number in range(16):
        values = dicom_files.slice_values(
            number, series=f"{UID}.5", sop_class=dicom_files.MR, shape=(24, 24), **changes
        )
        pixels = generator.integers(0, 500, (24, 24)).astype(np.int16)
        dicom_files.write(pool / SENTINEL / "dicom" / f"{SENTINEL}{number}", values, pixels)

    write_nifti(root / "member.nii.gz", 60)
    with zipfile.ZipFile(pool / f"{SENTINEL}.zip", "w") as archive:
        archive.write(root / "member.nii.gz", f"{SENTINEL}/{SENTINEL}.nii.gz")
    return pool


def write_dataset(root: Path) -> None:
    """A labelled dataset whose name, channel and cases are called after a patient."""
    folder = root / "nnUNet_raw" / f"Dataset077_{SENTINEL}"
    for seed in range(4):
        write_nifti(folder / "imagesTr" / f"{SENTINEL}{seed}_0000.nii.gz", 10 + seed)
        labels = np.zeros((24, 24, 24), np.uint8)
        labels[8:16, 8:16, 8:16] = 1
        (folder / "labelsTr").mkdir(exist_ok=True)
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(labels),
            str(folder / "labelsTr" / f"{SENTINEL}{seed}.nii.gz"),
        )
    content = {
        "channel_names": {"0": SENTINEL},
        "labels": {"background": 0, "cube": 1},
        "file_ending": ".nii.gz",
        "licence": "CC0",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def request_of(place: Path) -> Request:
    pool = write_inputs(place)
    write_dataset(place)
    exclude = place / f"exclude_{SENTINEL}.txt"
    exclude.write_text(f"excluded_{SENTINEL}\nnobody_{SENTINEL}\n")
    manifest = place / f"manifest_{SENTINEL}.csv"
    manifest.write_text(f"path,subject\n{pool / f'{SENTINEL}0'},{SENTINEL}\ngone_{SENTINEL},x\n")
    settings = (
        f"encoder.arguments={json.dumps(ARGUMENTS)}",
        "encoder.token_size_vox=8,8,8",
        "sequence.block_tokens=1,1,1",
        "sequence.crop_size_vox=16,16,16",
        "run.min_token_variance=0",
        "run.min_effective_rank=0",
    )
    return Request(
        "quiet",
        datasets=("77",),
        folders=(str(pool),),
        encoder="primus_tiny",
        num_steps=1,
        batch_size=1,
        exclude=str(exclude),
        manifest=str(manifest),
        settings=settings,
    )


def contents(file: Path) -> bytes:
    """The bytes of a file; of a zip, as torch writes it, those of its members too."""
    found = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            found += b"".join(archive.read(name) for name in archive.namelist())
    return found


def leaks(folder: Path) -> list[str]:
    """Files below a folder with a secret in their name or content, the private one left out."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != PRIVATE_NAME]
    assert files
    found = [
        f"{file.name}: {secret}"
        for file in files
        for secret in SECRETS
        if secret.encode() in contents(file)
    ]
    return sorted(
        found
        + [
            str(file)
            for file in files
            if any(secret in str(file.relative_to(folder)) for secret in SECRETS)
        ]
    )


def test_a_run_on_scans_with_telling_names_leaves_none_in_any_output(place: Path) -> None:
    logging.getLogger("nnunet_autoreg").setLevel(logging.INFO)
    request = request_of(place)

    outcome = pretrain(request, "cpu", show=True)

    private = (outcome.folder / PRIVATE_NAME).read_text()
    assert all(secret in private for secret in SECRETS)
    assert (outcome.folder / PRIVATE_NAME).stat().st_mode & 0o077 == 0
    assert leaks(place / "nnUNet_results") == []
    assert leaks(place / "nnUNet_preprocessed") == []
    statuses = {row.status for row in read_index(outcome.folder / "scans.csv")}
    assert {"ok", "duplicate", "unreadable", "excluded", "labels"} <= statuses

    # The same line goes on, since the paths are known from the private file; another one is
    # refused.
    assert read_plan(outcome.folder).request["folders"] == list(request.folders)
    assert matching_plan(outcome.folder, request).name == "quiet"
    with pytest.raises(UsageError):
        matching_plan(outcome.folder, replace(request, folders=(str(place),)))
    (outcome.folder / PRIVATE_NAME).unlink()
    with refused(UsageError, "private-file-missing", PRIVATE_NAME):
        pretrain(request, "cpu")


def test_an_index_is_split_in_two_and_read_as_one(tmp_path: Path) -> None:
    source = f"/data/{SENTINEL}/endings/x_{SENTINEL}.nii.gz"
    reason = f"no image endings; same as {source} and '{SENTINEL}'"
    row = ScanRow(
        "0a1b",
        SENTINEL,
        f"{SENTINEL}/x",
        "",
        "CT",
        source,
        None,
        None,
        None,
        "",
        "ignored",
        reason,
        part=f"series={UID};t=1",
        name=f"{SENTINEL}/endings/x_{SENTINEL}",
    )
    write_index(tmp_path / "scans.csv", [row], {"folders:0": "/data/" + SENTINEL})

    assert read_index(tmp_path / "scans.csv") == (row,)
    public = (tmp_path / "scans.csv").read_text()
    assert not [secret for secret in SECRETS if secret in public]
    # An ordinary word stays, although a folder is called so.
    assert "no image endings" in public

    write_index(tmp_path / "scans.csv", [row])
    assert f"folders:0,,,,,/data/{SENTINEL},," in (tmp_path / PRIVATE_NAME).read_text()


def test_channels_and_datasets_are_called_by_words_of_imaging_or_numbers() -> None:
    for name in (
        "CT",
        "MRI",
        "T1w",
        "T1ce",
        "FLAIR",
        "ADC",
        "noNorm",
        "zscore",
        "T2-FLAIR",
        "b1000",
    ):
        assert is_harmless_word(name), name
    for name in ("Doe", "DOE_JOHN", "T1 Doe", "19601231", "", "CT 1.2.840.113619", "Müller"):
        assert not is_harmless_word(name), name
    assert public_dataset(f"Dataset077_{SENTINEL}") == "Dataset077"
    assert SENTINEL not in public_dataset(SENTINEL) and public_dataset("a") != public_dataset("b")


def test_a_path_is_hidden_anywhere_and_a_word_between_quotes_only() -> None:
    said = "/data/DOE/x.nii and 'DOE' but no DOE endings"

    assert (
        without_names(said, ["DOE", "/data/DOE/x.nii", ""])
        == "[name] and [name] but no DOE endings"
    )
    assert os.sep == "/"
