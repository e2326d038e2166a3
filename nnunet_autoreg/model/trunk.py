"""Run transformer blocks under an attention rule. All self-attention is computed here.

timm's ``EvaBlock``, which nnU-Net's Primus networks are made of, is computed here. The result is
the same as the block's own, but attention uses the kernel that suits the rule. Blocks of our own
take ``rope`` and ``attn_mask`` and pass the mask on to ``attend``.

Shape suffixes: B samples, T tokens, V width, H heads, D head width.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from nnunet_autoreg.model.attention import AttentionRule, Mask, Rule, attend


def run_blocks(
    blocks: Iterable[nn.Module],
    x_BTV: Tensor,
    rope: Tensor | None,
    rule: Rule | None,
    recompute: bool = False,
) -> Tensor:
    """Return the features (B, T, V) after all blocks.

    Args:
        blocks: timm's ``EvaBlock``, or blocks of our own.
        rope: rotary table, (T, 2 * D) or (B, 1, T, 2 * D); None without.
        rule: attention rule; None for full attention.
        recompute: keep only each block's input and compute its inside a second time in the backward
            pass.
    """
    blocks = list(blocks)
    mask = None
    if rule is not None and blocks:
        # One mask serves all blocks.
        mask = mask_of(rule, num_heads_of(blocks[0]))

    for block in blocks:
        x_BTV = run_layer(block, recompute, x_BTV, rope, mask, by=run_block)
    return x_BTV


class FastPath:
    """How layers run in training on a GPU: each kind of layer is compiled once and shared.

    Only layers are compiled. A graph of one transformer block compiles in seconds, and its
    parameters are inputs of the graph, so that all blocks share it. Everything around the layers
    runs eagerly, masks included.

    Args:
        compile: compiles a function of a layer and its inputs.
        flex: attention is FlexAttention, whose mask is by tiles; otherwise it is torch's own, with
            a dense mask.

    Attributes:
        is_given_up: layers run eagerly after all, because they could not be compiled.
        recorder: is called with every call of a layer (function, layer, inputs), for the
            self-check; None for no check.
        rules: while there is a recorder, the rule behind each mask that is in use, and its number
            of heads.
    """

    def __init__(self, compile: Callable[["Layer"], "Layer"], flex: bool):
        self.compile, self.flex = compile, flex
        self.is_given_up = False
        self.recorder: Callable[[Layer, nn.Module, tuple[Any, ...]], None] | None = None
        self.rules: MutableMapping[Mask, tuple[AttentionRule, int]] = WeakIdKeyDictionary()


Layer = Callable[..., Tensor]
"""A function of a layer, as a module, and of the layer's inputs."""
_paths: list[FastPath] = []


@contextmanager
def layers_run_by(path: FastPath) -> Iterator[None]:
    """Run all layers inside the context by ``path``.

    Without this context they run eagerly, with dense masks.
    """
    _paths.append(path)
    try:
        yield
    finally:
        _paths.pop()


def _current_path() -> FastPath | None:
    if not _paths or _paths[-1].is_given_up:
        return None
    return _paths[-1]


def mask_of(rule: Rule, num_heads: int) -> Mask:
    """Return a rule's mask for the layers that ``run_layer`` runs next.

    It is made once for all of them.
    """
    path = _current_path()
    if path is None or not isinstance(rule, AttentionRule):
        return rule.mask()

    mask = rule.mask(path.flex, num_heads)
    if path.recorder is not None:
        path.rules[mask] = rule, num_heads
    return mask


def call_layer(layer: nn.Module, *inputs: Any) -> Tensor:
    """Return a layer's output."""
    out: Tensor = layer(*inputs)
    return out


def run_layer(layer: nn.Module, recompute: bool, *inputs: Any, by: Layer = call_layer) -> Tensor:
    """Return ``by(layer, *inputs)``, compiled if training runs compiled layers.

    Args:
        layer: one of several layers of the same kind, for which one graph is compiled.
        recompute: keep only the inputs and compute the inside a second time in the backward pass.
        by: how the layer is called.
    """
    path = _current_path()
    if path is None:
        return recomputed(by, recompute, layer, *inputs)

    if path.recorder is not None:
        path.recorder(by, layer, inputs)
    # The first layer's input may have other strides than that of the others. It would need a
    # separate graph.
    inputs = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)
    return recomputed(path.compile(by), recompute, layer, *inputs)


def num_heads_of(block: nn.Module) -> int:
    """Return the number of attention heads of a block; 1 if it states none."""
    # timm and nnU-Net call it ``attn``, the ViT of AR-SSL4M ``self_attn``.
    attention = getattr(block, "attn", None) or getattr(block, "self_attn", None)
    return int(getattr(attention, "num_heads", 1))


def recomputed(function: Callable[..., Tensor], recompute: bool, *arguments: Any) -> Tensor:
    """Return ``function(*arguments)``.

    Args:
        recompute: keep only the tensors among the arguments for the backward pass.
    """
    # Without a backward pass there is nothing to recompute for.
    if not (recompute and torch.is_grad_enabled()):
        return function(*arguments)
    if _observers:
        return _observers[-1](function, arguments)

    out: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return out


Observer = Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Give every function that would be computed twice to ``observer``, which calls it once.

    This is for counting the memory that recomputation keeps.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def run_block(block: nn.Module, x_BTV: Tensor, rope: Tensor | None, mask: Mask | None) -> Tensor:
    """Return the features (B, T, V) after one block of pre-norm attention and MLP."""
    # A block that ``hooked`` has changed computes the same, but is called as a module.
    if isinstance(block, EvaBlock) and "forward" not in vars(block):
        return _eva_block(block, x_BTV, rope, mask)
    own: Tensor = block(x_BTV, rope=rope, attn_mask=mask)
    return own


def hooked(block: nn.Module) -> None:
    """Make a block be called as a module; its output does not change.

    FSDP depends on hooks, which only run when a module is called.
    """
    if isinstance(block, EvaBlock):
        block.forward = partial(_eva_block, block)  # type: ignore[method-assign]


def _eva_block(
    block: EvaBlock,
    x_BTV: Tensor,
    rope: Tensor | None = None,
    attn_mask: Mask | None = None,
) -> Tensor:
    assert isinstance(block.attn, EvaAttention), "rotary attention of another layout"

    attended = self_attention(block.attn, block.norm1(x_BTV), rope, attn_mask)
    # gamma is LayerScale's factor, if the block has one.
    if block.gamma_1 is not None:
        attended = block.gamma_1 * attended
    x_BTV = x_BTV + block.drop_path1(attended)

    changed = block.mlp(block.norm2(x_BTV))
    if block.gamma_2 is not None:
        changed = block.gamma_2 * changed
    out: Tensor = x_BTV + block.drop_path2(changed)
    return out


def self_attention(
    attn: EvaAttention,
    x_BTV: Tensor,
    rope: Tensor | None,
    mask: Mask | None,
) -> Tensor:
    """Return the output (B, T, V) of ``attn``, with its projections, norms and rotary positions."""
    B, T, _ = x_BTV.shape
    if attn.qkv is None:
        q_BHTD, k_BHTD, v_BHTD = (
            layer(x_BTV).reshape(B, T, attn.num_heads, -1).transpose(1, 2)
            for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
    else:
        bias = None
        if attn.q_bias is not None:
            biases: Any = (attn.q_bias, attn.k_bias, attn.v_bias)
            bias = torch.cat(biases)
        fused = nn.functional.linear(x_BTV, attn.qkv.weight, bias)  # (B, T, 3 * V)
        fused = fused.reshape(B, T, 3, attn.num_heads, -1)
        q_BHTD, k_BHTD, v_BHTD = fused.permute(2, 0, 3, 1, 4).unbind(0)

    q_BHTD, k_BHTD = attn.q_norm(q_BHTD), attn.k_norm(k_BHTD)
    if rope is not None:
        # The table is in single precision; under autocast the values are not.
        q_BHTD = _rotated(attn, q_BHTD, rope).type_as(v_BHTD)
        k_BHTD = _rotated(attn, k_BHTD, rope).type_as(v_BHTD)

    dropout = attn.attn_drop.p if attn.training else 0.0
    seen_BHTD = attend(q_BHTD, k_BHTD, v_BHTD, mask, dropout)
    seen_BTV = seen_BHTD.transpose(1, 2).flatten(2)  # heads side by side
    out: Tensor = attn.proj_drop(attn.proj(attn.norm(seen_BTV)))
    return out


def _rotated(attn: EvaAttention, x_BHTD: Tensor, rope: Tensor) -> Tensor:
    """Return queries or keys rotated by their positions; leading register tokens have none."""
    first = attn.num_prefix_tokens
    registers, positioned = x_BHTD[:, :, :first], x_BHTD[:, :, first:]
    half = bool(getattr(attn, "rotate_half", False))
    rotated: Tensor = apply_rot_embed_cat(positioned, rope, half=half)
    if first == 0:
        return rotated
    return torch.cat([registers, rotated], dim=2)
