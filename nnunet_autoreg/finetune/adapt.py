"""Fit a tensor of pretrained weights to another token grid, other channels or other kernels.

Every function returns the new value and a note about what was done, which is "" if nothing was
changed.
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
    """Return the position embeddings of the token grid ``old`` for the grid ``new``."""
    if old == new:
        return positions_1TV, ""
    note = f"positions {times(old)} -> {times(new)}, trilinear"
    return interpolate_positions(positions_1TV, old, new), note


def interpolate_positions(positions_1TV: Tensor, old: Size, new: Size) -> Tensor:
    """Interpolate position embeddings; the tokens are in raster order (z, y, x)."""
    width = positions_1TV.shape[-1]
    grid_1ZYXV = positions_1TV.reshape(1, *old, width)
    grid_1VZYX = grid_1ZYXV.permute(0, 4, 1, 2, 3)
    resized_1VZYX = F.interpolate(grid_1VZYX, size=new, mode="trilinear", align_corners=False)

    resized_1ZYXV = resized_1VZYX.permute(0, 2, 3, 4, 1)
    resized_1TV = resized_1ZYXV.reshape(1, math.prod(new), width)
    return resized_1TV.contiguous()


def fit_channels(kernel: Tensor, channels: ChannelMap, num_live: int) -> tuple[Tensor, str]:
    """Return the input projection (out, in, z, y, x) for other image channels.

    The one-hot channels of a cascade come after the image channels and start at zero.

    Args:
        num_live: input channels of the network: image channels, then one-hot channels.
    """
    # One column of the kernel for every image channel.
    columns = []
    for sources, factor in zip(channels.sources, channels.factors, strict=True):
        summed = kernel[:, list(sources)].sum(1)  # (out, z, y, x)
        columns.append(summed * factor)

    notes = [channels.note] if channels.note else []
    extra = num_live - len(columns)
    if extra > 0:
        columns += [torch.zeros_like(columns[0])] * extra
        notes.append(f"{extra} one-hot channels of the cascade start at 0")
    return torch.stack(columns, dim=1), ", ".join(notes)


def fit_kernel(kernel: Tensor, size: Sequence[int]) -> tuple[Tensor, str]:
    """Return a convolution kernel (out, in, z, y, x) with another size along some axes.

    From 3 to 1, the kernel is summed over the axis: the result is the same on images that do not
    change along it. From 1 to 3, zeros are added on both sides: the result is always the same.
    Between other sizes the kernel is returned unchanged.
    """
    if kernel.ndim != CONV_AXES or len(size) != CONV_AXES - 2:
        return kernel, ""

    old = tuple(kernel.shape[2:])
    changed = [axis for axis in range(len(size)) if old[axis] != size[axis]]
    if not changed:
        return kernel, ""

    # Only between 1 and an odd size does the result stay the same: an even kernel has no middle.
    for axis in changed:
        if 1 not in (old[axis], size[axis]) or size[axis] % 2 == 0:
            return kernel, ""

    done = set()
    for axis in changed:
        if size[axis] == 1:
            kernel = kernel.sum(axis + 2, keepdim=True)
            done.add("summed")
        else:
            # F.pad lists the last axis first, with two numbers per axis.
            side = size[axis] // 2
            pads = [0, 0] * (2 - axis) + [side, side] + [0, 0] * axis
            kernel = F.pad(kernel, pads)
            done.add("padded with zeros")
    how = " and ".join(sorted(done))
    return kernel, f"kernel {times(old)} -> {times(size)}, {how}"


def times(size: Sequence[int]) -> str:
    """Return a size as text, such as ``4x5x4``."""
    return "x".join(str(s) for s in size)
