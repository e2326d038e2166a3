"""What a checkpoint holds beside the plan: weights, optimizer, guard, progress and the state of every generator.

The rate is a function of the step, samples are functions of (seed, step, number), and bf16 needs no loss scaler: none of them has a
state of its own.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_autoreg.pretrain.guard import StepGuard


@dataclass
class Progress:
    """Where training stands: steps done, the best held-out error so far (infinite before the first), and times it went back."""

    step: int = 0
    best_error: float = math.inf
    rollbacks: int = 0


def generator_states() -> dict[str, Any]:
    """The state of every global generator of this process, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """The inverse of ``generator_states``; states of devices that are not here are left alone."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for number, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, number)
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard, progress: Progress) -> dict[str, Any]:
    """Everything that training goes on from."""
    return {
        "network_weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "guard": guard.state_dict(),
        "step": progress.step,
        "best_error": progress.best_error,
        "rollbacks": progress.rollbacks,
        "generators": generator_states(),
    }


def restore(content: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard) -> Progress:
    """The inverse of ``snapshot``.

    Raises:
        KeyError, RuntimeError, ValueError: the content is of another network or optimizer.
    """
    restore_weights(content, module, optimizer)
    guard.load_state_dict(content["guard"])
    set_generators(content["generators"])
    return Progress(int(content["step"]), float(content["best_error"]), int(content["rollbacks"]))


def restore_weights(content: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer alone, for a roll-back."""
    module.load_state_dict(content["network_weights"])
    optimizer.load_state_dict(content["optimizer"])
