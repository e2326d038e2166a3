"""What the training loop asks of an objective.

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
"""Unit of entropies, so that runs compare."""


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss, as a sum and the number of things it sums over.

    The mean is then taken once, over the whole batch of all processes.

    Attributes:
        total: scalar, carries the gradient.
        count: scalar, number of samples, tokens or voxels in the sum.
        weight: how much the mean of this term counts in the loss.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """The loss on a batch: the weighted sum of the means of its terms.

    Attributes:
        terms: the terms by name.
        references: losses of trivial predictors, name -> sum over the things of the figure of
            merit's term (no gradient).
        statistics: other sums over the batch that ``after_step`` or ``health`` need, name ->
            tensor (no gradient). They are added up over the parts of a batch.
    """

    terms: Mapping[str, LossTerm]
    references: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Return the weighted sum of all sums. It is the loss if all terms count the same."""
        first, *others = (
            term.total if term.weight == 1 else term.weight * term.total
            for term in self.terms.values()
        )
        for other in others:
            first = first + other
        return first

    @property
    def count(self) -> Tensor:
        """Return the number of things in the first term."""
        return next(iter(self.terms.values())).count


def one_term(
    total: Tensor, count: Tensor, references: Mapping[str, Tensor] | None = None
) -> LossTerms:
    """Return a loss that has a single term."""
    return LossTerms({"error": LossTerm(total, count)}, references or {})


class Processes(Protocol):
    """The processes that train together, as far as an objective needs them."""

    @property
    def size(self) -> int:
        """How many there are."""

    def add(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; ``values`` is changed in place."""


@dataclass(frozen=True)
class Reconstruction:
    """What an objective makes of a batch, back in the place of the voxels, for people to look at.

    All (B, M, Z, Y, X).

    Attributes:
        truth: first channel, in normalised intensities.
        predicted: the prediction, with what the loss leaves free (a token's mean and deviation)
            taken from the truth.
        trivial: the same with a prediction of nothing, so that one sees what was taken from the
            truth.
        given: bool, what the model was shown from the start.
        loss_mask: bool, what it was asked for.
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
    """What the encoder says of every token, attending to all of them as in fine-tuning.

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
    """A pretraining task: how samples are drawn, what is computed on them, what transfers.

    Methods that raise NotImplementedError have to be defined. The others have a default that suits
    objectives without their own state.

    Attributes:
        plan: plan of the run.
        module: everything that is trained by gradients.
        network: the part of it that carries the encoder under the downstream keys.
        sampler: draws its samples, in any process.
        extra: what training changes without gradients, such as a momentum teacher, centres or
            memory banks. It belongs to no group of the optimiser. Checkpoints hold it, and every
            process has all of it.
        counts_ahead: the terms of the loss are means over different things. ``term_counts`` then
            has to say how many, because gradients are accumulated before the last part of a batch
            has been seen.
        follows_steps: ``after_step`` does something. Only then does the loop wait for the device
            to know whether a step was accepted.
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
        """The number by which states of a run are ranked, and the texts about it."""
        return figure_of_merit(self.plan)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the loss on a batch that is on the module's device.

        It changes no state: layers may be compiled, and a batch may come in parts.

        Args:
            references: also compute the losses of the trivial predictors of ``figure``.
        """
        raise NotImplementedError

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many things each term of the loss sums over, without computing the loss.

        It is asked only if ``counts_ahead`` is set.
        """
        raise NotImplementedError

    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        """Return true and predicted voxels of a batch; None if the objective predicts no voxels."""
        return None

    def groups(self, batches: Sequence[Batch]) -> list[SliceGroup]:
        """Return what of some batches the objective puts together; [] if it groups nothing."""
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

        Keys are those of the module's state. Checkpoints hold them, so a resumed run does not ask.
        """
        return {}

    def begin(self) -> None:
        """Set ``extra`` from the module's weights, before the first step of a new run.

        The weights named by ``--init`` are in the module by then.
        """

    def after_step(self, step: int, processes: Processes, statistics: Mapping[str, Tensor]) -> None:
        """Update ``extra`` after an accepted step. Skipped steps do not come here.

        Args:
            processes: all of them make this call.
            statistics: statistics of the loss, added up over this process's share of the batch.
        """

    def extra_state(self) -> dict[str, Any]:
        """Return the state beside the module that training continues from."""
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
        """Return the encoder's weights under the downstream network's keys."""
        raise NotImplementedError

    def adaptation(self) -> Adaptation:
        """Return where fine-tuning finds the parts that it may have to adapt."""
        raise NotImplementedError
