"""What a step really takes: its peak of memory, on a GPU by the allocator's own count, on a CPU by
following every tensor.

And the one place where the benchmarks make their plans and batches.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.plan import Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.sampling.blocks import block_ids
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.sample import Batch

PLENTY_GIB = 1e6
NUM_STEPS = 10_000


@dataclass(frozen=True)
class Setting:
    """Where ``gpu.py`` runs.

    Attributes:
        is_small: the miniature for a CPU.
        minutes: the most that one part may take.
        folder: for the scans and runs of the parts that type commands; parts of one call share it.
    """

    device: torch.device
    is_small: bool
    minutes: float
    folder: Path


def crop_of(encoder: EncoderSize, is_small: bool) -> Size:
    """Return a crop of whole blocks: 128^3 voxels or the next smaller one, or a miniature."""
    sides = []
    for token, block in zip(encoder.token_size, encoder.block_tokens, strict=True):
        side = token * block
        sides.append(max(2 * side, 32) if is_small else max(2, 128 // side) * side)
    return as_size(sides)


def plan_of(encoder: EncoderSize, crop: Size, micro: int, *settings: str) -> Plan:
    """Return the plan that planning makes for an encoder, with this crop and a step of two parts.

    Args:
        micro: crops on the device at once; the batch is twice that.
        settings: as after ``--set``; they come last.
    """
    pool = Pool(1, (1.0, 1.0, 1.0), crop, volume(crop), None)
    wishes = Overrides(encoder=encoder.name, batch_size=2 * micro, num_steps=NUM_STEPS)
    hardware = Hardware("cuda", PLENTY_GIB)
    planned = make_plan("benchmark", pool, hardware, wishes, 0, {}, lambda *_: (0.0, 0.0))

    sizes = {"crop_size_vox": crop, "block_tokens": encoder.block_tokens}
    fixed = [f"sequence.{name}={','.join(map(str, size))}" for name, size in sizes.items()]
    return check(override(planned, [*fixed, f"optim.micro_batch_size={micro}", *settings]))


def batch_of(plan: Plan, num_samples: int) -> Batch:
    """Return random crops, all to be mirrored on the device; a quarter of every second one is
    padding.
    """
    size = plan.sequence.crop_size_vox
    generator = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(
        block_ids(grid_of(size, plan.encoder.token_size_vox), plan.sequence.block_tokens),
    )
    num_blocks = int(ids.max()) + 1

    if plan.sequence.order == "random":
        orders = [torch.randperm(num_blocks, generator=generator) for _ in range(num_samples)]
        order_index = torch.stack([order[ids] for order in orders])  # (B, T)
    else:
        order_index = ids.expand(num_samples, -1).clone()

    valid_mask = torch.ones(num_samples, 1, *size, dtype=torch.bool)
    valid_mask[1::2, :, size[0] * 3 // 4 :] = False
    voxels = torch.randn(num_samples, 1, 1, *size, generator=generator) * valid_mask[:, :, None]
    prefix = torch.randint(1, num_blocks, (num_samples,), generator=generator)
    return Batch(
        voxels,
        valid_mask,
        order_index,
        prefix,
        flip_transposes=(FlipTranspose((True, True, True)),) * num_samples,
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive on the CPU, and the most there were; what an operation
    needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def peak_bytes(run: Callable[[], object], held: list[torch.Tensor], device: torch.device) -> int:
    """The most bytes in use while ``run`` runs.

    Args:
        held: tensors that are there before and count: parameters, moments, inputs. On a GPU all
            that is there counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    counted = LiveBytes()
    for tensor in held:
        counted.add(tensor)
    with counted:
        run()
    return counted.peak


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float(
        (found.float() - expected.float()).abs().max()
        / expected.float().abs().max().clamp(min=1e-12),
    )
