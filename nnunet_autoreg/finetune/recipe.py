"""The fine-tuning recipe as functions: learning rate of an iteration, which part learns in it,
parameter groups of a network.

All of it is a pure function of the iteration, so a resumed run is the run it resumes.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnunet_autoreg.finetune.block import SGD, Recipe
from nnunet_autoreg.finetune.network import encoder_prefixes
from nnunet_autoreg.model.parameters import is_decayed, is_position

_BLOCK = re.compile(r"^.*?(stages\.\d+\.)?(blocks|layers)\.\d+\.")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to ``peak_rate``, then polynomial decay to 0, in iterations.

    A decoder-first stage comes before: the decoder's rate rises to the peak while the encoder stays
        as it is; then all of the
    network warms up from 0.

    Source: the "sawtooth" schedule of arXiv 2412.17041 (nnssl), its first stage here a share of the
        run.
    """

    peak_rate: float
    num_iterations: int
    warmup_iterations: int
    poly_exponent: float
    decoder_first_iterations: int = 0

    def is_decoder_first(self, iteration: int) -> bool:
        """Whether only the decoder learns in ``iteration`` (from 0)."""
        return iteration < self.decoder_first_iterations

    def rate(self, iteration: int) -> float:
        """The learning rate of ``iteration`` (from 0); the last iteration of a rise has the peak
        rate.
        """
        if self.is_decoder_first(iteration):
            return self.peak_rate * (iteration + 1) / self.decoder_first_iterations
        done = iteration - self.decoder_first_iterations
        if done < self.warmup_iterations:
            return self.peak_rate * (done + 1) / self.warmup_iterations
        left = 1 - (done - self.warmup_iterations) / (
            self.num_iterations - self.decoder_first_iterations - self.warmup_iterations
        )
        return self.peak_rate * float(max(left, 0.0) ** self.poly_exponent)


def make_schedule(
    recipe: Recipe,
    peak_rate: float,
    num_epochs: int,
    iterations_per_epoch: int,
    batch_size: int,
    uses_weights: bool = True,
) -> Schedule:
    """The schedule of a run.

    Args:
        batch_size: patches of one optimiser step, over all processes.
        uses_weights: False for the scratch twin, whose encoder has nothing to keep: no
            decoder-first stage.
    """
    total = num_epochs * iterations_per_epoch
    warmup = min(
        max(recipe.warmup_fraction * total, recipe.warmup_min_samples / batch_size),
        recipe.warmup_max_epochs * iterations_per_epoch,
        recipe.warmup_max_fraction * total,
    )
    decoder_first = round(recipe.decoder_first_fraction * total) if uses_weights else 0
    return Schedule(peak_rate, total, round(warmup), recipe.poly_exponent, decoder_first)


class IterationRates:
    """Sets the rates of an optimiser; stands where nnU-Net expects a scheduler (it calls
    ``step(epoch)``).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule, iterations_per_epoch: int
    ):
        self.optimizer = optimizer
        self.schedule = schedule
        self.iterations_per_epoch = iterations_per_epoch

    def step(self, epoch: int, iteration: int = 0) -> None:
        """Set every group's rate for ``iteration`` of ``epoch``."""
        rate = self.schedule.rate(self._number(epoch, iteration))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]

    def is_decoder_first(self, epoch: int, iteration: int) -> bool:
        """Whether only the decoder learns in ``iteration`` of ``epoch``."""
        return self.schedule.is_decoder_first(self._number(epoch, iteration))

    def _number(self, epoch: int, iteration: int) -> int:
        return epoch * self.iterations_per_epoch + iteration


def encoder_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What a decoder-first stage leaves alone: encoder and stem."""
    prefixes = encoder_prefixes(network)
    return [
        parameter for name, parameter in network.named_parameters() if name.startswith(prefixes)
    ]


def parameter_groups(
    network: nn.Module, recipe: Recipe, decoder_keys: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups for the optimiser: decayed and undecayed parameters, and per layer too where
    ``layer_decay`` is on.

    The first group always has the full rate: nnU-Net logs that one.

    Args:
        decoder_keys: parameters of the decoder that start from pretrained weights; they have a rate
            of their own.
    """
    layers = _layer_of(network)
    top = max(layers.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = recipe.layer_decay ** (top - layers[name])
        if name in decoder_keys:
            factor *= recipe.decoder_rate_factor
        decay = (
            recipe.weight_decay if recipe.optimizer == SGD or is_decayed(name, parameter) else 0.0
        )
        groups.setdefault((factor, decay), []).append(parameter)

    # Every network has heads that start at random, so there is always a group at the full rate.
    full_rate_first = sorted(groups, key=lambda group: (group[0] == 1.0, *group), reverse=True)
    return [
        {"params": groups[factor, decay], "rate_factor": factor, "weight_decay": decay}
        for factor, decay in full_rate_first
    ]


def _layer_of(network: nn.Module) -> dict[str, int]:
    """Depth of each parameter:

    0 for stem and positions, i + 1 for block i, one more for final norm and decoder.

    Blocks of a CNN are counted through all of its stages.
    """
    names = [name for name, _ in network.named_parameters()]
    encoder, stem = encoder_prefixes(network)
    blocks = {
        name: found[0]
        for name in names
        if name.startswith(encoder) and (found := _BLOCK.match(name))
    }
    order = {block: number for number, block in enumerate(dict.fromkeys(blocks.values()), start=1)}
    top = len(order) + 1
    return {
        name: 0
        if name.startswith(stem) or is_position(name)
        else order[blocks[name]]
        if name in blocks
        else top
        for name in names
    }


def make_optimizer(
    groups: Iterable[dict[str, Any]], recipe: Recipe, peak_rate: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum as nnU-Net has it, or AdamW in its fused form as nnU-Net's own
    Primus trainers have it.
    """
    if recipe.optimizer == SGD:
        return torch.optim.SGD(
            list(groups), lr=peak_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0
        )
    return torch.optim.AdamW(list(groups), lr=peak_rate, betas=recipe.betas, fused=True)
