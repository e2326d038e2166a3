"""Crops of a batch as Alice uses them: each image by itself, and the blocks that the student sees.

Shape suffixes: B samples, M members, N = B * M crops, C channels, Z Y X voxels, T tokens of a crop
in raster order, S visible tokens, K visible blocks, J tokens of a block, P voxels of a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.sequence import from_tokens, to_blocks, to_tokens
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.corruption import corrupted
from nnunet_autoreg.sampling.sample import Batch


@dataclass(frozen=True)
class Crops:
    """Crops of a batch, one by one, and the parts that the student sees.

    Attributes:
        voxels: (N, C, Z, Y, X).
        valid_mask: (N, T, P) bool, False where a voxel of a token is padding.
        valid: (N, T) bool, False where a token holds padding only.
        positions: (N, T) raster index of every token in the plan's grid.
        visible: (N, S) index of the visible tokens, block after block; equally many in every crop.
        is_visible: (N, T) bool, the same as a mask.
        visible_blocks: (N, K) index of the visible blocks, in the same order.
    """

    voxels: Tensor
    valid_mask: Tensor
    valid: Tensor
    positions: Tensor
    visible: Tensor
    is_visible: Tensor
    visible_blocks: Tensor


def crops_of(batch: Batch, plan: Plan) -> Crops:
    """Return each image of a batch by itself, with the blocks that the student sees.

    Of the K blocks of a crop, ceil((1 - visible share) K) are hidden: the last ones of the sampled
    order.
    """
    B, M, _, Z, Y, X = batch.voxels.shape
    N = B * M
    token_size, block_tokens = plan.encoder.token_size_vox, plan.sequence.block_tokens
    grid = grid_of(as_size((Z, Y, X)), token_size)
    num_tokens, per_block = volume(grid), volume(block_tokens)

    # The order runs over the blocks of all images; only their order within each one counts.
    order_NT = batch.order_index.reshape(N, num_tokens)
    num_blocks = num_tokens // per_block
    num_visible = num_blocks - num_hidden_blocks(num_blocks, plan.sequence.prefix_share)
    visible_NS = order_NT.argsort(dim=1, stable=True)[:, : num_visible * per_block]
    is_visible_NT = torch.zeros_like(order_NT, dtype=torch.bool)
    is_visible_NT = is_visible_NT.scatter(1, visible_NS, True)

    # All tokens of a block have the same entry, so that the first one is enough.
    blocks_NKJ = to_blocks(order_NT.reshape(N, 1, *grid), block_tokens).flatten(2)
    visible_blocks_NK = blocks_NKJ[:, :, 0].argsort(dim=1, stable=True)[:, :num_visible]

    positions_NT = torch.arange(num_tokens, device=order_NT.device).expand(N, -1)
    if batch.positions is not None:
        positions_NT = batch.positions.reshape(N, num_tokens)

    valid_N11ZYX = batch.valid_mask.flatten(0, 1)[:, None, None]
    valid_NTP = to_tokens(valid_N11ZYX, token_size)
    return Crops(
        voxels=batch.voxels.flatten(0, 1),
        valid_mask=valid_NTP,
        valid=valid_NTP.any(dim=2),
        positions=positions_NT,
        visible=visible_NS,
        is_visible=is_visible_NT,
        visible_blocks=visible_blocks_NK,
    )


def student_voxels(batch: Batch, crops: Crops, token_size: Size) -> Tensor:
    """Return the voxels that the student gets, (N, C, Z, Y, X), corrupted if planned."""
    if batch.corruption is None:
        return crops.voxels
    B, M, _, Z, Y, X = batch.voxels.shape
    # Hidden voxels are cut out later, so that only visible ones are corrupted.
    visible_NTP = crops.is_visible[:, :, None].expand_as(crops.valid_mask)
    visible_BTP = visible_NTP.reshape(B, -1, visible_NTP.shape[2])
    visible_BMZYX = from_tokens(visible_BTP, token_size, (B, M, 1, Z, Y, X))
    corrupted_BMCZYX = corrupted(
        batch.voxels,
        visible_BMZYX & batch.valid_mask,
        batch.corruption,
    )
    return corrupted_BMCZYX.flatten(0, 1)


def num_hidden_blocks(num_blocks: int, visible_share: float) -> int:
    """Return ceil((1 - visible share) x blocks); at least one is hidden and one visible."""
    # Rounded first, because 1 - 0.7 is a little more than 0.3 in floating point.
    wanted = math.ceil(round((1 - visible_share) * num_blocks, 6))
    return min(max(1, wanted), num_blocks - 1)
