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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.geometry import as_size, grid_of, volume
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.sequence import to_tokens
from nnunet_autoreg.objective_kinds import SliceGroup
from nnunet_autoreg.objectives.base import (
    OF_LARGEST,
    LossTerm,
    LossTerms,
    Objective,
    Processes,
    TokenFeatures,
    whole,
)
from nnunet_autoreg.objectives.clusters import balance_of, codes_of, swapped_losses
from nnunet_autoreg.objectives.joint_networks import JointNetwork, scores_of, slabs_of
from nnunet_autoreg.objectives.joint_plan import BANK_SLABS, JointPlan, joint_of
from nnunet_autoreg.objectives.targets import full_precision
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler
from nnunet_autoreg.sampling.views import NUM_VIEWS, num_slabs, slab_size

SLABS, IMAGES, VOLUMES = range(3)
NUM_KINDS = 3
"""What is embedded. Each kind is standardised by itself: slabs and images then share clusters."""
MOMENTUM = 0.9
"""Of the running means and deviations."""
LEAST_DEVIATION, LEAST_LENGTH = 1e-3, 1.0
"""Smaller deviations, as a share of the mean, are taken as this. Shorter embeddings than the second
stay short: rounding of projections that are all alike is not blown up, and shows as a collapse."""
MOST_BALANCED = 8192
"""Embeddings of the bank by which clusters are balanced after a step, evenly spread over it."""
SHOWN_CLUSTERS, SHOWN_SLABS = 6, 5
"""Prototypes in the report, and slabs beside each."""
LEAST_SPREAD = 1e-5
"""Variance of the projections, as a share of their mean square. It is well above what is taken for
rounding (``LEAST_DEVIATION`` squared)."""
LEAST_USED, MOST_SHARED = 0.1, 0.999
"""Entropies of the codes, as shares of the largest possible: below the first limit all slabs
together use few clusters, and above the second every slab belongs to all clusters alike."""


class JointState(nn.Module):
    """What training changes without gradients.

    These are banks of embeddings, whose rows belong to cases by their number among all cases of the
    run; running means and deviations by which embeddings are standardised, one row each for
    ``SLABS``, ``IMAGES`` and ``VOLUMES``; and the balance of the clusters.
    """

    slab_bank: Tensor
    slab_known: Tensor
    volume_bank: Tensor
    volume_known: Tensor
    mean: Tensor
    deviation: Tensor
    num_measured: Tensor
    slab_balance: Tensor
    volume_balance: Tensor
    volume_share: Tensor

    def __init__(self, settings: JointPlan):
        super().__init__()
        cases, width = settings.bank_cases, settings.width
        buffers = {
            "slab_bank": torch.zeros(cases, BANK_SLABS, width),
            "slab_known": torch.zeros(cases, BANK_SLABS, dtype=torch.bool),
            "volume_bank": torch.zeros(cases, width),
            "volume_known": torch.zeros(cases, dtype=torch.bool),
            "mean": torch.zeros(NUM_KINDS, width),
            "deviation": torch.ones(NUM_KINDS, width),
            "num_measured": torch.zeros(NUM_KINDS),
            "slab_balance": torch.zeros(settings.num_slab_clusters),
            "volume_balance": torch.zeros(settings.num_volume_clusters),
            "volume_share": torch.zeros(()),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)


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
        # Share of their weights with which volumes and hidden slabs count. It is known to the host,
        # so that no device is waited for. A dry step has all terms.
        self.volume_share = 1.0

    def begin(self) -> None:
        """Cluster only slabs and images at first."""
        self._set_volume_share(volume_share(0.0, self.settings.slabs_first))

    def _set_volume_share(self, share: float) -> None:
        # Rounded as a checkpoint holds it, so that a resumed run has the same weights.
        self.volume_share = float(np.float32(share))
        self.state.volume_share.fill_(self.volume_share)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore banks, balance, and which terms the loss has."""
        super().load_extra_state(state)
        self.volume_share = float(self.state.volume_share)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the terms. References: ``uniform`` gives every cluster the same share."""
        slabs = self.slabs(batch)
        settings, state, network = self.settings, self.state, self.trained
        projected_BMRD = self._projected(slabs)
        embedded_BMRD = self._standardised(projected_BMRD, slabs.kind)
        counts = self._counts(slabs)
        valid_BR = slabs.valid.float()

        # Slab r of both views shows the same slices, so that each is the target of the other.
        scores_BMRK = scores_of(embedded_BMRD, network.prototypes)
        with full_precision(batch.voxels.device):
            first_BR, second_BR = swapped_losses(
                scores_BMRK[:, 0],
                scores_BMRK[:, 1],
                state.slab_balance,
                settings.sharpness,
                settings.temperature,
            )
        total = ((first_BR + second_BR) * valid_BR).sum()
        terms = {"slabs": LossTerm(total, counts["slabs"], settings.slab_weight)}

        # A step on 2D images has one term: the attention over slabs then stays as it is. Validation
        # measures all terms from the start.
        volumes_BMD = pooled_BMD = None
        if slabs.are_of_volumes and (self.volume_share > 0 or references):
            pooled_BMD = self._pooled_volumes(embedded_BMRD, slabs.valid)
            volumes_BMD = self._standardised(pooled_BMD, VOLUMES)
            terms["volumes"] = LossTerm(
                self._volume_loss(volumes_BMD, slabs.valid),
                counts["volumes"],
                settings.volume_weight * self.volume_share,
            )
            terms["hidden"] = LossTerm(
                self._hidden_loss(embedded_BMRD, slabs),
                counts["hidden"],
                settings.hidden_weight * self.volume_share,
            )

        statistics: dict[str, Tensor] = {}
        if batch.numbers is not None:
            statistics = self._bank_rows(batch, slabs, embedded_BMRD, volumes_BMD)
            statistics["moments"] = self._moments(slabs, projected_BMRD, pooled_BMD)
        if not references:
            return LossTerms(terms, statistics=statistics)

        uniform = torch.log(torch.full_like(total, settings.num_slab_clusters)) * counts["slabs"]
        statistics |= self._health_sums(scores_BMRK, embedded_BMRD, slabs.valid)
        statistics["moments"] = self._moments(slabs, projected_BMRD, pooled_BMD)
        return LossTerms(terms, {"uniform": uniform}, statistics)

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the numbers of slabs, volumes and hidden slabs, in both views."""
        slabs = self.slabs(batch)
        counts = self._counts(slabs)
        if not (slabs.are_of_volumes and self.volume_share > 0):
            return {"slabs": counts["slabs"]}
        return counts

    def slabs(self, batch: Batch) -> Slabs:
        """Cut the views of a batch into slabs, and choose those that are hidden."""
        settings = self.settings
        slab, step = settings.slab_vox, settings.slab_step_vox
        B, M = batch.voxels.shape[:2]
        voxels = slabs_of(batch.voxels.flatten(0, 2), slab, step)  # (B * M, R, z, Y, X)
        valid_mask = slabs_of(batch.valid_mask.flatten(0, 1), slab, step)
        R = voxels.shape[1]

        voxels = voxels.flatten(0, 1)[:, None]  # (N, 1, z, Y, X)
        tokens = to_tokens(valid_mask.flatten(0, 1)[:, None, None], self.token_size)
        valid_NT = tokens.any(dim=2)
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

    def _projected(self, slabs: Slabs) -> Tensor:
        """Return the projections of all slabs (B, M, R, D)."""
        B, R = slabs.valid.shape
        projected_ND = self.trained.embed(slabs.voxels, slabs.valid_tokens, slabs.positions)
        return projected_ND.reshape(B, -1, R, projected_ND.shape[1])

    def _standardised(self, projected_D: Tensor, kind: int) -> Tensor:
        """Return embeddings (..., D) of length 1, after the mean of their kind was taken away.

        A mean that all have in common would grow until all embeddings are alike. SwAV's head has a
        batch norm against that. Running statistics do the same, and do not depend on the batch.
        """
        mean_D, deviation_D = self.state.mean[kind], self.state.deviation[kind]
        least = LEAST_DEVIATION * mean_D.square().mean().sqrt().clamp(min=LEAST_DEVIATION)
        standardised_D = (projected_D - mean_D) / torch.maximum(deviation_D, least)
        return functional.normalize(standardised_D, dim=-1, eps=LEAST_LENGTH)

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

    def _volume_loss(self, volumes_BMD: Tensor, valid_BR: Tensor) -> Tensor:
        scores_BMK = scores_of(volumes_BMD, self.trained.volume_head.prototypes)
        with full_precision(volumes_BMD.device):
            first_B, second_B = swapped_losses(
                scores_BMK[:, 0],
                scores_BMK[:, 1],
                self.state.volume_balance,
                self.settings.sharpness,
                self.settings.temperature,
            )
        return ((first_B + second_B) * valid_BR.any(dim=1).float()).sum()

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

    def _bank_rows(
        self,
        batch: Batch,
        slabs: Slabs,
        embedded_BMRD: Tensor,
        volumes_BMD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return new entries of the banks from a part of a batch, at the numbers of their samples.

        All other rows are 0, so that the sum over all parts and processes is the whole batch.
        """
        assert batch.numbers is not None and batch.case_ids is not None, "of training samples"
        numbers_B = batch.numbers
        num_rows = self.plan.optim.batch_size
        R = slabs.valid.shape[1]
        # A few slabs are evenly spread over a volume. An image is one slab.
        chosen = [0]
        if R > 1:
            chosen = [(2 * slot + 1) * R // (2 * BANK_SLABS) for slot in range(BANK_SLABS)]

        def placed(rows_B: Tensor) -> Tensor:
            empty = rows_B.new_zeros(num_rows, *rows_B.shape[1:], dtype=torch.float32)
            return empty.index_copy(0, numbers_B, rows_B.detach().float())

        rows_BSD = embedded_BMRD.new_zeros(len(numbers_B), BANK_SLABS, embedded_BMRD.shape[3])
        known_BS = torch.zeros(rows_BSD.shape[:2], device=rows_BSD.device)
        rows_BSD[:, : len(chosen)] = embedded_BMRD[:, 0, chosen].detach()
        known_BS[:, : len(chosen)] = slabs.valid[:, chosen].float()
        rows = {
            "bank_cases": placed(batch.case_ids + 1),
            "bank_slabs": placed(rows_BSD),
            "bank_slabs_known": placed(known_BS),
        }
        if volumes_BMD is not None:
            rows["bank_volumes"] = placed(volumes_BMD[:, 0])
            rows["bank_volumes_known"] = placed(slabs.valid.any(dim=1))
        return rows

    @torch.no_grad()
    def after_step(self, step: int, processes: Processes, statistics: Mapping[str, Tensor]) -> None:
        """Write the step's embeddings into the banks, and rebalance the clusters."""
        # Every process writes the same rows, so that the banks stay equal.
        rows = {name: processes.add(value.clone()) for name, value in statistics.items()}
        state, settings = self.state, self.settings

        for number, case in enumerate(rows["bank_cases"].long().tolist()):
            # Rows that no sample was placed at.
            if case == 0:
                continue
            place = (case - 1) % settings.bank_cases
            known_S = rows["bank_slabs_known"][number] > 0
            state.slab_bank[place] = torch.where(
                known_S[:, None],
                rows["bank_slabs"][number],
                state.slab_bank[place],
            )
            state.slab_known[place] |= known_S
            if "bank_volumes" in rows and rows["bank_volumes_known"][number] > 0:
                state.volume_bank[place] = rows["bank_volumes"][number]
                state.volume_known[place] = True

        for kind, moments in enumerate(rows["moments"]):
            self._measure(kind, moments)

        # Prototypes and embeddings have moved, so that another balance keeps the clusters equal.
        network = self.trained
        for bank_ND, prototypes, balance_K in (
            (state.slab_bank[state.slab_known], network.prototypes, state.slab_balance),
            (
                state.volume_bank[state.volume_known],
                network.volume_head.prototypes,
                state.volume_balance,
            ),
        ):
            if len(bank_ND):
                scores_NK = scores_of(evenly_spread(bank_ND, MOST_BALANCED), whole(prototypes))
                balance_K.copy_(balance_of(scores_NK, settings.sharpness))

        share_done = (step + 1) / self.plan.optim.num_steps
        self._set_volume_share(volume_share(share_done, settings.slabs_first))

    def _measure(self, kind: int, moments: Tensor) -> None:
        """Move the running mean and deviation of one kind; nothing without anything of it."""
        state = self.state
        # Mean and variance from sums, which can be added over parts of a batch.
        sum_D, squares_D = moments[:-1].chunk(2)
        count = moments[-1]
        mean_D = sum_D / count.clamp(min=1)
        variance_D = (squares_D / count.clamp(min=1) - mean_D.square()).clamp(min=0)

        # A plain mean over the first steps, so that the very first is not remembered for long.
        is_there = (count > 0).float()
        share = torch.clamp(1 / (state.num_measured[kind] + 1), min=1 - MOMENTUM) * is_there
        state.mean[kind].lerp_(mean_D, share)
        state.deviation[kind].lerp_(variance_D.sqrt(), share)
        state.num_measured[kind] += is_there

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
        found: list[tuple[Tensor, Tensor, str]] = []
        for batch in batches:
            slabs = self.slabs(batch)
            embedded_BMRD = self._standardised(self._projected(slabs), slabs.kind)
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
                found.append((nearest_BK[sample], slices_KYX, kind))
        if len(found) < 2:
            return []

        # Of each sample only its nearest slab, so that slabs of one scan do not fill a row.
        nearest_NK = torch.stack([nearest_K for nearest_K, _, _ in found])
        count = min(SHOWN_SLABS, len(found))
        best_SK, sample_SK = nearest_NK.topk(count, dim=0)
        chosen = best_SK.mean(dim=0).topk(min(SHOWN_CLUSTERS, nearest_NK.shape[1])).indices
        groups = []
        for cluster in chosen.tolist():
            slices = []
            for rank in range(count):
                _, slices_KYX, kind = found[int(sample_SK[rank, cluster])]
                cosine = float(best_SK[rank, cluster])
                shown_YX = slices_KYX[cluster].float().cpu().numpy()
                slices.append((f"{kind}, cosine {cosine:.2f}", shown_YX))
            groups.append(SliceGroup(f"Nearest to prototype {cluster + 1}", tuple(slices)))
        return groups

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


def moments_of(values_D: Tensor, counted: Tensor) -> Tensor:
    """Return sum, sum of squares and number of the counted vectors, (2 D + 1,)."""
    # Two moments and a count: enough for mean and deviation of any split.
    weights = counted[..., None].float()
    axes = tuple(range(counted.ndim))
    sum_D = (values_D * weights).sum(dim=axes)
    squares_D = (values_D.square() * weights).sum(dim=axes)
    return torch.cat([sum_D, squares_D, weights.sum()[None]])


def smallest_spread(moments: Tensor) -> float:
    """Return the smallest variance of a kind, as a share of its mean square; 0 to 1.

    Args:
        moments: moments of all kinds, (kinds, 2 D + 1), as ``moments_of`` returns them.
    """
    spreads = [1.0]
    for of_kind in moments:
        sum_D, squares_D = of_kind[:-1].chunk(2)
        count, mean_square = of_kind[-1], squares_D.sum() / of_kind[-1].clamp(min=1)
        if count > 0 and mean_square > 0:
            spreads.append(float(1 - (sum_D / count).square().sum() / mean_square))
        elif count > 0:
            spreads.append(0.0)
    return min(spreads)


def volume_share(share_done: float, slabs_first: float) -> float:
    """Return the share of their weights with which volumes and hidden slabs count, 0 to 1.

    It is 0 in the first part of a run, and rises linearly over a second part of the same length. A
    loss that rose at once would pass for a spike, and its steps would be skipped.

    Args:
        share_done: finished share of the run's steps.
    """
    if slabs_first == 0:
        return 1.0
    return min(1.0, max(0.0, share_done / slabs_first - 1))


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


def hidden_loss(predicted_BRD: Tensor, target_BRD: Tensor, hidden_BR: Tensor) -> Tensor:
    """Return the sum of 1 - cosine over the hidden slabs; the target gets no gradient."""
    cosine_BR = torch.cosine_similarity(predicted_BRD, target_BRD.detach(), dim=-1)
    return ((1 - cosine_BR) * hidden_BR.float()).sum()


def evenly_spread(rows_ND: Tensor, most: int) -> Tensor:
    """Return at most this many rows, evenly spread."""
    if len(rows_ND) <= most:
        return rows_ND
    index = torch.arange(most, device=rows_ND.device) * len(rows_ND) // most
    return rows_ND[index]
