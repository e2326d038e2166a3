"""What a checkpoint holds beside the plan: weights, optimizer, guard, progress and the state of
every generator.

The rate is a function of the step, samples are functions of (seed, step, number), and bf16 needs no
loss scaler: none of them has a state of its own.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_autoreg.pretrain.distributed import ALONE, World, like, promised, whole
from nnunet_autoreg.pretrain.guard import StepGuard


@dataclass
class Progress:
    """Where training stands: steps done, the best held-out error so far (infinite before the
    first), and times it went back.
    """

    step: int = 0
    best_error: float = math.inf
    rollbacks: int = 0


def generator_states() -> dict[str, Any]:
    """The state of every global generator of this process - on CUDA of the device it uses - as
    tensors and plain values.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """The inverse of ``generator_states``; states of devices that are not here are left alone."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def snapshot(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    progress: Progress,
    world: World = ALONE,
) -> dict[str, Any]:
    """Everything that training goes on from, whole, whatever it was spread over.

    All processes have to call this.
    """
    return {
        "network_weights": whole(module.state_dict()),
        "optimizer": whole(optimizer.state_dict()),
        "guard": guard.state_dict(),
        "step": progress.step,
        "best_error": progress.best_error,
        "rollbacks": progress.rollbacks,
        "generators": world.gather(generator_states()),
    }


def lent(content: Mapping[str, Any]) -> dict[str, Any]:
    """A snapshot of the main process as ``World.share`` gives it to the others: weights and moments
    follow one by one as it is restored.
    """
    return {
        key: promised(value) if key in ("network_weights", "optimizer") else value
        for key, value in content.items()
    }


def restore(
    content: Mapping[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    world: World = ALONE,
) -> Progress:
    """The inverse of ``snapshot``, by all processes at once, of their own content or of what the
    main one ``lent``. A process that had no counterpart then keeps its fresh generators.

    Raises:
        KeyError, RuntimeError, ValueError: the content is of another network or optimizer.
    """
    restore_weights(content, module, optimizer, world)
    guard.load_state_dict(content["guard"])
    if world.rank < len(content["generators"]):
        set_generators(content["generators"][world.rank])
    return Progress(int(content["step"]), float(content["best_error"]), int(content["rollbacks"]))


def restore_weights(
    content: Mapping[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World = ALONE,
) -> None:
    """Weights and optimizer alone, for a roll-back; each process takes its part of what is
    spread.
    """
    present = module.state_dict()
    module.load_state_dict(
        {
            name: like(world.fetch(value), present.get(name))
            for name, value in content["network_weights"].items()
        }
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = content["optimizer"]
    state = {
        number: {
            key: like(world.fetch(value), parameters[number] if number < len(parameters) else None)
            for key, value in entries.items()
        }
        for number, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
