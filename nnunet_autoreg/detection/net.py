"""Retina U-Net on the networks that fine-tuning builds: their segmentation as it was, beside it
boxes from several feature maps.

Encoder and decoder keep their key names, so that pretrained weights load as they do for
segmentation; what is new lies below ``detection.``. In training, and where ``detect`` is set,
``forward`` gives a ``Output``; else the segmentation logits alone, so that stock
``nnUNetv2_predict`` works.

Shape suffixes: B samples, C channels, Z Y X voxels, z y x cells of a feature map, A anchors of all
    levels, K classes.

Source: Jaeger et al. 2018, "Retina U-Net" (arXiv 1811.08661); Li et al. 2022, "Exploring plain
    vision transformer backbones for object
detection" (arXiv 2203.16527) for the pyramid over tokens.
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
from nnunet_autoreg.geometry import Size, as_size

PRIOR = 0.01
"""Score that an untrained head gives to every anchor."""
FINEST_STRIDE, COARSER_STAGES = 2, 2
"""Tokens are brought up to stride 2, and down two stages."""
GROUP = 16
"""Channels that are normalised together in the heads."""


class Output(NamedTuple):
    """What the network says of a batch.

    Attributes:
        logits_BCZYX: segmentation.
        scores_BAK: one logit per anchor and class.
        codes_BA6: where the box lies (detection.boxes).
        cells: number of cells (z, y, x) of each level.
    """

    logits_BCZYX: Tensor  # noqa: N815
    scores_BAK: Tensor  # noqa: N815
    codes_BA6: Tensor  # noqa: N815
    cells: tuple[Size, ...]


class Heads(nn.Module):
    """Classifier and box regressor, shared by all levels; only the scale of the boxes is each
    level's own.
    """

    def __init__(self, num_channels: int, num_shapes: int, num_classes: int, num_levels: int):
        super().__init__()
        self.num_classes = num_classes
        self.classifier = _head(num_channels, num_shapes * num_classes)
        self.regressor = _head(num_channels, num_shapes * 6)
        self.scales = nn.Parameter(torch.ones(num_levels))
        last: Any = self.classifier[-1]
        nn.init.constant_(last.bias, -math.log((1 - PRIOR) / PRIOR))
        # Training starts from the anchors as they are: from random codes SGD at 1e-2 drove sides to
        # their limit, where no gradient is.
        to_codes: Any = self.regressor[-1]
        nn.init.zeros_(to_codes.weight)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, A, K) and codes (B, A, 6): levels one after the other, then cells (z, y, x),
        then shapes.
        """
        scores, codes = [], []
        for level, features in enumerate(maps):
            scores.append(_by_anchor(self.classifier(features), self.num_classes))
            codes.append(_by_anchor(self.regressor(features), 6) * self.scales[level])
        return torch.cat(scores, 1), torch.cat(codes, 1)


def _by_anchor(values_BCzyx: Tensor, size: int) -> Tensor:
    return values_BCzyx.permute(0, 2, 3, 4, 1).reshape(values_BCzyx.shape[0], -1, size)


def _head(num_channels: int, num_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        norm = nn.GroupNorm(max(1, num_channels // GROUP), num_channels)
        layers += [
            nn.Conv3d(num_channels, num_channels, 3, padding=1, bias=False),
            norm,
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Conv3d(num_channels, num_outputs, 3, padding=1))
    head = nn.Sequential(*layers)
    for layer in head:
        if isinstance(layer, nn.Conv3d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head


class Detector(nn.Module):
    """Base: a segmentation network whose inner feature maps feed the heads.

    Args:
        network: as ``encoders.build_network`` makes it, without deep supervision; its parts are
            taken over.
        parts: names of its children that are taken over.
        level_channels: channels of the feature map of every level, finest first.
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
        for name in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe"):
            setattr(self, name, getattr(network, name))
        self.detect = False
        self.detection = nn.ModuleDict(
            {
                "laterals": nn.ModuleList(
                    nn.Conv3d(c, num_channels, kernel_size=1) for c in level_channels
                ),
                "heads": Heads(num_channels, num_shapes, num_classes, len(level_channels)),
            }
        )

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segmentation logits and the feature map of every level."""
        raise NotImplementedError

    def forward(self, image_BCZYX: Tensor) -> Output | Tensor:
        """An ``Output`` in training or where ``detect`` is set; else segmentation logits (B, C, Z,
        Y, X).
        """
        logits, maps = self.both(image_BCZYX)
        if not (self.training or self.detect):
            return logits
        laterals: Any = self.detection["laterals"]
        heads: Any = self.detection["heads"]
        maps = [lateral(features) for lateral, features in zip(laterals, maps, strict=True)]
        scores, codes = heads(maps)
        return Output(logits, scores, codes, tuple(as_size(m.shape[2:]) for m in maps))


class ResEncDetector(Detector):
    """nnU-Net's residual encoder U-Net; levels are the outputs of the decoder's stages, and the
    bottleneck.

    Args:
        stages: of the encoder, 0 at full resolution.
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
            network, ("encoder", "decoder"), channels, num_shapes, num_classes, num_channels
        )
        self.stages = tuple(stages)
        # Without deep supervision nothing reaches the coarser outputs, and distributed training
        # waits for every gradient.
        decoder: Any = self.decoder
        decoder.seg_layers[:-1].requires_grad_(False)

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segmentation logits and the feature map of every level."""
        decoder: Any = self.decoder
        encoder: Any = self.encoder
        skips = encoder(image_BCZYX)
        x = skips[-1]
        outputs = [x]
        for up, stage, skip in zip(
            decoder.transpconvs, decoder.stages, reversed(skips[:-1]), strict=True
        ):
            x = stage(torch.cat([up(x), skip], 1))
            outputs.append(x)
        outputs.reverse()
        return decoder.seg_layers[-1](x), [outputs[stage] for stage in self.stages]


class TokenPyramid(nn.Module):
    """Feature maps of several strides from the token map alone: transposed convolutions up, pooling
    down.

    Args:
        doublings: per level how often the token map is doubled; negative: halved.
    """

    def __init__(self, width: int, doublings: Sequence[int]):
        super().__init__()
        self.doublings = tuple(doublings)
        widths = [max(width // 2**n, GROUP) for n in range(max(0, *doublings) + 1)]
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose3d(a, b, kernel_size=2, stride=2), LayerNormNd(b), nn.GELU()
            )
            for a, b in pairwise(widths)
        )
        self.channels = [widths[max(0, n)] for n in doublings]
        self.norms = nn.ModuleList(LayerNormNd(c) for c in self.channels)

    def forward(self, tokens_BCzyx: Tensor) -> list[Tensor]:
        """A map for every level."""
        grown = [tokens_BCzyx]
        for up in self.ups:
            grown.append(up(grown[-1]))
        maps = []
        for doublings, norm in zip(self.doublings, self.norms, strict=True):
            features = grown[max(0, doublings)]
            if doublings < 0:
                features = nn.functional.max_pool3d(features, 2**-doublings)
            maps.append(norm(features))
        return maps


class PrimusDetector(Detector):
    """Primus, V2 and V3: a pyramid over the token map; of V2 and V3 the stem's own features join it
    at their strides.
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
        self.stem_levels = self._join_stem(doublings, pyramid.channels)

    def _join_stem(self, doublings: Sequence[int], channels: Sequence[int]) -> dict[int, int]:
        """Level -> the stem's stage whose output joins it."""
        stem: Any = self.down_projection
        if not hasattr(stem, "stages"):
            return {}
        last = len(stem.stages) - 1
        levels = {level: last - n for level, n in enumerate(doublings) if 0 < n <= last}
        joins = {
            str(level): nn.Conv3d(int(stem.stages[s].output_channels), channels[level], 1)
            for level, s in levels.items()
        }
        self.detection["stem"] = nn.ModuleDict(joins)
        return levels

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segmentation logits and the feature map of every level."""
        tokens, seen = self._tokens(image_BCZYX)
        B, C, z, y, x = tokens.shape
        eva: Any = self.eva
        decode: Any = self.up_projection
        mixed, _ = eva(tokens.flatten(2).transpose(1, 2))
        tokens = mixed.transpose(1, 2).reshape(B, C, z, y, x)
        maps = self.detection["pyramid"](tokens)
        for level, stage in self.stem_levels.items():
            stem: Any = self.detection["stem"]
            maps[level] = maps[level] + stem[str(level)](seen[stage])
        return decode(tokens), maps

    def _tokens(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokenizer's output, and that of every stage of its stem."""
        stem: Any = self.down_projection
        if not hasattr(stem, "stages"):
            return stem(image_BCZYX), []
        x = stem.stem(image_BCZYX)
        has_skips = isinstance(stem, PatchEmbedDeeperControlled) and stem.add_skips
        before, seen = [x], []
        for stage in stem.stages:
            x = stage(x)
            seen.append(x)
            before.append(x)
        tokens: Tensor = stem.final_proj(x)
        if has_skips:
            skips = zip(stem.scale_proj_to_tokens, stem.proj_to_tokens, before[:-1], strict=True)
            tokens = tokens + torch.stack(
                [scale * project(features) for scale, project, features in skips]
            ).sum(0)
        return tokens, seen


class ViTDetector(Detector):
    """The ViT of AR-SSL4M with its UNETR decoder: a pyramid over the last tokens."""

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
            network, ("model", "decoder"), pyramid.channels, num_shapes, num_classes, num_channels
        )
        positions: Any = network.positions
        self.register_buffer("positions", positions, persistent=False)
        self.grid: Any = network.grid
        self.tap_indices: Any = network.tap_indices
        self.detection["pyramid"] = pyramid

    def both(self, image_BCZYX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Segmentation logits and the feature map of every level."""
        model: Any = self.model
        decoder: Any = self.decoder
        tokens_BNV = model.patchifier(image_BCZYX).flatten(2).transpose(1, 2) + self.positions
        states = [
            state[:, 1:].transpose(1, 2).unflatten(2, self.grid)
            for state in model.hidden(model.with_start(tokens_BNV))
        ]
        taps = [states[i] for i in self.tap_indices]
        return decoder(image_BCZYX, taps, states[-1]), self.detection["pyramid"](states[-1])


def token_doublings(token_size: Size) -> list[int]:
    """How often the token map is doubled for every stage that can carry a level, finest first;
    negative: halved.

    Raises:
        PlanError: the token is too small, or no power of two.
    """
    largest = max(token_size)
    if any(side & (side - 1) for side in token_size) or largest < FINEST_STRIDE:
        raise PlanError(
            f"tokens of {token_size} voxels: detection needs sides that are powers of two, and one "
            f"of {FINEST_STRIDE} or more"
        )
    most = int(math.log2(largest // FINEST_STRIDE))
    return [
        n for n in range(most, -COARSER_STAGES - 1, -1) if all(side >= 2**n for side in token_size)
    ]


def stage_strides(
    class_path: str, arguments: Mapping[str, Any], patch_size: Sequence[int]
) -> list[Size]:
    """The stride (z, y, x) in voxels of every stage that can carry a level, finest first.

    Args:
        arguments: of the configuration's network.
        patch_size: (z, y, x) voxels; a stage has at least one whole cell in it, and no cell is cut.
    """
    if family_of(class_path) == RESENC:
        strides, total = [], (1, 1, 1)
        for step in arguments["strides"]:
            total = as_size(
                [
                    t * s
                    for t, s in zip(
                        total, [step] * 3 if isinstance(step, int) else step, strict=True
                    )
                ]
            )
            strides.append(total)
        return strides
    token = token_size_of(class_path, arguments)
    every = [
        as_size([t // 2**n if n >= 0 else t * 2**-n for t in token]) for n in token_doublings(token)
    ]
    return [
        stride
        for stride in every
        if all(p % s == 0 for p, s in zip(patch_size, stride, strict=True))
    ]


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
    """The detector over a segmentation network, whose parts it takes over.

    Args:
        stages: of ``stage_strides`` that carry levels, finest first.
        num_shapes: anchors per cell.
        num_channels: of the heads.

    Raises:
        PlanError: the class is of no known family.
    """
    family = family_of(class_path)
    if family == RESENC:
        return ResEncDetector(network, stages, num_shapes, num_classes, num_channels)
    kind = ViTDetector if family == VIT else PrimusDetector
    return kind(
        network, stages, num_shapes, num_classes, num_channels, token_size_of(class_path, arguments)
    )
