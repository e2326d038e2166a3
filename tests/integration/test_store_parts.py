"""--part K/N as typed: planned once, made in parts by several processes, trained from one store."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

COMMAND = str(Path(sys.executable).with_name("autoreg_pretrain"))
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def workplace(tmp_path: Path, shared_data: Path) -> Path:
    """Eight real scans and empty nnU-Net folders."""
    (tmp_path / "scans").mkdir()
    source = shared_data / "nnUNet_raw/Dataset004_Hippocampus/imagesTr"
    for image in sorted(source.glob("*.nii.gz"))[:8]:
        shutil.copy(image, tmp_path / "scans")
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def start(workplace: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a training of one step, or what the further arguments ask for."""
    folders = {name: str(workplace / name) for name in FOLDERS}
    line = [
        COMMAND,
        "-i",
        str(workplace / "scans"),
        "--name",
        "array",
        "--batch",
        "1",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--encoder",
        "primus_tiny",
        *arguments,
    ]
    environment = {**os.environ, **folders, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_parts_need_a_plan_and_fill_one_store_together(
    workplace: Path,
) -> None:
    # Before the plan exists, parts could disagree about the scans.
    early = start(workplace, "--part", "1/2")
    _, said = early.communicate()
    assert early.returncode == 2
    assert "type the same line once with --dry-run instead of --part" in said

    both = start(workplace, "--part", "1/2", "--dry-run")
    assert "exclude each other" in both.communicate()[1]
    assert both.returncode == 2

    planned = start(workplace, "--dry-run")
    assert planned.wait() == 0

    parts = [start(workplace, "--part", f"{k}/2") for k in (1, 2)]
    lasts = [part.communicate()[0].splitlines()[-1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0]
    assert "next: type the same line without --part to train" in lasts

    # Eight scans, each of them preprocessed by one of the two parts.
    store = workplace / "nnUNet_preprocessed" / "autoreg_store"
    assert len(list(store.glob("*/*.b2nd"))) == 8

    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*.b2nd")}
    trained = start(workplace)
    _, said = trained.communicate()
    assert trained.returncode == 0, said
    assert "cases are missing" not in said
    # Training uses the cases as they are.
    assert {path: path.stat().st_mtime_ns for path in store.glob("*/*.b2nd")} == before
