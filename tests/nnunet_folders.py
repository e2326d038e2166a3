"""nnU-Net's three folders below a root of a test, and its planning and preprocessing there."""

import os
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TRAINER_MODULE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
# Data augmentation in the main process, and one process and thread for everything else.
ONE_PROCESS = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}


def make_folders(root: Path) -> None:
    for name in FOLDERS:
        (root / name).mkdir()


def environment_below(root: Path, **changes: object) -> dict[str, str]:
    """Return the environment of a command that works in the folders below ``root``.

    It works in one process, and no variable chooses weights. A change to None removes a variable.
    """
    # Variables of ours would choose weights or settings.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("autoreg_")}
    folders = {name: str(root / name) for name in FOLDERS}
    wanted = {**clean, **folders, **ONE_PROCESS, **changes}
    return {name: str(value) for name, value in wanted.items() if value is not None}


def set_folders(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Make the folders, name them to nnU-Net, install the bridge, and work in one process."""
    from nnunet_autoreg import bridge

    make_folders(root)
    for variable in FOLDERS:
        patch.setenv(variable, str(root / variable))
    for variable, value in ONE_PROCESS.items():
        patch.setenv(variable, value)
    patch.delenv("autoreg_weights", raising=False)
    bridge.install()
    patch.setattr(f"{TRAINER_MODULE}.default_num_processes", 1)


def plan_and_preprocess(
    dataset: int,
    configurations: tuple[str, ...] = ("3d_fullres",),
    **options: Any,
) -> None:
    """Do what ``nnUNetv2_plan_and_preprocess -pl AutoregPlanner`` does, in one process.

    Args:
        options: of ``plan_experiments``.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([dataset], num_processes=1, show_progress_bar=False)
    identifier = plan_experiments([dataset], "AutoregPlanner", **options)
    num_processes = [1] * len(configurations)
    preprocess([dataset], identifier, list(configurations), num_processes, show_progress_bar=False)
