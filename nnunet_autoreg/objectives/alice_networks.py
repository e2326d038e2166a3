"""The parts of Alice: encoders with a decoder for reconstruction, projection heads, and CASA.

Student and teacher are made of the same parts. The student is shown a part of the tokens, the
teacher all of them.

Shape suffixes: N crops, C channels, Z Y X voxels, T tokens of a crop in raster order, S visible
tokens, K blocks, P voxels of a token, V features of the encoder, W features of the decoder, D
features of the heads, Q queries, O prototypes.

Source: Alice (ICCV 2023); the projection heads are those of DINO (arXiv 2104.14294). For CNNs,
zeros at hidden places after every stage stand for sparse convolution, as in SparK (arXiv
2301.03580).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.families import family_of, has_transformer
from nnunet_autoreg.geometry import Size, as_size, grid_of, multiplied, volume
from nnunet_autoreg.model.attention import VisibleKeys, attend
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.encoders import build_sequence_encoder
from nnunet_autoreg.model.predictors import CrossLayer
from nnunet_autoreg.model.sequence import counted_mean, to_blocks, to_tokens
from nnunet_autoreg.model.trunk import mask_of, recomputed, run_layer
from nnunet_autoreg.model.unet import PretrainingUNet, build_unet
from nnunet_autoreg.objectives.alice_crops import Crops
from nnunet_autoreg.objectives.alice_plan import HEADS_OF_CASA, AlicePlan, alice_of
from nnunet_autoreg.plan import Plan

BOTTLENECK = 256
"""Features that are normalised before they are compared with the prototypes."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder says of crops.

    Attributes:
        tokens: (N, T, V). At hidden tokens they are 0.
        stages: features of all stages of a CNN, the finest first; () for a transformer.
    """

    tokens: Tensor
    stages: tuple[Tensor, ...] = ()


class TransformerBackbone(nn.Module):
    """A transformer encoder with a small decoder. Hidden tokens never enter the encoder."""

    def __init__(self, plan: Plan):
        super().__init__()
        settings = alice_of(plan)
        sequence, token = plan.sequence, plan.encoder.token_size_vox
        self.recompute = plan.optim.checkpoint_activations
        self.token_size = token
        self.block_tokens = sequence.block_tokens
        self.block_size = multiplied(token, sequence.block_tokens)

        self.encoder = build_sequence_encoder(
            plan.encoder,
            sequence.crop_size_vox,
            sequence.block_tokens,
            1,
            self.recompute,
        )
        self.width = self.decoder_width = self.encoder.width
        num_positions = volume(grid_of(sequence.crop_size_vox, token))
        # Stands for every hidden token in the decoder, which knows it only by its position.
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        self.position = nn.Parameter(torch.empty(num_positions, self.width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.layers = nn.ModuleList(
            CrossLayer(self.width, self.encoder.num_heads) for _ in range(settings.decoder_depth)
        )
        self.norm = nn.LayerNorm(self.width)
        self.to_voxels = nn.Linear(self.width, volume(token))

    @property
    def network(self) -> nn.Module:
        """The downstream network."""
        network: nn.Module = self.encoder.network
        return network

    def encode_all(self, crops: Crops) -> Encoded:
        """Return features of all tokens, which attend to each other."""
        rule = self._rule(crops.valid)
        # (N, starts + T, V); start tokens are not part of the image.
        features = self.encoder(crops.voxels[:, None], rule, crops.positions)
        return Encoded(features[:, self.encoder.num_starts :])

    def encode_visible(self, crops: Crops) -> Encoded:
        """Return features of the visible tokens, which attend only to each other."""
        # Hidden blocks are dropped here: nothing of them can reach the encoder.
        blocks_NKCzyx = to_blocks(crops.voxels, self.block_size)
        rows_N1 = torch.arange(len(blocks_NKCzyx), device=crops.voxels.device)[:, None]
        visible_NKCzyx = blocks_NKCzyx[rows_N1, crops.visible_blocks]

        # Padding is not a key, also within visible blocks.
        rule = self._rule(crops.valid.gather(1, crops.visible))
        positions_NS = crops.positions.gather(1, crops.visible)
        features_NSV = self.encoder(visible_NKCzyx, rule, positions_NS)
        features_NSV = features_NSV[:, self.encoder.num_starts :]

        # Back at the positions of the tokens, with 0 at the hidden ones.
        everywhere_NTV = features_NSV.new_zeros(*crops.valid.shape, self.width)
        index_NSV = crops.visible[:, :, None].expand_as(features_NSV)
        return Encoded(everywhere_NTV.scatter(1, index_NSV, features_NSV))

    def decode(self, encoded: Encoded, crops: Crops, all_visible: bool) -> tuple[Tensor, Tensor]:
        """Return decoder tokens (N, T, W) and predicted voxels (N, T, P)."""
        tokens_NTW = encoded.tokens
        if not all_visible:
            hidden_W = self.mask_token.to(tokens_NTW.dtype)
            tokens_NTW = torch.where(crops.is_visible[:, :, None], tokens_NTW, hidden_W)
        tokens_NTW = tokens_NTW + self.position[crops.positions]

        # The tokens are queries and keys of the same layer, which is then self-attention.
        mask = mask_of(VisibleKeys(crops.valid), self.encoder.num_heads)
        for layer in self.layers:
            tokens_NTW = run_layer(layer, self.recompute, tokens_NTW, tokens_NTW, mask, None, None)
        tokens_NTW = self.norm(tokens_NTW)
        return tokens_NTW, self.to_voxels(tokens_NTW)

    def describe(self, voxels_NCZYX: Tensor, valid_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Return features (N, T, V) as fine-tuning gets them."""
        features: Tensor = self.encoder.describe(
            voxels_NCZYX[:, None],
            self._rule(valid_NT),
            positions_NT,
        )
        return features

    def _rule(self, valid_NT: Tensor) -> VisibleKeys:
        # Start tokens are always valid.
        padded = functional.pad(valid_NT, (self.encoder.num_starts, 0), value=True)
        return VisibleKeys(padded)

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights that fine-tuning loads, under the downstream keys."""
        return self.encoder.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.encoder.adaptation()


class CnnBackbone(nn.Module):
    """A U-Net. Voxels and features at hidden places are set to 0 after every encoder stage."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.token_size = plan.encoder.token_size_vox
        network = build_unet(plan)
        self.unet = PretrainingUNet(
            network,
            learned_mark=False,
            recompute=plan.optim.checkpoint_activations,
        )
        channels = [int(number) for number in network.encoder.output_channels]
        # The decoder's coarsest map has the channels of the stage before the last.
        self.width, self.decoder_width = channels[-1], channels[-2]

    @property
    def network(self) -> nn.Module:
        """The downstream network."""
        network: nn.Module = self.unet.network
        return network

    def encode_all(self, crops: Crops) -> Encoded:
        """Return the features of the whole crops."""
        return self._encoded(self.unet.encode(crops.voxels))

    def encode_visible(self, crops: Crops) -> Encoded:
        """Return features that depend only on visible voxels, and are 0 at hidden places."""
        size = as_size(crops.voxels.shape[2:])
        grid = grid_of(size, self.token_size)
        visible_N1zyx = crops.is_visible.reshape(-1, 1, *grid).to(crops.voxels.dtype)

        network = self.unet.network
        # Voxels first, then the features of every stage: a convolution reads across the border.
        shown = crops.voxels * _enlarged(visible_N1zyx, size)
        x_NVZYX = network.encoder.stem(shown)
        stages = []
        for stage in network.encoder.stages:
            x_NVZYX = recomputed(stage, self.unet.recompute, x_NVZYX)
            # Biases and norms have filled the hidden places.
            x_NVZYX = x_NVZYX * _enlarged(visible_N1zyx, as_size(x_NVZYX.shape[2:]))
            stages.append(x_NVZYX)
        return self._encoded(stages)

    def decode(self, encoded: Encoded, crops: Crops, all_visible: bool) -> tuple[Tensor, Tensor]:
        """Return decoder tokens (N, T, W) and predicted voxels (N, T, P).

        The tokens are the means of the coarsest decoder map over each cell of the bottleneck.
        """
        # Coarsest first; the last one has the resolution of the crop.
        maps = self.unet.decode(encoded.stages)
        predicted_N1ZYX = self.unet.network.decoder.seg_layers[-1](maps[-1])

        depth, height, width = encoded.stages[-1].shape[2:]
        cells_NWzyx = functional.adaptive_avg_pool3d(maps[0], (depth, height, width))
        return _as_tokens(cells_NWzyx), to_tokens(predicted_N1ZYX[:, None], self.token_size)

    def describe(self, voxels_NCZYX: Tensor, valid_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Return the deepest features (N, T, V) of whole crops, as fine-tuning gets them."""
        return _as_tokens(self.unet.encode(voxels_NCZYX)[-1])

    def _encoded(self, stages: list[Tensor]) -> Encoded:
        return Encoded(_as_tokens(stages[-1]), tuple(stages))

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights of encoder and decoder under the downstream network's keys."""
        return self.unet.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.unet.adaptation()


def _as_tokens(map_NVzyx: Tensor) -> Tensor:
    """Return the cells of a map as tokens in raster order, (N, T, V)."""
    return map_NVzyx.flatten(2).transpose(1, 2)


def _enlarged(mask_N1zyx: Tensor, size: Size) -> Tensor:
    """Return a mask of tokens at a finer grid, of which every token is a cube."""
    return functional.interpolate(mask_N1zyx, size=size, mode="nearest")


class ProjectionHead(nn.Module):
    """Scores of the prototypes, D -> O: an MLP, a normalised vector, and directions to compare it.

    Tokens and whole volumes share the MLP and have their own directions.
    """

    def __init__(self, settings: AlicePlan):
        super().__init__()
        width, hidden = settings.width, settings.hidden
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, BOTTLENECK),
        )
        # Of length 1 in use, so that a score is a cosine.
        self.class_prototypes = nn.Parameter(torch.empty(settings.num_prototypes, BOTTLENECK))
        self.patch_prototypes = nn.Parameter(torch.empty(settings.num_prototypes, BOTTLENECK))
        for prototypes in (self.class_prototypes, self.patch_prototypes):
            nn.init.trunc_normal_(prototypes, std=0.02)

    def classes(self, x_D: Tensor) -> Tensor:
        """Return the scores of volumes (..., O)."""
        return self._scores(x_D, self.class_prototypes)

    def patches(self, x_D: Tensor) -> Tensor:
        """Return the scores of tokens (..., O)."""
        return self._scores(x_D, self.patch_prototypes)

    def _scores(self, x_D: Tensor, prototypes: Tensor) -> Tensor:
        # Lengths are removed on both sides: a score is a cosine, -1 to 1.
        direction = functional.normalize(self.mlp(x_D), dim=-1)
        return functional.linear(direction, functional.normalize(prototypes, dim=-1))


class Casa(nn.Module):
    """Cross-attention from the student's visible tokens to tokens of one side, post-norm.

    Keys and values have no positions: their order changes nothing. The published block drops a
    tenth of its features at random. Nothing is dropped here, so that one process and several
    compute the same loss.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, query_NQD: Tensor, key_NTD: Tensor, valid_NT: Tensor) -> Tensor:
        """Return (N, Q, D), one vector for each query.

        Args:
            valid_NT: False where a key is padding.
        """
        # (N, T, D) each, then (N, H, T, D / H)
        key, value = self.key_value(key_NTD).chunk(2, dim=-1)
        query, key, value = (_heads(x) for x in (self.query(query_NQD), key, value))
        mask = mask_of(VisibleKeys(valid_NT), HEADS_OF_CASA)
        seen_NQD = attend(query, key, value, mask).transpose(1, 2).flatten(2)
        x_NQD = self.norm_attention(query_NQD + self.project(seen_NQD))
        out: Tensor = self.norm_out(x_NQD + self.feed_forward(x_NQD))
        return out


def _heads(x_NTD: Tensor) -> Tensor:
    """Return the features of every head, (N, H, T, D / H)."""
    heads_NTHD: Tensor = x_NTD.reshape(*x_NTD.shape[:2], HEADS_OF_CASA, -1)
    return heads_NTHD.transpose(1, 2)


class AliceNetwork(nn.Module):
    """All that the student has, and the teacher as well."""

    def __init__(self, plan: Plan):
        super().__init__()
        settings = alice_of(plan)
        is_transformer = has_transformer(family_of(plan.encoder.class_path))
        self.backbone: TransformerBackbone | CnnBackbone
        self.backbone = TransformerBackbone(plan) if is_transformer else CnnBackbone(plan)

        self.project_encoder = _projection(self.backbone.width, settings.width)
        self.project_decoder = _projection(self.backbone.decoder_width, settings.width)
        self.head = ProjectionHead(settings)
        is_figure = settings.casa == "figure"
        casa_width = settings.width if is_figure else settings.num_prototypes
        self.casa = Casa(casa_width, settings.hidden)

    def class_scores(self, tokens_NTV: Tensor, counted_NT: Tensor) -> Tensor:
        """Return the scores of whole volumes (N, O), from the mean of their counted tokens."""
        mean_NV = counted_mean(tokens_NTV, counted_NT)
        return self.head.classes(self.project_encoder(mean_NV))


def _projection(width_in: int, width_out: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width_out))
