"""Primus, built from a plan, run over a sequence of blocks.

Pretraining runs on nnU-Net's own class, so that state-dict keys are already the downstream ones. Shape suffixes: B samples,
M members, C channels, Z Y X voxels, T = M * N tokens, N tokens of a member in raster order (z, y, x), V width.
"""

import pydoc
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, as_size, grid_of
from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.trunk import run_blocks


def build_primus(
    class_path: str,
    arguments: dict[str, Any],
    input_shape: Sequence[int],
    num_input_channels: int,
    num_classes: int,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """The network class of ``class_path`` with a plan's arguments.

    Args:
        input_shape: (z, y, x) voxels, a multiple of the token size.

    Raises:
        PlanError: the class does not exist, or the shape is no multiple of the token size.
    """
    network_class = pydoc.locate(class_path)
    if not isinstance(network_class, type):
        raise PlanError(f"the network class '{class_path}' cannot be imported; is dynamic_network_architectures installed?")
    try:
        grid_of(as_size(input_shape), arguments["patch_embed_size"])
    except ValueError as error:
        raise PlanError(f"input shape {tuple(input_shape)}: {error}") from error
    network: nn.Module = network_class(
        input_channels=num_input_channels,
        num_classes=num_classes,
        input_shape=tuple(int(s) for s in input_shape),
        drop_path_rate=drop_path_rate,
        **{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()},
    )
    return network


def to_blocks(volume_BCZYX: Tensor, block: Size) -> Tensor:
    """Cut volumes into non-overlapping cubes: (B, C, Z, Y, X) -> (B, blocks in raster order, C, z, y, x)."""
    B, C, Z, Y, X = volume_BCZYX.shape
    z, y, x = block
    cut = volume_BCZYX.reshape(B, C, Z // z, z, Y // y, y, X // x, x).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(B, (Z // z) * (Y // y) * (X // x), C, z, y, x)


def from_blocks(blocks_BKVzyx: Tensor, grid: Size) -> Tensor:
    """The inverse of ``to_blocks``: (B, blocks, V, z, y, x) -> (B, V, Z, Y, X) for ``grid`` blocks per axis."""
    B, _, V, z, y, x = blocks_BKVzyx.shape
    gz, gy, gx = grid
    whole = blocks_BKVzyx.reshape(B, gz, gy, gx, V, z, y, x).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return whole.reshape(B, V, gz * z, gy * y, gx * x)


class SequenceEncoder(nn.Module):
    """A Primus encoder that reads a sequence of blocks under an attention rule.

    The local part (tokenizer) runs on every block separately, blocks stacked on the batch axis, so that nothing crosses a
    block's border before attention does. ``primus`` keeps the downstream keys; its decoder is dropped.

    Args:
        primus: a Primus network of the crop's shape, drop-path 0.
        token_size: voxels of a token, (z, y, x).
        block_size: voxels of a block, (z, y, x), a multiple of the token size.
        recompute: keep less for the backward pass and compute it a second time (activation checkpointing).
    """

    def __init__(self, primus: nn.Module, token_size: Size, block_size: Size, recompute: bool = False):
        super().__init__()
        self.primus: Any = primus
        self.primus.up_projection = nn.Identity()
        self.token_size = token_size
        self.block_size = block_size
        self.recompute = recompute

    @property
    def width(self) -> int:
        """Length of a token's feature vector."""
        return int(self.primus.embed_dim)

    @property
    def linear_projection(self) -> nn.Conv3d | None:
        """The tokenizer's convolution if it sees one token at a time: then a matrix product does the same, several times faster."""
        tokenizer = self.primus.down_projection
        projection = getattr(tokenizer, "proj", None)
        is_linear = isinstance(tokenizer, PatchEmbed) and isinstance(projection, nn.Conv3d) and projection.kernel_size == self.token_size
        return projection if is_linear else None

    def tokens(self, voxels_BMCZYX: Tensor) -> Tensor:
        """Local features (B, T, V) of every token, members after one another."""
        B, M, C, Z, Y, X = voxels_BMCZYX.shape
        crops = voxels_BMCZYX.reshape(B * M, C, Z, Y, X)
        projection = self.linear_projection
        if projection is not None:
            cubes_NTP = to_blocks(crops, self.token_size).flatten(2)
            return functional.linear(cubes_NTP, projection.weight.flatten(1), projection.bias).reshape(B, -1, self.width)
        blocks = to_blocks(crops, self.block_size)
        local = self.primus.down_projection(blocks.flatten(0, 1))
        local = local.reshape(B * M, blocks.shape[1], *local.shape[1:])
        grid_VZYX = from_blocks(local, grid_of((Z, Y, X), self.block_size))
        return grid_VZYX.flatten(2).transpose(1, 2).reshape(B, -1, self.width)

    def rope(self, positions_BT: Tensor | None = None) -> Tensor | None:
        """Rotary table: (N, 2 * head width) of the whole grid, or (B, 1, T, 2 * head width) of the positions given."""
        if self.primus.eva.rope is None:
            return None
        table: Tensor = self.primus.eva.rope.get_embed()
        return table if positions_BT is None else table[positions_BT][:, None]

    def forward(
        self, voxels_BMCZYX: Tensor, rule: AttentionRule | None, positions_BT: Tensor | None = None, member_BTV: Tensor | None = None
    ) -> Tensor:
        """Contextual features (B, T, V).

        Args:
            rule: who may attend to whom, None for full attention.
            positions_BT: raster index of every token in the grid; None where one member fills it in order.
            member_BTV: added to the tokens; tells members apart.
        """
        eva = self.primus.eva
        x_BTV = self.tokens(voxels_BMCZYX)
        if eva.pos_embed is not None:
            x_BTV = x_BTV + (eva.pos_embed if positions_BT is None else eva.pos_embed[0][positions_BT])
        if member_BTV is not None:
            x_BTV = x_BTV + member_BTV
        x_BTV = run_blocks(eva.blocks, x_BTV, self.rope(positions_BT), rule, self.recompute)
        out: Tensor = eva.norm(x_BTV)
        return out

    def transferable_state(self) -> dict[str, Tensor]:
        """What fine-tuning loads, under the downstream keys: tokenizer, trunk and positions, float32 on the CPU."""
        prefixes = ("down_projection.", "eva.")
        state = self.primus.state_dict()
        return {
            key: value.detach().to("cpu", torch.float32).contiguous()
            for key, value in state.items()
            if key.startswith(prefixes) and not key.startswith("eva.rope.")
        }

    def adaptation(self) -> Adaptation:
        """Where the adaptable parts live."""
        p = self.primus
        return Adaptation(str(p.key_to_encoder), str(p.key_to_stem), tuple(p.keys_to_in_proj), str(p.key_to_lpe))
