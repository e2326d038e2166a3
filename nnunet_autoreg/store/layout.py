"""Divide a case into blosc2 blocks, the unit of decompression, and chunks, the unit of storage and
checksums.

The layout depends only on the case's shape, so a case always has the same bytes.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from nnunet_autoreg.geometry import Size, as_size, volume

REFERENCE_CROP_VOX = 96
MAX_BLOCK_VOX = 8192
# What a block costs beside its voxels, in voxels. Measured with crops of 64 and 128: 4096 voxels a
# block decompress the least, 8192 are the fastest, 32768 no faster.
BLOCK_OVERHEAD_VOX = 2000
CHUNK_VOX = 64**3
LARGE_AXIS_VOX, LARGE_AXIS_BLOCKS = 64, (8, 16, 32)


@lru_cache(maxsize=4096)
def layout_of(shape_vox: Size) -> tuple[Size, Size]:
    """Return the (blocks, chunks) of a case.

    Chunks are whole blocks. Both may extend a little beyond the case.
    """
    # Lengths to try along each axis. Short axes are cut in equal parts, so that little of the last
    # block is padding.
    lengths: list[Sequence[int]] = []
    for side in shape_vox:
        if side > LARGE_AXIS_VOX:
            lengths.append(LARGE_AXIS_BLOCKS)
        else:
            most_parts = max(1, side // 4)
            of_equal_parts = {math.ceil(side / n) for n in range(1, most_parts + 1)}
            lengths.append(sorted(of_equal_parts))

    choices = itertools.product(*lengths)
    allowed = [block for block in choices if volume(block) <= MAX_BLOCK_VOX]
    # Of equal ones the longest along x, where voxels are contiguous.
    block = as_size(min(allowed, key=lambda b: (_cost(shape_vox, b), -b[2], -b[1])))

    # A chunk grows block by block along its shortest axis, until it is large enough for one
    # checksum and one read.
    chunk = list(block)
    while True:
        growable = []
        for axis in range(3):
            longer_vox = volume(chunk) // chunk[axis] * (chunk[axis] + block[axis])
            if chunk[axis] < shape_vox[axis] and longer_vox <= CHUNK_VOX:
                growable.append(axis)
        if not growable:
            return block, as_size(chunk)
        axis = min(growable, key=lambda a: chunk[a])
        chunk[axis] += block[axis]


def blocks_touched(
    start_zyx: Sequence[int],
    size_zyx: Sequence[int],
    block_vox: Size,
    chunk_vox: Size,
) -> int:
    """Return the number of blocks that hold a part of a crop.

    Blocks do not cross chunks, and chunks are whole blocks.
    """
    assert all(c % b == 0 for c, b in zip(chunk_vox, block_vox, strict=True))
    number = 1
    for start, size, block in zip(start_zyx, size_zyx, block_vox, strict=True):
        first, last = start // block, (start + size - 1) // block
        number *= last - first + 1
    return number


def chunks_touched(
    start_zyx: Sequence[int],
    size_zyx: Sequence[int],
    shape_vox: Size,
    chunk_vox: Size,
) -> list[int]:
    """Return the numbers of the chunks that hold a part of a crop, counted in C order."""
    _, ny, nx = (math.ceil(n / c) for n, c in zip(shape_vox, chunk_vox, strict=True))
    per_axis = []
    for start, size, chunk in zip(start_zyx, size_zyx, chunk_vox, strict=True):
        first, last = start // chunk, (start + size - 1) // chunk
        per_axis.append(range(first, last + 1))
    return [(z * ny + y) * nx + x for z, y, x in itertools.product(*per_axis)]


def _cost(shape_vox: Size, block_vox: Sequence[int]) -> float:
    """Return the voxels that a typical crop decompresses.

    Along an axis that the crop covers, these are all blocks; else the length plus b - 1.
    """
    covered = 1
    for n, b in zip(shape_vox, block_vox, strict=True):
        whole = math.ceil(n / b) * b
        covered *= whole if n <= REFERENCE_CROP_VOX else min(whole, REFERENCE_CROP_VOX + b - 1)
    return covered * (1 + BLOCK_OVERHEAD_VOX / volume(block_vox))
