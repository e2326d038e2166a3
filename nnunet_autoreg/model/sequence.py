"""An encoder that reads a sequence of blocks under an attention rule: what all families share.

Pretraining runs on nnU-Net's own classes, so that state-dict keys are already the downstream ones.
Shape suffixes: B samples, M members, C channels, Z Y X voxels, T = M * N tokens, N tokens of a
member in raster order (z, y, x), V width, K blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.attention import Rule
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.parameters import weights_under
from nnunet_autoreg.model.trunk import recomputed, run_blocks

LOCAL_PIECES = 8


def to_blocks(volume_BCZYX: Tensor, block: Size) -> Tensor:
    """Cut volumes into non-overlapping cubes:

    (B, C, Z, Y, X) -> (B, blocks in raster order, C, z, y, x).
    """
    B, C, Z, Y, X = volume_BCZYX.shape
    z, y, x = block
    cut = volume_BCZYX.reshape(B, C, Z // z, z, Y // y, y, X // x, x).permute(
        0, 2, 4, 6, 1, 3, 5, 7
    )
    return cut.reshape(B, (Z // z) * (Y // y) * (X // x), C, z, y, x)


def from_blocks(blocks_BKVzyx: Tensor, grid: Size) -> Tensor:
    """The inverse of ``to_blocks``:

    (B, blocks, V, z, y, x) -> (B, V, Z, Y, X) for ``grid`` blocks per axis.
    """
    B, _, V, z, y, x = blocks_BKVzyx.shape
    gz, gy, gx = grid
    whole = blocks_BKVzyx.reshape(B, gz, gy, gx, V, z, y, x).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return whole.reshape(B, V, gz * z, gy * y, gx * x)


def to_tokens(volume_BMCZYX: Tensor, token: Size) -> Tensor:
    """Return the voxels of every token, (B, T, P) with P = (C, z, y, x) flattened."""
    cubes = to_blocks(volume_BMCZYX.flatten(0, 1), token).flatten(2)
    return cubes.reshape(volume_BMCZYX.shape[0], -1, cubes.shape[-1])


def from_tokens(tokens_BTP: Tensor, token: Size, shape_BMCZYX: Sequence[int]) -> Tensor:
    """Return the first channel of every token in its place, (B, M, Z, Y, X)."""
    B, M, _, Z, Y, X = shape_BMCZYX
    cubes = tokens_BTP[:, :, : volume(token)].reshape(B * M, -1, 1, *token)
    return from_blocks(cubes, grid_of((Z, Y, X), token)).reshape(B, M, Z, Y, X)


class SequenceEncoder(nn.Module):
    """A downstream network without its decoder, and what else pretraining needs to read a sequence
    of blocks with it.

    The local part - a linear or convolutional tokenizer, or a whole CNN - runs on every block
    separately, blocks stacked on the batch axis, so that nothing crosses a block's border before
    attention does: no receptive field, no statistics of a norm. A transformer then reads all tokens
    under a rule. Families differ in ``local``, ``trunk`` and in what transfers.

    Args:
        network: the downstream network of the crop's shape, drop-path 0; it keeps the downstream
            keys.
        token_size: voxels of a token, (z, y, x).
        block_size: voxels of a block, (z, y, x), a multiple of the token size.
        recompute: keep less for the backward pass and compute it a second time (activation
            checkpointing).
    """

    transfers: tuple[str, ...] = ()
    """Prefixes of the downstream keys that fine-tuning loads."""
    num_starts = 0
    """Tokens that the transformer reads in front of the sequence and that stand for no place:

    1 with a START token.
    """

    def __init__(
        self, network: nn.Module, token_size: Size, block_size: Size, recompute: bool = False
    ):
        super().__init__()
        self.network: Any = network
        self.token_size = token_size
        self.block_size = block_size
        self.recompute = recompute

    @property
    def trunk(self) -> Any:
        """The transformer: dynamic_network_architectures' ``Eva``."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Length of a token's feature vector."""
        return int(self.trunk.embed_dim)

    @property
    def num_heads(self) -> int:
        """Attention heads of the transformer."""
        return int(self.trunk.blocks[0].attn.num_heads)

    @property
    def linear_projection(self) -> nn.Conv3d | None:
        """The tokenizer's convolution if it sees one token at a time: then a matrix product does
        the same, several times faster.
        """
        return None

    def local(self, volumes_BCZYX: Tensor) -> Tensor:
        """Local features (B, V, z, y, x) of every token, from volumes of any size in whole
        tokens.
        """
        raise NotImplementedError

    def tokens(self, voxels_BMCZYX: Tensor, block_size: Size | None = None) -> Tensor:
        """Local features (B, T, V) of every token, members after one another.

        Args:
            block_size: voxels of the blocks that are looked at separately; None for those of the
                sequence.
        """
        B, M, C, Z, Y, X = voxels_BMCZYX.shape
        crops = voxels_BMCZYX.reshape(B * M, C, Z, Y, X)
        projection = self.linear_projection
        if projection is not None:
            cubes_NTP = to_blocks(crops, self.token_size).flatten(2)
            return functional.linear(
                cubes_NTP, projection.weight.flatten(1), projection.bias
            ).reshape(B, -1, self.width)
        block_size = block_size or self.block_size
        blocks = to_blocks(crops, block_size)
        local = (
            self._local_in_pieces(blocks.flatten(0, 1))
            if self.recompute
            else self.local(blocks.flatten(0, 1))
        )
        local = local.reshape(B * M, blocks.shape[1], *local.shape[1:])
        grid_VZYX = from_blocks(local, grid_of((Z, Y, X), block_size))
        return grid_VZYX.flatten(2).transpose(1, 2).reshape(B, -1, grid_VZYX.shape[1])

    def _local_in_pieces(self, blocks_BCZYX: Tensor) -> Tensor:
        """``local``, computed twice, piece by piece, so that the second time the inside of one of
        them is there at once.
        """
        return torch.cat(
            [recomputed(self.local, True, piece) for piece in blocks_BCZYX.chunk(LOCAL_PIECES)]
        )

    def rope(self, positions_BT: Tensor | None = None) -> Tensor | None:
        """Rotary table: (N, 2 * head width) of the whole grid, or (B, 1, T, 2 * head width) of the
        positions given.
        """
        if self.trunk.rope is None:
            return None
        table: Tensor = self.trunk.rope.get_embed()
        return table if positions_BT is None else table[positions_BT][:, None]

    def contextual(
        self,
        x_BTV: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Contextual features of local ones; see ``forward``."""
        trunk = self.trunk
        if trunk.pos_embed is not None:
            x_BTV = x_BTV + (
                trunk.pos_embed if positions_BT is None else trunk.pos_embed[0][positions_BT]
            )
        if member_BTV is not None:
            x_BTV = x_BTV + member_BTV
        out: Tensor = trunk.norm(
            run_blocks(trunk.blocks, x_BTV, self.rope(positions_BT), rule, self.recompute)
        )
        return out

    def forward(
        self,
        voxels_BMCZYX: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Contextual features (B, num_starts + T, V).

        Args:
            rule: who may attend to whom, None for full attention. It counts the start tokens too
                (``attention.with_starts``).
            positions_BT: raster index of every token in the grid; None where one member fills it in
                order.
            member_BTV: added to the tokens; tells members apart.
        """
        return self.contextual(self.tokens(voxels_BMCZYX), rule, positions_BT, member_BTV)

    def describe(
        self, voxels_BMCZYX: Tensor, rule: Rule | None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Features (B, T, *) of the tokens as fine-tuning gets them: the local part sees each whole
        crop at once.

        Args:
            rule, positions_BT: as of ``forward``.
        """
        whole = as_size(voxels_BMCZYX.shape[3:])
        return self.contextual(self.tokens(voxels_BMCZYX, whole), rule, positions_BT)[
            :, self.num_starts :
        ]

    def transferable_state(self) -> dict[str, Tensor]:
        """Return what fine-tuning loads, under the downstream keys (``weights_under``)."""
        return weights_under(self.network, self.transfers)

    def adaptation(self) -> Adaptation:
        """Where the adaptable parts live."""
        n = self.network
        positions = None if n.key_to_lpe is None else str(n.key_to_lpe)
        return Adaptation(
            str(n.key_to_encoder), str(n.key_to_stem), tuple(n.keys_to_in_proj), positions
        )
