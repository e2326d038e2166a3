"""Tensors of other people's files, made ready to be stored."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nnunet_autoreg.errors import WeightsError


def as_float(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Single precision, contiguous.

    Raises:
        WeightsError: one holds NaN or infinity.
    """
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{file}: '{key}' holds NaN or infinity; use other weights")
    return {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
