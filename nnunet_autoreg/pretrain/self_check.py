"""Whether compiled layers compute on the user's own device what plain attention computes.

Kernels and compilers have bugs that show on some devices only, and nothing else would notice: a network that
attends to the wrong tokens trains all the same. So the dry step notes which layers ran and under which masks,
and afterwards a copy of one layer of each kind runs both ways.

Shape suffixes: B samples, T tokens, V width, Q queries, S keys.
"""

import logging
import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.trunk import FastPath, Layer, layers_run_by, run_layer
from nnunet_autoreg.pretrain.machine import computes_in_half
from nnunet_autoreg.pretrain.validation import autocast

log = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Relative error of the fast path that is always allowed: float32 may be multiplied with the mantissa of TF32."""
HALF_FACTOR = 4.0
"""In bf16 so many times the error of plain attention in bf16 is allowed on top."""
SMALL = 2.0**-7
"""Size of the random tokens. Layers normalise them first, so that what attention adds is much larger."""
BESIDE_ATTENTION = ("mlp", "block")
"""Parts of a layer that add to the tokens without the mask; they would hide an error of the attention."""
SEED = 0


@dataclass(frozen=True)
class Call:
    """How training called a layer: enough to call a copy of it in the same way.

    Attributes:
        by: the function of the layer that was called.
        inputs: as they were. The random tokens of the check replace those that have a gradient, of which
            only an empty stand-in on the device "meta" is kept.
        rules: for every input that is a mask made of a rule: the rule and the number of heads.
    """

    by: Layer
    layer: nn.Module
    inputs: tuple[Any, ...]
    rules: dict[int, tuple[AttentionRule, int]]


class Witness:
    """Notes the first call of every kind of layer for every kind of sequence; set as ``FastPath.witness``.

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
        kind: of sequence.
        layer: the class of the layer.
        what: "the output" or a gradient.
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
            f"{self.what} of a layer {self.layer} in {self.kind} sequences is off by {self.error:.2g} "
            f"of its size ({self.allowed:.2g} would pass)"
        )


def self_check(path: FastPath, calls: Sequence[tuple[str, Call]], device: torch.device) -> Disagreement | None:
    """Compare the fast path with eager float32 and a dense mask; return the worst disagreement, None if all is well.

    Nothing that training uses is changed: layers are copied, and random numbers come from a generator of
    their own. Nothing is compiled either, since the dry step has compiled these very graphs.

    Args:
        calls: the kind of sequence and the call, for all kinds of layers and sequences.
    """
    if not calls:
        return None
    start = time.monotonic()
    found: list[Disagreement] = []
    for kind, call in calls:
        for is_attention_alone in (True, False):
            found += _compared(path, kind, call, is_attention_alone, device)

    log.info("attention checked on this device: %d layers, %.1f s", len(calls), time.monotonic() - start)
    return max(found, key=lambda one: one.error / one.allowed, default=None)


def _compared(
    path: FastPath, kind: str, call: Call, is_attention_alone: bool, device: torch.device
) -> list[Disagreement]:
    """Return what disagrees in one layer.

    Args:
        is_attention_alone: the parts beside attention give 0, so that errors of attention stand out.
    """
    generator = torch.Generator().manual_seed(SEED)
    layer = _strong_copy(call.layer, is_attention_alone, generator)
    inputs = [_random_like(x, device, generator) if _is_meta(x) else x for x in call.inputs]
    fast = list(inputs)
    for number, (rule, num_heads) in call.rules.items():
        fast[number] = rule.mask(path.flex, num_heads)

    with layers_run_by(path), autocast(device):
        out = run_layer(layer, False, *fast, by=call.by)
    del fast
    direction = torch.randn(out.shape, generator=generator).to(device)
    results = _with_gradients(out, inputs, direction)
    del out

    worst_fast = torch.zeros(len(results), device=device)
    worst_half = torch.zeros(len(results), device=device)
    num_samples = len(direction)
    for sample in range(num_samples):
        # One sample at a time: plain attention in float32 may keep all scores.
        mine = [_of_sample(x, sample, num_samples) for x in inputs]
        for number, (rule, _) in call.rules.items():
            mine[number] = rule.of_sample(sample).dense()
        toward = direction[sample : sample + 1]
        expected = _plain(call.by, layer, [_in_float32(x) for x in mine], toward)
        errors = [_error(x[sample], y[0]) for x, y in zip(results, expected, strict=True)]
        worst_fast = torch.maximum(worst_fast, torch.stack(errors))
        if computes_in_half(device):
            with autocast(device):
                half = _plain(call.by, layer, mine, toward)
            errors = [_error(x[0], y[0]) for x, y in zip(half, expected, strict=True)]
            worst_half = torch.maximum(worst_half, torch.stack(errors))

    names = ["the output", *(f"gradient {number}" for number in range(1, len(results)))]
    name = type(layer).__name__
    found = []
    for what, error, half_error in zip(names, worst_fast.tolist(), worst_half.tolist(), strict=True):
        allowed = TOLERANCE + HALF_FACTOR * half_error
        if error > allowed:
            found.append(Disagreement(kind, name, what, error, allowed))
    return found


def _strong_copy(layer: nn.Module, is_attention_alone: bool, generator: torch.Generator) -> nn.Module:
    """Return a copy whose attention is not drowned by the rest, as it is in a fresh network of small weights.

    Matrices keep the size of what they multiply, and scales of whole branches are 1. A layer that leaves
    out features at random is copied for evaluation, which takes a graph of its own.
    """
    copy = deepcopy(layer)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
            elif name.startswith("gamma"):
                parameter.fill_(1.0)
            if is_attention_alone and name.split(".")[0] in BESIDE_ATTENTION:
                parameter.zero_()

    rates = [getattr(m, "p", None) or getattr(m, "drop_prob", None) for m in copy.modules()]
    if any(rates):
        copy.eval()
    return copy


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _random_like(stand_in: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return small random tokens of the same shape and type, with a gradient."""
    drawn = SMALL * torch.randn(stand_in.shape, generator=generator)
    return drawn.to(device, stand_in.dtype).requires_grad_()


def _of_sample(value: Any, sample: int, num_samples: int) -> Any:
    """Return an input for one sample alone; a table of (T, *) is for all samples."""
    is_of_samples = isinstance(value, Tensor) and value.ndim > 2 and len(value) == num_samples
    if not is_of_samples:
        return value
    return value[sample : sample + 1].detach().requires_grad_(value.requires_grad)


def _in_float32(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().float().requires_grad_(value.requires_grad)


def _plain(by: Layer, layer: nn.Module, inputs: Sequence[Any], direction: Tensor) -> list[Tensor]:
    """Return output and gradients as they are without compiling."""
    return _with_gradients(by(layer, *inputs), inputs, direction)


def _with_gradients(out: Tensor, inputs: Sequence[Any], direction: Tensor) -> list[Tensor]:
    """Return the output and its gradients in the inputs that have one, in float32.

    Args:
        direction: what the output is multiplied with before it is summed.
    """
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad((out.float() * direction).sum(), leaves)
    return [out.detach().float(), *(gradient.float() for gradient in gradients)]


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """Return the size of the difference over the size of what is expected; infinite where a number is none."""
    error = (found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(error, nan=math.inf, posinf=math.inf)
