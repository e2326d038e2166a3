"""Blocks of tokens and their order. Pure numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Size, grid_of, volume
from nnunet_autoreg.plan import SequencePlan


def block_ids(grid: Sequence[int], block: Sequence[int]) -> NDArray[np.int64]:
    """Return the raster index of the block of each token, (T,), tokens in raster order.

    Args:
        grid: tokens per axis (z, y, x).
        block: tokens of a block per axis; divides ``grid``.
    """
    block_tokens = np.array(block)[:, None]  # (3, 1)
    token_zyx = _tokens_in_raster_order(grid)  # (3, T)
    block_zyx = token_zyx // block_tokens  # (3, T)
    return _raster_index(block_zyx, grid_of(grid, block))


def window_positions(
    grid: Sequence[int],
    window: Sequence[int],
    start: Sequence[int],
) -> NDArray[np.int64]:
    """Return the raster index within ``grid`` of every token of a window, (T,).

    Args:
        grid: tokens per axis (z, y, x).
        window: tokens of the window per axis; its tokens are taken in raster order.
        start: the first token of the window.
    """
    first_token = np.array(start)[:, None]  # (3, 1)
    token_zyx = first_token + _tokens_in_raster_order(window)  # (3, T)
    return _raster_index(token_zyx, grid)


def _tokens_in_raster_order(grid: Sequence[int]) -> NDArray[np.int64]:
    """Return z, y and x of every token of a grid, (3, T)."""
    zyx: NDArray[np.int64] = np.indices(tuple(grid))  # (3, z, y, x)
    return zyx.reshape(3, -1)


def _raster_index(zyx: NDArray[np.int64], grid: Sequence[int]) -> NDArray[np.int64]:
    """Return the raster indices, (T,), of the positions (3, T) in a grid."""
    z, y, x = zyx
    _, height, width = grid
    row = z * height + y
    return np.asarray(row * width + x, dtype=np.int64)


def sequence_ids(
    grid: Sequence[int],
    block: Sequence[int],
    num_members: int,
    order: str,
) -> NDArray[np.int64]:
    """Return the position of every token's block in the fixed order, (M * T,), member by member.

    Args:
        grid: tokens per axis of one member, (z, y, x).
        block: tokens of a block per axis.
        order: "raster" (and the start of "random") takes member after member, each in raster order.
            "interleaved" goes through x, then y, and at each such position through the members
            along z, as AR-SSL4M's code does with its concatenated sub-volumes.
    """
    num_blocks_zyx: Size = grid_of(grid, block)
    num_blocks = volume(num_blocks_zyx)
    ids = block_ids(grid, block)  # (T,)
    by_member = [ids + member * num_blocks for member in range(num_members)]
    in_raster_order = np.concatenate(by_member)  # (M * T,)
    if order != "interleaved":
        return in_raster_order

    blocks = np.arange(num_members * num_blocks)  # (K,), K blocks of all members
    member, z, y, x = np.unravel_index(blocks, (num_members, *num_blocks_zyx))  # (K,) each

    # lexsort sorts by its last key first: x changes slowest and z fastest.
    interleaved = np.lexsort((z, member, y, x))  # (K,), the blocks in the new order
    position_in_order = np.empty_like(blocks)  # (K,)
    position_in_order[interleaved] = blocks
    return np.asarray(position_in_order[in_raster_order])


def draw_order_index(
    ids: NDArray[np.int64],
    order: str,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Return the position of every token's block in the order, 0..K-1, shape (T,).

    This is the fixed order of ``sequence_ids``, or a random permutation of it.
    """
    if order != "random":
        return ids
    num_blocks = int(ids.max()) + 1
    position_in_order = generator.permutation(num_blocks).astype(np.int64)  # (K,)
    return position_in_order[ids]  # (T,)


def draw_prefix(num_blocks: int, generator: np.random.Generator, sequence: SequencePlan) -> int:
    """Draw how many of K blocks are given, by the plan's distribution.

    "uniform" is uniform over 1..K-1, and "uniform_from_0" over 0..K-1. "long" is the larger of two
    uniform draws, so that p has the probability (2 p - 1) / (K - 1)^2. "fixed" is
    ``fixed_prefix``.
    """
    if sequence.prefix == "fixed":
        return fixed_prefix(num_blocks, sequence.prefix_share)

    lowest = 0 if sequence.prefix == "uniform_from_0" else 1
    prefix = int(generator.integers(lowest, num_blocks))
    if sequence.prefix == "long":
        prefix = max(prefix, int(generator.integers(1, num_blocks)))
    return prefix


def fixed_prefix(num_blocks: int, share: float) -> int:
    """Return how many blocks are given if this share of them is.

    At least one block is given, and at least one is predicted.
    """
    prefix = max(1, round(share * num_blocks))
    return min(prefix, num_blocks - 1)
