"""Weights that the user names with nnU-Net's own option, and trained nnU-Net models among weight
files.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from refusals import refused
from torch import nn

from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.inspecting import inspect_weights
from nnunet_autoreg.convert.source import NNSSL, TRAINED, open_source
from nnunet_autoreg.errors import UsageError, WeightsError
from nnunet_autoreg.finetune.user_weights import misfit, named_weights, watch_loading
from nnunet_autoreg.trainers import autoreg_trainers
from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer, AutoregScratchTrainer

COMMAND = [
    "/usr/bin/nnUNetv2_train",
    "4",
    "3d_fullres",
    "0",
    "-tr",
    "AutoregPretrainedTrainer",
    "-p",
    "AutoregPlans",
    "--npz",
]


def checkpoint(file: Path, **changes: Any) -> Path:
    """Write what nnU-Net's trainer writes, numbers of numpy included."""
    content = {
        "network_weights": nn.Linear(2, 2).state_dict(),
        "optimizer_state": {},
        "logging": {
            "mean_fg_dice": [np.float32(0.5)],
            "lrs": [0.1],
            "epoch_start_timestamps": [np.float64(1.0)],
        },
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {
            "plans": {"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_Hippocampus"},
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": {"labels": {"background": 0}},
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        **changes,
    }
    torch.save(content, file)
    return file


@pytest.mark.parametrize("form", [["-pretrained_weights", "{}"], ["-pretrained_weights={}"]])
def test_the_file_is_found_in_every_form_of_the_option(tmp_path: Path, form: list[str]) -> None:
    file = checkpoint(tmp_path / "x.pth")

    assert named_weights([*COMMAND, *(word.format(file) for word in form)]) == file


def test_other_options_and_other_commands_name_no_weights(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "x.pth")

    assert named_weights(COMMAND) is None
    assert named_weights(["/usr/bin/pytest", "-pretrained_weights", str(file)]) is None


def test_a_missing_file_and_a_pretrained_encoder_are_refused(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.safetensors"
    encoder.write_bytes(b"x")

    for file, code in (
        (tmp_path / "gone.pth", "usage-no-file"),
        (encoder, "usage-not-a-checkpoint"),
    ):
        with refused(UsageError, code, file):
            named_weights([*COMMAND, "-pretrained_weights", str(file)])


def test_loading_into_a_network_is_noticed_and_a_copy_stays_apart() -> None:
    network = nn.Linear(2, 2)
    has_loaded = watch_loading(network)
    # The network is watched by a hook, with which it must still be possible to copy it.
    copied = copy.deepcopy(network)
    assert not has_loaded()

    network.load_state_dict(nn.Linear(2, 2).state_dict())

    assert has_loaded()
    assert copied.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("trainer_class", "is_loaded", "expected"),
    [
        (AutoregPretrainedTrainer, False, ["plan's weights loaded"]),
        (AutoregPretrainedTrainer, True, ["brain"]),
        (AutoregScratchTrainer, False, []),
        (AutoregScratchTrainer, True, ["scratch"]),
    ],
)
def test_the_users_weights_are_kept_and_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    trainer_class: type,
    is_loaded: bool,
    expected: list[str],
) -> None:
    # The plan's weights once overwrote those of -pretrained_weights without a word.
    lines: list[str] = []
    trainer = trainer_class.__new__(trainer_class)
    trainer.was_initialized, trainer.is_fresh_start = True, True
    trainer.has_users_weights = lambda: is_loaded
    trainer.users_weights = tmp_path / "x.pth"
    trainer.block = type("Block", (), {"weights": type("Weights", (), {"name": "brain"})})
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer.unwrapped = lambda: None
    trainer.local_rank = 0
    trainer.dataset_json = {"channel_names": {"0": "CT"}}
    trainer.configuration_manager = SimpleNamespace(patch_size=(8, 8, 8))
    table = SimpleNamespace(lines=lambda: ["plan's weights loaded"])
    monkeypatch.setattr(autoreg_trainers, "load_planned_encoder", lambda *arguments: table)
    monkeypatch.setattr(autoreg_trainers, "ignored_setting", lambda *arguments: None)
    monkeypatch.setattr(autoreg_trainers, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(
        trainer_class,
        "print_to_log_file",
        lambda self, *words, add_timestamp=True: lines.append(" ".join(words)),
    )

    trainer.on_train_start()

    assert len(lines) == len(expected)
    for line, value in zip(lines, expected, strict=True):
        assert value in line
        assert not is_loaded or str(tmp_path / "x.pth") in line


def test_weights_of_another_network_end_in_one_line(tmp_path: Path) -> None:
    # Three inputs where the network has two.
    file = checkpoint(tmp_path / "x.pth", network_weights=nn.Linear(3, 2).state_dict())
    command = [*COMMAND, "-pretrained_weights", str(file)]

    # nnU-Net itself compares shapes by an assertion.
    with pytest.raises(AssertionError) as caught:
        load_pretrained_weights(nn.Linear(2, 2), str(file))

    line = misfit(caught.value, caught.tb, command)
    assert line is not None
    assert str(file) in line
    assert "weight" in line
    assert "\n" not in line
    assert misfit(ValueError("other"), None, command) is None


def test_a_trained_model_is_recognised_even_if_it_is_not_imported(tmp_path: Path) -> None:
    # Such a file was once refused as one that asks to run numpy's scalar.
    file = checkpoint(tmp_path / "checkpoint_final.pth")

    facts, following = inspect_weights(file, ImportOptions())

    what = dict(facts)["what"]
    for word in ("nnUNetTrainer", "nnUNetPlans", "3d_fullres", "Dataset004_Hippocampus"):
        assert word in what
    assert f"-pretrained_weights {file}" in following
    # Its plans have no configuration.
    with refused(WeightsError, "weights-bad-plans", file):
        import_weights(file, "x", tmp_path, ImportOptions())
    assert not (tmp_path / "autoreg_pretraining").exists()


def test_a_pretraining_checkpoint_is_not_taken_for_a_trained_model(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"architecture_plans": {}}

    pretrained = checkpoint(tmp_path / "a.pth", nnssl_adaptation_plan=plan)
    pretraining = checkpoint(tmp_path / "b.pth", init_args={"pretrain_json": {}})

    assert open_source(pretrained).kind == NNSSL
    assert open_source(pretraining).kind != TRAINED


def test_a_trained_model_that_would_run_code_is_still_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "x.pth", logging={"evil": Path("x")})

    with pytest.raises(WeightsError) as caught:
        inspect_weights(file, ImportOptions())
    assert str(file) in str(caught.value)
