"""Next-block regression with random start-up: predict block after block from the p given ones.

Shape suffixes: B samples, M members, T tokens, K blocks, J tokens of a block, V width, P voxels of
    a token (channels included),
O outputs of the head for a token (``targets.num_outputs``).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.model.attention import (
    AttentionRule,
    block_causal,
    block_order,
    strictly_earlier,
    with_starts,
)
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.encoders import build_sequence_encoder
from nnunet_autoreg.model.predictors import NextHead, QueryDecoder, TokenPositions
from nnunet_autoreg.model.sequence import from_tokens, to_tokens
from nnunet_autoreg.objectives.base import (
    LossTerms,
    Objective,
    Reconstruction,
    TokenFeatures,
    one_term,
)
from nnunet_autoreg.objectives.prediction_plan import settings_of
from nnunet_autoreg.objectives.targets import (
    as_intensities,
    num_outputs,
    output_weight,
    smoothed,
    target_of,
)
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.corruption import corrupted
from nnunet_autoreg.sampling.kinds import num_blocks, num_codes
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler


def supervised_tokens(
    order_index_BT: Tensor,
    prefix_B: Tensor,
    valid_BT: Tensor,
    from_start: bool = False,
) -> Tensor:
    """Return which tokens are predicted, (B, T) bool.

    These are the tokens of blocks that are not given, if they contain valid voxels and follow a
    valid token.

    Args:
        from_start: there is a START token, which precedes all tokens.
    """
    if from_start:
        return valid_BT & (order_index_BT >= prefix_B[:, None])
    # A sample of padding only gets a number that no block reaches: nothing of it is predicted.
    first_B = torch.where(valid_BT, order_index_BT, order_index_BT.max() + 1).min(dim=1).values
    return valid_BT & (order_index_BT >= prefix_B[:, None]) & (order_index_BT > first_B[:, None])


class MemberEmbedding(nn.Module):
    """An embedding that is added to the tokens of each member code except 0. It starts at zero.

    It exists in pretraining only: fine-tuning sees tokens of code 0.
    """

    def __init__(self, num_codes: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_codes - 1, width))

    def forward(self, members_BT: Tensor) -> Tensor:
        """Return the embedding of every token's member, (B, T, V)."""
        zero_1V = self.table.new_zeros(1, self.table.shape[1])
        all_codes_CV = torch.cat([zero_1V, self.table])
        return all_codes_CV[members_BT]


class AutoregressiveModel(nn.Module):
    """The encoder and the head that predicts blocks."""

    def __init__(self, plan: Plan, num_channels: int = 1):
        super().__init__()
        sequence, token = plan.sequence, plan.encoder.token_size_vox
        settings = settings_of(plan)
        recompute = plan.optim.checkpoint_activations
        self.encoder = build_sequence_encoder(
            plan.encoder,
            sequence.crop_size_vox,
            sequence.block_tokens,
            num_channels,
            recompute,
        )

        self.block_num_tokens = volume(sequence.block_tokens)
        self.num_blocks = num_blocks(plan)
        # The head gives each token as many outputs as it has values to predict.
        outputs = num_outputs(settings, num_channels * volume(token))
        self.head: NextHead | QueryDecoder
        if sequence.predictor == "next":
            self.head = NextHead(self.encoder.width, outputs, settings.head)
        else:
            # The decoder is given the positions to predict, so that blocks may come in any order.
            num_positions = volume(grid_of(sequence.crop_size_vox, token))
            heads, depth = self.encoder.num_heads, settings.query_depth
            together = self.block_num_tokens if settings.query_attention else 1
            self.head = QueryDecoder(
                self.encoder.width,
                heads,
                depth,
                num_positions,
                num_codes(plan),
                outputs,
                recompute,
                together,
                settings.head,
            )

        # With one image, no embedding is needed that distinguishes images.
        self.member: MemberEmbedding | None = None
        if num_codes(plan) > 1:
            self.member = MemberEmbedding(num_codes(plan), self.encoder.width)

    def forward(self, batch: Batch, valid_BT: Tensor) -> Tensor:
        """Return predictions (B, T, P), entry t for token t.

        With ``next``, the first block is predicted only from START. Without START its entries are
        0.
        """
        member_BTV = None
        if self.member is not None and batch.members is not None:
            member_BTV = self.member(batch.members)

        # Who attends to whom is known before the encoder runs, and never depends on voxels.
        rule = self.rule(batch.order_index, batch.prefix, valid_BT)
        features_BTV = self.encoder(batch.voxels, rule, batch.positions, member_BTV)
        # (B, starts, V) and (B, T, V)
        start_BTV, features_BTV = features_BTV.tensor_split([self.encoder.num_starts], dim=1)
        if isinstance(self.head, QueryDecoder):
            return self._predict_queries(self.head, batch, valid_BT, features_BTV)

        # Token j of block b says what token j of block b + 1 is.
        order_BT = block_order(batch.order_index)
        predicted_BTP = self.shift(self.head(features_BTV), order_BT)
        if not self.predicts_first:
            return predicted_BTP
        first_B1P = order_BT[:, :1, None].expand(-1, -1, predicted_BTP.shape[2])
        return predicted_BTP.scatter(1, first_B1P, self.head(start_BTV))

    def _predict_queries(
        self,
        head: QueryDecoder,
        batch: Batch,
        valid_BT: Tensor,
        features_BTV: Tensor,
    ) -> Tensor:
        """Return the predictions of a head that is asked for positions, (B, T, P)."""
        # A query must not see its own block, which it predicts.
        query_rule = strictly_earlier(batch.order_index, valid_BT)
        tokens = TokenPositions(
            self.encoder.rope(batch.positions),
            batch.positions,
            batch.members,
        )
        if head.block_tokens == 1:
            predicted_BTP: Tensor = head(features_BTV, query_rule, tokens, tokens)
            return predicted_BTP

        # Queries block after block, and their predictions back at the places of the tokens.
        query_order_BT = block_order(batch.order_index)
        in_order_BTP = head(
            features_BTV,
            query_rule.with_queries(query_order_BT),
            self.places(batch, query_order_BT),
            tokens,
        )
        index_BTP = query_order_BT[:, :, None].expand_as(in_order_BTP)
        return torch.zeros_like(in_order_BTP).scatter(1, index_BTP, in_order_BTP)

    def places(self, batch: Batch, index_BN: Tensor) -> TokenPositions:
        """Return the positions of the tokens ``index_BN`` of a batch."""
        positions_BN = index_BN if batch.positions is None else batch.positions.gather(1, index_BN)
        members_BN = None if batch.members is None else batch.members.gather(1, index_BN)
        return TokenPositions(self.encoder.rope(positions_BN), positions_BN, members_BN)

    @property
    def predicts_first(self) -> bool:
        """Whether START predicts the first block. START has one output, so blocks must be single
        tokens.
        """
        return (
            self.encoder.num_starts == 1
            and self.block_num_tokens == 1
            and isinstance(self.head, NextHead)
        )

    def rule(self, order_index_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor) -> AttentionRule:
        """Return the attention rule of the encoder, start tokens included."""
        return block_causal(
            *with_starts(order_index_BT, prefix_B, valid_BT, self.encoder.num_starts),
        )

    def shift(self, out_BTP: Tensor, order_BT: Tensor) -> Tensor:
        """Move the prediction of token j of block b for its successor to token j of block b + 1."""
        J = self.block_num_tokens
        # In the order of blocks, so that the successor of a token lies J entries later.
        index_BTP = order_BT[:, :, None].expand_as(out_BTP)
        predicted_BTP = torch.gather(out_BTP, 1, index_BTP[:, :-J])
        return torch.zeros_like(out_BTP).scatter(1, index_BTP[:, J:], predicted_BTP)


class Autoregressive(Objective):
    """The objective: the loss, and the weights that transfer. See ``objectives.base.Objective``."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.settings = settings_of(plan)
        self.token_size = plan.encoder.token_size_vox
        self.sampler = SequenceSampler(plan)
        self.model = self.build_model(plan)
        self.module: nn.Module = self.model
        self.network: nn.Module = self.model.encoder.network

    def build_model(self, plan: Plan) -> AutoregressiveModel:
        """Return the encoder and the head."""
        return AutoregressiveModel(plan)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the squared error over the supervised valid voxels, in float32.

        References: ``mean`` outputs 0, which is every token's own mean, or the scan's mean if the
        target contains means; ``copy`` repeats the previous block.
        """
        settings, asked = self.settings, self.as_predicted(batch)
        voxels_BTP, real_BTP = self._target_voxels(batch)
        valid_BT = real_BTP.any(dim=-1)

        # (B, T, P) -> (B, T, O): what the plan calls the target.
        target_BTO = target_of(settings, voxels_BTP, real_BTP)

        # Only real voxels of predicted tokens carry loss.
        predicted_BT = supervised_tokens(
            asked.order_index,
            asked.prefix,
            valid_BT,
            self.model.predicts_first,
        )
        weight_BTP = (predicted_BT[:, :, None] & real_BTP).float()
        if batch.loss_mask is not None:
            loss_mask_BTP = to_tokens(batch.loss_mask[:, :, None], self.token_size)
            num_channels = batch.voxels.shape[2]
            weight_BTP = weight_BTP * loss_mask_BTP.repeat(1, 1, num_channels)

        shown = batch
        if batch.corruption is not None:
            # Targets were taken above, from the clean voxels; blocks that are predicted stay clean
            # as context of later ones, too.
            given_BMZYX = self._given_voxels(asked)
            shown_BMCZYX = corrupted(batch.voxels, given_BMZYX, batch.corruption)
            shown = replace(batch, voxels=shown_BMCZYX)

        output_weight_BTO = output_weight(settings, weight_BTP)
        predicted_BTO = self.model(shown, valid_BT).float()

        # What predictions without any learning would cost, for comparison.
        trivial = {}
        if references:
            previous_BTO = self.model.shift(target_BTO, block_order(batch.order_index))
            trivial = {
                "mean": _error(torch.zeros_like(target_BTO), target_BTO, output_weight_BTO),
                "copy": _error(previous_BTO, target_BTO, output_weight_BTO),
            }
        return one_term(
            _error(predicted_BTO, target_BTO, output_weight_BTO),
            weight_BTP.sum(),
            trivial,
        )

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return predictions in intensities (``targets.as_intensities``), for the first channel."""
        settings, asked = self.settings, self.as_predicted(batch)
        real_BTP = to_tokens(batch.valid_mask[:, :, None], self.token_size)
        voxels_BTP, every_BTP = self._target_voxels(batch)
        valid_BT = every_BTP.any(dim=-1)
        predicted_BTO = self.model(batch, valid_BT).float()
        predicted_BTP, trivial_BTP = as_intensities(settings, predicted_BTO, voxels_BTP, every_BTP)

        # What the picture shows as given, and what as predicted.
        given_BT = valid_BT & (batch.order_index < batch.prefix[:, None])
        predicted_BT = supervised_tokens(
            asked.order_index,
            asked.prefix,
            valid_BT,
            self.model.predicts_first,
        )
        parts = (
            predicted_BTP,
            trivial_BTP,
            given_BT[:, :, None] & real_BTP,
            predicted_BT[:, :, None] & real_BTP,
        )

        # Back to the shape of the images, (B, M, Z, Y, X).
        predicted, trivial, given, loss_mask = (
            from_tokens(part, self.token_size, batch.voxels.shape) for part in parts
        )
        loss_mask = loss_mask if batch.loss_mask is None else loss_mask & batch.loss_mask
        return Reconstruction(
            batch.voxels[:, :, 0],
            predicted,
            trivial,
            given,
            loss_mask,
            batch.valid_mask,
        )

    def as_predicted(self, batch: Batch) -> Batch:
        """Return the batch with the order and prefix that define given and predicted blocks.

        Here these are unchanged.
        """
        return batch

    def _target_voxels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the voxels by token and their mask of valid voxels; both (B, T, P).

        The voxels are smoothed as the plan says, and not normalised yet.
        """
        num_channels = batch.voxels.shape[2]
        real_BTP = to_tokens(batch.valid_mask[:, :, None], self.token_size)
        real_BTP = real_BTP.repeat(1, 1, num_channels)
        voxels_BTP = to_tokens(batch.voxels, self.token_size)
        sigma_vox = self.settings.target_smoothing
        return smoothed(voxels_BTP, real_BTP, self.token_size, sigma_vox), real_BTP

    def _given_voxels(self, asked: Batch) -> Tensor:
        """Return the mask of valid voxels in given blocks, (B, M, Z, Y, X)."""
        B, M, Z, Y, X = asked.valid_mask.shape
        grid = grid_of((Z, Y, X), self.token_size)
        given_BT = asked.order_index < asked.prefix[:, None]
        given_BMZYX = given_BT.reshape(B, M, *grid)

        # From tokens to voxels: every token is a cube of equal entries.
        for axis, side in enumerate(self.token_size, start=2):
            given_BMZYX = given_BMZYX.repeat_interleave(side, dim=axis)
        return given_BMZYX & asked.valid_mask

    def describe(self, batch: Batch) -> TokenFeatures:
        """Return features as fine-tuning gets them: all valid tokens attend to each other, and
        members are not distinguished.
        """
        voxels_BTP = to_tokens(batch.voxels, self.token_size)
        valid_BT = to_tokens(batch.valid_mask[:, :, None], self.token_size).any(dim=-1)
        one_block_BT = torch.zeros_like(batch.order_index)

        # One block that is given: every token may then attend to every other.
        rule = self.model.rule(one_block_BT, torch.ones_like(batch.prefix), valid_BT)
        features_BTV = self.model.encoder.describe(batch.voxels, rule, batch.positions)

        positions_BT = batch.positions
        if positions_BT is None:
            # Without given positions, tokens are numbered in raster order.
            raster_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
            positions_BT = raster_T.expand_as(valid_BT)
        return TokenFeatures(features_BTV, voxels_BTP, positions_BT, valid_BT)

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the encoder's weights under the downstream network's keys."""
        return self.model.encoder.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.model.encoder.adaptation()


def _error(predicted_BTP: Tensor, target_BTP: Tensor, weight_BTP: Tensor) -> Tensor:
    return ((predicted_BTP - target_BTP).square() * weight_BTP).sum()
