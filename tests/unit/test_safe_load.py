"""No command of ours runs code that a checkpoint asks to run."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_detector import write_model, write_scan
from traps import Trap

from nnunet_autoreg import bridge
from nnunet_autoreg.checkpoint import load_checkpoint
from nnunet_autoreg.cli.detect import main
from nnunet_autoreg.errors import CheckpointError, WeightsError
from nnunet_autoreg.safe_load import FORCE, FORCE_NOT, load_plain, plain_loading


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_results with a detector of one fold."""
    bridge.install()
    root = tmp_path_factory.mktemp("results")
    write_model(root, ("0",))
    return root


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the model, and a scan below ``in``."""
    shutil.copytree(trained, tmp_path / "results")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / "results"))
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    return next((tmp_path / "results" / "Dataset950_Tiny").iterdir())


def detect(tmp_path: Path) -> int:
    options = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    code: int = main(["-d", "950", *options])
    return code


def test_detect_runs_nothing_of_a_strangers_checkpoint(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # autoreg_detect once ran the code of such a file.
    file = model / "fold_0" / "checkpoint_final.pth"
    sprung = tmp_path / "sprung"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": Trap(sprung)}, file)

    assert detect(tmp_path) == 1

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error
    assert "mkdir" in error
    assert not sprung.exists()
    # The trap works: whoever unpickles it springs it.
    torch.load(file, weights_only=False)
    assert sprung.exists()


def test_detect_reads_the_numbers_of_numpy_that_nnunet_writes(model: Path, tmp_path: Path) -> None:
    # A stricter reading must not refuse nnU-Net's own checkpoints, as it once did.
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    # Lists of such numbers are what nnU-Net's own logging adds to a checkpoint.
    logging = {
        "mean_fg_dice": [np.float32(0.5)],
        "stamps": [np.float64(1), np.int64(2), np.bool_(True)],
    }
    torch.save({**content, "logging": logging, "_best_ema": np.float64(0.5)}, file)

    assert detect(tmp_path) == 0


@pytest.mark.parametrize("setting", [FORCE, FORCE_NOT])
def test_a_variable_of_torch_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
) -> None:
    monkeypatch.setenv(setting, "1")
    file = tmp_path / "x.pth"
    sprung = tmp_path / "sprung"
    torch.save({"more": Trap(sprung)}, file)

    # Whatever is asked for, torch reads plain data, and the user's variable is as before.
    for weights_only in (False, None, True):
        with pytest.raises(WeightsError), plain_loading(file):
            torch.load(file, weights_only=weights_only)

    assert not sprung.exists()
    assert os.environ[setting] == "1"
    assert (FORCE in os.environ) == (setting == FORCE)


def test_our_trainers_run_nothing_when_they_continue(tmp_path: Path) -> None:
    from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer

    file = tmp_path / "checkpoint_latest.pth"
    sprung = tmp_path / "sprung"
    torch.save({"network_weights": {}, "more": Trap(sprung)}, file)
    trainer: Any = AutoregPretrainedTrainer.__new__(AutoregPretrainedTrainer)
    trainer.was_initialized, trainer.device = True, torch.device("cpu")

    with pytest.raises(SystemExit) as ended:
        trainer.load_checkpoint(str(file))

    assert str(file) in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not sprung.exists()


def test_a_pretraining_checkpoint_that_asks_to_run_code_is_refused(tmp_path: Path) -> None:
    from nnunet_autoreg.checkpoint import save_checkpoint

    file = tmp_path / "checkpoint_latest.pth"
    sprung = tmp_path / "sprung"
    save_checkpoint(file, {"more": Trap(sprung)})

    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file)

    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not sprung.exists()


def test_names_in_a_hostile_file_reach_no_terminal_raw(tmp_path: Path) -> None:
    # A pickle that names "os\x1b[31m" and "sys\x07tem": a colour and a bell.
    file = tmp_path / "x.pth"
    file.write_bytes(b"cos\x1b[31m\nsys\x07tem\n(S'x'\ntR.")

    with pytest.raises(WeightsError) as caught:
        load_plain(file)

    assert str(caught.value).isprintable()
