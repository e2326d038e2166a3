"""Slabs of a batch as joint 2D/3D clustering uses them. A 2D image is one slab.

Shape suffixes: B samples, M = 2 views, R slabs of a view, N = B * M * R slabs, T tokens of a slab,
z slices of a slab, Y X pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_autoreg.model.sequence import to_tokens
from nnunet_autoreg.objectives.joint_networks import slabs_of
from nnunet_autoreg.objectives.joint_plan import joint_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.sample import Batch

SLABS, IMAGES, VOLUMES = range(3)
NUM_KINDS = 3
"""What is embedded. Each kind is standardised by itself: slabs and images then share clusters."""


@dataclass(frozen=True)
class Slabs:
    """The slabs of a batch.

    Attributes:
        voxels: (N, 1, z, Y, X).
        valid_tokens: (N, T) bool, False where a token holds padding only.
        positions: (N, T) raster index of every token in the plan's grid.
        valid: (B, R) bool, False where a slab holds padding only in one of the views.
        hidden: (B, R) bool, slabs that are predicted from the others.
    """

    voxels: Tensor
    valid_tokens: Tensor
    positions: Tensor
    valid: Tensor
    hidden: Tensor

    @property
    def are_of_volumes(self) -> bool:
        """Whether they are of volumes. A 2D image is one slab."""
        return self.valid.shape[1] > 1

    @property
    def kind(self) -> int:
        """What they are: ``SLABS`` or ``IMAGES``."""
        return SLABS if self.are_of_volumes else IMAGES


def slabs_in(batch: Batch, plan: Plan) -> Slabs:
    """Cut the views of a batch into slabs, and choose those that are hidden."""
    settings = joint_of(plan)
    slab, step = settings.slab_vox, settings.slab_step_vox
    B, M = batch.voxels.shape[:2]
    voxels = slabs_of(batch.voxels.flatten(0, 2), slab, step)  # (B * M, R, z, Y, X)
    valid_mask = slabs_of(batch.valid_mask.flatten(0, 1), slab, step)
    R = voxels.shape[1]

    voxels = voxels.flatten(0, 1)[:, None]  # (N, 1, z, Y, X)
    valid_mask = valid_mask.flatten(0, 1)[:, None, None]  # (N, 1, 1, z, Y, X)
    valid_NT = to_tokens(valid_mask, plan.encoder.token_size_vox).any(dim=2)
    valid_BR = valid_NT.any(dim=1).reshape(B, M, R).all(dim=1)
    # Attention needs a key. What it makes of a slab of padding is used nowhere.
    valid_NT = valid_NT | ~valid_NT.any(dim=1, keepdim=True)

    num_tokens = valid_NT.shape[1]
    positions_BT = torch.arange(num_tokens, device=voxels.device).expand(B, -1)
    if batch.positions is not None:
        positions_BT = batch.positions
    positions_NT = positions_BT[:, None].expand(-1, M * R, -1).flatten(0, 1)
    hidden_BR = hidden_slabs(valid_BR, batch.order_index, settings.hidden_share)
    return Slabs(voxels, valid_NT, positions_NT, valid_BR, hidden_BR)


def hidden_slabs(valid_BR: Tensor, order_BR: Tensor, share: float) -> Tensor:
    """Return which slabs are hidden, (B, R) bool: the first valid ones of a random order.

    Their number is ``share`` of the valid ones, rounded, at least one; of fewer than two, none.
    """
    # The first valid ones of a random order are a random choice of them.
    in_order_BR = valid_BR.gather(1, order_BR)
    num_valid_B = in_order_BR.sum(dim=1)
    wanted_B = (share * num_valid_B).round().clamp(min=1)
    wanted_B = torch.where(num_valid_B < 2, 0, wanted_B)
    is_first_BR = in_order_BR & (in_order_BR.cumsum(dim=1) <= wanted_B[:, None])
    return torch.zeros_like(valid_BR).scatter(1, order_BR, is_first_BR)
