"""Masked autoencoding of the simplest kind: the hidden blocks, all at once, from the visible ones. The yardstick of autoregression.

It is autoregression with two ranks. The given blocks of a random order are the visible ones; all others are hidden, and a light
decoder that is told where they lie predicts each from the visible blocks alone. Targets, padding, pictures and what transfers are those of
``objectives.autoregressive``.

Source: the idea of masked autoencoders (arXiv 2111.06377) with a decoder of cross-attention only, as CrossMAE (arXiv 2401.14391).
"""

from dataclasses import replace

import torch

from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.sequences.sample import Batch


class Masked(Autoregressive):
    """The objective; ``plan.check`` has seen to a fixed prefix, random order and the query predictor.

    Hidden tokens run through the encoder too, so that a step costs what an autoregressive one costs, but nothing reads what comes of them:
    visible tokens attend to rank 0 only, and queries to ranks below their own.
    """

    def as_predicted(self, batch: Batch) -> Batch:
        """Rank 0 for what is visible, rank 1 for what is hidden, and one given rank."""
        hidden_BT = (batch.ranks >= batch.prefix[:, None]).long()
        return replace(batch, ranks=hidden_BT, prefix=torch.ones_like(batch.prefix))
