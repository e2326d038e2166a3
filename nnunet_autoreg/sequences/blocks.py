"""Which token belongs to which block, and which block comes when. Pure numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import as_size


def block_ids(grid: Sequence[int], block: Sequence[int]) -> NDArray[np.int64]:
    """Raster index of the block that holds each token, as (T,) in raster order of the tokens.

    Args:
        grid: tokens per axis (z, y, x).
        block: tokens of a block per axis; divides ``grid``.
    """
    blocks = as_size([g // b for g, b in zip(grid, block, strict=True)])
    z, y, x = np.meshgrid(*(np.arange(g) // b for g, b in zip(grid, block, strict=True)), indexing="ij")
    return ((z * blocks[1] + y) * blocks[2] + x).reshape(-1).astype(np.int64)


def token_ranks(ids: NDArray[np.int64], order: str, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rank 0..K-1 of every token's block: its raster index, or a random permutation of it."""
    if order == "raster":
        return ids
    num_blocks = int(ids.max()) + 1
    return generator.permutation(num_blocks).astype(np.int64)[ids]


def draw_prefix(num_blocks: int, generator: np.random.Generator) -> int:
    """Number of given blocks, uniform over 1..K-1."""
    return int(generator.integers(1, num_blocks))
