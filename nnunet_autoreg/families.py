"""The families of encoders: which network class belongs to which, what its arguments must say, how
large its tokens are.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, as_size

PRIMUS, PRIMUS_V2, PRIMUS_V3, RESENC, VIT = "primus", "primus_v2", "primus_v3", "resenc", "vit"

_ARCHITECTURES = "dynamic_network_architectures.architectures"
CLASS_PATHS: dict[str, str] = {
    PRIMUS: f"{_ARCHITECTURES}.primus.Primus",
    PRIMUS_V2: f"{_ARCHITECTURES}.primus.PrimusV2",
    PRIMUS_V3: f"{_ARCHITECTURES}.primus.PrimusV3",
    RESENC: f"{_ARCHITECTURES}.unet.ResidualEncoderUNet",
    VIT: "nnunet_autoreg.model.vit.ViT",
}
TRANSFORMER_ARGUMENTS = ("embed_dim", "patch_embed_size", "eva_depth", "eva_numheads")
CNN_ARGUMENTS = (
    "n_stages",
    "features_per_stage",
    "conv_op",
    "kernel_sizes",
    "strides",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "conv_bias",
    "norm_op",
    "norm_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
)
LAYER_NAME = re.compile(r"torch\.nn\.(modules\.[a-z]+\.)?[A-Z]\w*")
"""What a name in a network's arguments may stand for: a layer of torch.

A longer path would reach any module that torch imports.
"""
MIN_CONV_SIDE = 16
"""Smallest side, in voxels, of a block that a convolution with instance normalisation runs on: over
fewer, it erases intensity.
"""


def family_of(class_path: str) -> str:
    """The family of a network class.

    Raises:
        PlanError: it is none that we know.
    """
    for family, path in CLASS_PATHS.items():
        if path == class_path:
            return family
    raise PlanError(
        f"the network class '{class_path}' is none of the known encoders: "
        f"{', '.join(CLASS_PATHS.values())}"
    )


def is_convolutional(family: str) -> bool:
    """Return whether convolutions that look beyond one token make the tokens.

    The blocks of such a transformer go through its stem one by one, so each holds several tokens.
    """
    return family in (PRIMUS_V2, PRIMUS_V3)


def has_transformer(family: str) -> bool:
    """Return whether the network holds a transformer; if not, it is a CNN."""
    return family != RESENC


def has_start(family: str) -> bool:
    """Whether a START token stands before the first block and can predict it."""
    return family == VIT


def has_deep_supervision(family: str) -> bool:
    """Whether the downstream network can give predictions at several resolutions."""
    return family == RESENC


def missing_arguments(class_path: str, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that a class cannot be built without and that are not there.

    Raises:
        PlanError: the class is of no known family.
    """
    needed = CNN_ARGUMENTS if family_of(class_path) == RESENC else TRANSFORMER_ARGUMENTS
    return [key for key in needed if key not in arguments]


def token_size_of(class_path: str, arguments: Mapping[str, Any]) -> Size:
    """Voxels (z, y, x) of a token: a transformer's patch, or the total stride of a CNN, whose
    deepest features are the tokens.

    Raises:
        PlanError: the class is of no known family, or its arguments state no size of three axes.
    """
    try:
        if family_of(class_path) != RESENC:
            return as_size(arguments["patch_embed_size"])
        return as_size(
            [
                math.prod(per_axis)
                for per_axis in zip(*(_triple(s) for s in arguments["strides"]), strict=True)
            ]
        )
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"encoder.arguments: {dict(arguments)} state no token size of three axes ({error})"
        ) from error


def smallest_block(family: str, token_size: Size) -> Size:
    """Tokens per axis of the smallest block: one, or as many as instance normalisation needs.

    Source: rule of the design, side >= max(16, 2 x total stride), so that the deepest features of a
        block are at least 2 x 2 x 2.
    """
    if not is_convolutional(family):
        return (1, 1, 1)
    return as_size([max(math.ceil(MIN_CONV_SIDE / token), 2) for token in token_size])


def _triple(stride: int | Sequence[int]) -> Sequence[int]:
    return [stride] * 3 if isinstance(stride, int) else stride
