"""The crop, and the blocks it is cut into."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_autoreg.families import PRIMUS, has_transformer, is_convolutional, smallest_block
from nnunet_autoreg.geometry import Size, as_size, round_up, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.planning.pool import MOSTLY_PADDING, Hardware, MemoryOf, Pool, real_share, times

START_VOX = 256**3
MAX_PRETRAIN_VOX = 128**3
MIN_BLOCKS = 8
"""A sequence of fewer blocks teaches little: each is mostly context, and few are predicted."""
LEAST_EXTENT, MOST_EXTENT = 0.5, 0.8
"""Of a scan that would fit into one crop, a crop takes this share of every axis: crops of the same
scan then differ.
"""


def plan_crop(
    median_shape_vox: Sequence[float],
    spacing_mm: Sequence[float],
    token_vox: Sequence[int],
    max_vox: int,
    round_to_nearest: bool = False,
) -> Size:
    """Return the crop (pretraining) or patch (fine-tuning) that suits images of a median shape.

    As nnU-Net plans patches: start from a box that is isotropic in mm and larger than needed, clip
        it to the median shape,
    round up to whole tokens, then shrink the axis that is largest relative to the median shape
    until it fits.

    Args:
        median_shape_vox: median image size after resampling, (z, y, x).
        spacing_mm: target spacing, (z, y, x).
        token_vox: token or block; every axis of the result is a multiple of it.
        max_vox: largest number of voxels allowed.
        round_to_nearest: round to the nearest multiple rather than up, at least one: large blocks
            would be padding mostly.
    """
    resolution = [1 / s for s in spacing_mm]
    scale = (START_VOX / (resolution[0] * resolution[1] * resolution[2])) ** (1 / 3)
    start = [
        max(1, min(round(r * scale), round(m)))
        for r, m in zip(resolution, median_shape_vox, strict=True)
    ]
    nearest = [max(1, math.floor(s / t + 0.5)) * t for s, t in zip(start, token_vox, strict=True)]
    crop = nearest if round_to_nearest else list(round_up(start, token_vox))
    while volume(crop) > max_vox:
        shrinkable = [i for i in range(3) if crop[i] > token_vox[i]]
        if not shrinkable:
            break
        largest = max(shrinkable, key=lambda i: crop[i] / median_shape_vox[i])
        crop[largest] -= token_vox[largest]
    return as_size(crop)


def with_variety(crop: Size, side: Size, median_shape_vox: Sequence[float]) -> Size:
    """Return a crop that leaves a part of the scan out.

    Otherwise ``crop`` would hold all of it, and crops would differ by flips alone.

    A crop holds the whole scan if it covers more than 0.8 of every axis. It is then shortened block
    by block, always along the axis that it covers most, to 0.5 - 0.8 of the scan. An axis keeps its
    length where blocks are too large for that, and every axis where fewer than 8 blocks would be
    left.

    Args:
        side: of a block, in voxels.
    """
    covered = [c / m for c, m in zip(crop, median_shape_vox, strict=True)]
    if min(covered) <= MOST_EXTENT:
        return crop
    shorter = list(crop)
    while True:
        spare = volume(shorter) // volume(side) - MIN_BLOCKS
        shortened = []
        for axis in range(3):
            lost = volume(shorter) // volume(side) // (shorter[axis] // side[axis])
            share = (shorter[axis] - side[axis]) / median_shape_vox[axis]
            if (
                shorter[axis] > MOST_EXTENT * median_shape_vox[axis]
                and share >= LEAST_EXTENT
                and lost <= spare
            ):
                shortened.append(axis)
        if not shortened:
            return as_size(shorter)
        longest = max(shortened, key=lambda axis: shorter[axis] / median_shape_vox[axis])
        shorter[longest] -= side[longest]


@dataclass(frozen=True)
class CropLayout:
    """A crop in voxels and its blocks in tokens, both (z, y, x), each with its reason."""

    crop: Size
    block_tokens: Size
    why_crop: str
    why_block: str


def choose_layout(
    encoder: EncoderSize, hardware: Hardware, pool: Pool, memory_of: MemoryOf
) -> CropLayout:
    """Return the largest crop that suits the median scan and fits into the memory.

    It is made of blocks that suit the encoder.

    A linear tokenizer takes whole blocks, rounded up: of one token, or of several small ones.
        Convolutions take larger blocks, and
    crops to the nearest whole block; where that makes fewer than 8 blocks, the smallest blocks that
    their norms allow, and at last crops rounded up.
    """
    if not has_transformer(encoder.family):
        return _layout_of_cnn(encoder, hardware, pool, memory_of)
    if not is_convolutional(encoder.family):
        crop, why = choose_crop(encoder, encoder.block_tokens, False, hardware, pool, memory_of)
        block = encoder.block_tokens
        why_block = "linear tokens: one of them is a block"
        if volume(block) > 1:
            why_block = (
                f"linear tokens: {times(block)} of them are a block of "
                f"{times(side_of(encoder, block))} voxels"
            )
        return CropLayout(crop, block, why, why_block)
    smallest = smallest_block(encoder.family, encoder.token_size)
    ways = ((_fitting_block(encoder, smallest, pool), True), (smallest, True), (smallest, False))
    for block, nearest in ways:
        crop, why = choose_crop(encoder, block, nearest, hardware, pool, memory_of)
        side = side_of(encoder, block)
        count = volume(crop) // volume(side)
        if count >= MIN_BLOCKS:
            break
    real = real_share(crop, pool.median_shape_vox)
    too_few = (
        ""
        if count >= MIN_BLOCKS
        else f", FEWER than the {MIN_BLOCKS} of a good sequence: an encoder of smaller blocks "
        "suits better"
    )
    padded = "" if real >= MOSTLY_PADDING else f", only {100 * real:.0f} % of them not padding"
    why_block = (
        f"{times(side)} voxels, on each of which the convolutions run separately (at least "
        f"{times(side_of(encoder, smallest))}, for "
        f"their norms): blocks in a crop: {count}{too_few}{padded}"
    )
    return CropLayout(crop, block, why, why_block)


def _layout_of_cnn(
    encoder: EncoderSize, hardware: Hardware, pool: Pool, memory_of: MemoryOf
) -> CropLayout:
    """Return the crop and the blocks of a CNN: a block is as large as the network's total stride.

    The crop is rounded to the nearest whole block; where that makes too few blocks, it is rounded
    up.
    """
    single = (1, 1, 1)
    for round_to_nearest in (True, False):
        crop, why_crop = choose_crop(encoder, single, round_to_nearest, hardware, pool, memory_of)
        num_blocks = volume(crop) // volume(encoder.token_size)
        if num_blocks >= MIN_BLOCKS:
            break

    why_block = (
        f"{times(encoder.token_size)} voxels, the total stride of the network: "
        f"{num_blocks} blocks in a crop"
    )
    if num_blocks < MIN_BLOCKS:
        why_block += (
            f", FEWER than the {MIN_BLOCKS} of a good sequence: a smaller encoder suits better"
        )
    return CropLayout(crop, single, why_crop, why_block)


def choose_crop(
    encoder: EncoderSize,
    block_tokens: Size,
    round_to_nearest: bool,
    hardware: Hardware,
    pool: Pool,
    memory_of: MemoryOf,
) -> tuple[Size, str]:
    """Return the largest crop of whole blocks that suits the median scan and fits, and the reason.

    If need be activations are checkpointed. It is a part of the scan where all of it would fit.
    """
    limit, side = min(encoder.max_crop_vox, MAX_PRETRAIN_VOX), side_of(encoder, block_tokens)
    if encoder.family == PRIMUS:
        # Small tokens make small crops: a step costs no more than with tokens of 8^3 voxels.
        limit = min(
            limit, min(encoder.max_tokens, MAX_PRETRAIN_VOX // 8**3) * volume(encoder.token_size)
        )
    max_vox = limit
    while True:
        crop = plan_crop(pool.median_shape_vox, pool.spacing_mm, side, max_vox, round_to_nearest)
        fits = any(
            sum(memory_of(encoder, crop, recompute)) <= hardware.usable_bytes
            for recompute in (False, True)
        )
        if fits or volume(crop) <= 2 * volume(side):
            break
        max_vox = volume(crop) - 1
    whole, crop = crop, with_variety(crop, side, pool.median_shape_vox)
    extent = [size * spacing for size, spacing in zip(crop, pool.spacing_mm, strict=True)]
    tokens = volume(crop) // volume(encoder.token_size)
    unit = "tokens" if volume(block_tokens) == 1 else "blocks"
    cause = (
        f"at most {limit} voxels"
        if max_vox == limit
        else f"as large as {hardware.memory_gib:.4g} GiB allow"
    )
    why = f"median scan of {times(pool.median_shape_vox)} voxels in whole {unit}, {cause}"
    if crop != whole:
        why += (
            f"; {times(whole)} would hold all of it, so a crop takes {LEAST_EXTENT:g} - "
            f"{MOST_EXTENT:g} of an axis where its {unit} allow: "
            "crops of whole images taught far less (AIM, arXiv 2401.08541)"
        )
    return crop, f"{why}: {times(extent)} mm, {tokens} tokens"


def _fitting_block(encoder: EncoderSize, smallest: Size, pool: Pool) -> Size:
    """Return the encoder's usual block.

    It is the smallest along axes that do not fill half of it, or whose tokens are short.
    """
    usual = zip(
        encoder.block_tokens, smallest, encoder.token_size, pool.median_shape_vox, strict=True
    )
    return as_size(
        [
            max(block, least) if median >= block * token / 2 else least
            for block, least, token, median in usual
        ]
    )


def side_of(encoder: EncoderSize, block_tokens: Size) -> Size:
    """Return a block in voxels."""
    return as_size([t * b for t, b in zip(encoder.token_size, block_tokens, strict=True)])
