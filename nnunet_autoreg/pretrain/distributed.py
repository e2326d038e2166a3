"""The processes that train together: their communication, and sharded weights.

File 5 of 11 in reading order.

It uses torch.distributed. ``rank`` is the number of a process; process 0 is the main one.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.machine import usable_cores
from nnunet_autoreg.model.trunk import hooked

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(hours=2)
"""How long processes wait for the main one, which validates and writes.

A process that died is noticed at once.
"""

TRAINING_TIMEOUT = timedelta(minutes=30)

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32."""

MOST_OF_DEVICE = 0.7
"""Share of a device's memory that these may take before they are sharded; the rest is for
activations."""

LOST_PEER = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "process group",
)
"""What occurs in torch's messages where another process is gone."""


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor of the main process that is sent when all processes call ``World.fetch``.

    So no machine has to hold all tensors of a checkpoint twice at once.

    Attributes:
        tensor: None in the other processes, and after pickling.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": self.dtype, "tensor": None}


def deferred(tree: Any) -> Any:
    """Return the same tree of dicts and lists with every tensor as a ``DeferredTensor``."""
    if isinstance(tree, Mapping):
        return {key: deferred(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(deferred(item) for item in tree)
    return DeferredTensor(tuple(tree.shape), tree.dtype, tree) if isinstance(tree, Tensor) else tree


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it. With one process, methods do
    nothing.

    Attributes:
        rank: 0 is the main process, the only one that writes.
        control: process group for messages between processes. It uses gloo, so no device waits for
            it.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process; all get the same answer."""
        if self.size == 1:
            return flag
        highest = torch.tensor(int(flag))
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.control)
        return bool(highest)

    def share(self, thing: T) -> T:
        """Return the main process's value in all processes.

        It is pickled as a whole, so large tensors should be ``deferred``.
        """
        if self.size == 1:
            return thing
        box = [thing if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return thing if self.is_main else box[0]  # type: ignore[return-value]

    def fetch(self, value: Any) -> Any:
        """Return a deferred tensor, byte for byte; anything else is returned as it is.

        All processes have to make these calls in the same order.
        """
        if not isinstance(value, DeferredTensor):
            return value
        if self.size == 1:
            return value.tensor
        if value.tensor is None:
            tensor = torch.empty(value.shape, dtype=value.dtype)
        else:
            tensor = value.tensor.contiguous()
        # As bytes, because gloo does not send every type of number.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self.control)
        return tensor

    def gather(self, thing: T) -> list[T]:
        """Return the values of all processes, ordered by rank, in all processes."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def add(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; ``values`` is changed in place on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


SINGLE_PROCESS = World()
"""A run in one process, which has nobody to exchange values with."""


def join(store: Any, rank: int, size: int, device: torch.device) -> World:
    """Connect to the other processes through ``store`` and form the process groups.

    The backend is nccl between CUDA devices and gloo between CPUs.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=PrefixStore("training", store),
        rank=rank,
        world_size=size,
        timeout=TRAINING_TIMEOUT,
        device_id=device if is_cuda else None,
    )
    return World(rank, size, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def leave() -> None:
    """Undo ``join``."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(device: str, local_rank: int, world: World = SINGLE_PROCESS) -> torch.device:
    """Return the device of this process; a single process uses the current device."""
    if device == "cuda" and world.size > 1:
        return torch.device(device, local_rank)
    return torch.device(device)


def share_cores(num_local: int) -> None:
    """Limit this process to its share of the cores, unless the user chose a number."""
    if num_local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // num_local))


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an exception means that another process has ended.

    Everything else happened in this process.
    """
    if isinstance(error, AutoregError):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def process_share(num: int, rank: int, size: int, sharded: bool = False) -> range:
    """Return the numbers out of ``range(num)`` that one of ``size`` processes takes.

    Every number is taken once, and the shares differ by at most one.

    Args:
        sharded: weights are sharded, so all processes have to make equally many passes.

    Raises:
        UsageError: there are fewer numbers than processes, or sharded weights need equal shares.
    """
    if sharded and num % size:
        raise UsageError(
            f"optim.batch_size={num} cannot be shared evenly by {size} processes, which "
            "run.sharding=full needs; train on a number of processes that divides it "
            "(--num-gpus), or set run.sharding=none in plan.json",
            code="batch-not-even",
        )
    if num < size:
        raise UsageError(
            f"optim.batch_size={num} cannot be shared by {size} processes, because each needs a "
            f"crop; train on {num} or fewer (--num-gpus), or start another --name with a larger "
            "--batch",
            code="batch-too-small",
        )
    return range(rank * num // size, (rank + 1) * num // size)


def is_sharded(sharding: str, module: nn.Module, device: torch.device, world: World) -> bool:
    """Return whether parameters, gradients and moments are sharded over the processes.

    Args:
        sharding: ``run.sharding`` of the plan; "auto" shards if otherwise a device had no room for
            activations.
    """
    if world.size == 1 or sharding == "none":
        return False
    if sharding == "full":
        return True
    if device.type != "cuda":
        return False
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in module.parameters())
    return needed > MOST_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory


def parallelise(module: nn.Module, device: torch.device, world: World, sharded: bool) -> nn.Module:
    """Return the module for training together.

    A single process gets it unchanged. Otherwise it is sharded in place (FSDP2), or wrapped so that
    gradients are averaged (DDP). Parameters that a step does not use, of another kind of sequence
    or of the downstream decoder, keep no gradient. Parameters stay float32 throughout, so that both
    ways give the same losses.
    """
    if world.size == 1:
        return module
    if sharded:
        # DDP makes the weights of all processes equal by itself; FSDP does not.
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)
        mesh = init_device_mesh(device.type, (world.size,))
        for layer in layers_of(module):
            # Layer by layer, so that only one at a time is whole.
            hooked(layer)
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    with warnings.catch_warnings():
        # Newer versions rename broadcast_buffers; older ones know only this name.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module,
            broadcast_buffers=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the outermost layers that are kept in lists; each is gathered as one piece."""
    layers: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            # A layer without weights has nothing to shard.
            layers += [layer for layer in child if list(layer.parameters())]
        else:
            layers += layers_of(child)
    return layers


def gradient_sync(module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Return the context of forward and backward of one part of a batch.

    Gradients are exchanged between the processes only in the last part.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext() if is_last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    return nullcontext()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather sharded parameters for forward passes that do not begin at the sharded module.

    All processes have to make the same passes inside.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def full_tensors(tree: Any, world: World) -> Any:
    """Return the same tree of dicts and lists with full tensors on the CPU for sharded ones.

    All processes have to call this. Only the main process keeps the full tensors; in the others
    they are None. So a machine holds them only once.
    """
    if isinstance(tree, Mapping):
        return {key: full_tensors(item, world) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_tensors(item, world) for item in tree)
    if not isinstance(tree, DTensor):
        return tree
    # All processes take part in gathering it, also those that throw it away.
    full = tree.full_tensor()
    return full.cpu() if world.is_main else None


def shard_like(value: Any, pattern: Any) -> Any:
    """Return this process's part of a full tensor, if ``pattern`` is a sharded one of its shape.

    Everything else is returned as it is.
    """
    if not isinstance(pattern, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != pattern.shape:
        return value
    return distribute_tensor(
        value.to(pattern.device),
        pattern.device_mesh,
        pattern.placements,
        src_data_rank=None,
    )
