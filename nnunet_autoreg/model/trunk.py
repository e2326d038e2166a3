"""Runs transformer blocks under an attention rule: the one place where self-attention happens.

timm's ``EvaBlock``, which nnU-Net's Primus networks are made of, is computed here: what it computes itself, but attention goes to the
kernel that suits the rule. Blocks of our own take ``rope`` and ``attn_mask`` and hand the mask to ``attend``.

Shape suffixes: B samples, T tokens, V width, H heads, D head width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_autoreg.model.attention import Mask, Rule, attend


def run_blocks(
    blocks: Iterable[nn.Module], x_BTV: Tensor, rope: Tensor | None, rule: Rule | None, recompute: bool = False
) -> Tensor:
    """Features (B, T, V) after all blocks.

    Args:
        blocks: timm's ``EvaBlock``, or blocks of our own.
        rope: rotary table, (T, 2 * D) or (B, 1, T, 2 * D); None without.
        rule: who attends to whom; None for full attention.
        recompute: keep only each block's input and compute its inside a second time in the backward pass.
    """
    mask = None if rule is None else rule.mask()
    for block in blocks:
        x_BTV = recomputed(run_block, recompute, block, x_BTV, rope, mask)
    return x_BTV


def recomputed(function: Callable[..., Tensor], recompute: bool, *arguments: Any) -> Tensor:
    """``function(*arguments)``; where ``recompute`` is on, only tensors among ``arguments`` are kept for the backward pass."""
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
    """Have every piece that would be computed twice run by ``observer``, once: for counting what it would keep."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def run_block(block: nn.Module, x_BTV: Tensor, rope: Tensor | None, mask: Mask | None) -> Tensor:
    """Features (B, T, V) after one block: pre-norm attention and MLP, each scaled where the block has a scale."""
    if isinstance(block, EvaBlock) and "forward" not in vars(block):
        return _eva_block(block, x_BTV, rope, mask)
    own: Tensor = block(x_BTV, rope=rope, attn_mask=mask)
    return own


def hooked(block: nn.Module) -> None:
    """Have a block be called as a module, so that hooks on modules, which FSDP lives by, take hold; what it computes stays."""
    if isinstance(block, EvaBlock):
        block.forward = partial(_eva_block, block)  # type: ignore[method-assign]


def _eva_block(block: EvaBlock, x_BTV: Tensor, rope: Tensor | None = None, attn_mask: Mask | None = None) -> Tensor:
    assert isinstance(block.attn, EvaAttention), "rotary attention of another layout"
    attended = self_attention(block.attn, block.norm1(x_BTV), rope, attn_mask)
    x_BTV = x_BTV + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    changed = block.mlp(block.norm2(x_BTV))
    out: Tensor = x_BTV + block.drop_path2(changed if block.gamma_2 is None else block.gamma_2 * changed)
    return out


def self_attention(attn: EvaAttention, x_BTV: Tensor, rope: Tensor | None, mask: Mask | None) -> Tensor:
    """What ``attn`` computes of (B, T, V), with its projections, norms and rotary positions."""
    q_BHTD, k_BHTD, v_BHTD = _projected(attn, x_BTV)
    q_BHTD, k_BHTD = attn.q_norm(q_BHTD), attn.k_norm(k_BHTD)
    if rope is not None:
        q_BHTD, k_BHTD = (_rotated(attn, x, rope).type_as(v_BHTD) for x in (q_BHTD, k_BHTD))
    seen_BHTD = attend(q_BHTD, k_BHTD, v_BHTD, mask, attn.attn_drop.p if attn.training else 0.0)
    out: Tensor = attn.proj_drop(attn.proj(attn.norm(seen_BHTD.transpose(1, 2).flatten(2))))
    return out


def _projected(attn: EvaAttention, x_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, H, T, D)."""
    B, T, _ = x_BTV.shape
    if attn.qkv is None:
        q, k, v = (layer(x_BTV).reshape(B, T, attn.num_heads, -1).transpose(1, 2) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        return q, k, v
    biases: Any = (attn.q_bias, attn.k_bias, attn.v_bias)
    fused = nn.functional.linear(x_BTV, attn.qkv.weight, None if attn.q_bias is None else torch.cat(biases))
    fused = fused.reshape(B, T, 3, attn.num_heads, -1)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotated(attn: EvaAttention, x_BHTD: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys turned by their positions; leading register tokens have none."""
    first = attn.num_prefix_tokens
    half = bool(getattr(attn, "rotate_half", False))
    if first == 0:
        turned: Tensor = apply_rot_embed_cat(x_BHTD, rope, half=half)
        return turned
    return torch.cat([x_BHTD[:, :, :first], apply_rot_embed_cat(x_BHTD[:, :, first:], rope, half=half)], dim=2)
