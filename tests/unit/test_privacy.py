"""No output but the one private file holds a name: a run on scans that name a patient wherever a
scan can, searched byte by byte. ``tests/integration/test_privacy.py`` does the same with the whole
chain of commands.
"""

import importlib.util
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
from refusals import refused
from sequence_cases import make_plan

from nnunet_autoreg.cli.common import configure_logging
from nnunet_autoreg.cli.pretrain import parser
from nnunet_autoreg.cli.pretrain import request_of as request_of_line
from nnunet_autoreg.convert.choices import HUGGINGFACE_FORM
from nnunet_autoreg.convert.exporting import export_weights
from nnunet_autoreg.corpus.grid import grid_of_scan
from nnunet_autoreg.corpus.private import (
    PRIVATE_NAME,
    is_harmless_word,
    public_dataset,
    terminal_only,
    without_names,
)
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.downstream.results import FROM_SEG, public_model
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.pretrain.pipeline import pretrain
from nnunet_autoreg.pretrain.request import (
    Request,
    matching_plan,
    read_plan,
    run_folder,
    write_plan,
)
from nnunet_autoreg.records import to_jsonable

# What must not be found: a name, a date of birth and a number of a series.
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


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders; returns the folder that holds them."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    # One process: starting workers takes longer than reading these small scans.
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    return tmp_path


def request_of(root: Path) -> Request:
    """Write scans, a labelled dataset and lists of scans; return the request of one step."""
    pool = planted.write_pool(root)
    lists = planted.write_lists(root, pool)
    planted.write_dataset(root / "nnUNet_raw", num_cases=4)
    settings = (
        f"encoder.arguments={json.dumps(ARGUMENTS)}",
        "encoder.token_size_vox=8,8,8",
        "sequence.block_tokens=1,1,1",
        "sequence.crop_size_vox=16,16,16",
        # One step teaches nothing; without limits the run is finished all the same.
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
        exclude=str(lists["exclude"]),
        manifest=str(lists["manifest"]),
        boxes=str(lists["boxes"]),
        settings=settings,
    )


def test_a_run_on_scans_that_name_a_patient_names_nobody(
    folders: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    request = request_of(folders)
    secrets = (*planted.SECRETS, planted.LABELLED)

    assert pretrain(request, "cpu", show=True)

    folder = run_folder(folders / "nnUNet_results", request.name)
    private = (folder / PRIVATE_NAME).read_text()
    # The names are needed to continue the run, so one file holds them, for its owner only.
    assert all(secret in private.lower() for secret in secrets)
    assert (folder / PRIVATE_NAME).stat().st_mode & 0o077 == 0
    assert planted.leaks(folders / "nnUNet_results", secrets, [PRIVATE_NAME]) == []
    assert planted.leaks(folders / "nnUNet_preprocessed", secrets) == []

    # What was shown: the output of a test is not a terminal, as that of a job on a cluster.
    shown = "".join(capfd.readouterr()).lower()
    assert "--exclude: 1 of 3" in shown
    assert [secret for secret in secrets if secret in shown] == []

    # The card that a repository would show.
    exported = folders / "exported"
    export_weights(folder / "encoder.safetensors", exported, HUGGINGFACE_FORM)
    assert planted.leaks(exported, secrets) == []

    # Events for TensorBoard, where it is installed, were searched with the rest.
    events = list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == (1 if importlib.util.find_spec("tensorboard") else 0)

    rows = read_index(folder / "scans.csv")
    statuses = {row.status for row in rows}
    assert {"ok", "duplicate", "unreadable", "excluded", "labels", "slices"} <= statuses

    # No ordinary word was redacted in the report because a folder is called by it.
    report = (folder / "report.html").read_text()
    assert "[name]" not in report
    assert "the content is not gzip; is it another kind of file?" in report


def test_a_run_continues_by_the_paths_of_its_private_file(folders: Path) -> None:
    pool = folders / "scans"
    for seed in range(2):
        planted.write_nifti(pool / f"{seed}.nii.gz", planted.noise(seed))
    request = Request("quiet", folders=(str(pool),), encoder="primus_tiny", num_steps=1)
    assert not pretrain(request, "cpu", dry_run=True)

    folder = run_folder(folders / "nnUNet_results", request.name)

    assert read_plan(folder).request["folders"] == list(request.folders)
    assert matching_plan(folder, request).name == "quiet"
    with refused(UsageError, "run-other-settings"):
        matching_plan(folder, replace(request, folders=(str(folders),)))

    (folder / PRIVATE_NAME).unlink()
    with refused(UsageError, "private-file-missing", PRIVATE_NAME):
        pretrain(request, "cpu")


def test_a_dataset_that_is_given_by_name_is_kept_by_its_number(folders: Path) -> None:
    name = planted.write_dataset(folders / "nnUNet_raw", num_cases=1).name
    line = ["--name", "quiet", "-d", name, "unknown"]

    request = request_of_line(parser().parse_args(line))

    assert request.datasets == ("77", "unknown")
    # A second dataset of this number: the number is ambiguous, so the name is kept.
    (folders / "nnUNet_raw" / "Dataset077_other").mkdir()
    assert request_of_line(parser().parse_args(line)).datasets == (name, "unknown")


def test_a_run_continues_whether_its_dataset_is_named_or_numbered(tmp_path: Path) -> None:
    request = Request("quiet", ("Dataset077_ZEPHYRINE",), num_steps=10)
    plan = replace(make_plan(), request=to_jsonable(request))
    write_plan(tmp_path, plan)

    assert matching_plan(tmp_path, replace(request, datasets=("77",))).request == plan.request
    with refused(UsageError, "run-other-settings"):
        matching_plan(tmp_path, replace(request, datasets=("78",)))


@pytest.mark.parametrize("part", ["", f"member={SENTINEL}.nii", f"series={UID};t=1"])
def test_errors_about_where_a_scan_lies_name_nobody(tmp_path: Path, part: str) -> None:
    """Such an error is logged when contrasts of a patient cannot be laid onto each other."""
    file = tmp_path / SENTINEL / f"{SENTINEL}.nii.gz"
    file.parent.mkdir()
    file.write_bytes(b"nothing")

    with pytest.raises(ScanError) as caught:
        grid_of_scan(file, part)

    for secret in (*SECRETS, str(tmp_path)):
        assert secret not in str(caught.value)


def test_files_are_named_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("nnunet_autoreg.corpus")

    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=is_terminal: answer)
        configure_logging()
        log.warning("%d scans are unknown", 2, extra=terminal_only(f"; the first is {SENTINEL}"))

    assert capsys.readouterr().err.splitlines() == [
        f"warning: 2 scans are unknown; the first is {SENTINEL}",
        "warning: 2 scans are unknown",
    ]


def test_results_name_no_folder_of_their_model_and_recognise_it() -> None:
    model = {"dataset": f"Dataset077_{SENTINEL}", FROM_SEG: f"/data/{SENTINEL}/predicted"}

    public = public_model(model)

    assert public["dataset"] == "Dataset077"
    assert SENTINEL not in str(public)
    # Results of an earlier run hold the public form; the same folder must be recognised by it.
    assert public_model(public) == public
    assert public_model({**model, FROM_SEG: "/data/other"}) != public


def test_the_search_finds_names_in_every_kind_of_file(tmp_path: Path) -> None:
    # Compressed, in upper case, in the name of an array or of a folder, in headers and in pixels.
    name = planted.NAME
    np.savez_compressed(tmp_path / "a.npz", **{name: np.zeros(3)})
    np.savez_compressed(tmp_path / "b.npz", a=np.array([f"of {name}"], dtype="S20"))
    planted.write_nifti(tmp_path / "c.nii.gz", planted.noise(1), note=name)
    (tmp_path / "d.json").write_text(json.dumps({"path": f"/data/{name.upper()}"}))
    (tmp_path / name).mkdir()
    (tmp_path / name / "e.txt").touch()
    planted.write_png(tmp_path / "f.png", f"of {name}")

    found = {leak.partition(":")[0] for leak in planted.leaks(tmp_path)}

    assert found == {"a.npz", "b.npz", "c.nii.gz", "d.json", f"{name}/e.txt", "f.png"}


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

    # Written without the paths of the request, as while indexing: those known before are kept.
    write_index(tmp_path / "scans.csv", [row])
    assert f"folders:0,,,,,/data/{SENTINEL},," in (tmp_path / PRIVATE_NAME).read_text()


def test_channels_and_datasets_are_called_by_words_of_imaging_or_numbers() -> None:
    words = ("CT", "MRI", "T1w", "T1ce", "FLAIR", "ADC", "noNorm", "zscore", "T2-FLAIR", "b1000")
    for name in words:
        assert is_harmless_word(name), name
    for name in ("Doe", "DOE_JOHN", "T1 Doe", "19601231", "", "CT 1.2.840.113619", "Müller"):
        assert not is_harmless_word(name), name
    assert public_dataset(f"Dataset077_{SENTINEL}") == "Dataset077"
    assert SENTINEL not in public_dataset(SENTINEL)
    assert public_dataset("a") != public_dataset("b")


def test_a_path_is_hidden_anywhere_and_a_word_between_quotes_only() -> None:
    message = "/data/DOE/x.nii and 'DOE' but no DOE endings"

    public = without_names(message, ["DOE", "/data/DOE/x.nii", ""])

    assert public == "[name] and [name] but no DOE endings"
    # Paths are recognised by their slashes.
    assert os.sep == "/"
