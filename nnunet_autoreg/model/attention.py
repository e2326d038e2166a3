"""Who may look at whom: the block-causal rule with random start-up, and the order of blocks in a
sequence.

Shape suffixes: B samples, T tokens (members, then raster order z, y, x), K blocks, J tokens of a
    block, Q queries, S keys, H heads,
D head width, N tiles of tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128
"""Tokens of a tile of FlexAttention's kernels."""
FLEX_DEVICES = ("cuda",)
ALIGNMENT = 8
"""Memory-efficient kernels with a mask need a head width that is a multiple of this; the plain one
keeps Q x S scores instead.
"""

LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)
"""What FlexAttention's kernels read of a BlockMask: forward by queries, backward by keys too."""

Mask = Tensor | BlockMask
"""A rule ready for use:

(B, 1, Q, S), True where a query may attend; or the same by tiles and rule for FlexAttention.
"""


@dataclass(frozen=True)
class AttentionRule:
    """Token q sees the valid tokens k with rank k <= reach q; and so that no query is left with
    nothing, one thing more.

    The rule is small; ``mask`` makes of it what the kernel at hand wants: once a step for all
    layers, outside of what is compiled.

    Attributes:
        rank: (B, T) int64, block rank of every token, 0..K-1.
        reach: (B, T) int64, the highest rank that a query sees.
        valid: (B, T) bool, False where a token holds no real voxel.
        lost: (B, T) bool, queries that see nothing by the rule, and so the tokens of rank 0
            instead. None: every token sees itself.
    """

    rank: Tensor
    reach: Tensor
    valid: Tensor
    lost: Tensor | None = None

    def mask(self, flex: bool = False, num_heads: int = 1) -> Mask:
        """Return the rule as the attention kernel wants it.

        Args:
            flex: for FlexAttention inside a compiled layer. Outside of compiled code FlexAttention
                would keep all scores, so that everything else takes the dense mask.
            num_heads: of the attention that the mask is for.
        """
        return self.block_mask(num_heads) if flex else self.dense()

    def with_queries(self, index_BT: Tensor) -> "AttentionRule":
        """Return the same rule for queries in another order; keys stay as they are.

        Args:
            index_BT: query i of the new order is query ``index_BT[:, i]`` of the old one.
        """
        assert self.lost is not None, "a query that sees itself has to stay at the place of its key"
        return replace(
            self, reach=self.reach.gather(1, index_BT), lost=self.lost.gather(1, index_BT)
        )

    def of_sample(self, sample: int) -> "AttentionRule":
        """Return the rule of one sample of the batch, as a batch of one."""
        one = slice(sample, sample + 1)
        lost = None if self.lost is None else self.lost[one]
        return AttentionRule(self.rank[one], self.reach[one], self.valid[one], lost)

    def dense(self) -> Tensor:
        """Boolean (B, 1, Q, S), True where a query may attend."""
        seen_BQS = (self.rank[:, None, :] <= self.reach[:, :, None]) & self.valid[:, None, :]
        if self.lost is None:
            more = torch.eye(self.rank.shape[1], dtype=torch.bool, device=self.rank.device)
        else:
            more = self.lost[:, :, None] & (self.rank == 0)[:, None, :]
        return (seen_BQS | more)[:, None]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def block_mask(self, num_heads: int = 1) -> BlockMask:
        """Return the rule for FlexAttention: the tiles that hold nothing, something or everything.

        A tile's lowest and highest ranks tell which. Nothing of size Q x S is made, and nothing
        waits for the device.

        FlexAttention's kernels find the list of sample b and head h at (b * H + h) times the stride
        of
        the head axis: they never read the batch's own stride. A compiler may give an axis of length
            1
        any stride, 0 included, and then every sample reads the tiles of sample 0. So the lists
        exist for every head, they are contiguous, and they are always made eagerly: called inside
        compiled code, this method breaks the graph (or is refused there, with ``fullgraph=True``).
        """
        rank_BT, reach_BT, valid_BT, lost_BT = self.rank, self.reach, self.valid, self.lost

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (rank_BT[b, k] <= reach_BT[b, q]) & valid_BT[b, k]
            return seen | (q == k if lost_BT is None else lost_BT[b, q] & (rank_BT[b, k] == 0))

        some_BNN, all_BNN = self._tiles()
        num, index = _listed(some_BNN & ~all_BNN, num_heads)
        full_num, full_index = _listed(all_BNN, num_heads)
        length = rank_BT.shape[1]

        made: BlockMask = BlockMask.from_kv_blocks(
            num,
            index,
            full_num,
            full_index,
            BLOCK_SIZE=TILE,
            mask_mod=allowed,
            seq_lengths=(length, length),
        )
        for name in LISTS:
            setattr(made, name, _plain(getattr(made, name)))
        return made

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """(B, N, N) bool twice, by tiles of queries and keys: whether any query sees any key, and
        whether all see all.
        """
        num_tokens = self.rank.shape[1]
        # Padding counts as a rank that nobody reaches.
        rank_BT = torch.where(self.valid, self.rank, num_tokens)
        lowest_BN, highest_BN = (
            _by_tile(rank_BT, num_tokens).amin(-1),
            _by_tile(rank_BT, num_tokens).amax(-1),
        )
        # As do queries that do not exist: kernels ask the rule of pairs in tiles that are not full.
        farthest_BN, nearest_BN = (
            _by_tile(self.reach, -1).amax(-1),
            _by_tile(self.reach, -1).amin(-1),
        )
        some_BNN = lowest_BN[:, None, :] <= farthest_BN[:, :, None]
        if self.lost is None:
            more = torch.eye(lowest_BN.shape[1], dtype=torch.bool, device=rank_BT.device)
        else:
            first_BN = _by_tile(self.rank, num_tokens).amin(-1) == 0
            more = _by_tile(self.lost, False).any(-1)[:, :, None] & first_BN[:, None, :]
        return some_BNN | more, highest_BN[:, None, :] <= nearest_BN[:, :, None]


@dataclass(frozen=True)
class VisibleKeys:
    """Every query sees all valid keys. Queries and keys may differ in number.

    Attributes:
        valid: (B, S) bool, False where a key holds no real voxel. A sample without any valid key
            shows all, to stay finite.
    """

    valid: Tensor

    def mask(self) -> Tensor:
        """Return a dense mask of (B, 1, 1, S), True where a key may be seen; it is small on every
        device.
        """
        none_B1 = ~self.valid.any(dim=1, keepdim=True)
        return (self.valid | none_B1)[:, None, None, :]


Rule = AttentionRule | VisibleKeys


def block_causal(rank_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor) -> AttentionRule:
    """A token of rank q sees one of rank k iff k <= max(q, p - 1): its own block, every earlier
    one, and - inside the given start of p blocks - all of the start. Wholly padded tokens are no
    keys, except to themselves.

    Args:
        rank_BT: block rank of every token, 0..K-1.
        prefix_B: number of given blocks p, 1..K-1.
        valid_BT: False where a token holds no real voxel.

    Source: AR-SSL4M's prefix mask (github.com/serena9525/AR-SSL4M) without START, on blocks.
    """
    return AttentionRule(rank_BT, torch.maximum(rank_BT, prefix_B[:, None] - 1), valid_BT)


def with_starts(
    rank_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor, num_starts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks, prefix and validity with start tokens in front: one more block, of rank 0, that is
    always given.

    So a prefix of 0 blocks becomes lawful: the start alone is given. Without start tokens nothing
        changes.
    """
    if num_starts == 0:
        return rank_BT, prefix_B, valid_BT
    padding = (num_starts, 0)
    return (
        functional.pad(rank_BT + 1, padding),
        prefix_B + 1,
        functional.pad(valid_BT, padding, value=True),
    )


def strictly_earlier(rank_BT: Tensor, valid_BT: Tensor) -> AttentionRule:
    """A query for a token of rank q attends to valid encoder tokens of rank < q.

    Queries without any such key (rank 0, or only padding before) attend to the tokens of rank 0
    instead, to stay finite; they carry no loss.
    """
    first_B = torch.where(valid_BT, rank_BT, rank_BT.shape[1]).amin(1)
    return AttentionRule(rank_BT, rank_BT - 1, valid_BT, rank_BT <= first_B[:, None])


def attend(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    mask: Mask | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention (B, H, T, D) by the kernel that suits ``mask``; None is attention to everything.

    Args:
        dropout: of attention weights; FlexAttention has none.
    """
    if isinstance(mask, BlockMask):
        assert dropout == 0, "pretraining has no attention dropout"
        fused: Tensor = flex_attention(query_BHTD, key_BHTD, value_BHTD, block_mask=mask)
        return fused
    width = query_BHTD.shape[-1]
    if mask is None or not query_BHTD.is_cuda or width % ALIGNMENT == 0:
        return functional.scaled_dot_product_attention(
            query_BHTD, key_BHTD, value_BHTD, attn_mask=mask, dropout_p=dropout
        )
    q, k, v = (
        functional.pad(x, (0, -width % ALIGNMENT)) for x in (query_BHTD, key_BHTD, value_BHTD)
    )
    padded = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=width**-0.5
    )
    return padded[..., :width]


def block_order(rank_BT: Tensor) -> Tensor:
    """Token indices (B, T) sorted by rank and, within a block, by raster order: position b * J + j
    holds token j of block b.
    """
    return torch.argsort(rank_BT, dim=1, stable=True)


def _by_tile(value_BT: Tensor, beyond: float) -> Tensor:
    """(B, N, TILE), the last tile filled up with ``beyond``."""
    B, T = value_BT.shape
    return functional.pad(value_BT, (0, -T % TILE), value=beyond).reshape(B, -1, TILE)


def _listed(chosen_BNN: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return how many tiles of keys are chosen for each tile of queries, and all tiles, chosen ones
    first.

    Shapes (B, H, N) and (B, H, N, N), int32, the same for all heads.
    """
    order_BNN = torch.argsort(chosen_BNN.to(torch.int8), dim=-1, descending=True, stable=True)
    num_BHN = chosen_BNN.sum(-1).to(torch.int32)[:, None].expand(-1, num_heads, -1)
    order_BHNN = order_BNN.to(torch.int32)[:, None].expand(-1, num_heads, -1, -1)
    return _plain(num_BHN), _plain(order_BHNN)


def _plain(values: Tensor) -> Tensor:
    """Return a copy whose strides are those of a C array, on axes of length 1 too."""
    # ``contiguous`` leaves the strides of such axes as they are.
    copy = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    return copy.copy_(values)
