"""nnU-Net's residual encoder U-Net as pretraining runs it, with its own heads.

Shape suffixes: B samples, C channels or features, Z Y X voxels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_autoreg.model.card import DECODER_PREFIXES, Adaptation
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.parameters import weights_under
from nnunet_autoreg.model.trunk import recomputed
from nnunet_autoreg.plan import Plan

ENCODER_PREFIX = "encoder."


class PretrainingUNet(nn.Module):
    """A ``ResidualEncoderUNet`` that is given a mask of the voxels it cannot see.

    Unknown voxels are set to 0 in the input. The value zero is ambiguous: padding, masked
    background and mean tissue are 0 too. With ``learned_mark`` a vector that is learned in
    pretraining is added to the features of unknown voxels after the stem. The vector is not
    transferred.

    Args:
        network: with one output channel and without deep supervision.
        learned_mark: whether there is such a vector.
        recompute: keep only the inputs of the stages for the backward pass (activation
            checkpointing).
        num_segments: K, classes that a second head on the decoder's finest features separates; 0
            for no such head. It is not transferred.
    """

    def __init__(
        self,
        network: Any,
        learned_mark: bool,
        recompute: bool = False,
        num_segments: int = 0,
    ):
        super().__init__()
        self.network: Any = network
        # The decoder registers the encoder a second time; every weight needs one name only.
        del network.decoder.encoder

        self.recompute = recompute
        self.mark: nn.Parameter | None = None
        if learned_mark:
            num_features = int(network.encoder.output_channels[0])
            self.mark = nn.Parameter(torch.zeros(num_features))

        self.segment_head: nn.Conv3d | None = None
        if num_segments:
            width = int(network.decoder.seg_layers[-1].in_channels)
            self.segment_head = nn.Conv3d(width, num_segments, kernel_size=1)

    def forward(self, voxels_BCZYX: Tensor, known_BZYX: Tensor | None = None) -> Tensor:
        """Return predicted intensities and, behind them, the segments' scores (B, 1 + K, Z, Y, X).

        Args:
            known_BZYX: bool, True where a voxel may be seen; None if all may be.
        """
        skips = self.encode(voxels_BCZYX, known_BZYX)
        x_BCZYX = self.decode(skips)[-1]

        out: Tensor = self.network.decoder.seg_layers[-1](x_BCZYX)  # (B, 1, Z, Y, X)
        if self.segment_head is not None:
            out = torch.cat([out, self.segment_head(x_BCZYX)], dim=1)
        return out

    def decode(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of every decoder stage, the coarsest first.

        Args:
            skips: features of every encoder stage, the finest first.
        """
        decoder = self.network.decoder
        features = []

        # From the coarsest features upwards; every stage joins the skip of its resolution.
        x_BCZYX = skips[-1]
        finer_skips = skips[-2::-1]
        for upsample, stage, skip_BCZYX in zip(
            decoder.transpconvs,
            decoder.stages,
            finer_skips,
            strict=True,
        ):
            joined_BCZYX = torch.cat([upsample(x_BCZYX), skip_BCZYX], dim=1)
            x_BCZYX = recomputed(stage, self.recompute, joined_BCZYX)
            features.append(x_BCZYX)
        return features

    def encode(self, voxels_BCZYX: Tensor, known_BZYX: Tensor | None = None) -> list[Tensor]:
        """Return the features of every encoder stage, the finest first."""
        encoder = self.network.encoder
        seen_BCZYX = voxels_BCZYX
        if known_BZYX is not None:
            seen_BCZYX = voxels_BCZYX * known_BZYX[:, None]

        x_BCZYX = encoder.stem(seen_BCZYX)
        # The stem has stride 1, so that a voxel and its features have the same position.
        if self.mark is not None and known_BZYX is not None:
            unknown_B1ZYX = (~known_BZYX[:, None]).to(x_BCZYX.dtype)
            mark_C111 = self.mark[:, None, None, None]
            x_BCZYX = x_BCZYX + mark_C111 * unknown_B1ZYX

        features = []
        for stage in encoder.stages:
            x_BCZYX = recomputed(stage, self.recompute, x_BCZYX)
            features.append(x_BCZYX)
        return features

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights that fine-tuning loads, under the keys of the downstream network."""
        return weights_under(self.network, (ENCODER_PREFIX, *DECODER_PREFIXES))

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return adaptation_of(self.network, DECODER_PREFIXES)


def build_unet(plan: Plan) -> Any:
    """Return the plan's U-Net with random weights, one input and one output channel."""
    encoder = plan.encoder
    return build_network(
        encoder.class_path,
        encoder.arguments,
        plan.sequence.crop_size_vox,
        num_input_channels=1,
        num_classes=1,
    )


def adaptation_of(network: Any, keys_to_decoder: tuple[str, ...] = ()) -> Adaptation:
    """Return where fine-tuning finds the parts of a U-Net that it may have to adapt.

    Args:
        keys_to_decoder: prefixes of the decoder, if it was pretrained too.
    """
    return Adaptation(
        key_to_encoder=str(network.key_to_encoder),
        key_to_stem=str(network.key_to_stem),
        keys_to_in_proj=tuple(network.keys_to_in_proj),
        key_to_lpe=None,
        keys_to_decoder=keys_to_decoder,
    )
