"""Heads that turn features into predictions of the next block. They exist in pretraining only.

Shape suffixes: B samples, T tokens, V width, P voxels of a token (channels included), H heads, D head width.
"""

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from nnunet_autoreg.model.attention import AttentionRule, Mask, attend
from nnunet_autoreg.model.trunk import recomputed


class NextHead(nn.Module):
    """Linear V -> P: the feature of token j of block b becomes the prediction of token j of block b + 1."""

    def __init__(self, width: int, token_voxels: int):
        super().__init__()
        self.project = nn.Linear(width, token_voxels)

    def forward(self, features_BTV: Tensor) -> Tensor:
        """Predictions (B, T, P)."""
        out: Tensor = self.project(features_BTV)
        return out


class CrossLayer(nn.Module):
    """Pre-norm cross-attention from queries to encoder tokens, then an MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_query, self.norm_token, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def _heads(self, x_BTV: Tensor) -> Tensor:
        B, T, V = x_BTV.shape
        return x_BTV.reshape(B, T, self.num_heads, V // self.num_heads).transpose(1, 2)

    def forward(self, query_BTV: Tensor, token_BTV: Tensor, mask: Mask, rope: Tensor | None) -> Tensor:
        """Updated queries (B, T, V)."""
        q_BHTD = self._heads(self.query(self.norm_query(query_BTV)))
        k_BHTD, v_BHTD = (self._heads(x) for x in self.key_value(self.norm_token(token_BTV)).chunk(2, dim=-1))
        if rope is not None:
            q_BHTD = apply_rot_embed_cat(q_BHTD, rope).type_as(v_BHTD)
            k_BHTD = apply_rot_embed_cat(k_BHTD, rope).type_as(v_BHTD)
        seen_BHTD = attend(q_BHTD, k_BHTD, v_BHTD, mask)
        query_BTV = query_BTV + self.project(seen_BHTD.transpose(1, 2).flatten(2))
        out: Tensor = query_BTV + self.mlp(self.norm_mlp(query_BTV))
        return out


class QueryDecoder(nn.Module):
    """A light decoder: one query per token, carrying that token's position and member, attends to strictly earlier blocks.

    Queries do not see each other, so all targets are predicted in parallel and any order of blocks is well-posed.

    Source: the parallel decoders of RandSAC (arXiv 2203.12054) and SAIM (arXiv 2212.01610), in cross-attention only.
    """

    def __init__(
        self, width: int, num_heads: int, depth: int, num_positions: int, num_members: int, token_voxels: int, recompute: bool = False
    ):
        super().__init__()
        self.recompute = recompute
        self.position = nn.Parameter(torch.empty(1, 1, num_positions, width))
        self.member = nn.Parameter(torch.empty(1, num_members, 1, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.member, std=0.02)
        self.layers = nn.ModuleList(CrossLayer(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, token_voxels)

    def forward(
        self, features_BTV: Tensor, rule: AttentionRule, rope: Tensor | None, positions_BT: Tensor | None = None,
        members_BT: Tensor | None = None,
    ) -> Tensor:
        """Predictions (B, T, P): entry t predicts token t itself, from blocks of lower rank.

        Args:
            positions_BT, members_BT: of every token; None where member 0 alone fills the grid in order.
        """
        position_BTV = self.position[0] if positions_BT is None else self.position[0, 0][positions_BT]
        member_BTV = self.member[:, 0] if members_BT is None else self.member[0, :, 0][members_BT]
        query_BTV = (position_BTV + member_BTV).expand(features_BTV.shape[0], -1, -1)
        mask = rule.mask()
        for layer in self.layers:
            query_BTV = recomputed(layer, self.recompute, query_BTV, features_BTV, mask, rope)
        out: Tensor = self.project(self.norm(query_BTV))
        return out
