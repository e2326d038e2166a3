"""Transformer encoders that read a sequence of blocks under an attention rule.

``SequenceEncoder`` is what all families share, ``PrimusEncoder`` and ``ViTEncoder`` are the
families. Pretraining runs on the classes of the downstream networks, so that state-dict keys are
the downstream ones from the start.

Shape suffixes: B samples, M members, C channels, Z Y X voxels, T = M * N tokens, N tokens of a
member in raster order (z, y, x), V width, K blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.attention import Rule
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.parameters import weights_under
from nnunet_autoreg.model.trunk import recomputed, run_blocks

LOCAL_PIECES = 8
"""Pieces in which blocks are tokenised if activations are recomputed."""


def to_blocks(volume_BCZYX: Tensor, block: Size) -> Tensor:
    """Cut volumes (B, C, Z, Y, X) into cubes (B, K, C, z, y, x), K cubes in raster order."""
    B, C, Z, Y, X = volume_BCZYX.shape
    z, y, x = block
    gz, gy, gx = Z // z, Y // y, X // x

    cut = volume_BCZYX.reshape(B, C, gz, z, gy, y, gx, x)
    cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, gz, gy, gx, C, z, y, x)
    return cut.reshape(B, gz * gy * gx, C, z, y, x)


def from_blocks(blocks_BKVzyx: Tensor, grid: Size) -> Tensor:
    """Put cubes (B, K, V, z, y, x) back together as volumes (B, V, Z, Y, X).

    This is the inverse of ``to_blocks``, for ``grid`` cubes per axis.
    """
    B, _, V, z, y, x = blocks_BKVzyx.shape
    gz, gy, gx = grid

    whole = blocks_BKVzyx.reshape(B, gz, gy, gx, V, z, y, x)
    whole = whole.permute(0, 4, 1, 5, 2, 6, 3, 7)  # (B, V, gz, z, gy, y, gx, x)
    return whole.reshape(B, V, gz * z, gy * y, gx * x)


def to_tokens(volume_BMCZYX: Tensor, token: Size) -> Tensor:
    """Return the voxels of every token, (B, T, P) with P = (C, z, y, x) flattened."""
    B = volume_BMCZYX.shape[0]
    crops = volume_BMCZYX.flatten(0, 1)  # (B * M, C, Z, Y, X)
    cubes = to_blocks(crops, token).flatten(2)  # (B * M, N, P)
    return cubes.reshape(B, -1, cubes.shape[-1])


def from_tokens(tokens_BTP: Tensor, token: Size, shape_BMCZYX: Sequence[int]) -> Tensor:
    """Return the first channel of every token at its position in the crop, (B, M, Z, Y, X)."""
    B, M, _, Z, Y, X = shape_BMCZYX
    first_channel = tokens_BTP[:, :, : volume(token)]  # (B, T, z * y * x)
    cubes = first_channel.reshape(B * M, -1, 1, *token)
    whole = from_blocks(cubes, grid_of((Z, Y, X), token))  # (B * M, 1, Z, Y, X)
    return whole.reshape(B, M, Z, Y, X)


class SequenceEncoder(nn.Module):
    """A downstream network without its decoder, which reads a sequence of blocks.

    The local part, a linear or convolutional tokenizer, runs on every block separately, with the
    blocks stacked on the batch axis. Nothing crosses the border of a block before attention does:
    no receptive field, and no statistics of a norm. A transformer then reads all tokens under a
    rule. Families differ in ``local``, ``trunk`` and in what transfers.

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
    """Tokens in front of the sequence that have no position: 1 with a START token."""

    def __init__(
        self,
        network: nn.Module,
        token_size: Size,
        block_size: Size,
        recompute: bool = False,
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
        """The tokenizer's convolution if it sees one token at a time, else None.

        A matrix product then gives the same several times faster.
        """
        return None

    def local(self, volumes_BCZYX: Tensor) -> Tensor:
        """Return local features (B, V, z, y, x) of every token of volumes of any size."""
        raise NotImplementedError

    def tokens(self, voxels_BMCZYX: Tensor, block_size: Size | None = None) -> Tensor:
        """Return local features (B, T, V) of every token, members after one another.

        Args:
            block_size: voxels of the blocks that are read separately; None for those of the
                sequence.
        """
        B, M, C, Z, Y, X = voxels_BMCZYX.shape
        crops = voxels_BMCZYX.reshape(B * M, C, Z, Y, X)

        # A linear tokenizer sees one token at a time, regardless of the size of a block.
        projection = self.linear_projection
        if projection is not None:
            cubes = to_blocks(crops, self.token_size).flatten(2)  # (B * M, N, P)
            tokens = functional.linear(cubes, projection.weight.flatten(1), projection.bias)
            return tokens.reshape(B, -1, self.width)

        block_size = block_size or self.block_size
        blocks = to_blocks(crops, block_size)  # (B * M, K, C, z, y, x)
        stacked = blocks.flatten(0, 1)  # (B * M * K, C, z, y, x)
        if self.recompute:
            # In pieces, so that the inside of only one of them is in memory when it is recomputed.
            pieces = stacked.chunk(LOCAL_PIECES)
            local = torch.cat([recomputed(self.local, True, piece) for piece in pieces])
        else:
            local = self.local(stacked)

        local = local.reshape(B * M, blocks.shape[1], *local.shape[1:])
        whole = from_blocks(local, grid_of((Z, Y, X), block_size))  # (B * M, V, gz, gy, gx)
        return whole.flatten(2).transpose(1, 2).reshape(B, -1, whole.shape[1])

    def rope(self, positions_BT: Tensor | None = None) -> Tensor | None:
        """Return the rotary table; None if there is none.

        It is (N, 2 * head width) for the whole grid, or (B, 1, T, 2 * head width) for positions.
        """
        if self.trunk.rope is None:
            return None
        table: Tensor = self.trunk.rope.get_embed()
        if positions_BT is None:
            return table
        return table[positions_BT][:, None]

    def contextual(
        self,
        x_BTV: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Return contextual features (B, T, V) of local ones; see ``forward``."""
        trunk = self.trunk
        table = trunk.pos_embed  # (1, N, V)
        if table is not None:
            x_BTV = x_BTV + (table if positions_BT is None else table[0][positions_BT])
        if member_BTV is not None:
            x_BTV = x_BTV + member_BTV

        rope = self.rope(positions_BT)
        x_BTV = run_blocks(trunk.blocks, x_BTV, rope, rule, self.recompute)
        out: Tensor = trunk.norm(x_BTV)
        return out

    def forward(
        self,
        voxels_BMCZYX: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Return contextual features (B, num_starts + T, V).

        Args:
            rule: attention rule; None for full attention. It includes the start tokens
                (``attention.with_starts``).
            positions_BT: raster index of every token in the grid; None if one member fills it in
                order.
            member_BTV: added to the tokens, to distinguish members.
        """
        tokens_BTV = self.tokens(voxels_BMCZYX)
        return self.contextual(tokens_BTV, rule, positions_BT, member_BTV)

    def describe(
        self,
        voxels_BMCZYX: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Return features (B, T, *) as fine-tuning gets them: the local part sees whole crops.

        Args:
            rule, positions_BT: as of ``forward``.
        """
        whole = as_size(voxels_BMCZYX.shape[3:])
        tokens_BTV = self.tokens(voxels_BMCZYX, whole)
        features = self.contextual(tokens_BTV, rule, positions_BT)  # (B, num_starts + T, V)
        return features[:, self.num_starts :]

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights that fine-tuning loads, under the downstream keys
        (``weights_under``)."""
        return weights_under(self.network, self.transfers)

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        network = self.network
        positions = network.key_to_lpe
        return Adaptation(
            key_to_encoder=str(network.key_to_encoder),
            key_to_stem=str(network.key_to_stem),
            keys_to_in_proj=tuple(network.keys_to_in_proj),
            key_to_lpe=None if positions is None else str(positions),
        )


class PrimusEncoder(SequenceEncoder):
    """Primus, PrimusV2 and PrimusV3 without their decoder.

    The convolutional tokenizers of V2 and V3 look far beyond a token and normalise over all that
    they see. In fine-tuning they see a whole patch, in pretraining one block.
    """

    transfers = ("down_projection.", "eva.")

    def __init__(
        self,
        network: nn.Module,
        token_size: Size,
        block_size: Size,
        recompute: bool = False,
    ):
        super().__init__(network, token_size, block_size, recompute)
        # The decoder's weights would take memory, and be saved, for nothing.
        self.network.up_projection = nn.Identity()

    @property
    def trunk(self) -> Any:
        """The network's own transformer."""
        return self.network.eva

    @property
    def linear_projection(self) -> nn.Conv3d | None:
        """The patch embedding of the first Primus; V2 and V3 have none."""
        tokenizer = self.network.down_projection
        projection = getattr(tokenizer, "proj", None)
        # Only a kernel of exactly one token is a matrix product of the token's voxels.
        is_linear = (
            isinstance(tokenizer, PatchEmbed)
            and isinstance(projection, nn.Conv3d)
            and projection.kernel_size == self.token_size
        )
        return projection if is_linear else None

    def local(self, volumes_BCZYX: Tensor) -> Tensor:
        """Return the tokenizer's output."""
        out: Tensor = self.network.down_projection(volumes_BCZYX)
        return out


class ViTEncoder(SequenceEncoder):
    """AR-SSL4M's ViT without its UNETR decoder.

    The START token goes in front of the sequence, as one more block that is always given.
    """

    transfers = ("model.",)
    num_starts = 1

    def __init__(
        self,
        network: nn.Module,
        token_size: Size,
        block_size: Size,
        recompute: bool = False,
    ):
        super().__init__(network, token_size, block_size, recompute)
        self.network.decoder = nn.Identity()

    @property
    def trunk(self) -> Any:
        """The network's own transformer, ``model.vit.Trunk``."""
        return self.network.model

    @property
    def width(self) -> int:
        """Length of a token's feature vector."""
        return int(self.network.embed_dim)

    @property
    def num_heads(self) -> int:
        """Attention heads of the transformer."""
        return int(self.trunk.layers[0].self_attn.num_heads)

    @property
    def linear_projection(self) -> nn.Conv3d:
        """The patch embedding."""
        projection: nn.Conv3d = self.trunk.patchifier.proj
        return projection

    def rope(self, positions_BT: Tensor | None = None) -> None:
        """Return None: there is no rotary table."""

    def contextual(
        self,
        x_BTV: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Return features (B, 1 + T, V) of START and the tokens; see ``forward``."""
        table = self.network.positions  # (1, N, V)
        x_BTV = x_BTV + (table if positions_BT is None else table[0][positions_BT])
        if member_BTV is not None:
            x_BTV = x_BTV + member_BTV

        trunk = self.trunk
        x_BTV = trunk.with_start(x_BTV)  # (B, 1 + T, V)
        x_BTV = run_blocks(trunk.layers, x_BTV, None, rule, self.recompute)
        out: Tensor = trunk.norm(x_BTV)
        return out


def counted_mean(tokens_BTV: Tensor, counted_BT: Tensor) -> Tensor:
    """Return the mean of each sample's counted tokens, (B, V); 0 if none counts.

    Args:
        counted_BT: bool.
    """
    weight_BT1 = counted_BT[:, :, None].to(tokens_BTV.dtype)
    sum_BV = (tokens_BTV * weight_BT1).sum(dim=1)
    number_B1 = weight_BT1.sum(dim=1).clamp(min=1)
    mean_BV: Tensor = sum_BV / number_B1
    return mean_BV
