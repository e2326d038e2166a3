"""How large the linear tokens of a Primus are, for scans of this size and spacing. Torch-free.

The token size is planned once, in pretraining, and stored in the encoder's card. Fine-tuning keeps
it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from nnunet_autoreg.families import PRIMUS
from nnunet_autoreg.geometry import Size, Spacing, as_size, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.planning.pool import times

USUAL_SIDE, SMALL_SIDE = 8, 4
THICK_SLICES = 3.0
"""Slices whose distance is more than this many times the finest spacing get flat tokens."""
SMALL_IMAGE_TOKENS = 512
"""An image of fewer tokens of 8^3 voxels is small: finer tokens are affordable, and 8^3 would leave
few to learn from.
"""
LARGEST_SIDE_MM = 12.0
"""A token of 8 voxels that is longer than this mixes most organs and brain structures with what
surrounds them.
"""
MAX_ELONGATION = 4.0
"""Flat tokens whose side along the slices is shorter, in mm, than the others by more than this do
not suit the scans.
"""


def with_tokens(
    encoder: EncoderSize,
    spacing_mm: Spacing,
    median_shape_vox: Sequence[float],
    fixed: Size | None = None,
) -> tuple[EncoderSize, str]:
    """Return ``encoder`` with tokens that suit the scans, and the reason.

    The reason is "" where its tokens cannot be chosen.

    Thick slices get tokens that are about as long in mm along every axis. Small images, and those
    of coarse voxels, get tokens of 4^3 voxels in blocks of 2^3 tokens. All others keep tokens of
    8^3 voxels.

    Args:
        spacing_mm, median_shape_vox: after resampling, (z, y, x).
        fixed: the token size of weights that training starts from, or that the user set.
    """
    if encoder.family != PRIMUS:
        return encoder, ""
    usual = as_size([USUAL_SIDE] * 3)
    single = (1, 1, 1)
    if fixed is not None:
        block = (2, 2, 2) if max(fixed) <= SMALL_SIDE else single
        return _resized(
            encoder, fixed, block
        ), "that of the weights it starts from, or of the arguments set by the user"

    finest = min(spacing_mm)
    if max(spacing_mm) > THICK_SLICES * finest:
        flat = as_size([_flat_side(spacing / finest) for spacing in spacing_mm])
        why = f"thick slices: {times([s * t for s, t in zip(spacing_mm, flat, strict=True)])} mm"
        return _resized(encoder, flat, single), why

    small, in_pairs = as_size([SMALL_SIDE] * 3), (2, 2, 2)
    num_tokens = volume([max(1, round(m)) for m in median_shape_vox]) / volume(usual)
    if num_tokens < SMALL_IMAGE_TOKENS:
        why = (
            f"small images: the median scan holds {num_tokens:.0f} tokens of 8^3 voxels, fewer "
            f"than {SMALL_IMAGE_TOKENS}"
        )
        return _resized(encoder, small, in_pairs), why
    side_mm = USUAL_SIDE * math.prod(spacing_mm) ** (1 / 3)
    if side_mm > LARGEST_SIDE_MM:
        why = (
            f"coarse voxels: 8 of them are {side_mm:.3g} mm, more than {LARGEST_SIDE_MM:g}, in "
            "which most structures would be lost"
        )
        return _resized(encoder, small, in_pairs), why
    return encoder, "the encoder's usual one"


def objection_to_flat_tokens(token_size: Size, spacing_mm: Sequence[float]) -> str | None:
    """Return why tokens made for thick slices do not suit scans of this spacing, or None."""
    if min(token_size) == max(token_size):
        return None
    sides_mm = [side * spacing for side, spacing in zip(token_size, spacing_mm, strict=True)]
    shortest_axis = token_size.index(min(token_size))
    if max(sides_mm) <= MAX_ELONGATION * sides_mm[shortest_axis]:
        return None
    return (
        f"its tokens of {times(token_size)} voxels were made for thick slices, and would be "
        f"{times(sides_mm)} mm here: too flat. "
        "Pretrain on scans of this spacing"
    )


def _flat_side(coarseness: float) -> int:
    """Return how many voxels make a flat token about as long as one of 8 voxels.

    It is a power of two.

    Axes that are as fine as the finest, or nearly, keep 8.
    """
    if coarseness <= THICK_SLICES:
        return USUAL_SIDE
    return 1 << max(0, round(math.log2(USUAL_SIDE / coarseness)))


def _resized(encoder: EncoderSize, token: Size, block_tokens: Size) -> EncoderSize:
    arguments = {**encoder.arguments, "patch_embed_size": list(token)}
    return replace(encoder, arguments=arguments, token_size=token, block_tokens=block_tokens)
