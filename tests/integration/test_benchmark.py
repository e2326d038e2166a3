"""autoreg_benchmark by its own line on real scans: all arms, two labels, two steps; and the same
line again.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import planted
import pytest
from few_cases import copy_cases
from nnunet_folders import environment_below, make_folders

from nnunet_autoreg.corpus.private import PRIVATE_NAME
from nnunet_autoreg.corpus.rows import OK, read_index

pytestmark = pytest.mark.integration

# Files in which names of cases are allowed: the user's own lists, and the private file.
NAME = "Dataset004_Hippocampus"
NUM_CASES = 8
WITH_NAMES = ("exclude.txt", PRIVATE_NAME, "commands.log")
OF_NNUNET = ("preprocessed/", "runs/")
LINE = [
    "-d",
    "4",
    "--labels",
    "2",
    "--seeds",
    "1",
    "--arms",
    "pretrained",
    "masked",
    "scratch",
    "stock",
    "--encoders",
    "primus_tiny",
    "--pretrain-steps",
    "2",
    "--pretrain-batch",
    "2",
    "--steps",
    "2",
    "--batch",
    "2",
    "--device",
    "cpu",
]


def environment(root: Path) -> dict[str, str]:
    # With as many processes as a user has.
    return environment_below(root, nnUNet_n_proc_DA=None, nnUNet_def_n_proc=None)


def typed(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nnunet_autoreg.cli.benchmark", *arguments],
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def root(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    make_folders(root)
    copy_cases(shared_data / "nnUNet_raw" / NAME, root / "nnUNet_raw" / NAME, NUM_CASES)
    return root


def test_all_arms_run_and_the_same_line_again_only_shows_the_table(root: Path) -> None:
    out = root / "out"
    done = typed(root, *LINE, "-o", str(out))
    assert done.returncode == 0, done.stderr[-3000:]

    lines = [json.loads(text) for text in (out / "runs.jsonl").read_text().splitlines()]
    by_arm = {line["arm"]: line for line in lines}
    assert list(by_arm) == ["pretrained", "masked", "scratch", "stock"]
    assert len(lines) == 4

    record = json.loads((out / "benchmark.json").read_text())["division"]
    for line in lines:
        assert sorted(line["dice_per_case"]) == record["test"]
        assert line["num_labelled"] == 2
        assert (line["steps"], line["batch"]) == (2, 2)
    assert by_arm["pretrained"]["patch"] == by_arm["masked"]["patch"] == by_arm["scratch"]["patch"]
    assert by_arm["pretrained"]["pretraining"]["objective"].startswith("autoregressive")
    assert by_arm["masked"]["pretraining"]["objective"].startswith("masked")
    assert by_arm["scratch"]["pretraining"] is None

    masked_run = out / "results/autoreg_pretraining/benchmark_primus_tiny_masked"
    seen = [
        row for row in read_index(masked_run / "scans.csv", is_private=False) if row.status == OK
    ]
    # The twin sees the pool only: no patient that is scored.
    assert len(seen) == len(record["pool"])
    assert (out / "benchmark.png").stat().st_size > 10_000
    assert "minus scratch" in (out / "table.md").read_text()

    # Cases and dataset are called by names in the private files and only in nnU-Net's own.
    for folder in (out, root / "nnUNet_preprocessed" / "autoreg_store"):
        found = planted.leaks(folder, ["hippocampus"], WITH_NAMES)
        assert [leak for leak in found if not leak.startswith(OF_NNUNET)] == []

    # How long the pretrainings take is shown before all trainings, and only once.
    before, _, _ = done.stdout.partition("surface Dice")
    assert len(re.findall(r"^pretraining \S+: 2 steps, about ", before, re.MULTILINE)) == 2

    # Nothing is trained again: no pretraining is announced, and no run is left.
    again = typed(root, *LINE, "-o", str(out))
    assert "pretraining" not in again.stdout
    assert again.returncode == 0
    assert re.search(r"\b4 of 4 runs\b.*\b0\b", again.stderr)
    assert again.stdout.splitlines()[-1].startswith("next: ")
    assert len((out / "runs.jsonl").read_text().splitlines()) == 4


def test_weights_that_saw_the_test_patients_end_in_one_line(root: Path) -> None:
    line = [
        "-d",
        "4",
        "--name",
        "all",
        "--encoder",
        "primus_tiny",
        "--steps",
        "1",
        "--batch",
        "1",
        "--device",
        "cpu",
    ]
    # Weights of all scans, also of the patients that the benchmark would score.
    program = str(Path(sys.executable).with_name("autoreg_pretrain"))
    subprocess.run([program, *line], env=environment(root), capture_output=True, check=True)

    done = typed(
        root,
        "-d",
        "4",
        "--labels",
        "2",
        "--weights",
        "all",
        "--steps",
        "2",
        "-o",
        str(root / "leaky"),
    )

    assert done.returncode == 1

    last = done.stderr.strip().splitlines()[-1]

    seen = "autoreg_benchmark: the pretraining 'all' saw 2 of the patients that are scored"
    assert last.startswith(seen)
    assert "--exclude" in last
