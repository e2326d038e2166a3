"""The loss as the device runs it: compiled on a GPU, as it stands elsewhere. Modules and the keys of their state stay as they are."""

import logging
from collections.abc import Callable

import torch

from nnunet_autoreg.objectives.base import LossTerms, Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.signals import refuse_interruption
from nnunet_autoreg.sequences.sample import Batch

log = logging.getLogger(__name__)

COMPILED_DEVICES = ("cuda",)
BACKEND = "inductor"
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory")
"""How torch says it where it raises a plain RuntimeError: on CPUs (Linux and macOS, Windows) and on Apple's GPUs."""


def is_compiled(plan: Plan, device: torch.device, sharded: bool) -> bool:
    """Whether the loss is compiled: where the plan says so, on a GPU, and weights are whole (FSDP's hooks would cut the graph up)."""
    return plan.run.compile and device.type in COMPILED_DEVICES and not sharded


def loss_function(plan: Plan, objective: Objective, device: torch.device, sharded: bool = False) -> Callable[[Batch], LossTerms]:
    """``objective.loss`` for training. Compiled, it is one graph from voxels to the sum, FlexAttention's kernels included.

    Shapes are compiled in: once for each kind of sequence, and once more where the last part of a batch is smaller.
    """
    if not is_compiled(plan, device, sharded):
        return objective.loss
    compiled: Callable[[Batch], LossTerms] = torch.compile(objective.loss, dynamic=False, backend=BACKEND)
    return compiled


def cannot_compile(error: BaseException) -> bool:
    """Return whether an exception says that compiling failed, for want of a compiler, say - rather than running, or memory.

    Raises:
        InterruptedRunError: it was an interruption that failed to get through the compiler.
    """
    refuse_interruption(error)
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that a device's or the machine's memory does not suffice."""
    causes = [error, error.__cause__, getattr(error, "inner_exception", None)]
    return any(isinstance(c, (torch.OutOfMemoryError, MemoryError)) or
               (isinstance(c, RuntimeError) and any(word in str(c) for word in NO_MEMORY)) for c in causes)
