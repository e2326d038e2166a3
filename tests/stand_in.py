"""A stand-in for an objective: one weight, fitted to 3, so that the training loop can be tried in
milliseconds.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.objectives.base import Objective, TokenFeatures, one_term
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.sampling.sample import Sample

TINY = encoder_size("primus_tiny")
PLAN = Plan(
    "t",
    DataPlan((1.0, 1.0, 1.0)),
    EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
    SequencePlan((16, 16, 16)),
    PredictionPlan(),
    OptimPlan(6, 1, 1e-2, 1),
    RunPlan(0, 2, 2, log_every=2),
)


@dataclass(frozen=True)
class Numbered:
    """The sample of training step n is full of n."""

    def kind(self, material, purpose, number):
        return "spatial"

    def draw(self, cases, purpose, *ids):
        voxels = np.full((1, 1, 16, 16, 16), ids[0], np.float32)
        return Sample(voxels, np.ones((1, 16, 16, 16), bool), np.arange(8), 1)


class Linear(Objective):
    """Fits one weight to 3; ``disturb(step, total)`` may spoil a step's loss."""

    figure = FigureOfMerit("distance", "squared error", "", {"mean": "predicting the mean"})

    def __init__(self, disturb=lambda step, total: total):
        torch.manual_seed(0)
        self.module = self.network = nn.Linear(1, 1)
        self.sampler, self.disturb = Numbered(), disturb

    def loss(self, batch, references=False):
        # Eight tokens, whose squared errors are added up.
        total = (self.module.weight.sum() - 3).square() * 8
        count = torch.tensor(8.0)
        if references:
            return one_term(total, count, {"mean": torch.tensor(8.0)})
        # The sample says which step it is.
        step = int(batch.voxels[0, 0, 0, 0, 0, 0])
        return one_term(self.disturb(step, total), count)

    def describe(self, batch):
        # Every token has its own direction, scaled by the brightness of the image.
        brightness = batch.voxels.mean((1, 2, 3, 4, 5))
        tokens = torch.eye(8).expand(len(batch.prefix), 8, 8) * brightness[:, None, None]
        valid = torch.ones_like(batch.order_index, dtype=torch.bool)
        return TokenFeatures(tokens, tokens, batch.order_index, valid)


class Collapsing(Linear):
    """Its features are the same for every token of every image, as soon as ``step`` was trained."""

    follows_steps = True

    def __init__(self, step: int):
        super().__init__()
        self.step, self.has_collapsed = step, False

    def after_step(self, step, *_):
        self.has_collapsed = step >= self.step

    def describe(self, batch):
        tokens = super().describe(batch)
        same = torch.ones_like(tokens.features)
        return replace(tokens, features=same) if self.has_collapsed else tokens


def trainer(folder, objective, plan=PLAN):
    return Trainer(plan, folder, objective, [None], [None], torch.device("cpu"), 0)
