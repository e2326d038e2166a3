"""The encoders by name, as numbers, and a CNN's strides for the spacing of the scans.

Torch-free, so that planning and ``--help`` stay light.

Sources:
    Primus S, B, M, L: Wald et al. 2025, arXiv 2503.01835, as in dynamic_network_architectures'
        ``_PRIMUS_CONFIGS``; LayerScale 0.1 and inner attention norm as in nnU-Net's trainers of
        Primus, V2 and V3.
    ResEnc: nnU-Net's ResEncUNetPlanner for an isotropic patch of 128^3.
    ViT-B/16: AR-SSL4M.
    The ``tiny`` sizes are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import (
    CLASS_PATHS,
    PRIMUS,
    PRIMUS_V2,
    PRIMUS_V3,
    RESENC,
    VIT,
    token_size_of,
)
from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import EncoderPlan

PRIMUS_WIDTHS = {
    "tiny": (264, 6, 4),
    "s": (396, 12, 6),
    "b": (792, 12, 12),
    "m": (864, 16, 12),
    "l": (1056, 24, 16),
}
"""Size -> width, depth, heads."""

ALIKE = 2.0
"""An axis is pooled and convolved together with the axis of the shortest voxels, if its voxels are
less than this many times as long.
"""


@dataclass(frozen=True)
class EncoderSize:
    """What a plan needs to know of an encoder.

    Attributes:
        family: as in ``families``; class path, tokens and what the network can do follow from it.
        class_path: the network class that fine-tuning builds.
        arguments: its constructor's arguments, without channels, classes and input shape.
        token_size: voxels (z, y, x) of one token - of a CNN, its total stride; crops and patches
            are multiples of it.
        block_tokens: tokens of a block per axis (z, y, x) if the images are large enough.
        max_crop_vox: largest useful number of voxels of a crop or patch.
        scratch_rate, pretrained_rate: peak learning rates of fine-tuning, without and with
            pretrained weights (AdamW; SGD for a CNN).
        pretrain_rate: peak learning rate of pretraining at the reference batch (AdamW).
        patch_gib: for a CNN, the GPU memory for which nnU-Net's planner of the same name plans
            patch and batch.
    """

    name: str
    family: str
    class_path: str
    arguments: dict[str, Any]
    token_size: Size
    block_tokens: Size
    max_crop_vox: int
    scratch_rate: float
    pretrained_rate: float
    pretrain_rate: float
    patch_gib: float | None = None

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a crop or patch.

        A transformer's cost grows with the number of tokens, however small they are.
        """
        return self.max_crop_vox // 8**3

    @property
    def is_tiny(self) -> bool:
        """Return whether this size is meant for CPUs and very small images."""
        return self.name.endswith("_tiny")

    def encoder_plan(self) -> EncoderPlan:
        """Return the part of this record that a plan keeps."""
        return EncoderPlan(self.name, self.class_path, self.arguments, self.token_size)


def _primus(family: str, size: str) -> EncoderSize:
    """Return one size of a Primus family."""
    width, depth, heads = PRIMUS_WIDTHS[size]
    is_tiny = size == "tiny"
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "patch_embed_size": [8, 8, 8],
        "eva_depth": depth,
        "eva_numheads": heads,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }
    if family == PRIMUS_V3:
        # Only V3's tokenizer has several levels and skips between them.
        arguments |= {
            "depth_per_level": [1, 1, 1],
            "ch_per_level": [16, 32, 64, 128] if is_tiny else [32, 64, 256, 1024],
            "add_skips": True,
        }

    return EncoderSize(
        name=f"{family}_{size}",
        family=family,
        class_path=CLASS_PATHS[family],
        arguments=arguments,
        token_size=token_size_of(CLASS_PATHS[family], arguments),
        # Convolutional tokenizers see one block at a time: blocks of one token would starve them.
        block_tokens=(1, 1, 1) if family == PRIMUS else (4, 4, 4),
        max_crop_vox=64**3 if is_tiny else 160**3,
        scratch_rate=1e-3 if is_tiny else 3e-4,
        pretrained_rate=1e-3 if is_tiny else 1e-4,
        pretrain_rate=1e-3 if is_tiny else 3e-4,
    )


def _resenc(
    size: str,
    features: list[int],
    blocks: list[int],
    patch_gib: float | None,
) -> EncoderSize:
    """Return a CNN of these features and blocks per stage, for an isotropic patch."""
    is_tiny = size == "tiny"
    num_stages = len(features)
    arguments: dict[str, Any] = {
        "n_stages": num_stages,
        "features_per_stage": features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * num_stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (num_stages - 1),
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": [1] * (num_stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return EncoderSize(
        name=f"{RESENC}_{size}",
        family=RESENC,
        class_path=CLASS_PATHS[RESENC],
        arguments=arguments,
        token_size=token_size_of(CLASS_PATHS[RESENC], arguments),
        block_tokens=(1, 1, 1),
        max_crop_vox=64**3 if is_tiny else 160**3,
        scratch_rate=1e-2,
        # The tiny network was measured, the large ones were not: they have a published value.
        pretrained_rate=1e-2 if is_tiny else 1e-3,
        pretrain_rate=1e-3 if is_tiny else 3e-4,
        patch_gib=patch_gib,
    )


# nnU-Net's M, L and XL are one network; they differ in the memory that patch and batch may fill.
_RESENC_FEATURES = [32, 64, 128, 256, 320, 320]
_RESENC_BLOCKS = [1, 3, 4, 6, 6, 6]


def _all_sizes() -> list[EncoderSize]:
    sizes = []
    for family in (PRIMUS, PRIMUS_V2, PRIMUS_V3):
        sizes += [_primus(family, size) for size in PRIMUS_WIDTHS]

    arguments = {
        "embed_dim": 768,
        "patch_embed_size": [16, 16, 16],
        "eva_depth": 12,
        "eva_numheads": 12,
        "mlp_ratio": 4.0,
        "decoder_features": 16,
    }
    vit_b16 = EncoderSize(
        name="vit_b16",
        family=VIT,
        class_path=CLASS_PATHS[VIT],
        arguments=arguments,
        token_size=(16, 16, 16),
        block_tokens=(1, 1, 1),
        max_crop_vox=160**3,
        scratch_rate=3e-4,
        pretrained_rate=1e-4,
        pretrain_rate=1e-4,
    )
    return [
        *sizes,
        _resenc("tiny", [16, 32, 64, 128], [1, 2, 2, 2], None),
        _resenc("m", _RESENC_FEATURES, _RESENC_BLOCKS, 8.0),
        _resenc("l", _RESENC_FEATURES, _RESENC_BLOCKS, 24.0),
        _resenc("xl", _RESENC_FEATURES, _RESENC_BLOCKS, 40.0),
        vit_b16,
    ]


ENCODERS: dict[str, EncoderSize] = {size.name: size for size in _all_sizes()}


def encoder_size(name: str) -> EncoderSize:
    """Return the encoder of a name.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in ENCODERS:
        raise PlanError(
            f"there is no encoder '{name}'; {did_you_mean(name, ENCODERS)}",
            code="plan-unknown-encoder",
        )
    return ENCODERS[name]


def grid_of_input(input_shape: Sequence[int], token_size: Size) -> Size:
    """Return the number of tokens per axis of a network's input.

    Raises:
        PlanError: an axis is not a multiple of the token size.
    """
    try:
        return grid_of(as_size(input_shape), token_size)
    except ValueError as error:
        raise PlanError(
            f"input shape {tuple(input_shape)}: {error}",
            code="plan-input-shape",
        ) from error


def suited_to(encoder: EncoderSize, spacing_mm: Spacing) -> EncoderSize:
    """Return a CNN with strides and kernels for voxels of this size; transformers do not change.

    Stages, widths and depths stay. An axis of thick slices is not halved, and not convolved along,
    until the voxels of the other axes have become as long.

    Source: the rule by spacing of nnU-Net's ``get_pool_and_conv_props``, for a fixed number of
        stages.
    """
    if encoder.family != RESENC:
        return encoder

    num_stages = int(encoder.arguments["n_stages"])
    voxel_mm = list(spacing_mm)
    strides, kernels = [[1, 1, 1]], []
    kernel = [1, 1, 1]

    for stage in range(num_stages):
        shortest_mm = min(voxel_mm)
        is_alike = [size / shortest_mm < ALIKE for size in voxel_mm]
        # An axis that was convolved once is convolved in all deeper stages.
        for axis in range(3):
            if is_alike[axis]:
                kernel[axis] = 3
        kernels.append(list(kernel))

        if stage + 1 < num_stages:
            stride = [2 if alike else 1 for alike in is_alike]
            strides.append(stride)
            voxel_mm = [size * factor for size, factor in zip(voxel_mm, stride, strict=True)]

    arguments = {**encoder.arguments, "strides": strides, "kernel_sizes": kernels}
    token_size = token_size_of(encoder.class_path, arguments)
    return replace(encoder, arguments=arguments, token_size=token_size)
