"""The rules: numbers about the data and the hardware in, plan values with their reasons out. Pure, and torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_autoreg.geometry import Size, Spacing, as_size, round_up, volume
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    IntensityWindow,
    ObjectivePlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)

START_VOX = 256**3
MAX_PRETRAIN_VOX = 128**3
SMALL_IMAGE_TOKENS = 512
NUM_PASSES, MIN_STEPS, MAX_STEPS = 300, 1000, 100_000
BY_USER = "set by the user"


def plan_crop(median_shape_vox: Sequence[float], spacing_mm: Sequence[float], token_vox: Sequence[int], max_vox: int) -> Size:
    """The crop (pretraining) or patch (fine-tuning) that suits images of a median shape.

    As nnU-Net plans patches: start from a box that is isotropic in mm and larger than needed, clip it to the median shape,
    round up to whole tokens, then shrink the axis that is largest relative to the median shape until it fits.

    Args:
        median_shape_vox: median image size after resampling, (z, y, x).
        spacing_mm: target spacing, (z, y, x).
        token_vox: token size; every axis of the result is a multiple of it.
        max_vox: largest number of voxels allowed.
    """
    resolution = [1 / s for s in spacing_mm]
    scale = (START_VOX / (resolution[0] * resolution[1] * resolution[2])) ** (1 / 3)
    start = [max(1, min(round(r * scale), round(m))) for r, m in zip(resolution, median_shape_vox, strict=True)]
    crop = list(round_up(start, token_vox))
    while volume(crop) > max_vox:
        shrinkable = [i for i in range(3) if crop[i] > token_vox[i]]
        if not shrinkable:
            break
        largest = max(shrinkable, key=lambda i: crop[i] / median_shape_vox[i])
        crop[largest] -= token_vox[largest]
    return as_size(crop)


@dataclass(frozen=True)
class Hardware:
    """What the run has: ``device`` is cpu, cuda or mps; ``memory_gib`` of the GPU, or of the machine without one."""

    device: str
    memory_gib: float


@dataclass(frozen=True)
class Pool:
    """What planning needs to know of the scans: how many, their median shape and all their voxels after resampling to
    ``spacing_mm``, and the CT window if CT is among them."""

    num_scans: int
    spacing_mm: Spacing
    median_shape_vox: Size
    total_vox: int
    ct_window: IntensityWindow | None


def choose_encoder(name: str, hardware: Hardware, pool: Pool) -> tuple[str, str]:
    """Encoder name and the reason for it; ``auto`` goes by device, image size and GPU memory."""
    if name != "auto":
        return encoder_size(name).name, BY_USER
    tokens = volume(pool.median_shape_vox) / volume(encoder_size("primus_tiny").token_size)
    if hardware.device != "cuda":
        return "primus_tiny", f"device {hardware.device}: larger encoders need a GPU"
    if tokens < SMALL_IMAGE_TOKENS:
        return "primus_tiny", f"the median scan holds {tokens:.0f} tokens, fewer than {SMALL_IMAGE_TOKENS}"
    for limit_gib, size in ((10, "primus_s"), (20, "primus_b")):
        if hardware.memory_gib < limit_gib:
            return size, f"{hardware.memory_gib:.0f} GiB of GPU memory, under {limit_gib}"
    return "primus_m", f"{hardware.memory_gib:.0f} GiB of GPU memory"


def choose_length(pool: Pool, crop_vox: int, batch_size: int) -> tuple[int, str]:
    """Steps and the reason: a number of passes over the pool's voxels, within bounds."""
    per_pass = max(1.0, pool.total_vox / (crop_vox * batch_size))
    steps = round(min(max(NUM_PASSES * per_pass, MIN_STEPS), MAX_STEPS))
    return steps, f"{steps / per_pass:.0f} passes over {pool.total_vox / 1e6:.0f} million voxels, within {MIN_STEPS} to {MAX_STEPS} steps"


def choose_batch(encoder: EncoderSize, hardware: Hardware, bytes_fixed: float, bytes_per_crop: float) -> tuple[int, str]:
    """Crops per step and the reason: 8 on a CPU, else as many as fit into 80 % of the memory, at most 64.

    Args:
        bytes_fixed, bytes_per_crop: estimated training memory of this encoder at the planned crop.
    """
    if hardware.device != "cuda":
        return 8, f"device {hardware.device}: small steps"
    room = 0.8 * hardware.memory_gib * 2**30 - bytes_fixed
    batch = int(min(max(room // bytes_per_crop, 1), 64))
    crop_gib, fixed_gib = bytes_per_crop / 2**30, bytes_fixed / 2**30
    return batch, f"{crop_gib:.2f} GiB a crop beside {fixed_gib:.2f} GiB, within 80 % of {hardware.memory_gib:.0f} GiB"


def make_plan(
    name: str, pool: Pool, hardware: Hardware, encoder_name: str, seed: int, request: dict[str, Any],
    batch_size: int | None, num_steps: int | None, memory_of: Callable[[EncoderSize, Size], tuple[float, float]],
) -> Plan:
    """The plan that fits these scans and this hardware.

    Args:
        batch_size, num_steps: the user's wish, or None to have it planned.
        memory_of: (encoder, crop) -> fixed bytes and bytes per crop of a training step.
    """
    chosen, why_encoder = choose_encoder(encoder_name, hardware, pool)
    encoder = encoder_size(chosen)
    crop = plan_crop(pool.median_shape_vox, pool.spacing_mm, encoder.token_size, min(encoder.max_crop_vox, MAX_PRETRAIN_VOX))
    batch, why_batch = choose_batch(encoder, hardware, *memory_of(encoder, crop)) if batch_size is None else (batch_size, BY_USER)
    steps, why_steps = choose_length(pool, volume(crop), batch) if num_steps is None else (num_steps, BY_USER)
    interval = min(steps, max(25, min(1000, steps // 20)))
    return Plan(
        name=name,
        data=DataPlan(pool.spacing_mm, pool.ct_window),
        encoder=EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
        sequence=SequencePlan(crop),
        objective=ObjectivePlan(),
        optim=OptimPlan(steps, batch, encoder.pretrain_rate, warmup_steps=max(1, steps // 20)),
        run=RunPlan(seed, checkpoint_every=interval, validate_every=interval),
        request=request,
        reasons={
            "data.spacing_mm": f"median of {pool.num_scans} scans, coarsest axis first",
            "encoder.name": why_encoder,
            "sequence.crop_size_vox": f"median scan of {list(pool.median_shape_vox)} voxels in whole tokens, at most "
            f"{min(encoder.max_crop_vox, MAX_PRETRAIN_VOX)} voxels",
            "optim.batch_size": why_batch,
            "optim.num_steps": why_steps,
            "optim.lr": f"the usual rate of {encoder.name}",
            "optim.warmup_steps": "5 % of the steps",
        },
    )
