"""The fine-tuning recipe as functions: learning rate of an iteration, parameter groups of a network.

The rate is a pure function of the iteration, so a resumed run is the run it resumes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnunet_autoreg.model.parameters import is_decayed, is_position
from nnunet_autoreg.transfer.block import Recipe

_BLOCK = re.compile(r"(^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to ``peak_rate``, then polynomial decay to 0, in iterations."""

    peak_rate: float
    num_iterations: int
    warmup_iterations: int
    poly_exponent: float

    def rate(self, iteration: int) -> float:
        """The learning rate of ``iteration`` (from 0); the last warm-up iteration has the peak rate."""
        if iteration < self.warmup_iterations:
            return self.peak_rate * (iteration + 1) / self.warmup_iterations
        left = 1 - (iteration - self.warmup_iterations) / (self.num_iterations - self.warmup_iterations)
        return self.peak_rate * float(max(left, 0.0) ** self.poly_exponent)


def make_schedule(recipe: Recipe, peak_rate: float, num_epochs: int, iterations_per_epoch: int, batch_size: int) -> Schedule:
    """The schedule of a run.

    Args:
        batch_size: patches of one optimiser step, over all processes.
    """
    total = num_epochs * iterations_per_epoch
    warmup = min(
        max(recipe.warmup_fraction * total, recipe.warmup_min_samples / batch_size),
        recipe.warmup_max_epochs * iterations_per_epoch,
        recipe.warmup_max_fraction * total,
    )
    return Schedule(peak_rate, total, round(warmup), recipe.poly_exponent)


class IterationRates:
    """Sets the rates of an optimiser; stands where nnU-Net expects a scheduler (it calls ``step(epoch)``)."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, iterations_per_epoch: int):
        self.optimizer = optimizer
        self.schedule = schedule
        self.iterations_per_epoch = iterations_per_epoch

    def step(self, epoch: int, iteration: int = 0) -> None:
        """Set every group's rate for ``iteration`` of ``epoch``."""
        rate = self.schedule.rate(epoch * self.iterations_per_epoch + iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]


def parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW: decayed and undecayed parameters, and per layer too where ``layer_decay`` is on.

    The first group always has the full rate: nnU-Net logs that one.
    """
    layers = _layer_of(network)
    top = max(layers.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = recipe.layer_decay ** (top - layers[name])
        decay = recipe.weight_decay if is_decayed(name, parameter) else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "rate_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _layer_of(network: nn.Module) -> dict[str, int]:
    """Depth of each parameter: 0 for stem and positions, i + 1 for block i, one more for final norm and decoder."""
    names = [name for name, _ in network.named_parameters()]
    numbers = {name: int(found.group(2)) + 1 for name in names if (found := _BLOCK.search(name)) and _is_encoder(network, name)}
    top = max(numbers.values(), default=0) + 1
    return {name: numbers.get(name, 0 if _is_input(network, name) else top) for name in names}


def _is_encoder(network: nn.Module, name: str) -> bool:
    return name.startswith(f"{getattr(network, 'key_to_encoder', 'eva')}.")


def _is_input(network: nn.Module, name: str) -> bool:
    stem = getattr(network, "key_to_stem", "down_projection")
    return name.startswith(f"{stem}.") or is_position(name)


def make_optimizer(groups: Iterable[dict[str, Any]], recipe: Recipe, peak_rate: float) -> torch.optim.AdamW:
    """AdamW as the recipe says, in its fused form (as nnU-Net's own Primus trainers)."""
    return torch.optim.AdamW(list(groups), lr=peak_rate, betas=recipe.betas, fused=True)
