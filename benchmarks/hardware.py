"""What a pretraining needs on GPUs of several sizes, by the planner's rules and estimates.

``python benchmarks/hardware.py`` prints the tables of ``docs/how-to/hardware.md``. Nothing is
trained: plans are made for a pool of brains and one of thick-slice CT, memory is the planner's own
estimate, and arithmetic is counted on tensors without contents. Neither has been compared with a
GPU.
"""

import sys
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_autoreg.geometry import Size
from nnunet_autoreg.machine import GIB
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool, dimensions
from nnunet_autoreg.pretrain.dry_run import step_memory
from nnunet_autoreg.store.store import BYTES_PER_VOXEL

GPUS_GIB = (8, 12, 16, 24, 40, 80)
BRAIN, THICK_CT = (170, 220, 170), (90, 420, 512)
POOLS = {
    "500 brains, T1 MR, 1 mm": Pool(500, (1.0, 1.0, 1.0), BRAIN, 500 * 170 * 220 * 170, None),
    "300 CT, slices of 5 mm": Pool(300, (5.0, 0.78, 0.78), THICK_CT, 300 * 90 * 420 * 512, None),
}
RATES_TFLOPS = (10, 50)
COLUMNS = ("GPU", "encoder", "crop", "crops at once", "memory", "steps", "PFLOPs", "hours")


@cache
def memory_of(encoder: str, crop: Size, recompute: bool) -> tuple[float, float]:
    """Return the estimated bytes of a training step: fixed, and per crop."""
    return step_memory(_KNOWN[encoder], crop, recompute)


_KNOWN: dict[str, EncoderSize] = {}


def _memory(encoder: EncoderSize, crop: Size, recompute: bool) -> tuple[float, float]:
    # Within one pool, an encoder's name says what its strides are.
    _KNOWN[encoder.name] = encoder
    return memory_of(encoder.name, crop, recompute)


def flops_per_crop(plan: Plan) -> float:
    """Return multiplications and additions of a training step on one crop, forward and backward."""
    with torch.device("meta"):
        objective = build_objective(plan)
        objective.module.train()
        batch = objective.example_batch(1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            torch.autograd.backward(objective.loss(batch).total)
    return float(counter.get_total_flops())


def row_of(pool: Pool, gpu_gib: int) -> list[str]:
    """Return the cells of one GPU."""
    plan = make_plan(
        "hardware",
        pool,
        Hardware("cuda", float(gpu_gib)),
        Overrides(),
        0,
        {},
        _memory,
    )
    micro = plan.optim.micro_batch_size or plan.optim.batch_size
    encoder, crop = plan.encoder.name, plan.sequence.crop_size_vox
    fixed, each = memory_of(encoder, crop, plan.optim.checkpoint_activations)
    flops = flops_per_crop(plan) * plan.optim.batch_size * plan.optim.num_steps

    hours = " / ".join(f"{flops / (rate * 1e12) / 3600:.0f}" for rate in RATES_TFLOPS)
    return [
        f"{gpu_gib} GiB",
        f"`{encoder}`",
        dimensions(crop),
        f"{micro} of {plan.optim.batch_size}",
        f"{(fixed + micro * each) / GIB:.1f} GiB",
        f"{plan.optim.num_steps:,}",
        f"{flops / 1e15:,.0f}",
        hours,
    ]


def main() -> None:
    """Print one table for each pool."""
    for name, pool in POOLS.items():
        memory_of.cache_clear()
        disk = pool.total_vox * BYTES_PER_VOXEL / GIB
        print(f"\n{name}: about {disk:.0f} GiB of disk for the preprocessed scans\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for gpu_gib in GPUS_GIB:
            print(f"| {' | '.join(row_of(pool, gpu_gib))} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
