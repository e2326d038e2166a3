"""Masked autoencoding, the baseline of autoregression: all hidden blocks at once, from the visible
ones.

The given blocks of a random order are the visible ones. Only they enter the encoder: hidden voxels
are removed before anything is computed, so they influence nothing and cost nothing. A decoder that
is given the positions of the hidden tokens then predicts them from the visible ones. Targets, head,
padding, pictures and transfer are those of ``objectives.autoregressive``.

Shape suffixes: as there, and S visible tokens, Q hidden tokens.

Source: masked autoencoders (arXiv 2111.06377) with a decoder of cross-attention, as CrossMAE (arXiv
    2401.14391).
"""

from dataclasses import replace

import torch
from torch import Tensor

from nnunet_autoreg.geometry import grid_of, multiplied
from nnunet_autoreg.model.attention import VisibleKeys, block_order, with_starts
from nnunet_autoreg.model.predictors import QueryDecoder
from nnunet_autoreg.model.sequence import to_blocks
from nnunet_autoreg.objectives.autoregressive import Autoregressive, AutoregressiveModel
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.blocks import fixed_prefix
from nnunet_autoreg.sampling.sample import Batch


class MaskedModel(AutoregressiveModel):
    """The modules of autoregression, but the encoder reads only the visible blocks."""

    def __init__(self, plan: Plan, num_channels: int = 1):
        super().__init__(plan, num_channels)
        self.visible_share = plan.sequence.prefix_share
        self.token_size, self.block_grid = plan.encoder.token_size_vox, plan.sequence.block_tokens

    def forward(self, batch: Batch, valid_BT: Tensor) -> Tensor:
        """Return predictions (B, T, O), entry t for token t; 0 at visible tokens."""
        assert isinstance(self.head, QueryDecoder), "plan.check allows no other predictor"
        order_BT = block_order(batch.order_index)
        num_blocks = order_BT.shape[1] // self.block_num_tokens
        # The same number in every sample, known without looking at the batch: shapes stay fixed.
        num_visible = fixed_prefix(num_blocks, self.visible_share)
        num_visible_tokens = num_visible * self.block_num_tokens
        visible_BS = order_BT[:, :num_visible_tokens]
        hidden_BQ = order_BT[:, num_visible_tokens:]

        # Positions of the visible tokens, and of those to predict.
        tokens = self.places(batch, visible_BS)
        queries = self.places(batch, hidden_BQ)
        member_BSV = None
        if self.member is not None and tokens.members is not None:
            member_BSV = self.member(tokens.members)
        valid_BS = valid_BT.gather(1, visible_BS)
        starts_BS = with_starts(visible_BS, batch.prefix, valid_BS, self.encoder.num_starts)[2]

        # The voxels of the visible blocks in their order, (B, K, C, z, y, x). Every visible block
        # is a small separate crop: one member of the sequence.
        B, M, C, Z, Y, X = batch.voxels.shape
        grid = grid_of((Z, Y, X), self.token_size)
        order = to_blocks(batch.order_index.reshape(B * M, 1, *grid), self.block_grid)
        order_BKJ = order.reshape(B, -1, self.block_num_tokens)
        # All tokens of a block share its number, so that the first one is enough.
        visible_BK = torch.argsort(order_BKJ[:, :, 0], dim=1)[:, :num_visible]

        block_size = multiplied(self.token_size, self.block_grid)
        all_blocks = to_blocks(batch.voxels.flatten(0, 1), block_size)
        all_BKCzyx = all_blocks.reshape(B, -1, C, *block_size)
        samples_B1 = torch.arange(B, device=visible_BK.device)[:, None]
        blocks_BKCzyx = all_BKCzyx[samples_B1, visible_BK]

        features = self.encoder(blocks_BKCzyx, VisibleKeys(starts_BS), tokens.positions, member_BSV)
        # Without the start tokens, (B, S, V).
        features_BSV = features[:, self.encoder.num_starts :]

        predicted_BQO = self.head(features_BSV, VisibleKeys(valid_BS), queries, tokens)
        # Back at the positions of the hidden tokens.
        everywhere_BTO = predicted_BQO.new_zeros(*order_BT.shape, predicted_BQO.shape[2])
        index_BQO = hidden_BQ[:, :, None].expand_as(predicted_BQO)
        out: Tensor = everywhere_BTO.scatter(1, index_BQO, predicted_BQO)
        return out


class Masked(Autoregressive):
    """The objective; ``plan_check`` ensures fixed prefix, random order and the query predictor."""

    def build_model(self, plan: Plan) -> MaskedModel:
        """Return the encoder and the head."""
        return MaskedModel(plan)

    def as_predicted(self, batch: Batch) -> Batch:
        """Return the batch with visible blocks first, as given ones, and hidden blocks last."""
        # 0 for visible blocks and 1 for hidden ones: two blocks, of which the first is given.
        hidden_BT = (batch.order_index >= batch.prefix[:, None]).long()
        return replace(batch, order_index=hidden_BT, prefix=torch.ones_like(batch.prefix))
