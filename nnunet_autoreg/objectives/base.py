"""What the training loop asks of an objective.

A new objective is a new file beside this one; the loop does not change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler


@dataclass(frozen=True)
class LossTerms:
    """A loss as a sum and the number of things it sums over, so that the mean is taken once, over
    the whole batch.

    Attributes:
        total: scalar, carries the gradient.
        count: scalar, number of supervised voxels.
        references: trivial baselines, name -> sum over the same voxels (no gradient).
        parts: what ``total`` is made of where it has several terms, name -> sum (no gradient).
    """

    total: Tensor
    count: Tensor
    references: Mapping[str, Tensor]
    parts: Mapping[str, Tensor] = field(default_factory=dict)


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
        valid_mask: bool, False where there is padding.
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


class Objective(Protocol):
    """A pretraining task: how samples are drawn, what is computed on them, what transfers.

    Attributes:
        module: everything that is trained.
        network: the part of it that carries the encoder under the downstream keys.
        sampler: draws its samples, in any process.
    """

    module: nn.Module
    network: nn.Module
    sampler: SequenceSampler

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """The loss on a batch that is on the module's device."""

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """True against predicted voxels of a batch that is on the module's device."""

    def describe(self, batch: Batch) -> TokenFeatures:
        """Features of a batch that is on the module's device."""

    def pool_statistics(self, pool: SamplingPool) -> dict[str, Tensor]:
        """Return buffers of the module that are measured on the pool before the first step.

        Keys are those of the module's state. Checkpoints hold them, so a resumed run does not ask.
        """

    def after_step(self, step: int) -> None:
        """What follows an optimiser step, e.g. a momentum teacher."""

    def transferable_state(self) -> dict[str, Tensor]:
        """Encoder weights under the downstream network's keys."""

    def adaptation(self) -> Adaptation:
        """Where fine-tuning finds the parts that it may have to adapt."""
