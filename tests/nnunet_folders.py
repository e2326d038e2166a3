"""nnU-Net's three folders below a root of a test, and its planning and preprocessing there."""

from pathlib import Path

import pytest

TRAINER_MODULE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
ONE_PROCESS = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}


def set_folders(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Make the folders, name them to nnU-Net, install the bridge, and work in one process."""
    from nnunet_autoreg import bridge

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / variable).mkdir()
        patch.setenv(variable, str(root / variable))
    for variable, value in ONE_PROCESS.items():
        patch.setenv(variable, value)
    patch.delenv("autoreg_weights", raising=False)
    bridge.install()
    patch.setattr(f"{TRAINER_MODULE}.default_num_processes", 1)


def plan_and_preprocess(dataset: int, configurations: tuple[str, ...] = ("3d_fullres",)) -> None:
    """Do what ``nnUNetv2_plan_and_preprocess -pl AutoregPlanner`` does, in one process."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([dataset], num_processes=1, show_progress_bar=False)
    identifier = plan_experiments([dataset], "AutoregPlanner")
    num_processes = [1] * len(configurations)
    preprocess([dataset], identifier, list(configurations), num_processes, show_progress_bar=False)
