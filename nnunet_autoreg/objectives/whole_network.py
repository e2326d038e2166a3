"""Whole-network autoregression for CNNs: the complete U-Net predicts unknown blocks from known
ones.

The blocks of a crop are put in a random order, and the first k of them are known ("random
start-up"). The U-Net sees the known blocks and predicts the voxels of all others at once. Averaged
over k and over orders this estimates the autoregressive objective over all orders
(order-agnostic autoregression). For a CNN it is masked prediction whose known share is drawn
uniformly; the masked twin is the same network with a fixed share.

With ``objective.num_segments`` the network also predicts which pseudo-segment an unknown voxel
belongs to (``objectives.segments``), from a second head on the same features as the voxels.

Encoder and decoder are both trained and both transferred. Several contrasts or patients are set
side by side along z into one crop with one input channel, and the order runs over the blocks of
all of them.

Source: Uria et al. 2014 and Hoogeboom et al., arXiv 2110.02037 (order-agnostic autoregression);
S3D, arXiv 2410.23132 (transfer of a CNN's decoder).

Shape suffixes: B samples, M members, C channels, Z Y X voxels, T tokens, P voxels of a token, K
segments, N points, F features.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import Size, grid_of
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.sequence import from_tokens, to_tokens
from nnunet_autoreg.model.unet import PretrainingUNet, build_unet
from nnunet_autoreg.objectives.base import (
    LossTerm,
    LossTerms,
    Objective,
    Reconstruction,
    TokenFeatures,
)
from nnunet_autoreg.objectives.prediction_plan import settings_of
from nnunet_autoreg.objectives.segments import SegmentMap, measured
from nnunet_autoreg.objectives.targets import (
    full_precision,
    normalised_target,
    smoothed,
    token_statistics,
)
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.corruption import corrupted
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch, collate
from nnunet_autoreg.sampling.sampler import SequenceSampler

ABOVE_FLOOR = 1.001
"""A token is flat if its deviation is the floor, up to rounding."""
SEGMENT_CROPS = 32
"""Crops of the pool that the centres of the segments are measured on."""
SEGMENT_POINTS = 1024
"""Voxels of each of them, at most."""
SEGMENTS = "segments"
"""The purpose that these crops and voxels are drawn for."""


@dataclass(frozen=True)
class Targets:
    """The targets of the network and their masks; all (B, T, P).

    Attributes:
        values: the intensities, normalised per token if the plan says so.
        mean, deviation: they convert ``values`` back into intensities, (B, T, 1).
        known: bool, voxels that the network sees. Padding counts as known.
        valid_mask: bool, False in padding.
        eligible: bool, voxels that have a loss if they are unknown.
        loss_mask: bool, voxels that have a loss.
    """

    values: Tensor
    mean: Tensor
    deviation: Tensor
    known: Tensor
    valid_mask: Tensor
    eligible: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Predictions:
    """The predictions of the network for every voxel, float32.

    Attributes:
        values: in the form of ``Targets.values``, (B, T, P).
        scores: unnormalised, of every segment, (B, K, M * Z, Y, X); K is 0 without segments.
    """

    values: Tensor
    scores: Tensor


class WholeNetwork(Objective):
    """The objective: the loss, and the weights that transfer. See ``objectives.base.Objective``.

    For CNNs, ``autoregressive`` and ``masked`` are both this class. They differ in the distribution
    of the number of known blocks (``sequence.prefix`` of the plan).
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.settings = settings_of(plan)
        self.sampler = SequenceSampler(plan)
        self.token: Size = plan.encoder.token_size_vox

        network = build_unet(plan)
        self.model = PretrainingUNet(
            network,
            learned_mark=self.settings.unknown_mark == "learned",
            recompute=plan.optim.checkpoint_activations,
            num_segments=self.settings.num_segments,
        )
        self.segment_map: SegmentMap | None = None
        if self.settings.num_segments:
            self.segment_map = SegmentMap(self.settings.num_segments, plan.data.spacing_mm)
            # As a part of the module it is checkpointed and moved with the weights.
            self.model.add_module("segment_map", self.segment_map)

        self.module: nn.Module = self.model
        self.network: nn.Module = self.model.network

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the loss over unknown voxels: the sum of each sample's mean.

        It is the squared error of the voxels and, with segments, their cross-entropy times
        ``segment_weight``, over the same voxels. Every sample has the same weight, regardless of
        the number of its unknown voxels. References: ``mean`` predicts the mean of the known
        voxels, and the shares of their segments; ``copy`` repeats the nearest known block.
        """
        targets = self._targets(batch)
        weight_BTP = targets.loss_mask.float()
        predicted = self._predict(batch, targets.known)

        # Each sample's mean, so that all samples count alike.
        error_B = _sample_errors(predicted.values, targets.values, weight_BTP)
        count = (weight_BTP.sum(dim=(1, 2)) > 0).sum()

        trivial = {}
        if references:
            # What predictions without any learning would cost, for comparison.
            nearest_BT = self._nearest_known(batch, targets)
            copied_BTP = _tokens_at(targets.values, nearest_BT)
            mean_BTP = self._known_mean(targets)
            trivial = {
                "mean": _sample_errors(mean_BTP, targets.values, weight_BTP).sum(),
                "copy": _sample_errors(copied_BTP, targets.values, weight_BTP).sum(),
            }

        terms = {"voxels": LossTerm(error_B.sum(), count)}
        if self.segment_map is not None:
            weight = self.settings.segment_weight
            classes_BMZYX = self.segment_map(batch.voxels, batch.valid_mask)
            entropy_B = self._cross_entropy(predicted.scores, classes_BMZYX, batch, weight_BTP)
            terms["segments"] = LossTerm(entropy_B.sum(), count, weight)
            if references:
                entropies = self._trivial_entropies(classes_BMZYX, targets, nearest_BT)
                trivial = {name: trivial[name] + weight * entropies[name] for name in trivial}
        return LossTerms(terms, trivial)

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return predictions in intensities, beside the truth and the prediction of the mean."""
        targets = self._targets(batch)
        predicted_BTP = self._predict(batch, targets.known).values
        trivial_BTP = self._known_mean(targets)

        scale, shift = targets.deviation, targets.mean
        given_BTP = targets.known & targets.valid_mask
        return Reconstruction(
            truth=batch.voxels[:, :, 0],
            predicted=self._volume(predicted_BTP * scale + shift, batch),
            trivial=self._volume(trivial_BTP * scale + shift, batch),
            given=self._volume(given_BTP, batch),
            loss_mask=self._volume(targets.loss_mask, batch),
            valid_mask=batch.valid_mask,
        )

    def describe(self, batch: Batch) -> TokenFeatures:
        """Return the deepest features of each complete member, as in fine-tuning."""
        voxels_BTP = to_tokens(batch.voxels, self.token)
        valid_BT = to_tokens(batch.valid_mask[:, :, None], self.token).any(dim=-1)
        B, T = valid_BT.shape

        deepest = self.model.encode(batch.voxels.flatten(0, 1))[-1]  # (B * M, V, z, y, x)
        features_BTV = deepest.flatten(2).transpose(1, 2).reshape(B, T, -1)

        positions_BT = batch.positions
        if positions_BT is None:
            positions_BT = torch.arange(T, device=valid_BT.device).expand(B, T)
        return TokenFeatures(features_BTV, voxels_BTP, positions_BT, valid_BT)

    @torch.no_grad()
    def pool_statistics(self, pool: SamplingPool) -> dict[str, Tensor]:
        """Return the centres of the segments: k-means over voxels of crops drawn from the pool.

        Only voxels that may have a loss are used. The draw depends only on the run's seed.

        Raises:
            AutoregError: a case cannot be read, or its voxels differ too little.
        """
        if self.segment_map is None:
            return {}

        seed, device = self.plan.run.seed, self.segment_map.centres.device
        points = []
        for number in range(SEGMENT_CROPS):
            batch = collate([self.sampler.draw(pool, SEGMENTS, number)]).to(device)
            eligible_MZYX = self._volume(self._targets(batch).eligible, batch)[0]
            features_NFZYX = self.segment_map.features(batch.voxels, batch.valid_mask)
            points_NF = features_NFZYX.movedim(1, -1)[eligible_MZYX].cpu().numpy()

            generator = rng.generator(seed, f"{SEGMENTS}: voxels", number)
            num_points = min(SEGMENT_POINTS, len(points_NF))
            points.append(points_NF[generator.permutation(len(points_NF))[:num_points]])

        all_points_NF = np.concatenate(points).astype(np.float64)
        generator = rng.generator(seed, f"{SEGMENTS}: centres")
        found = measured(all_points_NF, self.settings.num_segments, generator)
        return {f"segment_map.{name}": value for name, value in found.items()}

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights of encoder and decoder under the downstream network's keys."""
        return self.model.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.model.adaptation()

    def _targets(self, batch: Batch) -> Targets:
        settings = self.settings
        real_BTP = to_tokens(batch.valid_mask[:, :, None], self.token)
        valid_BT = real_BTP.any(dim=-1)

        known_BT = known_tokens(batch.order_index, batch.prefix, valid_BT)
        # Known are whole tokens: (B, T) -> (B, T, P).
        known_BTP = known_BT[:, :, None].expand_as(real_BTP)

        voxels_BTP = to_tokens(batch.voxels, self.token).float()
        voxels_BTP = smoothed(voxels_BTP, real_BTP, self.token, settings.target_smoothing)
        floor, epsilon = settings.variance_floor, settings.variance_epsilon
        mean_BT1, deviation_BT1 = token_statistics(voxels_BTP, real_BTP, floor, epsilon)

        # Flat blocks (air, masked background) would make up most of the mean of some samples, and
        # nothing is to be learned from them. They are hidden like all others, but carry no loss.
        is_textured_BT1 = deviation_BT1 > math.sqrt(floor + epsilon) * ABOVE_FLOOR
        eligible_BTP = real_BTP & is_textured_BT1
        if batch.loss_mask is not None:
            eligible_BTP = eligible_BTP & to_tokens(batch.loss_mask[:, :, None], self.token)
        loss_mask_BTP = ~known_BTP & eligible_BTP

        if settings.target == "normalised":
            values_BTP = normalised_target(voxels_BTP, real_BTP, floor, epsilon)
        else:
            values_BTP = voxels_BTP
            mean_BT1 = torch.zeros_like(mean_BT1)
            deviation_BT1 = torch.ones_like(deviation_BT1)
        return Targets(
            values_BTP,
            mean_BT1,
            deviation_BT1,
            known_BTP,
            real_BTP,
            eligible_BTP,
            loss_mask_BTP,
        )

    def _predict(self, batch: Batch, known_BTP: Tensor) -> Predictions:
        """Return the prediction of the network from the known voxels."""
        known_BMZYX = self._volume(known_BTP, batch)
        # Targets are taken from the clean voxels; only what is shown is corrupted.
        shown_BMCZYX = corrupted(batch.voxels, known_BMZYX & batch.valid_mask, batch.corruption)
        crop_BCZYX = side_by_side(shown_BMCZYX)
        known_BZYX = side_by_side(known_BMZYX[:, :, None])[:, 0]

        predicted_BCZYX = self.model(crop_BCZYX, known_BZYX).float()
        values_BTP = self._as_tokens(predicted_BCZYX[:, :1], batch)
        return Predictions(values_BTP, predicted_BCZYX[:, 1:])

    def _as_tokens(self, crop_BCZYX: Tensor, batch: Batch) -> Tensor:
        """Return a one-channel map of members side by side as tokens (B, T, P)."""
        B, M, _, Z, Y, X = batch.voxels.shape
        members_BMCZYX = crop_BCZYX.reshape(B, 1, M, Z, Y, X).transpose(1, 2)
        return to_tokens(members_BMCZYX, self.token)

    def _cross_entropy(
        self,
        scores_BKZYX: Tensor,
        classes_BMZYX: Tensor,
        batch: Batch,
        weight_BTP: Tensor,
    ) -> Tensor:
        """Return each sample's mean cross-entropy over its weighted voxels, (B,)."""
        classes_BZYX = side_by_side(classes_BMZYX[:, :, None])[:, 0]
        with full_precision(scores_BKZYX.device):
            entropy_BZYX = functional.cross_entropy(scores_BKZYX, classes_BZYX, reduction="none")
        return _sample_means(self._as_tokens(entropy_BZYX[:, None], batch), weight_BTP)

    def _trivial_entropies(
        self,
        classes_BMZYX: Tensor,
        targets: Targets,
        nearest_BT: Tensor,
    ) -> dict[str, Tensor]:
        """Return the cross-entropies of the references, each summed over the samples.

        They predict the shares of the segments among the known voxels, and in the nearest known
        token. One voxel of every segment is added, because a share of 0 would have an infinite
        cross-entropy.
        """
        num_segments = self.settings.num_segments
        weight_BTP = targets.loss_mask.float()
        classes_BTP = to_tokens(classes_BMZYX[:, :, None], self.token)
        given_BTP = (targets.known & targets.valid_mask).float()

        # How often each segment occurs among the known voxels of each token.
        counts_BTK = given_BTP.new_zeros(*classes_BTP.shape[:2], num_segments)
        counts_BTK = counts_BTK.scatter_add(2, classes_BTP, given_BTP)
        of_all_BTK = counts_BTK.sum(dim=1, keepdim=True).expand_as(counts_BTK)

        found = {}
        of_nearest_BTK = _tokens_at(counts_BTK, nearest_BT)
        for name, of_reference_BTK in (("mean", of_all_BTK), ("copy", of_nearest_BTK)):
            smoothed_BTK = of_reference_BTK + 1
            shares_BTK = smoothed_BTK / smoothed_BTK.sum(dim=2, keepdim=True)
            entropy_BTP = -shares_BTK.log().gather(2, classes_BTP)
            found[name] = _sample_means(entropy_BTP, weight_BTP).sum()
        return found

    def _known_mean(self, targets: Targets) -> Tensor:
        """Return the mean of each sample's known voxels everywhere, (B, T, P)."""
        weight_BTP = (targets.known & targets.valid_mask).float()
        total_B = (targets.values * weight_BTP).sum(dim=(1, 2))
        mean_B = total_B / weight_BTP.sum(dim=(1, 2)).clamp(min=1)
        return mean_B[:, None, None].expand_as(targets.values)

    def _nearest_known(self, batch: Batch, targets: Targets) -> Tensor:
        """Return for every token the index of the known token nearest to it, (B, T)."""
        _, M, _, Z, Y, X = batch.voxels.shape
        grid = grid_of((Z, Y, X), self.token)
        axes = [torch.arange(n, device=batch.voxels.device) for n in (M * grid[0], *grid[1:])]
        token_3 = torch.tensor(self.token, device=batch.voxels.device)
        place_T3 = torch.cartesian_prod(*axes).float() * token_3

        nearest = []
        can_be_copied_BT = (targets.known & targets.valid_mask).any(dim=-1)
        # One sample at a time: all distances of a batch would be large.
        for usable_T in can_be_copied_BT:
            distance_TT = torch.cdist(place_T3, place_T3)
            distance_TT = distance_TT.masked_fill(~usable_T[None, :], float("inf"))
            nearest.append(distance_TT.argmin(dim=1))
        return torch.stack(nearest)

    def _volume(self, tokens_BTP: Tensor, batch: Batch) -> Tensor:
        """Return values of tokens at their voxels, (B, M, Z, Y, X)."""
        return from_tokens(tokens_BTP, self.token, batch.voxels.shape)


def known_tokens(order_index_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor) -> Tensor:
    """Return which tokens are known, (B, T) bool; tokens that are all padding count as known.

    Only blocks with at least one valid voxel are counted. Of K such blocks, 1 to K - 1 are known.
    The sampler draws the number of known blocks for a crop without padding, so it is scaled to K.
    Nothing waits for the device.

    Args:
        order_index_BT: position of every token's block in the drawn order of all blocks.
        prefix_B: number of known blocks of a crop without padding, from 1.
        valid_BT: False where a token is all padding.
    """
    B, T = order_index_BT.shape

    # Whether the block at each place of the order holds a real voxel; places beyond the last
    # block stay empty.
    is_real_BT = torch.zeros(B, T, dtype=torch.int64, device=order_index_BT.device)
    is_real_BT = is_real_BT.scatter_reduce(1, order_index_BT, valid_BT.long(), reduce="amax")

    num_real_B = is_real_BT.sum(dim=1)
    place_among_real_BT = is_real_BT.cumsum(dim=1) - 1

    num_blocks_B = order_index_BT.amax(dim=1) + 1
    scaled_B = (prefix_B - 1) * (num_real_B - 1) // (num_blocks_B - 1).clamp(min=1)
    num_known_B = 1 + scaled_B.clamp(min=0)

    place_BT = place_among_real_BT.gather(1, order_index_BT)
    return ~valid_BT | (place_BT < num_known_B[:, None])


def side_by_side(members_BMCZYX: Tensor) -> Tensor:
    """Return the members of a sequence along z in one crop, (B, C, M * Z, Y, X)."""
    return members_BMCZYX.transpose(1, 2).flatten(2, 3)


def _sample_errors(predicted_BTP: Tensor, target_BTP: Tensor, weight_BTP: Tensor) -> Tensor:
    """Return each sample's mean squared error over its weighted voxels, (B,); 0 without any."""
    return _sample_means((predicted_BTP - target_BTP).square(), weight_BTP)


def _sample_means(loss_BTP: Tensor, weight_BTP: Tensor) -> Tensor:
    """Return each sample's mean over its weighted voxels, (B,); 0 without any."""
    weighted_BTP = loss_BTP * weight_BTP
    return weighted_BTP.sum(dim=(1, 2)) / weight_BTP.sum(dim=(1, 2)).clamp(min=1)


def _tokens_at(values_BTP: Tensor, index_BT: Tensor) -> Tensor:
    """Return for every token the values of the token at its index, (B, T, P)."""
    return values_BTP.gather(1, index_BT[:, :, None].expand_as(values_BTP))
