"""Reads files of ``torch.save`` without running code that is in them. All commands use it.

A pickle names functions that are called while it is read. PyTorch's ``weights_only=True`` calls
none but those that make tensors and plain values. nnU-Net's own checkpoints need a few numbers of
numpy besides, which are allowed here by name.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.records import regular

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Variables of PyTorch that overrule the argument ``weights_only`` of ``torch.load``."""

STOCK_KINDS = ("float32", "float64", "int32", "int64", "bool")
"""The kinds of numpy's numbers that nnU-Net's logs and plans hold."""


def load_plain(file: Path) -> Any:
    """Return the content of a file of ``torch.save``, with all tensors on the CPU.

    Raises:
        WeightsError: the file is damaged, or reading it would run code. Nothing of it was run.
    """
    import torch

    try:
        _refuse_inflating(regular(file))
        with plain_loading(file), warnings.catch_warnings():
            # About pickle protocols, which the error says better.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # torch stumbles over damaged bytes in many ways
        reason = (str(error).splitlines() or [""])[0][:200]
        message = f"{file} cannot be read ({type(error).__name__}: {reason}); download it again"
        raise WeightsError(message) from error


def _refuse_inflating(file: Path) -> None:
    """Refuse archives whose records are larger than the file itself.

    ``torch.save`` does not compress, so only a file that is meant to fill the memory has such
    records.

    Raises:
        WeightsError: it is one (code "weights-inflates").
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > file.stat().st_size:
        raise WeightsError(
            f"{file} has {file.stat().st_size:,} bytes, but its records would have {size:,}; "
            "torch.save writes no such file: ask its author for a safetensors file",
            code="weights-inflates",
        )


@contextmanager
def plain_loading(where: Path) -> Iterator[None]:
    """Make every ``torch.load`` inside the context refuse to run code.

    This also holds where nnU-Net asks for the opposite.

    Args:
        where: the file that is read, or the folder of a model, for the message.

    Raises:
        WeightsError: a file asked to run code. Nothing of it was run.
    """
    import numpy as np
    import torch

    # The functions that make a single number of numpy; none of them runs code. Earlier versions of
    # numpy named the module differently, and the file names the one that wrote it.
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in STOCK_KINDS]
    numbers: list[Any] = [*((scalar, name) for name in names), np.dtype, *kinds]

    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(numbers):
            yield
    except pickle.UnpicklingError as error:
        reason = (
            "cannot be read as tensors and plain values (it is damaged, or contains code); no code "
            "in it was run"
        )
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            # A file can name anything here, line breaks and control characters included.
            function = ascii(named[1])[1:-1][:80]
            reason = (
                f"would run '{function}' when it is loaded; no code in it was run, because only "
                "tensors and plain values are read. Ask its author for a safetensors file or a "
                "plain state dict"
            )
        raise WeightsError(f"{where} {reason}", code="weights-run-code") from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
