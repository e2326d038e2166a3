"""Apply the fine-tuning recipe: learning rates, trained parts and parameter groups.

Everything is a pure function of the iteration, so a resumed run equals an uninterrupted one.
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
    """Compute learning rates: linear warm-up to ``peak_rate``, then polynomial decay to 0.

    All lengths are in iterations. A decoder-first stage may come before: the decoder's rate rises
    to the peak while the encoder is frozen; then the whole network warms up from 0.

    Source: the "sawtooth" schedule of arXiv 2412.17041 (nnssl); here its first stage is a share of
    the run.
    """

    peak_rate: float
    num_iterations: int
    warmup_iterations: int
    poly_exponent: float
    decoder_first_iterations: int = 0

    def is_decoder_first(self, iteration: int) -> bool:
        """Return whether only the decoder is trained in ``iteration`` (from 0)."""
        return iteration < self.decoder_first_iterations

    def rate(self, iteration: int) -> float:
        """Return the learning rate of ``iteration`` (from 0).

        The last iteration of a rise has the peak rate.
        """
        if self.is_decoder_first(iteration):
            return self.peak_rate * (iteration + 1) / self.decoder_first_iterations

        done = iteration - self.decoder_first_iterations
        if done < self.warmup_iterations:
            return self.peak_rate * (done + 1) / self.warmup_iterations

        num_decay = self.num_iterations - self.decoder_first_iterations - self.warmup_iterations
        left = 1 - (done - self.warmup_iterations) / num_decay
        return self.peak_rate * float(max(left, 0.0) ** self.poly_exponent)


def make_schedule(
    recipe: Recipe,
    peak_rate: float,
    num_epochs: int,
    iterations_per_epoch: int,
    batch_size: int,
    uses_weights: bool = True,
) -> Schedule:
    """Return the schedule of a run.

    Args:
        batch_size: patches per optimiser step, of all processes together.
        uses_weights: False for training from scratch, which needs no decoder-first stage.
    """
    total = num_epochs * iterations_per_epoch
    # A share of the run, but of enough samples, and never too much of a short run.
    wanted = max(recipe.warmup_fraction * total, recipe.warmup_min_samples / batch_size)
    warmup = min(
        wanted,
        recipe.warmup_max_epochs * iterations_per_epoch,
        recipe.warmup_max_fraction * total,
    )
    decoder_first = round(recipe.decoder_first_fraction * total) if uses_weights else 0
    return Schedule(peak_rate, total, round(warmup), recipe.poly_exponent, decoder_first)


class IterationRates:
    """Set the learning rates of an optimiser.

    It replaces nnU-Net's scheduler, which nnU-Net calls as ``step(epoch)``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        iterations_per_epoch: int,
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
        """Return whether only the decoder is trained in ``iteration`` of ``epoch``."""
        return self.schedule.is_decoder_first(self._number(epoch, iteration))

    def _number(self, epoch: int, iteration: int) -> int:
        return epoch * self.iterations_per_epoch + iteration


def encoder_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of encoder and stem, which a decoder-first stage does not train."""
    prefixes = encoder_prefixes(network)
    return [
        parameter for name, parameter in network.named_parameters() if name.startswith(prefixes)
    ]


def parameter_groups(
    network: nn.Module,
    recipe: Recipe,
    decoder_keys: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups by learning rate and weight decay.

    Rates differ between layers if ``layer_decay`` is on. The first group always has the full rate,
    because nnU-Net logs the rate of that group.

    Args:
        decoder_keys: parameters of the decoder that start from pretrained weights, and may have
            another rate.
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
        # nnU-Net's SGD decays everything.
        has_decay = recipe.optimizer == SGD or is_decayed(name, parameter)
        decay = recipe.weight_decay if has_decay else 0.0
        groups.setdefault((factor, decay), []).append(parameter)

    # Every network has heads that start at random, so there is always a group at the full rate.
    full_rate_first = sorted(groups, key=lambda group: (group[0] == 1.0, *group), reverse=True)
    described = []
    for factor, decay in full_rate_first:
        parameters = groups[factor, decay]
        described.append(
            {"params": parameters, "rate_factor": factor, "weight_decay": decay},
        )
    return described


def _layer_of(network: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter.

    It is 0 for stem and positions, i + 1 for block i, and one more for the final norm and the
    decoder. Blocks of a CNN are counted through all of its stages.
    """
    names = [name for name, _ in network.named_parameters()]
    encoder, stem = encoder_prefixes(network)

    # A block's name is the beginning that all of its parameters share.
    block_of: dict[str, str] = {}
    for name in names:
        found = _BLOCK.match(name)
        if name.startswith(encoder) and found:
            block_of[name] = found[0]

    blocks = dict.fromkeys(block_of.values())  # in the order of the network, each once
    depth_of = {block: depth for depth, block in enumerate(blocks, start=1)}

    layers = {}
    for name in names:
        if name.startswith(stem) or is_position(name):
            layers[name] = 0
        elif name in block_of:
            layers[name] = depth_of[block_of[name]]
        else:
            layers[name] = len(blocks) + 1
    return layers


def make_optimizer(
    groups: Iterable[dict[str, Any]],
    recipe: Recipe,
    peak_rate: float,
) -> torch.optim.Optimizer:
    """Return the recipe's optimiser.

    It is SGD with Nesterov momentum as in nnU-Net, or fused AdamW as in nnU-Net's Primus trainers.
    """
    if recipe.optimizer == SGD:
        return torch.optim.SGD(
            list(groups),
            lr=peak_rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
        )
    return torch.optim.AdamW(list(groups), lr=peak_rate, betas=recipe.betas, fused=True)
