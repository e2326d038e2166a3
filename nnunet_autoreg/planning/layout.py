"""The crop, and the blocks it is cut into."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_autoreg.families import PRIMUS, has_transformer, is_convolutional, smallest_block
from nnunet_autoreg.geometry import Size, as_size, multiplied, round_up, volume
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.planning.pool import (
    MOSTLY_PADDING,
    Hardware,
    MemoryOf,
    Pool,
    dimensions,
    unpadded_share,
)

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
    it to the median shape, round up to whole tokens, then shrink the axis that is largest relative
    to the median shape until it fits.

    Args:
        median_shape_vox: median image size after resampling, (z, y, x).
        spacing_mm: target spacing, (z, y, x).
        token_vox: token or block; every axis of the result is a multiple of it.
        max_vox: largest number of voxels allowed.
        round_to_nearest: round to the nearest multiple rather than up, at least one: large blocks
            would be padding mostly.
    """
    # A box of START_VOX voxels, as long in mm along every axis, clipped to the median shape.
    resolution = [1 / s for s in spacing_mm]
    side_mm = (START_VOX / (resolution[0] * resolution[1] * resolution[2])) ** (1 / 3)
    start = []
    for voxels_per_mm, median_side in zip(resolution, median_shape_vox, strict=True):
        side = round(voxels_per_mm * side_mm)
        start.append(max(1, min(side, round(median_side))))

    if round_to_nearest:
        crop = []
        for side, token in zip(start, token_vox, strict=True):
            # Python's own ``round`` would round halves to even numbers.
            number = math.floor(side / token + 0.5)
            crop.append(max(1, number) * token)
    else:
        crop = list(round_up(start, token_vox))

    while volume(crop) > max_vox:
        shrinkable = [i for i in range(3) if crop[i] > token_vox[i]]
        if not shrinkable:
            break
        largest = max(shrinkable, key=lambda i: crop[i] / median_shape_vox[i])
        crop[largest] -= token_vox[largest]
    return as_size(crop)


def with_variety(crop: Size, side: Size, median_shape_vox: Sequence[float]) -> Size:
    """Return a crop that leaves a part of the scan out.

    Otherwise ``crop`` would hold all of it, and crops would differ only by flips.

    A crop holds the whole scan if it covers more than 0.8 of every axis. It is then shortened block
    by block, always along the axis that it covers most, to 0.5 - 0.8 of the scan. An axis keeps its
    length if blocks are too large for that, and every axis does if fewer than 8 blocks would be
    left.

    Args:
        side: side length of a block, in voxels.
    """
    # An axis of which enough is left out already makes crops differ.
    covered = [c / m for c, m in zip(crop, median_shape_vox, strict=True)]
    if min(covered) <= MOST_EXTENT:
        return crop

    shorter = list(crop)
    while True:
        num_blocks = volume(shorter) // volume(side)
        shrinkable = []
        for axis in range(3):
            # One block less along this axis takes a whole layer of blocks away.
            layer_blocks = num_blocks // (shorter[axis] // side[axis])
            has_blocks = num_blocks - layer_blocks >= MIN_BLOCKS
            share_left = (shorter[axis] - side[axis]) / median_shape_vox[axis]
            is_long = shorter[axis] > MOST_EXTENT * median_shape_vox[axis]
            if is_long and has_blocks and share_left >= LEAST_EXTENT:
                shrinkable.append(axis)
        if not shrinkable:
            return as_size(shorter)

        longest = max(shrinkable, key=lambda axis: shorter[axis] / median_shape_vox[axis])
        shorter[longest] -= side[longest]


@dataclass(frozen=True)
class CropLayout:
    """A crop in voxels and its blocks in tokens, both (z, y, x), each with its reason."""

    crop: Size
    block_tokens: Size
    why_crop: str
    why_block: str


def choose_layout(
    encoder: EncoderSize,
    hardware: Hardware,
    pool: Pool,
    memory_of: MemoryOf,
) -> CropLayout:
    """Return the largest crop that suits the median scan and fits into the memory, and its blocks.

    A linear tokenizer takes whole blocks, rounded up: of one token, or of several small ones. A
    CNN's block is as large as its total stride. Convolutional tokenizers take larger blocks.
    """
    if not has_transformer(encoder.family):
        return _layout_of_cnn(encoder, hardware, pool, memory_of)
    if is_convolutional(encoder.family):
        return _layout_of_convolutional_tokens(encoder, hardware, pool, memory_of)

    block = encoder.block_tokens
    crop, why_crop = choose_crop(encoder, block, False, hardware, pool, memory_of)
    why_block = "linear tokens: one of them is a block"
    if volume(block) > 1:
        why_block = (
            f"linear tokens: {dimensions(block)} of them are a block of "
            f"{dimensions(side_of(encoder, block))} voxels"
        )
    return CropLayout(crop, block, why_crop, why_block)


def _layout_of_convolutional_tokens(
    encoder: EncoderSize,
    hardware: Hardware,
    pool: Pool,
    memory_of: MemoryOf,
) -> CropLayout:
    """Return the crop and the blocks of a transformer with a convolutional tokenizer.

    The crop is rounded to the nearest whole block. If that makes fewer than 8 blocks, it takes the
    smallest blocks that the tokenizer's norms allow. If there are still fewer, it is rounded up.
    """
    smallest = smallest_block(encoder.family, encoder.token_size)

    # The encoder's usual block; the smallest along axes that do not fill half of it.
    usual = []
    for axis, median_vox in enumerate(pool.median_shape_vox):
        number = encoder.block_tokens[axis]
        fills_half = median_vox >= number * encoder.token_size[axis] / 2
        if fills_half:
            usual.append(max(number, smallest[axis]))
        else:
            usual.append(smallest[axis])

    # From the best way to the last resort.
    for block, nearest in ((as_size(usual), True), (smallest, True), (smallest, False)):
        crop, why_crop = choose_crop(encoder, block, nearest, hardware, pool, memory_of)
        side = side_of(encoder, block)
        num_blocks = volume(crop) // volume(side)
        if num_blocks >= MIN_BLOCKS:
            break

    why_block = (
        f"{dimensions(side)} voxels, on each of which the convolutions run separately (at least "
        f"{dimensions(side_of(encoder, smallest))}, for their norms): {num_blocks} blocks in a crop"
    )
    if num_blocks < MIN_BLOCKS:
        why_block += (
            f", FEWER than the {MIN_BLOCKS} of a good sequence: an encoder of smaller blocks suits "
            "better"
        )

    real = unpadded_share(crop, pool.median_shape_vox)
    if real < MOSTLY_PADDING:
        why_block += f", only {100 * real:.0f} % of them not padding"
    return CropLayout(crop, block, why_crop, why_block)


def _layout_of_cnn(
    encoder: EncoderSize,
    hardware: Hardware,
    pool: Pool,
    memory_of: MemoryOf,
) -> CropLayout:
    """Return the crop and the blocks of a CNN: a block is as large as the network's total stride.

    The crop is rounded to the nearest whole block. If that makes too few blocks, it is rounded up.
    """
    # Rounded up, a crop holds more padding, but more blocks.
    single = (1, 1, 1)
    for round_to_nearest in (True, False):
        crop, why_crop = choose_crop(encoder, single, round_to_nearest, hardware, pool, memory_of)
        num_blocks = volume(crop) // volume(encoder.token_size)
        if num_blocks >= MIN_BLOCKS:
            break

    why_block = (
        f"{dimensions(encoder.token_size)} voxels, the total stride of the network: "
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

    Activations are checkpointed if necessary. If the whole scan would fit, the crop is a part of
    it.
    """
    side = side_of(encoder, block_tokens)
    limit = min(encoder.max_crop_vox, MAX_PRETRAIN_VOX)
    if encoder.family == PRIMUS:
        # Small tokens make small crops: a step costs no more than with tokens of 8^3 voxels.
        max_tokens = min(encoder.max_tokens, MAX_PRETRAIN_VOX // 8**3)
        limit = min(limit, max_tokens * volume(encoder.token_size))

    # Shrink the crop until a step of one sample fits, or until two blocks are left.
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

    whole = crop
    crop = with_variety(whole, side, pool.median_shape_vox)

    # The reason: limit by memory or by the encoder, then the part of the scan, then the result.
    unit = "tokens" if volume(block_tokens) == 1 else "blocks"
    cause = f"at most {limit} voxels"
    if max_vox != limit:
        cause = f"as large as {hardware.memory_gib:.4g} GiB allow"
    why = f"median scan of {dimensions(pool.median_shape_vox)} voxels in whole {unit}, {cause}"
    if crop != whole:
        why += (
            f"; {dimensions(whole)} would hold all of it, so a crop takes {LEAST_EXTENT:g} - "
            f"{MOST_EXTENT:g} of an axis where its {unit} allow: crops of whole images taught far "
            "less (AIM, arXiv 2401.08541)"
        )
    extent_mm = [size * spacing for size, spacing in zip(crop, pool.spacing_mm, strict=True)]
    num_tokens = volume(crop) // volume(encoder.token_size)
    return crop, f"{why}: {dimensions(extent_mm)} mm, {num_tokens} tokens"


def side_of(encoder: EncoderSize, block_tokens: Size) -> Size:
    """Return a block in voxels."""
    return multiplied(encoder.token_size, block_tokens)
