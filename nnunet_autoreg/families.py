"""The families of encoders.

They are known by the network's class, and decide which arguments it needs and how large its tokens
are.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import shown

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
# What the arguments of a network have to be; those listed here are always checked.
COUNTS = (
    "embed_dim",
    "eva_depth",
    "eva_numheads",
    "decoder_features",
    "n_stages",
)
LISTS_OF_COUNTS = (
    "features_per_stage",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "depth_per_level",
    "ch_per_level",
)
LISTS_OF_LAYERS = ("n_blocks_per_stage", "n_conv_per_stage_decoder", "depth_per_level")
LISTS_OF_SIZES = ("kernel_sizes", "strides")
NUMBERS = ("init_values", "mlp_ratio")
FLAGS = ("conv_bias", "scale_attn_inner", "add_skips")
NAMES = ("conv_op", "norm_op", "nonlin")
NUMBERS_OF_LAYERS = ("eva_depth", "n_stages", *LISTS_OF_LAYERS)
MAX_COUNT = 2**20
MOST_LAYERS = 1000
"""Of one kind in a network; the largest encoder has 24."""
LAYER_NAME = re.compile(r"torch\.nn\.(modules\.[a-z]+\.)?[A-Z]\w*")
"""What a name in a network's arguments may be: a layer of torch.

A longer path would reach any module that torch imports.
"""
MIN_CONV_SIDE = 16
"""Smallest side, in voxels, of a block that a convolution with instance normalisation runs on: over
fewer, it erases intensity.
"""


def family_of(class_path: str) -> str:
    """Return the family of a network class.

    Raises:
        PlanError: it is none that we know.
    """
    for family, path in CLASS_PATHS.items():
        if path == class_path:
            return family
    raise PlanError(
        f"the network class '{class_path}' is none of the known encoders: "
        f"{', '.join(CLASS_PATHS.values())}",
        code="plan-unknown-network",
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
    """Return whether there is a START token before the first block that can predict it."""
    return family == VIT


def has_deep_supervision(family: str) -> bool:
    """Return whether the downstream network can predict at several resolutions."""
    return family == RESENC


def missing_arguments(class_path: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments that a class cannot be built without and that are missing.

    Raises:
        PlanError: the class is of no known family.
    """
    needed = CNN_ARGUMENTS if family_of(class_path) == RESENC else TRANSFORMER_ARGUMENTS
    return [key for key in needed if key not in arguments]


def check_argument_types(class_path: str, arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of a network that it cannot be built with, before it is built.

    Raises:
        PlanError: one has a wrong type, lies out of its range, or is a list of another length.
    """
    rules: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
        (COUNTS, _is_count, "a whole number from 1 on"),
        (LISTS_OF_COUNTS, _is_list_of_counts, "a list of whole numbers from 1 on"),
        (LISTS_OF_SIZES, _is_list_of_sizes, "a list of sizes such as 3 or [1, 3, 3]"),
        (("patch_embed_size",), _is_size, "a list of three whole numbers from 1 on"),
        (NUMBERS, _is_number, "a finite number"),
        (FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (NAMES, lambda value: isinstance(value, str), "the name of a layer, in quotes"),
        (
            ("dropout_op",),
            lambda value: isinstance(value, str | None),
            "the name of a layer, or null",
        ),
    ]
    for keys, is_right, expected in rules:
        for key in keys:
            if key in arguments and not is_right(arguments[key]):
                raise PlanError(
                    f"{where}.{key}: {shown(arguments[key])} does not fit; write {expected}",
                    code="plan-wrong-type",
                )
    # Layers are built one by one, so that a great number of them would keep the command busy.
    for key in NUMBERS_OF_LAYERS:
        value = arguments.get(key, 1)
        listed = [value] if isinstance(value, int) else value
        if sum(listed) > MOST_LAYERS:
            raise PlanError(
                f"{where}.{key}: {shown(value)} are more than {MOST_LAYERS} layers; write fewer",
                code="plan-out-of-range",
            )
    for key in ("norm_op_kwargs", "nonlin_kwargs", "dropout_op_kwargs"):
        if not isinstance(arguments.get(key), Mapping | None):
            raise PlanError(
                f"{where}.{key}: {shown(arguments[key])} does not fit; write an object in braces, "
                "or null",
                code="plan-wrong-type",
            )

    if family_of(class_path) == RESENC:
        _check_stages(arguments, where)
        return
    width = arguments.get("embed_dim", 0)
    num_heads = arguments.get("eva_numheads", 1)
    if width % num_heads:
        raise PlanError(
            f"{where}: the width embed_dim={width} is not a multiple of eva_numheads={num_heads}, "
            "so the heads would differ in width; change one of them",
            code="plan-argument",
        )


def _check_stages(arguments: Mapping[str, Any], where: str) -> None:
    num_stages = arguments.get("n_stages", 0)
    lengths = {
        "features_per_stage": num_stages,
        "kernel_sizes": num_stages,
        "strides": num_stages,
        "n_blocks_per_stage": num_stages,
        "n_conv_per_stage_decoder": num_stages - 1,
    }
    for key, length in lengths.items():
        value = arguments.get(key, 1)
        # One number holds for all stages.
        if num_stages and not isinstance(value, int) and len(value) != length:
            raise PlanError(
                f"{where}.{key}: {shown(value)} has {len(value)} values, {length} are needed for "
                f"n_stages={num_stages}",
                code="plan-wrong-length",
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT


def _is_size(value: Any) -> bool:
    is_triple = isinstance(value, list | tuple) and len(value) == 3
    return is_triple and all(map(_is_count, value))


def _is_list_of_counts(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_count, value))
    return _is_count(value)


def _is_list_of_sizes(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False
    return all(_is_count(side) or _is_size(side) for side in value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < float("inf")


def token_size_of(class_path: str, arguments: Mapping[str, Any]) -> Size:
    """Return the voxels (z, y, x) of a token.

    It is a transformer's patch, or the total stride of a CNN, whose deepest features are the
    tokens.

    Raises:
        PlanError: the class is of no known family, or its arguments state no size of three axes.
    """
    try:
        if family_of(class_path) != RESENC:
            return as_size(arguments["patch_embed_size"])
        triples = []
        for stride in arguments["strides"]:
            triples.append([stride] * 3 if isinstance(stride, int) else stride)
        along_axes = zip(*triples, strict=True)
        return as_size([math.prod(strides) for strides in along_axes])
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(
            f"encoder.arguments: {shown(dict(arguments))} state no token size of three axes "
            f"({error})",
            code="plan-token-size",
        ) from error


def smallest_block(family: str, token_size: Size) -> Size:
    """Return the tokens per axis of the smallest block.

    It is one, or as many as instance normalisation needs.

    Source: rule of the design, side >= max(16, 2 x total stride), so that the deepest features of a
        block are at least 2 x 2 x 2.
    """
    if not is_convolutional(family):
        return (1, 1, 1)
    return as_size([max(math.ceil(MIN_CONV_SIDE / token), 2) for token in token_size])


def features_per_token(class_path: str, arguments: Mapping[str, Any]) -> int:
    """Return the features of a token, or of a position of a CNN's deepest stage.

    Args:
        arguments: arguments of the network, as in ``model.sizes``.
    """
    if has_transformer(family_of(class_path)):
        return int(arguments["embed_dim"])
    return int(arguments["features_per_stage"][-1])
