"""Who may look at whom: the block-causal rule with random start-up, and the order of blocks in a sequence.

Shape suffixes: B samples, T tokens (members, then raster order z, y, x), K blocks, J tokens of a block, Q queries, S keys.
"""

import torch
from torch import Tensor


def block_causal_mask(rank_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor) -> Tensor:
    """Boolean (B, 1, Q, S): may query token q attend to key token k? True means yes.

    A token of rank q sees one of rank k iff k <= max(q, p - 1): its own block, every earlier one, and - inside the given
    start of p blocks - all of the start. Wholly padded tokens are no keys, except to themselves, so that no row is empty.

    Args:
        rank_BT: block rank of every token, 0..K-1.
        prefix_B: number of given blocks p, 1..K-1.
        valid_BT: False where a token holds no real voxel.

    Source: AR-SSL4M's prefix mask (github.com/serena9525/AR-SSL4M) without START, on blocks.
    """
    reach_BT = torch.maximum(rank_BT, prefix_B[:, None] - 1)
    allow_BQS = (rank_BT[:, None, :] <= reach_BT[:, :, None]) & valid_BT[:, None, :]
    itself = torch.eye(rank_BT.shape[1], dtype=torch.bool, device=rank_BT.device)
    return (allow_BQS | itself)[:, None]


def strictly_earlier_mask(rank_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Boolean (B, 1, Q, S): a query for a token of rank q attends to valid encoder tokens of rank < q.

    Rows without any such key (rank 0, or only padding before) attend to the tokens of rank 0 instead, to stay finite; they
    carry no loss.
    """
    allow_BQS = (rank_BT[:, None, :] < rank_BT[:, :, None]) & valid_BT[:, None, :]
    empty_BQ = ~allow_BQS.any(dim=-1)
    return (allow_BQS | (empty_BQ[:, :, None] & (rank_BT == 0)[:, None, :]))[:, None]


def block_order(rank_BT: Tensor) -> Tensor:
    """Token indices (B, T) sorted by rank and, within a block, by raster order: position b * J + j holds token j of block b."""
    return torch.argsort(rank_BT, dim=1, stable=True)
