"""Checkpoints of a pretraining run: one format, written whole or not at all, read without running anything."""

from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import CheckpointError
from nnunet_autoreg.records import atomic_path

LATEST_NAME = "checkpoint_latest.pth"
BEST_NAME = "checkpoint_best.pth"
CHECKPOINT_VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``.

    Raises:
        CheckpointError: the disk is full or the folder not writable; the previous file is untouched.
    """
    import torch

    try:
        with atomic_path(path) as temporary:
            torch.save({"version": CHECKPOINT_VERSION, **content}, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}); the last good checkpoint is kept: free some space and rerun") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only (``weights_only=True``).

    Raises:
        CheckpointError: it is damaged, holds anything but tensors and plain values, or is of a newer format.
    """
    import pickle

    import torch

    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({first_line}); move it away to start from the beginning") from error
    if not isinstance(content, dict) or content.get("version") != CHECKPOINT_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} is of format {found}, {CHECKPOINT_VERSION} is needed; update nnunet-autoreg, or move it away")
    return content
