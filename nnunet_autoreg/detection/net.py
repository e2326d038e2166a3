"""Build a Retina U-Net on the networks that fine-tuning builds: segmentation, and boxes beside it.

The boxes come from several feature maps. Encoder and decoder keep their key names, so that
pretrained weights load as they do for segmentation. The keys of new layers begin with
``detection.``. In training, and if ``detect`` is set, ``forward`` returns an ``Output``. Otherwise
it returns only the segmentation logits, so that stock ``nnUNetv2_predict`` works.

Shape suffixes: B samples, C channels, Z Y X voxels, z y x cells of a feature map, A anchors of all
levels, K classes.

Source: Jaeger et al. 2018, "Retina U-Net" (arXiv 1811.08661); Li et al. 2022, "Exploring plain
    vision transformer backbones for object detection" (arXiv 2203.16527) for the pyramid over
    tokens.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import (
    LayerNormNd,
    PatchEmbedDeeperControlled,
)
from torch import Tensor, nn

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import RESENC, VIT, family_of, token_size_of
from nnunet_autoreg.geometry import Size, as_size, multiplied
from nnunet_autoreg.model.feature_maps import NAMES_OF_PARTS

PRIOR = 0.01
"""Score that an untrained head gives to every anchor."""
FINEST_STRIDE, COARSER_STAGES = 2, 2
"""Token maps are enlarged up to stride 2, and reduced by up to two stages."""
GROUP = 16
"""Channels that are normalised together in the heads."""


class Output(NamedTuple):
    """Hold the output of the network for a batch.

    Attributes:
        logits_BCZYX: segmentation logits.
        scores_BAK: one logit per anchor and class.
        deltas_BA6: from the anchor to the box (boxes.encode).
        cells: number of cells (z, y, x) of each level.
    """

    logits_BCZYX: Tensor  # noqa: N815
    scores_BAK: Tensor  # noqa: N815
    deltas_BA6: Tensor  # noqa: N815
    cells: tuple[Size, ...]


class Heads(nn.Module):
    """Classifier and box regressor, shared by all levels.

    Only the scale of the deltas differs between levels.
    """

    def __init__(self, num_channels: int, num_shapes: int, num_classes: int, num_levels: int):
        super().__init__()
        self.num_classes = num_classes
        self.classifier = _head(num_channels, num_shapes * num_classes)
        self.regressor = _head(num_channels, num_shapes * 6)
        # Levels may need deltas of different size.
        self.scales = nn.Parameter(torch.ones(num_levels))
        # Scores start low. Otherwise the many background anchors would dominate the first steps.
        to_scores: Any = self.classifier[-1]
        nn.init.constant_(to_scores.bias, -math.log((1 - PRIOR) / PRIOR))
        # Training starts from the anchors as they are. From random deltas, SGD at 1e-2 drove sides
        # to their limit, where the gradient is 0.
        to_deltas: Any = self.regressor[-1]
        nn.init.zeros_(to_deltas.weight)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (B, A, K) and deltas (B, A, 6).

        Anchors are in the order of levels, then cells (z, y, x), then shapes.
        """
        scores = []
        deltas = []
        for level, features in enumerate(maps):
            scores.append(_by_anchor(self.classifier(features), self.num_classes))
            deltas.append(_by_anchor(self.regressor(features), 6) * self.scales[level])
        return torch.cat(scores, 1), torch.cat(deltas, 1)


def _by_anchor(values_BCzyx: Tensor, size: int) -> Tensor:
    """Return the values of a map with ``size`` channels per anchor as (B, anchors, size)."""
    return values_BCzyx.permute(0, 2, 3, 4, 1).reshape(values_BCzyx.shape[0], -1, size)


def _head(num_channels: int, num_outputs: int) -> nn.Sequential:
    """Return two normalised convolutions and one that gives the outputs, with small weights."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(nn.Conv3d(num_channels, num_channels, 3, padding=1, bias=False))
        layers.append(nn.GroupNorm(max(1, num_channels // GROUP), num_channels))
        layers.append(nn.ReLU(inplace=True))

    layers.append(nn.Conv3d(num_channels, num_outputs, 3, padding=1))
    for layer in layers:
        if isinstance(layer, nn.Conv3d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """A segmentation network whose inner feature maps feed the heads; the base of all detectors.

    Args:
        network: network of ``encoders.build_network``, without deep supervision.
        parts: names of its children that become children of the detector.
        level_channels: channels of the feature map of every level, finest first.
        num_shapes: anchors per cell.
        num_channels: channels of the laterals and heads.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: Sequence[str],
        level_channels: Sequence[int],
        num_shapes: int,
        num_classes: int,
        num_channels: int,
    ):
        super().__init__()
        for part in parts:
            setattr(self, part, getattr(network, part))
        for name in NAMES_OF_PARTS:
            setattr(self, name, getattr(network, name))
        self.detect = False
        laterals = [nn.Conv3d(c, num_channels, kernel_size=1) for c in level_channels]
        heads = Heads(num_channels, num_shapes, num_classes, len(level_channels))
        self.detection = nn.ModuleDict({"laterals": nn.ModuleList(laterals), "heads": heads})

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return segmentation logits (B, C, Z, Y, X) and the feature map of every level."""
        raise NotImplementedError

    def forward(self, image_BCZYX: Tensor) -> Output | Tensor:
        """Return an ``Output`` in training or if ``detect`` is set, else segmentation logits."""
        logits, maps = self.both(image_BCZYX)
        if not (self.training or self.detect):
            return logits
        laterals: Any = self.detection["laterals"]
        heads: Any = self.detection["heads"]

        maps = [lateral(features) for lateral, features in zip(laterals, maps, strict=True)]
        scores, deltas = heads(maps)
        cells = tuple(as_size(features.shape[2:]) for features in maps)
        return Output(logits, scores, deltas, cells)


class ResEncDetector(Detector):
    """nnU-Net's residual encoder U-Net.

    The feature maps are the outputs of the decoder's stages, and the bottleneck.

    Args:
        stages: for each level, the index of a stage of the encoder; 0 is at full resolution.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[int],
        num_shapes: int,
        num_classes: int,
        num_channels: int,
    ):
        encoder: Any = network.encoder
        channels = [int(encoder.output_channels[stage]) for stage in stages]
        super().__init__(
            network,
            ("encoder", "decoder"),
            channels,
            num_shapes,
            num_classes,
            num_channels,
        )
        self.stages = tuple(stages)
        # Without deep supervision no gradient reaches the coarser outputs, and distributed training
        # waits for every gradient.
        decoder: Any = self.decoder
        decoder.seg_layers[:-1].requires_grad_(False)

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return segmentation logits (B, C, Z, Y, X) and the feature map of every level."""
        decoder: Any = self.decoder
        encoder: Any = self.encoder
        skips = encoder(image_BCZYX)
        x = skips[-1]
        outputs = [x]
        coarsest_first = reversed(skips[:-1])
        for up, stage, skip in zip(
            decoder.transpconvs,
            decoder.stages,
            coarsest_first,
            strict=True,
        ):
            x = stage(torch.cat([up(x), skip], 1))
            outputs.append(x)

        logits = decoder.seg_layers[-1](x)
        outputs.reverse()
        return logits, [outputs[stage] for stage in self.stages]


class TokenPyramid(nn.Module):
    """Make feature maps of several strides from only the token map.

    Transposed convolutions enlarge it, and pooling reduces it.

    Args:
        width: number of features of a token.
        doublings: for each level, how often the token map is doubled; halved, if negative.
    """

    def __init__(self, width: int, doublings: Sequence[int]):
        super().__init__()
        self.doublings = tuple(doublings)
        # Every doubling of the map halves the number of channels.
        most_doublings = max(0, *doublings)
        widths = [max(width // 2**n, GROUP) for n in range(most_doublings + 1)]
        self.ups = nn.ModuleList()
        for before, after in pairwise(widths):
            up = nn.ConvTranspose3d(before, after, kernel_size=2, stride=2)
            self.ups.append(nn.Sequential(up, LayerNormNd(after), nn.GELU()))
        self.channels = [widths[max(0, n)] for n in doublings]
        self.norms = nn.ModuleList(LayerNormNd(c) for c in self.channels)

    def forward(self, tokens_BCzyx: Tensor) -> list[Tensor]:
        """Return the feature map (B, C, z, y, x) of every level."""
        enlarged = [tokens_BCzyx]
        for up in self.ups:
            enlarged.append(up(enlarged[-1]))

        maps = []
        for doublings, norm in zip(self.doublings, self.norms, strict=True):
            features = enlarged[max(0, doublings)]
            if doublings < 0:
                features = nn.functional.max_pool3d(features, 2**-doublings)
            maps.append(norm(features))
        return maps


class PrimusDetector(Detector):
    """Primus, PrimusV2 and PrimusV3: a pyramid over the token map.

    In V2 and V3 the stem's own features are added to it at their strides.

    Args:
        stages: for each level, an index into ``token_doublings``.
        token: size of a token in voxels.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[int],
        num_shapes: int,
        num_classes: int,
        num_channels: int,
        token: Size,
    ):
        doublings = [token_doublings(token)[stage] for stage in stages]
        width = int(network.embed_dim)  # type: ignore[arg-type]
        pyramid = TokenPyramid(width, doublings)
        super().__init__(
            network,
            ("down_projection", "eva", "up_projection"),
            pyramid.channels,
            num_shapes,
            num_classes,
            num_channels,
        )
        mask_token: Any = network.mask_token
        self.register_buffer("mask_token", mask_token)
        self.detection["pyramid"] = pyramid

        # Level -> the stem's stage whose output is added to it.
        self.stem_levels: dict[int, int] = {}
        stem: Any = self.down_projection
        if not hasattr(stem, "stages"):
            return
        last = len(stem.stages) - 1
        projections = {}
        for level, n in enumerate(doublings):
            if 0 < n <= last:
                stage = stem.stages[last - n]
                self.stem_levels[level] = last - n
                channels = int(stage.output_channels)
                projections[str(level)] = nn.Conv3d(channels, pyramid.channels[level], 1)

        self.detection["stem"] = nn.ModuleDict(projections)

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return segmentation logits (B, C, Z, Y, X) and the feature map of every level."""
        tokens, stem_features = self._tokens(image_BCZYX)
        B, C, z, y, x = tokens.shape
        eva: Any = self.eva
        decode: Any = self.up_projection
        mixed, _ = eva(tokens.flatten(2).transpose(1, 2))  # (B, tokens, C)
        tokens = mixed.transpose(1, 2).reshape(B, C, z, y, x)

        maps = self.detection["pyramid"](tokens)
        for level, stage in self.stem_levels.items():
            stem: Any = self.detection["stem"]
            maps[level] = maps[level] + stem[str(level)](stem_features[stage])
        return decode(tokens), maps

    def _tokens(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the tokenizer's output, and that of every stage of its stem."""
        stem: Any = self.down_projection
        if not hasattr(stem, "stages"):
            return stem(image_BCZYX), []
        x = stem.stem(image_BCZYX)
        inputs = [x]
        stage_outputs = []
        for stage in stem.stages:
            x = stage(x)
            stage_outputs.append(x)
            inputs.append(x)

        tokens: Tensor = stem.final_proj(x)

        if isinstance(stem, PatchEmbedDeeperControlled) and stem.add_skips:
            skips = []
            for scale, project, features in zip(
                stem.scale_proj_to_tokens,
                stem.proj_to_tokens,
                inputs[:-1],
                strict=True,
            ):
                skips.append(scale * project(features))
            tokens = tokens + torch.stack(skips).sum(0)
        return tokens, stage_outputs


class ViTDetector(Detector):
    """The ViT of AR-SSL4M with its UNETR decoder: a pyramid over the last tokens.

    Args:
        stages, token: see ``PrimusDetector``.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[int],
        num_shapes: int,
        num_classes: int,
        num_channels: int,
        token: Size,
    ):
        doublings = [token_doublings(token)[stage] for stage in stages]
        pyramid = TokenPyramid(int(network.embed_dim), doublings)  # type: ignore[arg-type]
        super().__init__(
            network,
            ("model", "decoder"),
            pyramid.channels,
            num_shapes,
            num_classes,
            num_channels,
        )
        positions: Any = network.positions
        self.register_buffer("positions", positions, persistent=False)
        self.grid: Any = network.grid
        self.tap_indices: Any = network.tap_indices
        self.detection["pyramid"] = pyramid

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return segmentation logits (B, C, Z, Y, X) and the feature map of every level."""
        model: Any = self.model
        decoder: Any = self.decoder
        tokens_BNV = model.patchifier(image_BCZYX).flatten(2).transpose(1, 2) + self.positions
        states = []
        for state in model.hidden(model.with_start(tokens_BNV)):
            # Without the start token, as a map (B, C, z, y, x).
            states.append(state[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        taps = [states[i] for i in self.tap_indices]
        logits = decoder(image_BCZYX, taps, states[-1])
        return logits, self.detection["pyramid"](states[-1])


def token_doublings(token_size: Size) -> list[int]:
    """Return how often the token map is doubled for every stage that can carry a level.

    The finest stage comes first; a negative number means that the map is halved.

    Raises:
        PlanError: the token is too small, or a side is not a power of two.
    """
    largest = max(token_size)
    if any(side & (side - 1) for side in token_size) or largest < FINEST_STRIDE:
        raise PlanError(
            f"tokens of {token_size} voxels: detection needs sides that are powers of two, and one "
            f"of {FINEST_STRIDE} or more",
            code="detection-token-size",
        )
    most = int(math.log2(largest // FINEST_STRIDE))
    steps = range(most, -COARSER_STAGES - 1, -1)
    return [n for n in steps if min(token_size) >= 2**n]


def stage_strides(
    class_path: str,
    arguments: Mapping[str, Any],
    patch_size: Sequence[int],
) -> list[Size]:
    """Return the stride (z, y, x) in voxels of every stage that can carry a level, finest first.

    Args:
        class_path: class of the network.
        arguments: arguments of the configuration's network.
        patch_size: (z, y, x) voxels. Stages of a transformer have whole cells in it.
    """
    if family_of(class_path) == RESENC:
        strides = []
        stride = (1, 1, 1)
        for step in arguments["strides"]:
            steps = [step] * 3 if isinstance(step, int) else step
            stride = multiplied(stride, steps)
            strides.append(stride)
        return strides

    token = token_size_of(class_path, arguments)
    strides = []
    for doublings in token_doublings(token):
        if doublings >= 0:
            stride = as_size([side // 2**doublings for side in token])
        else:
            stride = as_size([side * 2**-doublings for side in token])
        has_whole_cells = [size % step == 0 for size, step in zip(patch_size, stride, strict=True)]
        if all(has_whole_cells):
            strides.append(stride)
    return strides


def build_detector(
    network: nn.Module,
    class_path: str,
    arguments: Mapping[str, Any],
    *,
    stages: Sequence[int],
    num_shapes: int,
    num_classes: int,
    num_channels: int,
) -> Detector:
    """Return the detector over a segmentation network, whose parts become parts of it.

    Args:
        class_path: class of the network.
        arguments: arguments of the configuration's network.
        stages: indices into ``stage_strides`` that carry levels, finest first.
        num_shapes: anchors per cell.
        num_channels: number of channels of the heads.

    Raises:
        PlanError: the class does not belong to a known family.
    """
    family = family_of(class_path)
    if family == RESENC:
        return ResEncDetector(network, stages, num_shapes, num_classes, num_channels)
    kind = ViTDetector if family == VIT else PrimusDetector
    token = token_size_of(class_path, arguments)
    return kind(network, stages, num_shapes, num_classes, num_channels, token)
