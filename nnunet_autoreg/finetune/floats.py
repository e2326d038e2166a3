"""Check tensors of other projects' files, and convert them to single precision."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nnunet_autoreg.errors import WeightsError

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Supported floating-point types. Narrower ones need scales, which a file keeps elsewhere."""


def check_kind(file: Path, key: str, tensor: Tensor) -> None:
    """Check that a tensor is dense, and that the file has all of its values.

    Raises:
        WeightsError: its type is not supported, it is sparse or quantised, or it repeats its values
            by a stride of 0 (code "weights-kind").
    """
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    is_narrow = tensor.is_floating_point() and tensor.dtype not in KINDS
    if not is_plain or is_narrow or tensor.is_complex():
        raise WeightsError(
            f"{file}: '{key}' has the type {tensor.dtype}, which is not supported; ask its authors "
            "for float32, float16 or bfloat16",
            code="weights-kind",
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise WeightsError(
            f"{file}: '{key}' has shape {tuple(tensor.shape)}, but the file holds fewer values; "
            "ask its authors for a plain state dict",
            code="weights-kind",
        )


def as_float(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors in single precision, contiguous.

    Raises:
        WeightsError: one holds NaN or infinity (code "weights-not-finite"), or has a type that is
            not supported (code "weights-kind").
    """
    for key, tensor in tensors.items():
        check_kind(file, key, tensor)
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{file}: '{key}' holds NaN or infinity; use other weights",
                code="weights-not-finite",
            )
    return {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
