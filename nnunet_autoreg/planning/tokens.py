"""The size of a Primus's linear tokens, for scans of a given size and spacing. Torch-free.

The token size is planned once, in pretraining, and stored in the encoder's card. Fine-tuning keeps
it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from nnunet_autoreg.families import PRIMUS
from nnunet_autoreg.geometry import Size, Spacing, as_size, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.planning.pool import dimensions

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

    The reason is "" if its tokens cannot be chosen. Thick slices get tokens that are about as long
    in mm along every axis. Small images, and those of coarse voxels, get tokens of 4^3 voxels in
    blocks of 2^3 tokens. All others keep tokens of 8^3 voxels.

    Args:
        spacing_mm, median_shape_vox: after resampling, (z, y, x).
        fixed: the token size of weights that training starts from, or that the user set.
    """
    if encoder.family != PRIMUS:
        return encoder, ""

    usual, small = as_size([USUAL_SIDE] * 3), as_size([SMALL_SIDE] * 3)
    # A block is about as large, whether it is one token or eight small ones.
    single, in_pairs = (1, 1, 1), (2, 2, 2)

    if fixed is not None:
        block = in_pairs if max(fixed) <= SMALL_SIDE else single
        why = "that of the weights it starts from, or of the arguments set by the user"
        return _resized(encoder, fixed, block), why

    finest = min(spacing_mm)
    if max(spacing_mm) > THICK_SLICES * finest:
        # Along thick slices, the power of two that comes closest to the length of 8 fine voxels.
        sides = []
        for spacing in spacing_mm:
            side = USUAL_SIDE
            coarseness = spacing / finest
            if coarseness > THICK_SLICES:
                side = 2 ** max(0, round(math.log2(USUAL_SIDE / coarseness)))
            sides.append(side)
        sides_mm = [side * spacing for side, spacing in zip(sides, spacing_mm, strict=True)]
        return _resized(encoder, as_size(sides), single), f"thick slices: {dimensions(sides_mm)} mm"

    rounded_shape = [max(1, round(side)) for side in median_shape_vox]
    num_tokens = volume(rounded_shape) / volume(usual)
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

    # Scans of thick slices make such tokens about as long in mm along every axis.
    sides_mm = [side * spacing for side, spacing in zip(token_size, spacing_mm, strict=True)]
    shortest_axis = token_size.index(min(token_size))
    if max(sides_mm) <= MAX_ELONGATION * sides_mm[shortest_axis]:
        return None
    return (
        f"its tokens of {dimensions(token_size)} voxels were made for thick slices, and would be "
        f"{dimensions(sides_mm)} mm here: too flat. Pretrain on scans of this spacing"
    )


def _resized(encoder: EncoderSize, token: Size, block_tokens: Size) -> EncoderSize:
    """Return the encoder with tokens of ``token`` voxels, in blocks of ``block_tokens`` tokens."""
    arguments = {**encoder.arguments, "patch_embed_size": list(token)}
    return replace(encoder, arguments=arguments, token_size=token, block_tokens=block_tokens)
