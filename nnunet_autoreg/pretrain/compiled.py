"""Training as the device runs it: layers compiled on a GPU, everything as it stands elsewhere.

What is compiled is the repeated layer alone (``model.trunk.FastPath``), so that the first step
comes soon and a mask is always made outside of compiled code. Modules and the keys of their state
stay as they are.
"""

import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from nnunet_autoreg.model import attention
from nnunet_autoreg.model.trunk import FastPath, Layer, layers_run_by
from nnunet_autoreg.objectives.base import LossTerms, Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.signals import refuse_interruption
from nnunet_autoreg.sampling.sample import Batch

log = logging.getLogger(__name__)

COMPILED_DEVICES = ("cuda",)
ON_CPU = "AUTOREG_COMPILE_ON_CPU"
"""This environment variable, set to 1, compiles on a CPU what a GPU would compile.

It is meant for tests.
"""
BACKEND = "inductor"
MOST_GRAPHS = 64
"""Graphs of one kind of layer: one for every kind of sequence and size of a part of a batch.
torch's own limit is 8.
"""
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)
"""How torch says it where it raises a plain RuntimeError: on CPUs (Linux and macOS, Windows) and on
Apple's GPUs.
"""


def is_compiled(plan: Plan, device: torch.device, sharded: bool) -> bool:
    """Return whether layers are compiled: where the plan says so, on a GPU, and weights are whole.

    Sharded weights are gathered by hooks, which would cut the graph up.
    """
    is_fast = device.type in COMPILED_DEVICES or (
        device.type == "cpu" and os.environ.get(ON_CPU) == "1"
    )
    return plan.run.compile and is_fast and not sharded


def fast_path(plan: Plan, device: torch.device, sharded: bool = False) -> FastPath | None:
    """Return how layers run in training, or None where they run eagerly."""
    if not is_compiled(plan, device, sharded):
        return None
    # FlexAttention has no gradient on a CPU, so that there the dense mask is compiled.
    return FastPath(
        compiled_layer, plan.run.flex_attention and device.type in attention.FLEX_DEVICES
    )


def compiled_layer(function: Layer) -> Layer:
    """Return the function compiled: the same object every time, so that nothing is compiled twice.

    Shapes are compiled in: once for each kind of sequence, and once more where the last part of a
        batch is
    smaller. The dry step and the training share what is compiled.
    """
    return _compiled(function, BACKEND)


@cache
def _compiled(function: Layer, backend: str) -> Layer:
    config = torch._dynamo.config
    config.cache_size_limit = max(MOST_GRAPHS, config.cache_size_limit)
    # A layer's gradient is one piece already. DDP's own way to cut graphs into pieces refuses
    # FlexAttention.
    config.optimize_ddp = False
    log.info(
        "compiling the transformer's layers, once for every kind of sequence: about half a minute "
        "each"
    )
    compiled: Layer = torch.compile(function, dynamic=False, backend=backend)
    return compiled


def run_by(
    path: FastPath | None, loss: Callable[[Batch], LossTerms]
) -> Callable[[Batch], LossTerms]:
    """Return the loss with its layers run by ``path``; the loss itself where there is none."""
    if path is None:
        return loss

    def fast_loss(batch: Batch) -> LossTerms:
        with layers_run_by(path):
            return loss(batch)

    return fast_loss


def loss_function(
    plan: Plan, objective: Objective, device: torch.device, sharded: bool = False
) -> Callable[[Batch], LossTerms]:
    """Return ``objective.loss`` as training runs it on this device."""
    return run_by(fast_path(plan, device, sharded), objective.loss)


def place_on(device: torch.device, module: nn.Module, sharded: bool) -> None:
    """Move a module to its device, on a GPU with convolutions in the layout that its tensor cores
    read.

    Sharding needs the usual layout.
    """
    module.to(device)
    if device.type == "cuda" and not sharded:
        module.to(memory_format=torch.channels_last_3d)


def cannot_compile(error: BaseException) -> bool:
    """Return whether an exception says that compiling failed, for want of a compiler, say - rather
    than running, or memory.

    Raises:
        InterruptedRunError: it was an interruption that failed to get through the compiler.
    """
    refuse_interruption(error)
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) and not is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """Return what an exception says in its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that a device's or the machine's memory does
    not suffice.
    """
    causes = [error, error.__cause__, getattr(error, "inner_exception", None)]
    return any(
        isinstance(c, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(c, RuntimeError) and any(word in str(c) for word in NO_MEMORY))
        for c in causes
    )
