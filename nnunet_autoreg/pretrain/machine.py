"""The machine that a run is on: device, memory, processes."""

import os

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.planning import Hardware


def hardware(device: str, memory_gib: float | None = None) -> Hardware:
    """The device and the memory planned for: ``memory_gib`` if it is given, else all there is."""
    if memory_gib is not None:
        return Hardware(device, memory_gib)
    if device == "cuda":
        import torch

        return Hardware(device, torch.cuda.get_device_properties(0).total_memory / 2**30)
    return Hardware(device, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def check_device(device: str) -> str:
    """Return ``device`` if torch has it.

    Raises:
        UsageError: it has not.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise UsageError(f"--device {device}: torch {torch.__version__} finds no such device here; use --device cpu")
    return device


def default_device() -> str:
    """cuda if there is one, else mps, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def step_memory(encoder: EncoderSize, crop: Size, half: bool) -> tuple[float, float]:
    """Estimated bytes of a training step, in half precision as on a GPU or not: fixed, and per crop."""
    from nnunet_autoreg.model.encoders import build_network
    from nnunet_autoreg.model.memory import training_memory

    memory = training_memory(lambda: build_network(encoder.class_path, encoder.arguments, crop, 1, 1), (1, *crop), half)
    return float(memory.fixed_bytes), float(memory.sample_bytes)


def num_processes() -> int:
    """Processes for reading and preprocessing: as many as nnU-Net would use, bounded by the cores at hand."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
