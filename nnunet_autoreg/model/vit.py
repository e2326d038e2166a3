"""AR-SSL4M's ViT as an nnU-Net network.

It has a START token, fixed 3D sin-cos positions, and a UNETR decoder.

Everything below ``model.`` has AR-SSL4M's own key names and shapes. Only the axes differ: volumes
are (z, y, x) here and (x, y, z) there. The patch kernel is therefore transposed, and the three
thirds of a position belong to x, y and z in that order.

Shape suffixes: B samples, C channels, Z Y X voxels, N tokens in raster order (z, y, x), T = N + 1
    tokens with START in front, V width, H heads, D head width, Q queries, S keys.

Source: AR-SSL4M (github.com/serena9525/AR-SSL4M), reimplemented from its description; UNETR (arXiv
    2103.10504) for the decoder.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import (
    AbstractDynamicNetworkArchitectures,
)
from dynamic_network_architectures.building_blocks.residual import (
    BasicBlockD,
    StackedResidualBlocks,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from timm.layers.drop import DropPath
from torch import Tensor, nn

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.model.attention import Mask, attend
from nnunet_autoreg.model.sizes import grid_of_input

START_ROW = 1
"""Row of ``embed_tokens`` that is START.

Row 2 is END, which pretraining with END appends and nothing else reads; 0 and 3 are unused.
"""

NUM_SPECIAL_TOKENS = 4


def sincos_positions(grid: Size, width: int) -> Tensor:
    """Return fixed positions (1, N, V) of a grid (z, y, x).

    A third of the width is for x, one for y and one for z, each [sin | cos].
    Angular frequencies are 10000^(-k / (width / 6)), k = 0 .. width / 6 - 1, at integer grid
    indices.

    Raises:
        PlanError: the width is not a multiple of 6.
    """
    if width % 6:
        raise PlanError(
            f"width {width} is not a multiple of 6, so sine and cosine of three axes do not fill "
            f"it; use {width // 6 * 6}",
            code="plan-width",
        )

    num_frequencies = width // 6
    steps = torch.arange(num_frequencies, dtype=torch.float64)
    frequencies = 10000.0 ** (-steps / num_frequencies)  # (V / 6,)

    thirds = []
    for axis in (2, 1, 0):
        length = grid[axis]
        indices = torch.arange(length, dtype=torch.float64)
        angles = indices[:, None] * frequencies  # (length, V / 6)
        third = torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, V / 3)

        shape = [1, 1, 1, width // 3]
        shape[axis] = length
        thirds.append(third.reshape(shape).expand(*grid, -1))  # (z, y, x, V / 3)

    whole = torch.cat(thirds, dim=-1)  # (z, y, x, V)
    return whole.reshape(1, math.prod(grid), width).float()


class PatchEmbedding(nn.Module):
    """Turns the voxels of every token into a vector."""

    def __init__(self, num_channels: int, width: int, token_size: Size):
        super().__init__()
        self.proj = nn.Conv3d(num_channels, width, kernel_size=token_size, stride=token_size)

    def forward(self, volume_BCZYX: Tensor) -> Tensor:
        """Return tokens (B, V, z, y, x) on the grid."""
        out: Tensor = self.proj(volume_BCZYX)
        return out


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values have no bias."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width)

    def heads(self, x_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, T, D)."""
        B, T, V = x_BTV.shape
        shape = (B, T, self.num_heads, V // self.num_heads)
        q, k, v = (
            layer(x_BTV).reshape(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, x_BTV: Tensor, attn_mask: Mask | None = None) -> Tensor:
        """Return tokens (B, T, V); ``attn_mask`` is True where a query may attend."""
        q_BHTD, k_BHTD, v_BHTD = self.heads(x_BTV)
        seen_BHTD = attend(q_BHTD, k_BHTD, v_BHTD, attn_mask)
        seen_BTV = seen_BHTD.transpose(1, 2).flatten(2)
        out: Tensor = self.o_proj(seen_BTV)
        return out


class Mlp(nn.Module):
    """Two layers with exact GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x_BTV: Tensor) -> Tensor:
        """Return tokens (B, T, V)."""
        out: Tensor = self.linear2(nn.functional.gelu(self.linear1(x_BTV)))
        return out


class Layer(nn.Module):
    """A pre-norm transformer block. Called as timm's ``EvaBlock`` is; there is no rotary table."""

    def __init__(self, width: int, num_heads: int, hidden: int, drop_path_rate: float):
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.mlp = Mlp(width, hidden)
        self.input_layernorm = nn.LayerNorm(width, eps=1e-5)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=1e-5)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x_BTV: Tensor, rope: None = None, attn_mask: Mask | None = None) -> Tensor:
        """Return tokens (B, T, V).

        ``attn_mask`` (B, 1, Q, S) is True where a query may attend, None for full attention.
        """
        attended = self.self_attn(self.input_layernorm(x_BTV), attn_mask)
        x_BTV = x_BTV + self.drop_path(attended)

        changed = self.mlp(self.post_attention_layernorm(x_BTV))
        out: Tensor = x_BTV + self.drop_path(changed)
        return out


class Trunk(nn.Module):
    """Everything that is pretrained: AR-SSL4M's ``model``."""

    def __init__(
        self,
        num_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        token_size: Size,
        mlp_ratio: float,
        drop_path_rate: float,
    ):
        super().__init__()
        self.embed_tokens = nn.Embedding(NUM_SPECIAL_TOKENS, width)
        self.patchifier = PatchEmbedding(num_channels, width, token_size)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(
            Layer(width, num_heads, round(width * mlp_ratio), rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # The patch embedding is a matrix in the form of a convolution, and is initialised as one.
        projection = self.patchifier.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)

    def with_start(self, tokens_BNV: Tensor) -> Tensor:
        """Return tokens (B, T, V): START, which has no position, then ``tokens_BNV``."""
        start_11V = self.embed_tokens.weight[START_ROW][None, None]
        start_B1V = start_11V.expand(len(tokens_BNV), -1, -1).to(tokens_BNV.dtype)
        return torch.cat([start_B1V, tokens_BNV], dim=1)

    def hidden(self, x_BTV: Tensor, mask_B1QS: Mask | None = None) -> list[Tensor]:
        """Return the tokens (B, T, V) after every layer; the last entry is normalised."""
        states = []
        for layer in self.layers:
            x_BTV = layer(x_BTV, attn_mask=mask_B1QS)
            states.append(x_BTV)
        return [*states[:-1], self.norm(x_BTV)]


class UnetrDecoder(nn.Module):
    """Turns token grids of several depths, and the image, into logits at full resolution.

    Level l has a resolution of 1 / 2^l; level ``num_levels`` is the token grid. Taps are brought to
    levels num_levels - 1 .. 1 by transposed convolutions, the deepest tap by the fewest; level 0 is
    the image itself.
    """

    def __init__(
        self,
        num_channels: int,
        width: int,
        num_classes: int,
        num_levels: int,
        num_features: int,
    ):
        super().__init__()
        features = [num_features * 2**level for level in range(num_levels)]
        self.image = _residual(num_channels, features[0])

        # From level 1, fed by the shallowest tap, to the deepest but one. The order in which layers
        # are made is that of their random weights.
        self.taps = nn.ModuleList()
        for level in range(1, num_levels):
            lift: list[nn.Module] = [_up(width, features[level])]
            for _ in range(num_levels - level - 1):
                lift.append(_up(features[level], features[level]))
                lift.append(_residual(features[level], features[level]))
            self.taps.append(nn.Sequential(*lift))

        above = [*features[1:], width]
        self.ups = nn.ModuleList(_up(above[level], features[level]) for level in range(num_levels))
        self.merges = nn.ModuleList(_residual(2 * f, f) for f in features)
        self.logits = nn.Conv3d(features[0], num_classes, kernel_size=1)
        self.apply(InitWeights_He(1e-2))

    def forward(
        self,
        image_BCZYX: Tensor,
        taps_BVzyx: Sequence[Tensor],
        final_BVzyx: Tensor,
    ) -> Tensor:
        """Return logits (B, classes, Z, Y, X); ``taps_BVzyx`` from shallow to deep."""
        skips = [self.image(image_BCZYX)]
        skips += [lift(tap) for lift, tap in zip(self.taps, taps_BVzyx, strict=True)]

        x = final_BVzyx
        for level in reversed(range(len(skips))):
            joined = torch.cat([self.ups[level](x), skips[level]], dim=1)
            x = self.merges[level](joined)

        out: Tensor = self.logits(x)
        return out


def _residual(num_inputs: int, num_outputs: int) -> nn.Module:
    block: nn.Module = StackedResidualBlocks(
        1,
        nn.Conv3d,
        num_inputs,
        num_outputs,
        [3, 3, 3],
        1,
        False,
        nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True},
        None,
        None,
        nn.LeakyReLU,
        {"inplace": True},
        block=BasicBlockD,
    )
    return block


def _up(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.ConvTranspose3d(num_inputs, num_outputs, kernel_size=2, stride=2, bias=False)


def num_doublings(token_size: Size) -> int:
    """Return how often the UNETR decoder doubles a token until it is a voxel.

    Raises:
        PlanError: doubling does not lead to voxels.
    """
    side = token_size[0]
    is_cube = len(set(token_size)) == 1
    is_power_of_two = side & (side - 1) == 0
    if not is_cube or side < 4 or not is_power_of_two:
        raise PlanError(
            f"patch_embed_size={list(token_size)}: the UNETR decoder doubles tokens up to voxels; "
            "use a cube of side 4, 8, 16 or 32",
            code="plan-token-size",
        )
    return side.bit_length() - 1


class ViT(AbstractDynamicNetworkArchitectures):  # type: ignore[misc]
    """AR-SSL4M's encoder under a UNETR decoder; arguments are named as those of nnU-Net's Primus.

    The encoder reads START and the tokens under full attention; START is dropped before decoding.
    UNETR's skips are taken after blocks 4, 7 and 10 of 12, and at the same shares of another depth.

    Args:
        input_shape: (z, y, x) voxels, a multiple of the token size; positions are computed for it.
        patch_embed_size: voxels of a token: a cube whose side is a power of two.
        eva_depth, eva_numheads: transformer blocks and heads.
        drop_path_rate: stochastic depth of the last block, falling linearly to 0 at the first.
        decoder_features: channels of the decoder at full resolution.

    Raises:
        PlanError: tokens that UNETR cannot double up to full resolution, a shape that they do not
            fill, or a width that heads or positions do not divide.
    """

    def __init__(
        self,
        input_channels: int,
        embed_dim: int,
        patch_embed_size: Sequence[int],
        num_classes: int,
        eva_depth: int = 12,
        eva_numheads: int = 12,
        input_shape: Sequence[int] = (128, 128, 128),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        decoder_features: int = 16,
    ):
        super().__init__()
        token_size = as_size(patch_embed_size)
        num_levels = num_doublings(token_size)
        self.grid = grid_of_input(input_shape, token_size)
        if embed_dim % eva_numheads:
            raise PlanError(
                f"width {embed_dim} is not a multiple of {eva_numheads} heads",
                code="plan-width",
            )

        # The attributes under which nnU-Net's networks name the parts that are transferred.
        self.embed_dim = embed_dim
        self.key_to_encoder = "model"
        self.key_to_stem = "model.patchifier"
        self.keys_to_in_proj = ("model.patchifier.proj",)
        self.key_to_lpe = None

        # For tokens of 16 voxels a side: after blocks 4, 7 and 10 of 12.
        self.tap_indices = []
        for k in range(1, num_levels):
            block_number = int(1 + eva_depth * k / num_levels)
            self.tap_indices.append(min(block_number, eva_depth) - 1)

        self.model = Trunk(
            input_channels,
            embed_dim,
            eva_depth,
            eva_numheads,
            token_size,
            mlp_ratio,
            drop_path_rate,
        )
        self.decoder = UnetrDecoder(
            input_channels,
            embed_dim,
            num_classes,
            num_levels,
            decoder_features,
        )

        # The positions follow from the input shape, so that no file holds them.
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid, embed_dim), persistent=False)

    def tokens(self, volume_BCZYX: Tensor) -> Tensor:
        """Return embedded tokens (B, N, V) with their positions, without START."""
        grid_BVzyx: Tensor = self.model.patchifier(volume_BCZYX)
        tokens_BNV = grid_BVzyx.flatten(2).transpose(1, 2)
        return tokens_BNV + self.positions

    def encode(self, volume_BCZYX: Tensor) -> list[Tensor]:
        """Return the tokens (B, N, V) after every block under full attention, without START.

        The last entry is normalised.
        """
        tokens_BTV = self.model.with_start(self.tokens(volume_BCZYX))
        states = self.model.hidden(tokens_BTV)
        return [state[:, 1:] for state in states]

    def forward(self, volume_BCZYX: Tensor) -> Tensor:
        """Return logits (B, classes, Z, Y, X)."""
        states = self.encode(volume_BCZYX)
        taps = [self._on_grid(states[i]) for i in self.tap_indices]
        out: Tensor = self.decoder(volume_BCZYX, taps, self._on_grid(states[-1]))
        return out

    def _on_grid(self, tokens_BNV: Tensor) -> Tensor:
        """Return the tokens as a map (B, V, z, y, x)."""
        tokens_BVN = tokens_BNV.transpose(1, 2)
        return tokens_BVN.reshape(len(tokens_BVN), -1, *self.grid)

    def compute_conv_feature_map_size(self, input_size: Any) -> int:
        """Refuse nnU-Net's measure of memory for CNNs, which does not hold for attention.

        Raises:
            NotImplementedError: always, as Primus does.
        """
        raise NotImplementedError(
            "the memory of a transformer is not proportional to its convolutional feature maps",
        )
