"""The processes that train together: what they agree on, and how the weights are spread over them.

The engine is torch.distributed.
"""

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
from nnunet_autoreg.model.trunk import hooked

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(hours=2)
"""How long processes wait for the main one, which alone looks at held-out scans and writes.

One that died is noticed at once.
"""
TRAINING_TIMEOUT = timedelta(minutes=30)
BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32."""
MOST_OF_DEVICE = 0.7
"""What of a device's memory these may take before they are spread; the rest is for activations."""
LOST_PEER = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "process group",
)
"""What occurs in torch's messages where another process is gone."""


@dataclass(frozen=True)
class Promised:
    """A tensor that the main process holds and that is sent when all ask for it (``World.fetch``):
    no host has to hold all at once.

    Attributes:
        held: None on the other processes, and wherever this is pickled.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    held: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": self.dtype, "held": None}


def promised(tree: Any) -> Any:
    """The same tree of dicts and lists with every tensor promised."""
    if isinstance(tree, Mapping):
        return {key: promised(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(promised(item) for item in tree)
    return Promised(tuple(tree.shape), tree.dtype, tree) if isinstance(tree, Tensor) else tree


@dataclass(frozen=True)
class World:
    """This process among those that train together. Alone, every method does nothing.

    Attributes:
        rank: 0 is the main process, which alone writes.
        control: the group for what hosts say to each other, on gloo, so that no device waits for
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
        """Whether any process says so; all get the same answer."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.control)
        return bool(said)

    def share(self, thing: T) -> T:
        """What the main process holds, for all: pickled whole, so that large tensors are better
        ``promised``.
        """
        if self.size == 1:
            return thing
        box = [thing if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return thing if self.is_main else box[0]  # type: ignore[return-value]

    def fetch(self, value: Any) -> Any:
        """A promised tensor, byte for byte; anything else is given back.

        All processes have to ask in the same order.
        """
        if not isinstance(value, Promised):
            return value
        if self.size == 1:
            return value.held
        tensor = (
            torch.empty(value.shape, dtype=value.dtype)
            if value.held is None
            else value.held.contiguous()
        )
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self.control)
        return tensor

    def gather(self, thing: T) -> list[T]:
        """One thing of every process, in the order of their ranks, for all."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place, on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


ALONE = World()


def join(store: Any, rank: int, size: int, device: torch.device) -> World:
    """Meet the other processes at ``store`` and form the groups: nccl between CUDA devices, gloo
    between CPUs.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("training", store),
        rank=rank,
        world_size=size,
        timeout=TRAINING_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return World(rank, size, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def leave() -> None:
    """Undo ``join``."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that another process is gone, rather than what happened here."""
    if isinstance(error, AutoregError):
        return False
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER)
    return isinstance(error, dist.DistError) or told


def share_of(num: int, rank: int, size: int, sharded: bool = False) -> range:
    """The numbers out of ``range(num)`` that one of ``size`` processes takes: none twice, none
    left, as even as they come.

    Args:
        sharded: weights are spread, so that all processes have to take equally many passes.

    Raises:
        UsageError: there are fewer than processes, or they cannot be shared evenly where they have
            to be.
    """
    if sharded and num % size:
        raise UsageError(
            f"optim.batch_size={num} cannot be shared evenly by {size} processes, which "
            "run.sharding=full needs; train on a "
            "number of processes that divides it (--num-gpus), or set run.sharding=none in "
            "plan.json"
        )
    if num < size:
        raise UsageError(
            f"optim.batch_size={num} cannot be shared by {size} processes, of which each needs a "
            f"crop; train on {num} or "
            "fewer (--num-gpus), or start another --name with a larger --batch"
        )
    return range(rank * num // size, (rank + 1) * num // size)


def is_spread(sharding: str, module: nn.Module, device: torch.device, world: World) -> bool:
    """Whether parameters, gradients and moments are to be spread over the processes instead of
    being held by each.

    Args:
        sharding: ``run.sharding`` of the plan; "auto" spreads what would not leave a device room
            for activations.
    """
    if world.size == 1 or sharding == "none":
        return False
    if sharding == "full":
        return True
    need = BYTES_PER_PARAMETER * sum(p.numel() for p in module.parameters())
    return (
        device.type == "cuda"
        and need > MOST_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory
    )


def spread(module: nn.Module, device: torch.device, world: World, sharded: bool) -> nn.Module:
    """The module for training together: as it is (alone), sharded in place (FSDP2), or wrapped so
    that gradients are summed (DDP).

    Parameters that a step does not use - of another kind of sequence, of the downstream decoder -
    keep no gradient, as alone. Parameters stay float32 throughout, so that both ways give the same
    losses.
    """
    if world.size == 1:
        return module
    if sharded:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)
        mesh = init_device_mesh(device.type, (world.size,))
        for layer in layers_of(module):
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
    """The outermost layers that are kept in lists: what is gathered one at a time."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            found += layers_of(child)
    return found


def summing(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of one part of a batch: gradients are summed over the processes
    in the ``last`` part alone.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


@contextmanager
def usable(module: nn.Module) -> Iterator[None]:
    """Around forward passes that do not begin at the module that was spread: its outer parameters
    are gathered, and spread again after.

    All processes have to take the same passes inside.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def whole(value: Any) -> Any:
    """The same tree of dicts and lists with whole tensors on the CPU instead of spread ones.

    All processes have to call this.
    """
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value: Any, pattern: Any) -> Any:
    """This process's part of a whole tensor, if ``pattern`` is a spread one of its shape; else the
    value itself.
    """
    if not (
        isinstance(pattern, DTensor) and isinstance(value, Tensor) and value.shape == pattern.shape
    ):
        return value
    return distribute_tensor(
        value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None
    )
