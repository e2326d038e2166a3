"""How much memory a training step needs, computed without a GPU.

A forward pass on the meta device counts what autograd keeps. What is kept depends only on shapes,
so the count costs milliseconds and no memory. On a CPU in single precision it agrees with the bytes
really kept (a test holds it to 10 %); the half-precision rules and the overheads follow CUDA
autocast's published lists and have not been compared with a GPU's peak yet.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import TorchFunctionMode

from nnunet_autoreg.model.trunk import observed

GIB = 1024**3
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two Adam moments in single precision."""
BYTES_PER_LOGIT = 24
"""Kept per output voxel and class by Dice and cross-entropy: single-precision copy, softmax,
log-softmax, one-hot, gradients.
"""
CONTEXT_BYTES = int(0.75 * GIB)
"""The CUDA context and the libraries' workspaces."""
SLACK = 1.1
"""The allocator's fragmentation and short-lived buffers."""

_HALF_OPS = frozenset(
    {
        F.linear,
        F.conv3d,
        F.conv_transpose3d,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.baddbmm,
    },
)
_SINGLE_OPS = frozenset(
    {
        F.layer_norm,
        F.group_norm,
        F.softmax,
        F.log_softmax,
        torch.softmax,
        torch.pow,
        torch.Tensor.pow,
        torch.rsqrt,
        torch.sum,
    },
)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step as a straight line in the batch size.

    Attributes:
        fixed_bytes: parameters, gradients, moments, half-precision copies of the weights, context.
        sample_bytes: activations and loss terms of one sample.
    """

    fixed_bytes: int
    sample_bytes: int

    def total_bytes(self, batch_size: int) -> int:
        """Return the bytes needed to train with ``batch_size`` samples."""
        return self.fixed_bytes + batch_size * self.sample_bytes

    def largest_batch(self, budget_bytes: float) -> int:
        """Return the largest batch that fits into ``budget_bytes``; 0 if none does."""
        return max(0, int((budget_bytes - self.fixed_bytes) // self.sample_bytes))


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps for the backward pass.

    These are queries, keys, values, output and one log-sum per row, and never N x N scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError("this stand-in only counts memory")


class _AsOnDevice(TorchFunctionMode):
    """Gives tensors the shapes and types that they have on the training device.

    Attention is fused, and autocast's lists apply with ``half``.
    """

    def __init__(self, half: bool):
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query_key_value = [self._cast(a, torch.bfloat16) for a in args[:3]]
            return _FusedAttention.apply(*query_key_value)

        if func in _HALF_OPS:
            args = [self._cast(a, torch.bfloat16) for a in args]
        elif func in _SINGLE_OPS:
            args = [self._cast(a, torch.float32) for a in args]
            kwargs = {k: self._cast(v, torch.float32) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if self.half and is_float else value


class _Kept:
    """Counts the bytes of the distinct storages that autograd saves.

    Those of ``known`` tensors, parameters and buffers, are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        self._storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in known}
        self.num_bytes = 0
        self.largest_piece = 0
        """Bytes kept inside the largest of the pieces that are computed twice.

        Only one piece at a time is in memory.
        """

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.num_bytes += storage.nbytes()
        return tensor

    def piece(
        self,
        function: Callable[..., torch.Tensor],
        arguments: tuple[Any, ...],
    ) -> torch.Tensor:
        """Run a function as activation checkpointing does, and count what that keeps."""
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.pack(argument)

        # What is kept outside already is not counted a second time inside.
        inside = _Kept(())
        inside._storages = dict(self._storages)
        with torch.autograd.graph.saved_tensors_hooks(inside.pack, lambda tensor: tensor):
            out = function(*arguments)

        self.largest_piece = max(self.largest_piece, inside.num_bytes)
        return out


@contextmanager
def _counting(network: nn.Module) -> Iterator[_Kept]:
    kept = _Kept([*network.parameters(), *network.buffers()])
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        observed(kept.piece),
    ):
        yield kept


def kept_bytes(
    network: nn.Module,
    volume: torch.Tensor,
    half: bool | None = None,
) -> tuple[int, torch.Size]:
    """Return the bytes that autograd keeps for the backward pass, and the output's shape.

    Args:
        volume: (B, C, Z, Y, X), on the network's device.
        half: count as under half-precision autocast with fused attention (True), or as in single
            precision with fused attention (False); None runs the network just as it is.
    """
    with _counting(network) as kept, nullcontext() if half is None else _AsOnDevice(half):
        output = network(volume)
    return kept.num_bytes, output.shape


def training_memory(
    build: Callable[[], nn.Module],
    input_shape: Sequence[int],
    half: bool = True,
) -> TrainingMemory:
    """Estimate the memory of training a network with AdamW on segmentation patches.

    Args:
        build: makes the network; called once, on the meta device.
        input_shape: one sample, (C, Z, Y, X).
        half: mixed precision, as on a GPU.
    """
    with torch.device("meta"):
        network = build().train()
        one, output = kept_bytes(network, torch.empty(1, *input_shape), half)
        two, _ = kept_bytes(network, torch.empty(2, *input_shape), half)

    # The loss is not part of the network.
    loss_bytes = output.numel() * BYTES_PER_LOGIT
    return _line(network, one + loss_bytes, two + 2 * loss_bytes)


def pretraining_memory(
    module: nn.Module,
    loss_of: Callable[[int], object],
    half: bool = True,
    extra: nn.Module | None = None,
) -> TrainingMemory:
    """Estimate the memory of training ``module`` with AdamW.

    Args:
        module: on the meta device.
        extra: a module held beside it without gradients and moments, such as a momentum teacher.
        loss_of: computes the loss of this many samples on the meta device.
        half: mixed precision, as on a GPU.
    """
    held = nn.ModuleList([module] if extra is None else [module, extra])
    kept_of = {}
    for num_samples in (1, 2):
        with torch.device("meta"), _counting(held) as kept, _AsOnDevice(half):
            loss_of(num_samples)
        kept_of[num_samples] = kept.num_bytes + kept.largest_piece

    extra_bytes = 0 if extra is None else held_bytes(extra)
    return _line(module, kept_of[1], kept_of[2], extra_bytes)


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def _line(network: nn.Module, one: int, two: int, extra_bytes: int = 0) -> TrainingMemory:
    """Return the straight line through the bytes kept for one sample and for two."""
    num_parameters = sum(p.numel() for p in network.parameters())
    sample_bytes = two - one
    # Some things are kept once, regardless of the batch: copies of the weights in half precision,
    # for instance.
    kept_once = max(0, one - sample_bytes)
    fixed_bytes = num_parameters * BYTES_PER_PARAMETER + extra_bytes + kept_once

    return TrainingMemory(
        fixed_bytes=CONTEXT_BYTES + int(SLACK * fixed_bytes),
        sample_bytes=max(1, int(SLACK * sample_bytes)),
    )
