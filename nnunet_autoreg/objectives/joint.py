"""Joint 2D/3D clustering: slabs of volumes, volumes, and 2D images by one 3D encoder.

A crop is cut into slabs along z. Every slab, and every 2D image, is encoded by itself by the same
3D encoder. Three losses train the network:

- "slabs": two views of one slab, or of one image, belong to the same cluster;
- "volumes": after attention over their slabs, two views of one crop belong to the same cluster;
- "hidden": the attention predicts the embeddings of hidden slabs from those of the others.

Clusters are prototypes that are learnt. The targets are balanced over a bank of embeddings, so that
all clusters stay equally large (``clusters``). In the first part of a run, only slabs and images
are clustered.

Shape suffixes: as in ``joint_networks``; M = 2 views, N = B * M * R slabs, K clusters, S slabs of a
case in the bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_autoreg.geometry import as_size, grid_of, volume
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.parameters import whole
from nnunet_autoreg.model.sequence import to_tokens
from nnunet_autoreg.objective_kinds import SliceGroup
from nnunet_autoreg.objectives.base import (
    OF_LARGEST,
    LossTerm,
    LossTerms,
    Objective,
    Processes,
    TokenFeatures,
)
from nnunet_autoreg.objectives.clusters import codes_of, swapped_losses
from nnunet_autoreg.objectives.joint_networks import JointNetwork, scores_of
from nnunet_autoreg.objectives.joint_plan import joint_of
from nnunet_autoreg.objectives.joint_slabs import NUM_KINDS, VOLUMES, Slabs, slabs_in
from nnunet_autoreg.objectives.joint_state import (
    JointState,
    bank_rows,
    moments_of,
    smallest_spread,
)
from nnunet_autoreg.objectives.targets import full_precision
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler
from nnunet_autoreg.sampling.views import NUM_VIEWS, num_slabs, slab_size

SHOWN_CLUSTERS, SHOWN_SLABS = 6, 5
"""Prototypes in the report, and slabs beside each."""
LEAST_SPREAD = 1e-5
"""Variance of the projections, as a share of their mean square. It is well above what is taken for
rounding (``LEAST_DEVIATION`` squared)."""
LEAST_USED, MOST_SHARED = 0.1, 0.999
"""Entropies of the codes, as shares of the largest possible: below the first limit all slabs
together use few clusters, and above the second every slab belongs to all clusters alike."""


@dataclass(frozen=True)
class ClusterCandidate:
    """One sample for the pictures of clusters.

    Attributes:
        cosines: (K,), of each prototype and the slab of this sample that is nearest to it.
        slices: (K, Y, X), the middle slice of that slab.
        kind: "volume" or "2D image".
    """

    cosines: Tensor
    slices: Tensor
    kind: str


class Joint(Objective):
    """The objective: the losses, the banks, and the weights that transfer. See
    ``objectives.base.Objective``."""

    counts_ahead = True
    follows_steps = True

    def __init__(self, plan: Plan):
        self.plan = plan
        self.settings = joint_of(plan)
        self.token_size = plan.encoder.token_size_vox
        self.sampler = SequenceSampler(plan)

        self.trained = JointNetwork(plan)
        self.module: nn.Module = self.trained
        self.network: nn.Module = self.trained.backbone.network
        self.state = JointState(self.settings)
        self.extra: nn.Module = self.state

    def begin(self) -> None:
        """Cluster only slabs and images at first."""
        self.state.set_phase_in(0.0)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the terms. References: ``uniform`` gives every cluster the same share."""
        slabs = slabs_in(batch, self.plan)
        settings, state = self.settings, self.state
        projected_BMRD = self._projected(slabs)
        embedded_BMRD = state.standardised(projected_BMRD, slabs.kind)
        counts = self._counts(slabs)

        # Slab r of both views shows the same slices, so that each is the target of the other.
        scores_BMRK = scores_of(embedded_BMRD, self.trained.prototypes)
        total = self._swapped_loss(scores_BMRK, state.slab_balance, slabs.valid)
        terms = {"slabs": LossTerm(total, counts["slabs"], settings.slab_weight)}

        # A step on 2D images has one term: the attention over slabs then stays as it is. Validation
        # measures all terms from the start.
        volumes_BMD = pooled_BMD = None
        if slabs.are_of_volumes and (state.phase_in > 0 or references):
            pooled_BMD = self._pooled_volumes(embedded_BMRD, slabs.valid)
            volumes_BMD = state.standardised(pooled_BMD, VOLUMES)
            volume_scores_BMK = scores_of(volumes_BMD, self.trained.volume_head.prototypes)
            has_slab_B = slabs.valid.any(dim=1)
            terms["volumes"] = LossTerm(
                self._swapped_loss(volume_scores_BMK, state.volume_balance, has_slab_B),
                counts["volumes"],
                settings.volume_weight * state.phase_in,
            )
            terms["hidden"] = LossTerm(
                self._hidden_loss(embedded_BMRD, slabs),
                counts["hidden"],
                settings.hidden_weight * state.phase_in,
            )

        statistics: dict[str, Tensor] = {}
        if batch.numbers is not None:
            first_volumes_BD = None if volumes_BMD is None else volumes_BMD[:, 0]
            statistics = bank_rows(
                batch,
                self.plan.optim.batch_size,
                embedded_BMRD[:, 0],
                slabs.valid,
                first_volumes_BD,
            )
        if batch.numbers is not None or references:
            statistics["moments"] = self._moments(slabs, projected_BMRD, pooled_BMD)
        if not references:
            return LossTerms(terms, statistics=statistics)

        uniform = torch.log(torch.full_like(total, settings.num_slab_clusters)) * counts["slabs"]
        statistics |= self._health_sums(scores_BMRK, embedded_BMRD, slabs.valid)
        return LossTerms(terms, {"uniform": uniform}, statistics)

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the numbers of slabs, volumes and hidden slabs, in both views."""
        slabs = slabs_in(batch, self.plan)
        counts = self._counts(slabs)
        if not (slabs.are_of_volumes and self.state.phase_in > 0):
            return {"slabs": counts["slabs"]}
        return counts

    def _projected(self, slabs: Slabs) -> Tensor:
        """Return the projections of all slabs (B, M, R, D)."""
        B, R = slabs.valid.shape
        projected_ND = self.trained.embed(slabs.voxels, slabs.valid_tokens, slabs.positions)
        return projected_ND.reshape(B, -1, R, projected_ND.shape[1])

    def _moments(self, slabs: Slabs, projected_BMRD: Tensor, pooled_BMD: Tensor | None) -> Tensor:
        """Return sum, sum of squares and number of what was embedded, by kind, (kinds, 2 D + 1)."""
        width = projected_BMRD.shape[3]
        moments = projected_BMRD.new_zeros(NUM_KINDS, 2 * width + 1)
        valid_BMR = slabs.valid[:, None].expand(projected_BMRD.shape[:3])
        moments[slabs.kind] = moments_of(projected_BMRD.detach(), valid_BMR)
        if pooled_BMD is not None:
            valid_BM = slabs.valid.any(dim=1)[:, None].expand(pooled_BMD.shape[:2])
            moments[VOLUMES] = moments_of(pooled_BMD.detach(), valid_BM)
        return moments

    def _pooled_volumes(self, embedded_BMRD: Tensor, valid_BR: Tensor) -> Tensor:
        """Return the means of all views of volumes after attention (B, M, D)."""
        B, M = embedded_BMRD.shape[:2]
        valid_NR = valid_BR[:, None].expand(-1, M, -1).flatten(0, 1)
        embedded_ND = self.trained.volume_head.embed(embedded_BMRD.flatten(0, 1), valid_NR)
        return embedded_ND.reshape(B, M, -1)

    def _swapped_loss(self, scores_BMK: Tensor, balance_K: Tensor, counted_B: Tensor) -> Tensor:
        """Return the sum of the losses of both views, each with the other's clusters as target.

        Args:
            scores_BMK: scores of the two views; there may be more axes between M and K.
            counted_B: bool, False where there is only padding.
        """
        with full_precision(scores_BMK.device):
            first_B, second_B = swapped_losses(
                scores_BMK[:, 0],
                scores_BMK[:, 1],
                balance_K,
                self.settings.sharpness,
                self.settings.temperature,
            )
        return ((first_B + second_B) * counted_B.float()).sum()

    def _hidden_loss(self, embedded_BMRD: Tensor, slabs: Slabs) -> Tensor:
        """Return the sum of 1 - cosine over the hidden slabs of both views."""
        M = embedded_BMRD.shape[1]
        valid_NR = slabs.valid[:, None].expand(-1, M, -1).flatten(0, 1)
        hidden_NR = slabs.hidden[:, None].expand(-1, M, -1).flatten(0, 1)
        target_NRD = embedded_BMRD.flatten(0, 1)
        predicted_NRD = self.trained.volume_head.predict(target_NRD, valid_NR, hidden_NR)
        with full_precision(target_NRD.device):
            return hidden_loss(predicted_NRD.float(), target_NRD, hidden_NR)

    def _counts(self, slabs: Slabs) -> dict[str, Tensor]:
        return {
            "slabs": NUM_VIEWS * slabs.valid.float().sum(),
            "volumes": NUM_VIEWS * slabs.valid.any(dim=1).float().sum(),
            "hidden": NUM_VIEWS * slabs.hidden.float().sum(),
        }

    @torch.no_grad()
    def after_step(self, step: int, processes: Processes, statistics: Mapping[str, Tensor]) -> None:
        """Write the step's embeddings into the banks, and rebalance the clusters."""
        # Every process writes the same rows, so that the banks stay equal.
        rows = {name: processes.add(value.clone()) for name, value in statistics.items()}
        state = self.state
        state.write_rows(rows)
        for kind, moments in enumerate(rows["moments"]):
            state.measure(kind, moments)

        # Prototypes and embeddings have moved, so that another balance keeps the clusters equal.
        slabs_ND = state.slab_bank[state.slab_known]
        state.rebalance(state.slab_balance, slabs_ND, whole(self.trained.prototypes))
        volumes_ND = state.volume_bank[state.volume_known]
        volume_prototypes_KD = whole(self.trained.volume_head.prototypes)
        state.rebalance(state.volume_balance, volumes_ND, volume_prototypes_KD)

        state.set_phase_in((step + 1) / self.plan.optim.num_steps)

    def _health_sums(
        self,
        scores_BMRK: Tensor,
        embedded_BMRD: Tensor,
        valid_BR: Tensor,
    ) -> dict[str, Tensor]:
        """Return the sums over all valid slabs by which ``health`` is judged."""
        # The soft cluster of every slab, as the loss makes it.
        codes_BMRK = codes_of(scores_BMRK, self.state.slab_balance, self.settings.sharpness)
        weight_BMR = valid_BR[:, None].expand(codes_BMRK.shape[:3]).float()
        entropy_BMR = torch.special.entr(codes_BMRK).sum(dim=-1)
        return {
            "num_slabs": weight_BMR.sum(),
            "code_sums": (codes_BMRK * weight_BMR[..., None]).sum(dim=(0, 1, 2)),
            "code_entropy": (entropy_BMR * weight_BMR).sum(),
            "embedding_sums": (embedded_BMRD.float() * weight_BMR[..., None]).sum(dim=(0, 1, 2)),
        }

    def health(self, statistics: Mapping[str, Tensor]) -> dict[str, tuple[float, str]]:
        """Return entropies of the codes, spread of the embeddings, and what the bank holds."""
        # Entropies are shares of the largest possible one, so that runs compare.
        count = statistics["num_slabs"].clamp(min=1)
        most = torch.log(torch.tensor(float(self.settings.num_slab_clusters)))
        share_K = statistics["code_sums"] / count
        used = torch.special.entr(share_K).sum() / most
        each = statistics["code_entropy"] / count / most
        mean_D = statistics["embedding_sums"] / count

        # Codes are soft: a cluster counts as empty if it is the first choice of no slab there.
        state = self.state
        bank_ND = state.slab_bank[state.slab_known]
        empty = 1.0
        if len(bank_ND):
            scores_NK = scores_of(bank_ND, whole(self.trained.prototypes))
            nearest_N = (scores_NK / self.settings.sharpness + state.slab_balance).argmax(dim=1)
            num_used = int((nearest_N.bincount() > 0).sum())
            empty = 1 - num_used / self.settings.num_slab_clusters
        return {
            "cluster_entropy": (float(used), OF_LARGEST),
            "code_entropy": (float(each), OF_LARGEST),
            "projection_spread": (smallest_spread(statistics["moments"]), "share of mean square"),
            "slab_spread": (float(1 - mean_D.square().sum()), "variance of unit vectors"),
            "empty_clusters": (empty, "share of the clusters"),
            "bank_filled": (float(state.slab_known.any(dim=1).float().mean()), "share of cases"),
        }

    def collapse_signs(self, health: Mapping[str, tuple[float, str]]) -> list[str]:
        """Return a message where clusters say nothing about a slab."""
        signs = []
        used, _ = health["cluster_entropy"]
        each, _ = health["code_entropy"]
        spread, _ = health["projection_spread"]
        if not spread >= LEAST_SPREAD:
            signs.append(
                f"the projections of all slabs are alike (variance {spread:.2g} of mean square, "
                f"limit {LEAST_SPREAD:g})",
            )
        if not used >= LEAST_USED:
            signs.append(
                f"almost all slabs belong to the same clusters (entropy {used:.2g} of the largest, "
                f"limit {LEAST_USED:g})",
            )
        if not each <= MOST_SHARED:
            signs.append(
                f"every slab belongs to all clusters alike (entropy {each:.4f} of the largest, "
                f"limit {MOST_SHARED:g})",
            )
        return signs

    def groups(self, batches: Sequence[Batch]) -> list[SliceGroup]:
        """Return the slabs and images nearest to a few prototypes, from different samples.

        The prototypes are those whose nearest slabs are most alike.
        """
        found: list[ClusterCandidate] = []
        for batch in batches:
            slabs = slabs_in(batch, self.plan)
            embedded_BMRD = self.state.standardised(self._projected(slabs), slabs.kind)
            first_BRK = scores_of(embedded_BMRD, self.trained.prototypes)[:, 0]
            B, R = slabs.valid.shape
            # A slab of padding is near to nothing.
            first_BRK = first_BRK.masked_fill(~slabs.valid[:, :, None], -2.0)
            nearest_BK, slab_BK = first_BRK.max(dim=1)

            middle = self.settings.slab_vox // 2
            views = slabs.voxels.reshape(B, -1, R, *slabs.voxels.shape[2:])[:, 0, :, middle]
            kind = "volume" if slabs.are_of_volumes else "2D image"
            for sample in range(B):
                slices_KYX = views[sample, slab_BK[sample]]
                found.append(ClusterCandidate(nearest_BK[sample], slices_KYX, kind))
        return nearest_groups(found)

    def describe(self, batch: Batch) -> TokenFeatures:
        """Return features of every view by itself, as fine-tuning gets them."""
        B, M, _, Z, Y, X = batch.voxels.shape
        num_tokens = volume(grid_of(as_size((Z, Y, X)), self.token_size))
        positions_BT = torch.arange(num_tokens, device=batch.voxels.device).expand(B, -1)
        # Only the positions of an image are drawn; those of a crop are all there are.
        if batch.positions is not None and batch.positions.shape[1] == num_tokens:
            positions_BT = batch.positions
        positions_NT = positions_BT.repeat_interleave(M, dim=0)

        masks = batch.valid_mask.flatten(0, 1)[:, None, None]
        valid_NT = to_tokens(masks, self.token_size).any(dim=2)
        # A view of padding only still needs a key to attend to.
        attended_NT = valid_NT | ~valid_NT.any(dim=1, keepdim=True)
        features_NTV = self.trained.backbone(batch.voxels.flatten(0, 1), attended_NT, positions_NT)
        return TokenFeatures(
            features_NTV.reshape(B, -1, features_NTV.shape[2]),
            to_tokens(batch.voxels, self.token_size),
            positions_NT.reshape(B, -1),
            valid_NT.reshape(B, -1),
        )

    def example_batch(self, num_samples: int) -> Batch:
        """Return views of crops of the planned shapes."""
        size = self.plan.sequence.crop_size_vox
        num_tokens = volume(grid_of(slab_size(self.plan), self.token_size))
        return Batch(
            voxels=torch.zeros(num_samples, NUM_VIEWS, 1, *size),  # (B, M, C, Z, Y, X)
            valid_mask=torch.ones(num_samples, NUM_VIEWS, *size, dtype=torch.bool),
            order_index=torch.arange(num_slabs(self.plan)).expand(num_samples, -1),
            prefix=torch.ones(num_samples, dtype=torch.int64),
            positions=torch.arange(num_tokens).expand(num_samples, -1),
            case_ids=torch.arange(num_samples),
            numbers=torch.arange(num_samples),
        )

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the encoder's weights under the downstream network's keys."""
        return self.trained.backbone.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.trained.backbone.adaptation()


def hidden_loss(predicted_BRD: Tensor, target_BRD: Tensor, hidden_BR: Tensor) -> Tensor:
    """Return the sum of 1 - cosine over the hidden slabs; the target gets no gradient."""
    cosine_BR = torch.cosine_similarity(predicted_BRD, target_BRD.detach(), dim=-1)
    return ((1 - cosine_BR) * hidden_BR.float()).sum()


def nearest_groups(candidates: Sequence[ClusterCandidate]) -> list[SliceGroup]:
    """Return the slices nearest to a few prototypes; [] if there are not two samples.

    Each sample contributes only its nearest slab, so that slabs of one scan do not fill a row.
    """
    if len(candidates) < 2:
        return []
    cosines_NK = torch.stack([candidate.cosines for candidate in candidates])
    count = min(SHOWN_SLABS, len(candidates))
    best_SK, sample_SK = cosines_NK.topk(count, dim=0)
    num_clusters = min(SHOWN_CLUSTERS, cosines_NK.shape[1])
    chosen = best_SK.mean(dim=0).topk(num_clusters).indices

    groups = []
    for cluster in chosen.tolist():
        slices = []
        for place in range(count):
            candidate = candidates[int(sample_SK[place, cluster])]
            cosine = float(best_SK[place, cluster])
            slice_YX = candidate.slices[cluster].float().cpu().numpy()
            slices.append((f"{candidate.kind}, cosine {cosine:.2f}", slice_YX))
        groups.append(SliceGroup(f"Nearest to prototype {cluster + 1}", tuple(slices)))
    return groups
