"""Attention rules: which tokens a query may attend to, and the order of blocks in a sequence.

Shape suffixes: B samples, T tokens (members, then raster order z, y, x), K blocks, J tokens of a
block, Q queries, S keys, H heads, D head width, N tiles of tokens.
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
"""Memory-efficient kernels with a mask need a head width that is a multiple of this.

The plain kernel has no such limit, but it keeps Q x S scores.
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
"""The lists of a BlockMask that FlexAttention's kernels read.

The forward pass goes by queries, the backward pass by keys as well.
"""

Mask = Tensor | BlockMask
"""A rule as attention kernels take it.

Either a bool tensor (B, 1, Q, S), True where a query may attend, or FlexAttention's form of it.
"""


@dataclass(frozen=True)
class AttentionRule:
    """A query sees the valid tokens of all blocks up to one of them in the order.

    Attention to nothing is not a number. So queries in ``sees_first_block_only`` see the first
    block; without this mask, every token also sees itself.

    A rule is small. ``mask`` converts it for the attention kernel, once a step for all layers and
    outside of compiled code.

    Attributes:
        order_index: (B, T) int64, position in the order of every token's block, 0..K-1.
        max_visible_block: (B, T) int64, the last block that a query sees, by its position in the
            order.
        valid: (B, T) bool, False where a token holds padding only.
        sees_first_block_only: (B, T) bool, queries that see nothing by the rule, and therefore the
            first block of the order. None: every token sees itself.
    """

    order_index: Tensor
    max_visible_block: Tensor
    valid: Tensor
    sees_first_block_only: Tensor | None = None

    def mask(self, flex: bool = False, num_heads: int = 1) -> Mask:
        """Return the rule as the attention kernel needs it.

        Args:
            flex: for FlexAttention inside a compiled layer. Outside of compiled code FlexAttention
                would keep all scores, so that the dense mask is used there.
            num_heads: number of heads of the attention that the mask is for.
        """
        return self.block_mask(num_heads) if flex else self.dense()

    def with_queries(self, index_BT: Tensor) -> "AttentionRule":
        """Return the same rule for queries in another order; keys stay as they are.

        Args:
            index_BT: query i of the new order is query ``index_BT[:, i]`` of the old one.
        """
        assert self.sees_first_block_only is not None, (
            "a query that sees itself has to have the index of its key"
        )
        return replace(
            self,
            max_visible_block=self.max_visible_block.gather(1, index_BT),
            sees_first_block_only=self.sees_first_block_only.gather(1, index_BT),
        )

    def of_sample(self, sample: int) -> "AttentionRule":
        """Return the rule of one sample of the batch, as a batch of one."""
        one = slice(sample, sample + 1)
        sees_first_block_only = self.sees_first_block_only
        if sees_first_block_only is not None:
            sees_first_block_only = sees_first_block_only[one]
        return AttentionRule(
            self.order_index[one],
            self.max_visible_block[one],
            self.valid[one],
            sees_first_block_only,
        )

    def dense(self) -> Tensor:
        """Return a bool mask (B, 1, Q, S), True where a query may attend."""
        is_reached_BQS = self.order_index[:, None, :] <= self.max_visible_block[:, :, None]
        seen_BQS = is_reached_BQS & self.valid[:, None, :]

        if self.sees_first_block_only is None:
            num_tokens = self.order_index.shape[1]
            more = torch.eye(num_tokens, dtype=torch.bool, device=self.order_index.device)  # (Q, S)
        else:
            is_first_BT = self.order_index == 0
            more = self.sees_first_block_only[:, :, None] & is_first_BT[:, None, :]  # (B, Q, S)

        mask_BQS = seen_BQS | more
        return mask_BQS[:, None]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def block_mask(self, num_heads: int = 1) -> BlockMask:
        """Return the rule for FlexAttention: the tiles that hold nothing, something or everything.

        This follows from the first and the last block in each tile. Nothing of size Q x S is made,
        and nothing waits for the device.

        FlexAttention's kernels find the list of sample b and head h at (b * H + h) times the stride
        of the head axis: they never read the stride of the batch axis. A compiler may give an axis
        of length 1 any stride, 0 included, and then every sample reads the tiles of sample 0. The
        lists therefore exist for every head, are contiguous, and are always made eagerly: called
        inside compiled code, this method breaks the graph (or is refused there, with
        ``fullgraph=True``).
        """
        order_index_BT, max_visible_BT = self.order_index, self.max_visible_block
        valid_BT, first_only_BT = self.valid, self.sees_first_block_only

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (order_index_BT[b, k] <= max_visible_BT[b, q]) & valid_BT[b, k]
            if first_only_BT is None:
                return seen | (q == k)
            is_first = order_index_BT[b, k] == 0
            return seen | (first_only_BT[b, q] & is_first)

        # Kernels ask ``allowed`` only in the tiles that are neither empty nor full.
        some_BNN, all_BNN = self._tiles()
        num, index = _listed(some_BNN & ~all_BNN, num_heads)
        full_num, full_index = _listed(all_BNN, num_heads)

        length = order_index_BT.shape[1]
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
        """Return two masks (B, N, N) over tiles of queries and tiles of keys.

        The first is True where any query may see any key, the second where all see all.
        """
        num_tokens = self.order_index.shape[1]

        # First and last block of every tile of keys. Padding counts as a block that nobody sees.
        order_index_BT = torch.where(self.valid, self.order_index, num_tokens)
        order_index_BNt = _by_tile(order_index_BT, num_tokens)
        lowest_BN = order_index_BNt.amin(-1)
        highest_BN = order_index_BNt.amax(-1)

        # The last block that any and that every query of a tile sees. Queries that fill up the last
        # tile see nothing; then its tiles are not full, and kernels ask the rule for every pair.
        max_visible_BNt = _by_tile(self.max_visible_block, -1)
        farthest_BN = max_visible_BNt.amax(-1)
        nearest_BN = max_visible_BNt.amin(-1)

        some_BNN = lowest_BN[:, None, :] <= farthest_BN[:, :, None]
        all_BNN = highest_BN[:, None, :] <= nearest_BN[:, :, None]

        # Keys that a query sees beyond its rule: itself, or the first block.
        if self.sees_first_block_only is None:
            num_tiles = lowest_BN.shape[1]
            more = torch.eye(num_tiles, dtype=torch.bool, device=order_index_BT.device)  # (N, N)
        else:
            holds_first_BN = _by_tile(self.order_index, num_tokens).amin(-1) == 0
            first_only_BN = _by_tile(self.sees_first_block_only, False).any(-1)
            more = first_only_BN[:, :, None] & holds_first_BN[:, None, :]  # (B, N, N)
        return some_BNN | more, all_BNN


@dataclass(frozen=True)
class VisibleKeys:
    """Every query sees all valid keys. Queries and keys may differ in number.

    Attributes:
        valid: (B, S) bool, False where a key holds padding only. In a sample without any valid key
            all are seen, because attention to nothing is not a number.
    """

    valid: Tensor

    def mask(self) -> Tensor:
        """Return a dense mask (B, 1, 1, S), True where a key may be seen."""
        none_B1 = ~self.valid.any(dim=1, keepdim=True)
        seen_BS = self.valid | none_B1
        return seen_BS[:, None, None, :]


Rule = AttentionRule | VisibleKeys


def block_causal(order_index_BT: Tensor, prefix_B: Tensor, valid_BT: Tensor) -> AttentionRule:
    """Return the rule of the encoder: a token of block q sees block k if k <= max(q, p - 1).

    It sees its own block and every earlier one and, inside the p given blocks, all of these. Tokens
    of padding only are seen by nobody but themselves.

    Args:
        order_index_BT: position in the order of every token's block, 0..K-1.
        prefix_B: number of given blocks p, 1..K-1.
        valid_BT: False where a token holds padding only.

    Source: AR-SSL4M's prefix mask (github.com/serena9525/AR-SSL4M) without START, on blocks.
    """
    last_given_B1 = prefix_B[:, None] - 1
    max_visible_BT = torch.maximum(order_index_BT, last_given_B1)
    return AttentionRule(order_index_BT, max_visible_BT, valid_BT)


def with_starts(
    order_index_BT: Tensor,
    prefix_B: Tensor,
    valid_BT: Tensor,
    num_starts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order, the prefix and the valid tokens with start tokens in front.

    The start tokens are one more block, the first of the order, that is always given. A prefix of 0
    blocks is therefore possible: only the start is given. Without start tokens nothing changes.
    """
    if num_starts == 0:
        return order_index_BT, prefix_B, valid_BT
    in_front = (num_starts, 0)
    order_index_BT = functional.pad(order_index_BT + 1, in_front)  # the start is block 0
    valid_BT = functional.pad(valid_BT, in_front, value=True)
    return order_index_BT, prefix_B + 1, valid_BT


def strictly_earlier(order_index_BT: Tensor, valid_BT: Tensor) -> AttentionRule:
    """Return the rule of a query decoder: a query attends to the valid tokens of earlier blocks.

    A query without any such key, of the first block or after padding only, attends to the first
    block instead, because attention to nothing is not a number. It carries no loss.
    """
    num_tokens = order_index_BT.shape[1]
    first_valid_B = torch.where(valid_BT, order_index_BT, num_tokens).amin(1)
    first_only_BT = order_index_BT <= first_valid_B[:, None]
    return AttentionRule(order_index_BT, order_index_BT - 1, valid_BT, first_only_BT)


def attend(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    mask: Mask | None,
    dropout: float = 0.0,
) -> Tensor:
    """Return attention (B, H, T, D), computed by the kernel that suits ``mask``.

    Args:
        mask: None for attention to everything.
        dropout: dropout of attention weights; FlexAttention has none.
    """
    if isinstance(mask, BlockMask):
        assert dropout == 0, "pretraining has no attention dropout"
        fused: Tensor = flex_attention(query_BHTD, key_BHTD, value_BHTD, block_mask=mask)
        return fused

    width = query_BHTD.shape[-1]
    if mask is None or not query_BHTD.is_cuda or width % ALIGNMENT == 0:
        return functional.scaled_dot_product_attention(
            query_BHTD,
            key_BHTD,
            value_BHTD,
            attn_mask=mask,
            dropout_p=dropout,
        )

    # Zeros in the head width change no score. The scale stays that of the true width.
    padding = (0, -width % ALIGNMENT)
    q, k, v = (functional.pad(x, padding) for x in (query_BHTD, key_BHTD, value_BHTD))
    padded = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        scale=width**-0.5,
    )
    return padded[..., :width]


def block_order(order_index_BT: Tensor) -> Tensor:
    """Return token indices (B, T) sorted by block and, within a block, in raster order.

    Entry b * J + j is token j of block b.
    """
    return torch.argsort(order_index_BT, dim=1, stable=True)


def _by_tile(value_BT: Tensor, beyond: float) -> Tensor:
    """Return the values by tile, (B, N, TILE), the last tile filled up with ``beyond``."""
    B, T = value_BT.shape
    missing = -T % TILE
    filled = functional.pad(value_BT, (0, missing), value=beyond)
    return filled.reshape(B, -1, TILE)


def _listed(chosen_BNN: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return how many tiles of keys are chosen for each tile of queries, and which.

    Returns:
        (B, H, N), the number; and (B, H, N, N), all tiles, the chosen ones first. Both int32, the
        same for all heads.
    """
    num_BN = chosen_BNN.sum(-1).to(torch.int32)
    chosen_first = torch.argsort(chosen_BNN.to(torch.int8), dim=-1, descending=True, stable=True)
    order_BNN = chosen_first.to(torch.int32)

    num_BHN = num_BN[:, None].expand(-1, num_heads, -1)
    order_BHNN = order_BNN[:, None].expand(-1, num_heads, -1, -1)
    return _plain(num_BHN), _plain(order_BHNN)


def _plain(values: Tensor) -> Tensor:
    """Return a copy whose strides are those of a C array, on axes of length 1 too."""
    # ``contiguous`` leaves the strides of such axes as they are.
    copy = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    return copy.copy_(values)
