"""How the device runs the network: precision, compiled layers, and the check of compiled layers.

On a GPU layers are compiled; elsewhere everything runs uncompiled. Only the repeated layer is
compiled (``model.trunk.FastPath``), so that the first step comes soon and masks are always made
outside of compiled code. Modules and the keys of their state stay as they are.

Kernels and compilers have bugs that show on some devices only, and nothing else would notice: a
network that attends to the wrong tokens trains all the same. So the dry step notes which layers
ran and under which masks, and afterwards a copy of one layer of each kind runs both ways.

Shape suffixes: B samples, T tokens, V width, Q queries, S keys.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nnunet_autoreg.machine import has_bf16, is_out_of_memory
from nnunet_autoreg.model import attention
from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.trunk import FastPath, Layer, layers_run_by, run_layer
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.stopping import refuse_interruption

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Loss = TypeVar("Loss")

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

TOLERANCE = 1e-2
"""Relative error that is always allowed: a GPU may multiply float32 with the mantissa of TF32."""

HALF_FACTOR = 4.0
"""In bf16 this many times the error of plain attention in bf16 is allowed on top."""

SMALL = 2.0**-7
"""Size of the random tokens. Layers normalise them first: the output of attention is much
larger."""

BESIDE_ATTENTION = ("mlp", "block")
"""Parts of a layer that add to the tokens without the mask and would hide errors of attention."""

SEED = 0


def is_compiled(plan: Plan, device: torch.device, sharded: bool) -> bool:
    """Return whether layers are compiled: if the plan says so, on a GPU, and weights are whole.

    Sharded weights are gathered by hooks, which would cut the graph up.
    """
    is_cpu_in_test = device.type == "cpu" and os.environ.get(ON_CPU) == "1"
    can_compile = device.type in COMPILED_DEVICES or is_cpu_in_test
    return plan.run.compile and can_compile and not sharded


def fast_path(plan: Plan, device: torch.device, sharded: bool = False) -> FastPath | None:
    """Return how layers run in training, or None if they run eagerly."""
    if not is_compiled(plan, device, sharded):
        return None
    # FlexAttention has no gradient on a CPU, so that there the dense mask is compiled.
    has_flex = device.type in attention.FLEX_DEVICES
    return FastPath(compiled_layer, plan.run.flex_attention and has_flex)


def compiled_layer(function: Layer) -> Layer:
    """Return the compiled function: the same object every time, so that it is compiled once.

    Shapes are compiled in: once for each kind of sequence, and once more where the last part of a
    batch is smaller. The dry step and the training share what is compiled.
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
        "each",
    )
    compiled: Layer = torch.compile(function, dynamic=False, backend=backend)
    return compiled


def run_by(path: FastPath | None, loss: Callable[[Batch], Loss]) -> Callable[[Batch], Loss]:
    """Return the loss with its layers run by ``path``; the loss itself if there is none."""
    if path is None:
        return loss

    def fast_loss(batch: Batch) -> Loss:
        with layers_run_by(path):
            return loss(batch)

    return fast_loss


def place_on(device: torch.device, module: nn.Module, sharded: bool) -> None:
    """Move a module to its device, with its weights in the layout that the device reads best.

    On a GPU that is the layout of its tensor cores. Sharding needs the usual one.
    """
    module.to(device)
    if device.type == "cuda" and not sharded:
        put_channels_last(module)


def put_channels_last(module: nn.Module) -> None:
    """Store the kernels of 3D convolutions with their channels last.

    ``module.to(memory_format=torch.channels_last_3d)`` would ask it of tensors with four axes, too,
    such as a transformer's tables of positions and members, and fail.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.dim() == 5:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last_3d)


def cannot_compile(error: BaseException) -> bool:
    """Return whether an exception says that compiling failed, rather than running or memory.

    Raises:
        InterruptedRunError: it was an interruption that failed to get through the compiler.
    """
    refuse_interruption(error)
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) and not is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return the context of the forward pass: bf16 on GPUs that have it, else float32.

    bf16 has the range of float32, so that no loss scaler is needed.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


@dataclass(frozen=True)
class Call:
    """How training called a layer: enough to call a copy of it in the same way.

    Attributes:
        by: the function of the layer that was called.
        inputs: as they were. Of those that have a gradient, only an empty stand-in on the device
            "meta" is kept: the random tokens of the check take their place.
        rules: for every input that is a mask made of a rule: the rule and the number of heads.
    """

    by: Layer
    layer: nn.Module
    inputs: tuple[Any, ...]
    rules: dict[int, tuple[AttentionRule, int]]


class CallRecorder:
    """Notes the first call of every kind of layer for every kind of sequence.

    It is to be set as ``FastPath.recorder``.

    Attributes:
        kind: the kind of sequence that is trained now.
        calls: by kind of sequence, function and class of the layer.
    """

    def __init__(self, path: FastPath):
        self.path = path
        self.kind = ""
        self.calls: dict[tuple[str, Layer, type[nn.Module]], Call] = {}

    def __call__(self, by: Layer, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note a call, without keeping what takes memory."""
        key = (self.kind, by, type(layer))
        if key in self.calls:
            return

        rules: dict[int, tuple[AttentionRule, int]] = {}
        kept: list[Any] = []
        for number, value in enumerate(inputs):
            if isinstance(value, (Tensor, BlockMask)) and value in self.path.rules:
                rules[number] = self.path.rules[value]
                kept.append(None)
            elif isinstance(value, Tensor) and value.requires_grad:
                stand_in = torch.empty(value.shape, dtype=value.dtype, device="meta")
                kept.append(stand_in.requires_grad_())
            else:
                kept.append(value)
        self.calls[key] = Call(by, layer, tuple(kept), rules)


@dataclass(frozen=True)
class Disagreement:
    """The largest difference that was found, over what is allowed.

    Attributes:
        kind: kind of sequence.
        layer: the class of the layer.
        what: "the output" or the gradient that is off.
        error: relative to what float32 gives, of the sample where it is largest.
        allowed: the same that would pass.
    """

    kind: str
    layer: str
    what: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.what} of a layer {self.layer} in {self.kind} sequences is off by "
            f"{self.error:.2g} of its size ({self.allowed:.2g} would pass)"
        )


def self_check(
    path: FastPath,
    calls: Sequence[tuple[str, Call]],
    device: torch.device,
) -> Disagreement | None:
    """Compare the fast path with eager float32 and a dense mask.

    Nothing that training uses is changed: layers are copied, and random numbers come from a
    separate generator. Nothing is compiled either: the dry step has compiled these graphs already.

    Args:
        calls: the kind of sequence and the call, for all kinds of layers and sequences.

    Returns:
        the worst disagreement, None if all is well.
    """
    if not calls:
        return None
    start = time.monotonic()
    found: list[Disagreement] = []
    for kind, call in calls:
        for only_attention in (True, False):
            found += compare_layer(path, kind, call, only_attention, device)

    seconds = time.monotonic() - start
    log.info("attention checked on this device: %.1f s (layers compared: %d)", seconds, len(calls))
    return max(found, key=lambda one: one.error / one.allowed, default=None)


def compare_layer(
    path: FastPath,
    kind: str,
    call: Call,
    only_attention: bool,
    device: torch.device,
) -> list[Disagreement]:
    """Return the differences found in one layer.

    Args:
        only_attention: the parts beside attention give 0, so that its errors are visible.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    layer = copy_with_strong_attention(call.layer, only_attention, generator)
    inputs = list(call.inputs)
    for number, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.is_meta:
            # Small random tokens of the same shape and type, with a gradient.
            drawn = torch.randn(value.shape, generator=generator, device=generator.device)
            inputs[number] = (SMALL * drawn).to(value.dtype).requires_grad_()

    # All samples at once, as training runs them.
    masked = list(inputs)
    for number, (rule, num_heads) in call.rules.items():
        masked[number] = rule.mask(path.flex, num_heads)
    with layers_run_by(path), autocast(device):
        out = run_layer(layer, False, *masked, by=call.by)
    direction = torch.randn(out.shape, generator=generator, device=device)
    found = output_and_gradients(out, inputs, direction)
    del masked, out

    # One sample at a time, because plain attention in float32 may keep all scores.
    num_samples = len(direction)
    worst = torch.zeros(len(found), device=device)
    worst_half = torch.zeros(len(found), device=device)
    for sample in range(num_samples):
        plain = [input_of_sample(x, sample, num_samples) for x in inputs]
        for number, (rule, _) in call.rules.items():
            plain[number] = rule.of_sample(sample).dense()
        toward = direction[sample : sample + 1]
        in_float32 = [to_float32(x) for x in plain]
        out = call.by(layer, *in_float32)
        expected = output_and_gradients(out, in_float32, toward)
        of_sample = [x[sample : sample + 1] for x in found]
        worst = torch.maximum(worst, relative_errors(of_sample, expected))

        if has_bf16(device):
            with autocast(device):
                out = call.by(layer, *plain)
            half = output_and_gradients(out, plain, toward)
            worst_half = torch.maximum(worst_half, relative_errors(half, expected))

    names = ["the output"]
    for number, value in enumerate(inputs, start=1):
        if has_gradient(value):
            names.append(f"the gradient in input {number}")

    disagreements = []
    for name, error, half_error in zip(names, worst.tolist(), worst_half.tolist(), strict=True):
        allowed = TOLERANCE + HALF_FACTOR * half_error
        if error > allowed:
            layer_name = type(layer).__name__
            disagreements.append(Disagreement(kind, layer_name, name, error, allowed))
    return disagreements


def copy_with_strong_attention(
    layer: nn.Module,
    only_attention: bool,
    generator: torch.Generator,
) -> nn.Module:
    """Return a copy whose attention is not hidden by the rest, as it is if weights are small.

    Random matrices keep the size of what they multiply, and scales of whole branches are 1. A layer
    that leaves out features at random is copied for evaluation, which needs a separate graph.
    """
    copy = deepcopy(layer)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            # Zeros, or weights of 0.02, would have attention add next to nothing.
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
            elif name.startswith("gamma"):
                parameter.fill_(1.0)
            part, *_ = name.split(".")
            if only_attention and part in BESIDE_ATTENTION:
                parameter.zero_()

    for module in copy.modules():
        # The rates of torch's Dropout and of timm's DropPath.
        if getattr(module, "p", None) or getattr(module, "drop_prob", None):
            copy.eval()
    return copy


def has_gradient(value: Any) -> bool:
    """Return whether an input of a layer is a tensor that a gradient is computed for."""
    return isinstance(value, Tensor) and value.requires_grad


def input_of_sample(value: Any, sample: int, num_samples: int) -> Any:
    """Return the part of an input for one sample; a table of (T, *) is for all samples."""
    # A rotary table of all samples has two axes, one for each sample has four.
    is_of_samples = isinstance(value, Tensor) and value.ndim > 2 and len(value) == num_samples
    if not is_of_samples:
        return value
    part = value[sample : sample + 1]
    return part.detach().requires_grad_(value.requires_grad)


def to_float32(value: Any) -> Any:
    """Return an input in float32, with a gradient if it had one; masks stay as they are."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().float().requires_grad_(value.requires_grad)


def output_and_gradients(out: Tensor, inputs: Sequence[Any], direction: Tensor) -> list[Tensor]:
    """Return the output and its gradients in the inputs that have one, in float32.

    Args:
        direction: what the output is multiplied with before it is summed.
    """
    leaves = [x for x in inputs if has_gradient(x)]
    weighted_sum = (out.float() * direction).sum()
    gradients = torch.autograd.grad(weighted_sum, leaves)

    tensors = [out.detach(), *gradients]
    return [tensor.float() for tensor in tensors]


def relative_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Return the norms of the differences over those of ``expected``, (N,); infinite for NaN."""
    tiny = torch.finfo(torch.float32).tiny
    ratios = []
    for x, y in zip(found, expected, strict=True):
        length = y.norm().clamp(min=tiny)
        ratios.append((x - y).norm() / length)
    return torch.nan_to_num(torch.stack(ratios), nan=math.inf, posinf=math.inf)
