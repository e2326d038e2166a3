"""Which token belongs to which block, and which block comes when. Pure numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.plan import SequencePlan


def block_ids(grid: Sequence[int], block: Sequence[int]) -> NDArray[np.int64]:
    """Raster index of the block that holds each token, as (T,) in raster order of the tokens.

    Args:
        grid: tokens per axis (z, y, x).
        block: tokens of a block per axis; divides ``grid``.
    """
    blocks = as_size([g // b for g, b in zip(grid, block, strict=True)])
    z, y, x = np.meshgrid(
        *(np.arange(g) // b for g, b in zip(grid, block, strict=True)), indexing="ij"
    )
    return ((z * blocks[1] + y) * blocks[2] + x).reshape(-1).astype(np.int64)


def sequence_ids(
    grid: Sequence[int], block: Sequence[int], num_members: int, order: str
) -> NDArray[np.int64]:
    """Place of every token's block in the fixed order, (M * T,), members after one another.

    Orders: "raster" (and the start of "random") takes member after member, each in raster order;
        "interleaved" goes through x,
    then y, and at each such place through the members along z, as AR-SSL4M's code does with its
    concatenated sub-volumes.

    Args:
        grid: tokens per axis of one member, (z, y, x).
        block: tokens of a block per axis.
    """
    ids, num_blocks = (
        block_ids(grid, block),
        int(np.prod([g // b for g, b in zip(grid, block, strict=True)])),
    )
    whole = np.concatenate([ids + m * num_blocks for m in range(num_members)])
    if order != "interleaved":
        return whole
    shape = (num_members, *(g // b for g, b in zip(grid, block, strict=True)))
    member, z, y, x = np.unravel_index(np.arange(num_members * num_blocks), shape)
    place = np.empty(num_members * num_blocks, dtype=np.int64)
    place[np.lexsort((z, member, y, x))] = np.arange(num_members * num_blocks)
    return np.asarray(place[whole])


def token_ranks(
    ids: NDArray[np.int64], order: str, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Rank 0..K-1 of every token's block: its place in the fixed order, or a random permutation of
    it.
    """
    if order != "random":
        return ids
    num_blocks = int(ids.max()) + 1
    return generator.permutation(num_blocks).astype(np.int64)[ids]


def window_positions(
    grid: Sequence[int], window: Sequence[int], start: Sequence[int]
) -> NDArray[np.int64]:
    """Raster index within ``grid`` of every token of a ``window`` that begins at token ``start``,
    (T,) in raster order.
    """
    z, y, x = np.meshgrid(
        *(s + np.arange(w) for s, w in zip(start, window, strict=True)), indexing="ij"
    )
    return ((z * grid[1] + y) * grid[2] + x).reshape(-1).astype(np.int64)


def draw_prefix(num_blocks: int, generator: np.random.Generator, sequence: SequencePlan) -> int:
    """Number of given blocks of K, by the plan's distribution.

    "uniform" over 1..K-1; "uniform_from_0" over 0..K-1; "long": the larger of two uniform ones, so
    that p has the probability (2 p - 1) / (K - 1)^2; "fixed": ``fixed_prefix``.
    """
    if sequence.prefix == "fixed":
        return fixed_prefix(num_blocks, sequence.prefix_share)
    first = int(generator.integers(0 if sequence.prefix == "uniform_from_0" else 1, num_blocks))
    return (
        max(first, int(generator.integers(1, num_blocks))) if sequence.prefix == "long" else first
    )


def fixed_prefix(num_blocks: int, share: float) -> int:
    """This share of the blocks, rounded; at least one is given and one asked for."""
    return min(max(1, round(share * num_blocks)), num_blocks - 1)
