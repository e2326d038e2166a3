"""How one tensor of pretrained weights is fitted to another grid of positions, other channels or
other kernels.

Every function gives the new value and what was done, "" where nothing had to be.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nnunet_autoreg.finetune.channels import ChannelMap
from nnunet_autoreg.geometry import Size

CONV_AXES = 5
"""(out, in, z, y, x)."""


def fit_positions(positions_1TV: Tensor, old: Size, new: Size) -> tuple[Tensor, str]:
    """Position embeddings of the token grid ``old`` on the grid ``new``."""
    if old == new:
        return positions_1TV, ""
    return interpolate_positions(
        positions_1TV, old, new
    ), f"positions {times(old)} -> {times(new)}, trilinear"


def interpolate_positions(positions_1TV: Tensor, old: Size, new: Size) -> Tensor:
    """Position embeddings of grid ``old`` on grid ``new``, tokens in raster order (z, y, x)."""
    width = positions_1TV.shape[-1]
    volume_1VZYX = positions_1TV.reshape(1, *old, width).permute(0, 4, 1, 2, 3)
    resized = F.interpolate(volume_1VZYX, size=new, mode="trilinear", align_corners=False)
    return resized.permute(0, 2, 3, 4, 1).reshape(1, math.prod(new), width).contiguous()


def fit_channels(kernel: Tensor, channels: ChannelMap, num_live: int) -> tuple[Tensor, str]:
    """The input projection (out, in, z, y, x) for other image channels; one-hot channels of a
    cascade start at zero.

    Args:
        num_live: input channels of the network: image channels, then one-hot channels.
    """
    columns = [
        kernel[:, list(s)].sum(1) * f
        for s, f in zip(channels.sources, channels.factors, strict=True)
    ]
    notes = [channels.note] if channels.note else []
    extra = num_live - len(columns)
    if extra > 0:
        columns += [torch.zeros_like(columns[0])] * extra
        notes.append(f"{extra} one-hot channels of the cascade start at 0")
    return torch.stack(columns, dim=1), ", ".join(notes)


def fit_kernel(kernel: Tensor, size: Sequence[int]) -> tuple[Tensor, str]:
    """A convolution kernel (out, in, z, y, x) of another size along some axes, left alone where
    that cannot be done.

    3 -> 1 sums over the axis: on images that do not change along it, the answer stays the same. 1
    -> 3 puts the kernel in the middle, which changes nothing at all.
    """
    if kernel.ndim != CONV_AXES or len(size) != CONV_AXES - 2:
        return kernel, ""
    old = tuple(kernel.shape[2:])
    changed = [axis for axis, (a, b) in enumerate(zip(old, size, strict=True)) if a != b]
    if not changed or any(
        1 not in (old[axis], size[axis]) or size[axis] % 2 == 0 for axis in changed
    ):
        return kernel, ""
    done = set()
    for axis in changed:
        if size[axis] == 1:
            kernel = kernel.sum(axis + 2, keepdim=True)
            done.add("summed")
        else:
            side = size[axis] // 2
            pads = [0, 0] * (2 - axis) + [side, side] + [0, 0] * axis
            kernel = F.pad(kernel, pads)
            done.add("padded with zeros")
    return kernel, f"kernel {times(old)} -> {times(size)}, {' and '.join(sorted(done))}"


def times(size: Sequence[int]) -> str:
    """``4x5x4``."""
    return "x".join(str(s) for s in size)
