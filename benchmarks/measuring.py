"""The peak of memory of a step, and the plans and batches of the benchmarks.

On a GPU the allocator counts the memory. On a CPU every tensor is counted.
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
    """The device and the limits of ``gpu.py``.

    Attributes:
        is_small: everything is small, for a CPU.
        minutes: limit for one part.
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
    overrides = Overrides(encoder=encoder.name, batch_size=2 * micro, num_steps=NUM_STEPS)
    hardware = Hardware("cuda", PLENTY_GIB)
    planned = make_plan("benchmark", pool, hardware, overrides, 0, {}, lambda *_: (0.0, 0.0))

    changes = []
    sizes = {"crop_size_vox": crop, "block_tokens": encoder.block_tokens}
    for name, size in sizes.items():
        text = ",".join(str(side) for side in size)
        changes.append(f"sequence.{name}={text}")
    changes += [f"optim.micro_batch_size={micro}", *settings]
    return check(override(planned, changes))


def batch_of(plan: Plan, num_samples: int) -> Batch:
    """Return random crops, all of which are flipped on the device.

    A quarter of every second crop is padding.
    """
    size = plan.sequence.crop_size_vox
    generator = torch.Generator().manual_seed(0)
    grid = grid_of(size, plan.encoder.token_size_vox)
    ids = torch.from_numpy(block_ids(grid, plan.sequence.block_tokens))
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
    """Bytes of the tensors that are alive on the CPU, and their largest number so far.

    Memory that an operation uses only inside is not counted.
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
    """Return the largest number of bytes in use while ``run`` runs.

    Args:
        held: tensors that exist before and are counted: parameters, moments, inputs. On a GPU all
            existing tensors are counted.
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
    """Return the largest difference over the largest value."""
    difference = (found.float() - expected.float()).abs().max()
    largest = expected.float().abs().max().clamp(min=1e-12)
    return float(difference / largest)
