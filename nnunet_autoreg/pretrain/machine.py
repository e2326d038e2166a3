"""The machine that a run is on: device, memory, processes."""

import os
from typing import TYPE_CHECKING

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.encoder import choose_objective, choose_order
from nnunet_autoreg.planning.pool import Hardware

if TYPE_CHECKING:
    import torch

    from nnunet_autoreg.model.memory import TrainingMemory


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

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise UsageError(
            f"--device {device}: torch {torch.__version__} finds no such device here; use --device "
            "cpu"
        )
    return device


def default_device() -> str:
    """cuda if there is one, else mps, else cpu."""
    import torch

    return (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


def computes_in_half(device: "torch.device") -> bool:
    """Whether training computes in bf16 there: on GPUs that have it in hardware.

    Others, and CPUs, compute in float32.

    float16 would be faster on older GPUs (V100, T4), but its range ends at 65504: it would need a
    loss scaler beside the guard against bad steps.
    """
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_half(device: str) -> bool:
    """``computes_in_half`` by the device's name."""
    import torch

    return computes_in_half(torch.device(device))


def step_memory(
    encoder: EncoderSize, crop: Size, recompute: bool = False, half: bool = True
) -> tuple[float, float]:
    """Estimated bytes of a training step with the sequences that are planned for this encoder:
    fixed, and per crop.

    Args:
        recompute: activation checkpointing.
        half: half precision, as on a GPU.
    """
    from nnunet_autoreg.plan import DataPlan, EncoderPlan, OptimPlan, RunPlan, SequencePlan

    fitting = [
        max(n for n in range(1, most + 1) if size // token % n == 0)
        for size, token, most in zip(crop, encoder.token_size, encoder.block_tokens, strict=True)
    ]
    order, predictor, _ = choose_order(encoder)
    sketch = Plan(
        "sketch",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
        SequencePlan(crop, as_size(fitting), order, predictor),
        choose_objective(encoder)[0],
        OptimPlan(1, 1, 1e-4, 1, checkpoint_activations=recompute),
        RunPlan(0, 1, 1),
    )
    memory = plan_memory(sketch, half)
    return float(memory.fixed_bytes), float(memory.sample_bytes)


def plan_memory(plan: Plan, half: bool = True) -> "TrainingMemory":
    """Estimated memory of a plan's training step on spatial sequences, which are as long as those
    of the other kinds.
    """
    import torch

    from nnunet_autoreg.model.memory import pretraining_memory
    from nnunet_autoreg.objectives.registry import build_objective
    from nnunet_autoreg.sampling.sample import Batch

    size = plan.sequence.crop_size_vox
    num_tokens = volume(grid_of(size, plan.encoder.token_size_vox))
    with torch.device("meta"):
        objective = build_objective(plan)
        objective.module.train()

    def loss_of(num_samples: int) -> object:
        # Inputs count where they are kept; the crops themselves are small beside what is made of
        # them.
        voxels = torch.empty(num_samples, 1, 1, *size)
        real = torch.empty(num_samples, 1, *size, dtype=torch.bool)
        ranks = torch.empty(num_samples, num_tokens, dtype=torch.int64)
        return objective.loss(
            Batch(voxels, real, ranks, torch.empty(num_samples, dtype=torch.int64))
        )

    return pretraining_memory(objective.module, loss_of, half)


def num_processes() -> int:
    """Return the number of processes for reading and preprocessing: nnU-Net's own (8, or
    nnUNet_def_n_proc), bounded by the cores at hand.

    Raises:
        UsageError: nnUNet_def_n_proc is no number.
    """
    wanted = os.environ.get("nnUNet_def_n_proc", "8").strip()  # noqa: SIM112
    if not wanted.isdigit() or int(wanted) < 1:
        raise UsageError(
            f"nnUNet_def_n_proc={wanted}: must be a whole number of processes, at least 1; set it "
            "anew or unset it"
        )
    return max(1, min(int(wanted), usable_cores()))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
