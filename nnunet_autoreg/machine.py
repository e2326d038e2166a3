"""The facts about this machine, each with one owner: cores, memory, devices and their precision.

torch is imported only by the functions that need it.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.errors import UsageError

if TYPE_CHECKING:
    import torch

GIB = 2**30


def problem_of_name(path: str | Path) -> str:
    """Return why a file or folder cannot be used by its name, and the remedy; "" if it can.

    SimpleITK, blosc2, safetensors and our own files use UTF-8.
    """
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return "the name is not valid UTF-8; rename it"
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not str(path).isascii():
        return (
            f"Python reads names as {encoding} here, and the name has non-English letters; run "
            "again after: export PYTHONUTF8=1"
        )
    return ""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    # A scheduler or a container may allow fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the size of this machine's memory; 0 if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


MOST_DIGITS = 9
"""Of a number that a user gives; Python converts no number of thousands of digits."""


def is_whole_number(text: str, most_digits: int = MOST_DIGITS) -> bool:
    """Return whether a text is a whole number without a sign that ``int`` can convert."""
    return text.isdecimal() and len(text) <= most_digits


def num_processes() -> int:
    """Return the number of processes for reading and preprocessing.

    It is nnU-Net's own number (8, or nnUNet_def_n_proc), bounded by the usable cores.

    Raises:
        UsageError: nnUNet_def_n_proc is not a positive whole number.
    """
    wanted = os.environ.get("nnUNet_def_n_proc", "8").strip()  # noqa: SIM112
    if not is_whole_number(wanted) or int(wanted) < 1:
        raise UsageError(
            f"nnUNet_def_n_proc={wanted} is not a positive whole number; correct or unset it",
            code="machine-num-processes",
        )
    return max(1, min(int(wanted), usable_cores()))


def default_device() -> str:
    """Return the name of the fastest kind of device that torch finds: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def device_option() -> str:
    """Return the option that nnU-Net's commands need: " -device cpu" without CUDA, else "".

    They take a CUDA device unless they are given another one, and fail without it.
    """
    device = default_device()
    return "" if device == "cuda" else f" -device {device}"


def check_device(device: str) -> str:
    """Return ``device`` if torch finds it.

    Raises:
        UsageError: torch finds no such device.
    """
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise UsageError(
            f"--device {device}: torch {torch.__version__} finds no such device on this machine; "
            "use --device cpu",
            code="device-missing",
        )
    return device


def has_bf16(device: "torch.device | str") -> bool:
    """Return whether a device computes in bf16 in hardware, as GPUs since NVIDIA's A100 do.

    Everything else trains in float32. float16 would be faster on older GPUs (V100, T4), but its
    range ends at 65504: it would need a loss scaler beside the loss-spike guard.
    """
    import torch

    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)
"""Beginnings of torch's messages when it raises a plain RuntimeError: on CPUs (Linux and macOS,
Windows) and on Apple's GPUs.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or its cause, says that there is not enough memory.

    It may be the memory of a device or of the machine.
    """
    # An error of torch cannot come before torch is imported, so this function does not import it.
    torch = sys.modules.get("torch")
    kinds = (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError))
    # torch's compiler keeps what it wraps as ``inner_exception``.
    for cause in (error, error.__cause__, getattr(error, "inner_exception", None)):
        if isinstance(cause, kinds):
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in NO_MEMORY):
            return True
    return False
