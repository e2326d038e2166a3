"""Heads that turn features into predictions of the next block. They exist in pretraining only.

Shape suffixes: B samples, T tokens, Q queries, S encoder tokens, J queries of a block, V width, O
outputs for a token, H heads, D head width.
"""

from dataclasses import dataclass

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from nnunet_autoreg.model.attention import Mask, Rule, attend
from nnunet_autoreg.model.trunk import mask_of, run_layer

HEAD_RATIO = 2
"""Hidden features of an MLP head, as a multiple of the width."""


def output_head(kind: str, width: int, outputs: int) -> nn.Module:
    """Return the last layers, V -> O: "linear" is one matrix, "mlp" has a hidden layer."""
    if kind == "linear":
        return nn.Linear(width, outputs)
    return nn.Sequential(
        nn.Linear(width, HEAD_RATIO * width),
        nn.GELU(),
        nn.Linear(HEAD_RATIO * width, outputs),
    )


class NextHead(nn.Module):
    """Predicts token j of block b + 1 from the feature of token j of block b, V -> O."""

    def __init__(self, width: int, outputs: int, kind: str = "linear"):
        super().__init__()
        self.project = output_head(kind, width, outputs)

    def forward(self, features_BTV: Tensor) -> Tensor:
        """Return predictions (B, T, O)."""
        out: Tensor = self.project(features_BTV)
        return out


class BlockAttention(nn.Module):
    """Pre-norm attention among the queries of one block.

    Queries come block after block, so that one block is one row of a reshaped batch. Nothing can
    cross a row, so that no mask is needed, and the cost grows with the tokens of a block rather
    than with those of the sequence.

    Args:
        block_tokens: queries of a block, J.
    """

    def __init__(self, width: int, num_heads: int, block_tokens: int):
        super().__init__()
        self.num_heads, self.block_tokens = num_heads, block_tokens
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, query_BQV: Tensor, rope: Tensor | None) -> Tensor:
        """Return the change of the queries, (B, Q, V)."""
        B, Q, V = query_BQV.shape
        heads, width = self.num_heads, V // self.num_heads

        parts = self.query_key_value(self.norm(query_BQV)).chunk(3, dim=-1)
        by_head = [part.reshape(B, Q, heads, width) for part in parts]
        q_BHQD, k_BHQD, v_BHQD = (part.transpose(1, 2) for part in by_head)

        if rope is not None:
            q_BHQD = apply_rot_embed_cat(q_BHQD, rope).type_as(v_BHQD)
            k_BHQD = apply_rot_embed_cat(k_BHQD, rope).type_as(v_BHQD)

        # (B, H, Q, D) -> (B * H, K, J, D): kernels take the K blocks for heads, which do not see
        # each other.
        rows = (B * heads, Q // self.block_tokens, self.block_tokens, width)
        seen = attend(q_BHQD.reshape(rows), k_BHQD.reshape(rows), v_BHQD.reshape(rows), None)
        seen_BHQD = seen.reshape(B, heads, Q, width)
        seen_BQV = seen_BHQD.transpose(1, 2).flatten(2)
        out: Tensor = self.project(seen_BQV)
        return out


class CrossLayer(nn.Module):
    """A layer of the query decoder.

    It has pre-norm cross-attention from queries to encoder tokens, attention among the queries of a
    block, and an MLP.

    Args:
        block_tokens: queries of a block, which come block after block and see each other; 1 if none
            sees another.
    """

    def __init__(self, width: int, num_heads: int, block_tokens: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_token = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.block = BlockAttention(width, num_heads, block_tokens) if block_tokens > 1 else None

    def _heads(self, x_BTV: Tensor) -> Tensor:
        """Return the vectors by head, (B, H, T, D)."""
        B, T, V = x_BTV.shape
        x_BTHD = x_BTV.reshape(B, T, self.num_heads, V // self.num_heads)
        return x_BTHD.transpose(1, 2)

    def forward(
        self,
        query_BQV: Tensor,
        token_BSV: Tensor,
        mask: Mask,
        query_rope: Tensor | None,
        token_rope: Tensor | None,
    ) -> Tensor:
        """Return updated queries (B, Q, V)."""
        q_BHQD = self._heads(self.query(self.norm_query(query_BQV)))
        key_value = self.key_value(self.norm_token(token_BSV))  # (B, S, 2 * V)
        key_BSV, value_BSV = key_value.chunk(2, dim=-1)
        k_BHSD, v_BHSD = self._heads(key_BSV), self._heads(value_BSV)

        if query_rope is not None and token_rope is not None:
            q_BHQD = apply_rot_embed_cat(q_BHQD, query_rope).type_as(v_BHSD)
            k_BHSD = apply_rot_embed_cat(k_BHSD, token_rope).type_as(v_BHSD)

        seen_BHQD = attend(q_BHQD, k_BHSD, v_BHSD, mask)
        seen_BQV = seen_BHQD.transpose(1, 2).flatten(2)
        query_BQV = query_BQV + self.project(seen_BQV)

        if self.block is not None:
            query_BQV = query_BQV + self.block(query_BQV, query_rope)
        out: Tensor = query_BQV + self.mlp(self.norm_mlp(query_BQV))
        return out


@dataclass(frozen=True)
class TokenPositions:
    """Positions and members of tokens: which token a query predicts, and where a key comes from.

    Attributes:
        rope: rotary table of the tokens; None without.
        positions, members: (B, T) int64 each; None if only member 0 fills the grid, in order.
    """

    rope: Tensor | None
    positions: Tensor | None = None
    members: Tensor | None = None


class QueryDecoder(nn.Module):
    """A light decoder with one query per token, which attends to the tokens that a rule allows.

    A query is the position and member of its token. Queries of different blocks never see each
    other, so that all targets are predicted in parallel and any order of blocks is well-posed.
    Queries of one block see each other if ``block_tokens`` is greater than 1.

    Args:
        block_tokens: as of ``CrossLayer``.
        head: as of ``output_head``.

    Source: the parallel decoders of RandSAC (arXiv 2203.12054) and SAIM (arXiv 2212.01610).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        depth: int,
        num_positions: int,
        num_members: int,
        outputs: int,
        recompute: bool = False,
        block_tokens: int = 1,
        head: str = "linear",
    ):
        super().__init__()
        self.recompute, self.num_heads = recompute, num_heads
        self.block_tokens = block_tokens

        # Axes: 1, members, positions, width. The sum of both tables is a query.
        self.position = nn.Parameter(torch.empty(1, 1, num_positions, width))
        self.member = nn.Parameter(torch.empty(1, num_members, 1, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.member, std=0.02)

        self.layers = nn.ModuleList(
            CrossLayer(width, num_heads, block_tokens) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project = output_head(head, width, outputs)

    def forward(
        self,
        features_BSV: Tensor,
        rule: Rule,
        queries: TokenPositions,
        tokens: TokenPositions,
    ) -> Tensor:
        """Return predictions (B, Q, O), entry i for query i.

        Args:
            features_BSV: features of the encoder's tokens.
            rule: which of these each query may see.
            queries: in the order of blocks if queries of a block see each other.
            tokens: positions of the encoder's tokens.
        """
        chosen, members = queries.positions, queries.members
        position_BQV = self.position[0] if chosen is None else self.position[0, 0][chosen]
        member_BQV = self.member[:, 0] if members is None else self.member[0, :, 0][members]
        query_BQV = (position_BQV + member_BQV).expand(features_BSV.shape[0], -1, -1)

        # All layers share the rule, so that its mask is made once.
        mask = mask_of(rule, self.num_heads)
        for layer in self.layers:
            query_BQV = run_layer(
                layer,
                self.recompute,
                query_BQV,
                features_BSV,
                mask,
                queries.rope,
                tokens.rope,
            )

        out: Tensor = self.project(self.norm(query_BQV))
        return out
