"""The interface between the training loop and an objective.

A new objective is a new file beside this one; the loop does not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.objective_kinds import FigureOfMerit, SliceGroup, figure_of_merit
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler

OF_LARGEST = "share of the largest possible"
"""Unit of entropies, which makes runs comparable."""


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: a sum, and the number of its summands.

    So the mean can be taken once, over the whole batch of all processes.

    Attributes:
        total: scalar, carries the gradient.
        count: scalar, number of samples, tokens or voxels in the sum.
        weight: weight of this term's mean in the loss.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """The loss on a batch: the weighted sum of the means of its terms.

    Attributes:
        terms: the terms by name.
        references: losses of trivial predictors by name, as sums like those of the term that the
            figure of merit uses (no gradient).
        statistics: other sums over the batch, by name, for ``after_step`` or ``health`` (no
            gradient). They are added up over the parts of a batch.
    """

    terms: Mapping[str, LossTerm]
    references: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Return the weighted sum of all sums: the loss, if all terms have the same count."""
        first, *others = (
            term.total if term.weight == 1 else term.weight * term.total
            for term in self.terms.values()
        )
        for other in others:
            first = first + other
        return first

    @property
    def count(self) -> Tensor:
        """Return the count of the first term."""
        return next(iter(self.terms.values())).count


def one_term(
    total: Tensor,
    count: Tensor,
    references: Mapping[str, Tensor] | None = None,
) -> LossTerms:
    """Return a loss that has a single term."""
    return LossTerms({"error": LossTerm(total, count)}, references or {})


class Processes(Protocol):
    """The processes that train together, as an objective sees them."""

    @property
    def size(self) -> int:
        """Return the number of processes."""

    def add(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; ``values`` is changed in place."""


@dataclass(frozen=True)
class Reconstruction:
    """True and predicted voxels of a batch, for pictures.

    All tensors are (B, M, Z, Y, X).

    Attributes:
        truth: first channel, in normalised intensities.
        predicted: the prediction. What the loss does not determine (mean and deviation of a token)
            is taken from the truth.
        trivial: the same for a prediction of zeros. It shows how much comes from the truth.
        given: bool, the voxels that the model sees from the start.
        loss_mask: bool, the voxels that it has to predict.
        valid_mask: bool, False in padding.
    """

    truth: Tensor
    predicted: Tensor
    trivial: Tensor
    given: Tensor
    loss_mask: Tensor
    valid_mask: Tensor


@dataclass(frozen=True)
class TokenFeatures:
    """Features of every token, which attends to all others as in fine-tuning.

    Attributes:
        features: (B, T, V).
        voxels: (B, T, P), the token's own voxels.
        positions: (B, T) int64, raster index in the plan's grid.
        valid: (B, T) bool, False where a token is all padding.
    """

    features: Tensor
    voxels: Tensor
    positions: Tensor
    valid: Tensor


class Objective:
    """A pretraining task: it draws samples, computes the loss, and returns the encoder.

    Methods that raise NotImplementedError have to be defined. The others have a default that suits
    objectives without their own state.

    Attributes:
        plan: plan of the run.
        module: everything that is trained by gradients.
        network: the part of the module that contains the encoder under the downstream keys.
        sampler: draws the samples, in any process.
        extra: state that training changes without gradients, such as a momentum teacher, centres
            or memory banks. The optimiser does not see it. Checkpoints contain it, and every
            process has a full copy.
        counts_ahead: the terms of the loss have different counts. ``term_counts`` then has to
            return these, because gradients are accumulated before the last part of a batch has
            been seen.
        follows_steps: ``after_step`` does something. Only then does the loop wait for the device
            to learn whether a step was accepted.
    """

    plan: Plan
    module: nn.Module
    network: nn.Module
    sampler: SequenceSampler
    # Empty for most objectives, which may therefore share one.
    extra: nn.Module = nn.Module()
    counts_ahead: bool = False
    follows_steps: bool = False

    @property
    def figure(self) -> FigureOfMerit:
        """Return the number by which states of a run are ranked, with its texts."""
        return figure_of_merit(self.plan)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the loss on a batch that is on the module's device.

        It changes no state: layers may be compiled, and a batch may come in parts.

        Args:
            references: also compute the losses of the trivial predictors of ``figure``.
        """
        raise NotImplementedError

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the count of each term of the loss, without computing the loss.

        It is called only if ``counts_ahead`` is set.
        """
        raise NotImplementedError

    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        """Return true and predicted voxels of a batch; None if the objective predicts no voxels."""
        return None

    def groups(self, batches: Sequence[Batch]) -> list[SliceGroup]:
        """Return groups of slices, for pictures; [] if the objective does not group anything."""
        return []

    def describe(self, batch: Batch) -> TokenFeatures:
        """Return the features of a batch, as fine-tuning would get them."""
        raise NotImplementedError

    def example_batch(self, num_samples: int) -> Batch:
        """Return a batch of the planned shapes, with arbitrary values, for the memory estimate.

        It is made on torch's default device.
        """
        size = self.plan.sequence.crop_size_vox
        num_tokens = volume(grid_of(size, self.plan.encoder.token_size_vox))
        return Batch(
            voxels=torch.empty(num_samples, 1, 1, *size),  # (B, M, C, Z, Y, X)
            valid_mask=torch.empty(num_samples, 1, *size, dtype=torch.bool),
            order_index=torch.empty(num_samples, num_tokens, dtype=torch.int64),
            prefix=torch.empty(num_samples, dtype=torch.int64),
        )

    def pool_statistics(self, pool: SamplingPool) -> dict[str, Tensor]:
        """Return buffers of the module that are measured on the pool before the first step.

        Keys are those of the module's state. A resumed run reads them from its checkpoint instead.
        """
        return {}

    def begin(self) -> None:
        """Set ``extra`` from the module's weights, before the first step of a new run.

        The weights of ``--init`` have been loaded by then.
        """

    def after_step(self, step: int, processes: Processes, statistics: Mapping[str, Tensor]) -> None:
        """Update ``extra`` after an accepted step; it is not called after skipped steps.

        Args:
            processes: all processes of the training. All of them make this call.
            statistics: statistics of the loss, added up over this process's share of the batch.
        """

    def extra_state(self) -> dict[str, Any]:
        """Return the state that a resumed training needs beside the module."""
        return dict(self.extra.state_dict())

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what ``extra_state`` returned.

        Raises:
            RuntimeError: it is the state of another network.
        """
        self.extra.load_state_dict(dict(state))

    def health(self, statistics: Mapping[str, Tensor]) -> dict[str, tuple[float, str]]:
        """Return further values that show whether training is healthy: name -> (value, unit).

        Args:
            statistics: statistics of the loss, added up over all validation samples.
        """
        return {}

    def collapse_signs(self, health: Mapping[str, tuple[float, str]]) -> list[str]:
        """Return a message for each sign of collapse in the objective's own ``health``."""
        return []

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights that fine-tuning loads, under the downstream network's keys.

        These are those of the encoder and, if the objective trains one for it, of the decoder. All
        processes call this together, because sharded weights are gathered.
        """
        raise NotImplementedError

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        raise NotImplementedError
