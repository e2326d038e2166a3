"""What joint 2D/3D clustering changes without gradients: banks, running statistics, balances.

Shape suffixes: B samples of a part of a batch, R slabs of a volume, N embeddings, D their features,
K clusters, S slabs of a case in the bank, I samples of a step.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.objectives.clusters import balance_of
from nnunet_autoreg.objectives.joint_networks import scores_of
from nnunet_autoreg.objectives.joint_plan import BANK_SLABS, JointPlan
from nnunet_autoreg.objectives.joint_slabs import NUM_KINDS
from nnunet_autoreg.sampling.sample import Batch

MOMENTUM = 0.9
"""Of the running means and deviations."""
LEAST_DEVIATION = 1e-3
"""Least deviation by which embeddings are divided, as a share of their typical mean. The typical
mean is taken as at least this."""
LEAST_LENGTH = 1.0
"""Embeddings that are shorter are not made longer. If all projections are alike, what is left of
them is rounding: it then stays small, and shows as a collapse."""
MOST_BALANCED = 8192
"""Embeddings of the bank by which clusters are balanced after a step, evenly spread over it."""


class JointState(nn.Module):
    """What training changes without gradients.

    These are banks of embeddings, whose rows belong to cases by their number among all cases of the
    run (with more cases than rows, several cases share a row); running means and deviations by
    which embeddings are standardised, one row each for ``SLABS``, ``IMAGES`` and ``VOLUMES``; and
    the balance of the clusters.

    Attributes:
        phase_in: share of their weights with which volumes and hidden slabs count, 0 to 1. It
            is kept as a number as well, so that the host does not wait for the device. Before
            training it is 1: a dry step has all terms.
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
        self.settings = settings
        self.phase_in = 1.0
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

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Restore banks, balances, and which terms the loss has."""
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.phase_in = float(self.volume_share)
        return result

    def set_phase_in(self, share_done: float) -> None:
        """Set the weight of volumes and hidden slabs after this share of the run."""
        # Rounded as a checkpoint holds it, so that a resumed run has the same weights.
        self.phase_in = float(np.float32(volume_share(share_done, self.settings.slabs_first)))
        self.volume_share.fill_(self.phase_in)

    def standardised(self, projected_D: Tensor, kind: int) -> Tensor:
        """Return embeddings (..., D) of length at most 1, without the mean of their kind.

        A mean that all have in common would grow until all embeddings are alike. SwAV's head has a
        batch norm against that. Running statistics do the same, and do not depend on the batch.
        """
        mean_D, deviation_D = self.mean[kind], self.deviation[kind]
        typical = mean_D.square().mean().sqrt()
        least = LEAST_DEVIATION * typical.clamp(min=LEAST_DEVIATION)
        standardised_D = (projected_D - mean_D) / torch.maximum(deviation_D, least)
        return functional.normalize(standardised_D, dim=-1, eps=LEAST_LENGTH)

    def measure(self, kind: int, moments: Tensor) -> None:
        """Move the running mean and deviation of one kind, if there was anything of it.

        Args:
            moments: what ``moments_of`` returned, added up over the step.
        """
        # Mean and variance from sums, which can be added over parts of a batch.
        sum_D, squares_D = moments[:-1].chunk(2)
        count = moments[-1]
        mean_D = sum_D / count.clamp(min=1)
        variance_D = (squares_D / count.clamp(min=1) - mean_D.square()).clamp(min=0)

        # A plain mean over the first steps, so that the very first is not remembered for long.
        is_there = (count > 0).float()
        share = torch.clamp(1 / (self.num_measured[kind] + 1), min=1 - MOMENTUM) * is_there
        self.mean[kind].lerp_(mean_D, share)
        self.deviation[kind].lerp_(variance_D.sqrt(), share)
        self.num_measured[kind] += is_there

    def write_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Write the embeddings of a step into the banks.

        Args:
            rows: ``bank_cases`` (I,), the number of each sample's case + 1, or 0 for no sample;
                ``bank_slabs`` (I, S, D) and ``bank_slabs_known`` (I, S). If volumes were embedded,
                also ``bank_volumes`` (I, D) and ``bank_volumes_known`` (I,).
        """
        for sample, case in enumerate(rows["bank_cases"].long().tolist()):
            if case == 0:
                continue
            row = (case - 1) % self.settings.bank_cases
            known_S = rows["bank_slabs_known"][sample] > 0
            self.slab_bank[row] = torch.where(
                known_S[:, None],
                rows["bank_slabs"][sample],
                self.slab_bank[row],
            )
            self.slab_known[row] |= known_S
            if "bank_volumes" in rows and rows["bank_volumes_known"][sample] > 0:
                self.volume_bank[row] = rows["bank_volumes"][sample]
                self.volume_known[row] = True

    def rebalance(self, balance_K: Tensor, bank_ND: Tensor, prototypes_KD: Tensor) -> None:
        """Set a balance so that all clusters are equally large in the bank, if it has entries."""
        if len(bank_ND):
            scores_NK = scores_of(evenly_spread(bank_ND, MOST_BALANCED), prototypes_KD)
            balance_K.copy_(balance_of(scores_NK, self.settings.sharpness))


def bank_rows(
    batch: Batch,
    num_rows: int,
    slabs_BRD: Tensor,
    valid_BR: Tensor,
    volumes_BD: Tensor | None,
) -> dict[str, Tensor]:
    """Return new entries of the banks from a part of a batch, as ``write_rows`` takes them.

    They are at the numbers of their samples. All other rows are 0, so that the sum over all parts
    and processes is the whole batch.

    Args:
        num_rows: samples of the whole batch.
        slabs_BRD: embeddings of the slabs.
        valid_BR: bool, False where a slab is padding.
        volumes_BD: embeddings of the volumes; None if there are none in this step.
    """
    assert batch.numbers is not None and batch.case_ids is not None, "of training samples"
    numbers_B = batch.numbers
    B, R, width = slabs_BRD.shape

    # A few slabs are evenly spread over a volume. An image is one slab.
    chosen = [0]
    if R > 1:
        chosen = [(2 * slot + 1) * R // (2 * BANK_SLABS) for slot in range(BANK_SLABS)]
    rows_BSD = slabs_BRD.new_zeros(B, BANK_SLABS, width)
    known_BS = torch.zeros(B, BANK_SLABS, device=rows_BSD.device)
    rows_BSD[:, : len(chosen)] = slabs_BRD[:, chosen].detach()
    known_BS[:, : len(chosen)] = valid_BR[:, chosen].float()

    def at_numbers(rows_B: Tensor) -> Tensor:
        empty = rows_B.new_zeros(num_rows, *rows_B.shape[1:], dtype=torch.float32)
        return empty.index_copy(0, numbers_B, rows_B.detach().float())

    rows = {
        "bank_cases": at_numbers(batch.case_ids + 1),
        "bank_slabs": at_numbers(rows_BSD),
        "bank_slabs_known": at_numbers(known_BS),
    }
    if volumes_BD is not None:
        rows["bank_volumes"] = at_numbers(volumes_BD)
        rows["bank_volumes_known"] = at_numbers(valid_BR.any(dim=1))
    return rows


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


def evenly_spread(rows_ND: Tensor, most: int) -> Tensor:
    """Return at most this many rows, evenly spread."""
    if len(rows_ND) <= most:
        return rows_ND
    index = torch.arange(most, device=rows_ND.device) * len(rows_ND) // most
    return rows_ND[index]
