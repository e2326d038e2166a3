"""Tensors of other people's files, made ready to be stored."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nnunet_autoreg.errors import WeightsError

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Floating-point numbers that weights come in; narrower ones need scales that a file keeps
elsewhere.
"""


def check_kind(file: Path, key: str, tensor: Tensor) -> None:
    """Check that a tensor can be computed with, and that it is no larger than what the file holds
    of it.

    Raises:
        WeightsError: it is of another kind, sparse or quantised, or repeats its values (a stride of
            0).
    """
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    is_narrow = tensor.is_floating_point() and tensor.dtype not in KINDS
    if not is_plain or is_narrow or tensor.is_complex():
        raise WeightsError(
            f"{file}: '{key}' is of kind {tensor.dtype}, which is not read; ask for float32, "
            "float16 or bfloat16"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(
            f"{file}: '{key}' has shape {tuple(tensor.shape)}, but the file holds fewer values; "
            "ask for a plain state dict"
        )


def as_float(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Single precision, contiguous.

    Raises:
        WeightsError: one holds NaN or infinity.
    """
    for key, tensor in tensors.items():
        check_kind(file, key, tensor)
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{file}: '{key}' holds NaN or infinity; use other weights",
                code="weights-not-finite",
            )
    return {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
