"""Networks of every family by class path and arguments.

These are the downstream network and the encoder that pretraining runs. Both are made of the same
class, so that state-dict keys are the downstream ones from the start.
"""

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import (
    LAYER_NAME,
    PRIMUS_V2,
    PRIMUS_V3,
    RESENC,
    VIT,
    family_of,
    has_deep_supervision,
    missing_arguments,
    token_size_of,
)
from nnunet_autoreg.geometry import Size, multiplied
from nnunet_autoreg.model.sequence import PrimusEncoder, SequenceEncoder, ViTEncoder
from nnunet_autoreg.model.sizes import grid_of_input
from nnunet_autoreg.plan import EncoderPlan

IMPORTED_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments of a CNN that name a class."""


def build_network(
    class_path: str,
    arguments: Mapping[str, Any],
    input_shape: Sequence[int],
    num_input_channels: int,
    num_classes: int,
    drop_path_rate: float = 0.0,
    deep_supervision: bool = False,
) -> nn.Module:
    """Return the downstream network of any family, with random weights.

    It names its parts as dynamic_network_architectures does: ``key_to_encoder``, ``key_to_stem``,
    ``keys_to_in_proj`` (here every convolution that reads the image) and ``key_to_lpe`` (None
    without learned positions).

    Args:
        arguments: as in ``model.sizes``; classes as dotted names.
        input_shape: (z, y, x) voxels, a multiple of the token size.
        drop_path_rate: stochastic depth; a CNN has none.
        deep_supervision: predictions at several resolutions while
            ``network.decoder.deep_supervision`` is on; CNNs only.

    Raises:
        PlanError: the class is unknown or cannot be imported, the shape is not a multiple of the
            token size, arguments are missing, or the family cannot do what is asked.
    """
    family = family_of(class_path)
    _check_arguments(class_path, arguments, input_shape)
    if deep_supervision and not has_deep_supervision(family):
        raise PlanError(
            f"{class_path} predicts at one resolution only; build it without deep supervision",
            code="plan-deep-supervision",
        )
    if family == RESENC and drop_path_rate > 0:
        raise PlanError(
            f"drop_path_rate={drop_path_rate}: {class_path} has no stochastic depth; set it to 0",
            code="plan-stochastic-depth",
        )

    # JSON has no tuples, but the constructors take sizes as tuples.
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        values[key] = tuple(value) if isinstance(value, list) else value

    if family == RESENC:
        values |= _imported_layers(values)
        values["deep_supervision"] = deep_supervision
    else:
        values["input_shape"] = tuple(int(s) for s in input_shape)
        values["drop_path_rate"] = drop_path_rate

    network_class = located(class_path)
    network: nn.Module = network_class(
        input_channels=num_input_channels,
        num_classes=num_classes,
        **values,
    )

    if family == RESENC:
        network.apply(network.initialize)  # type: ignore[arg-type]
        network.key_to_lpe = None  # type: ignore[assignment]
    if family in (PRIMUS_V2, PRIMUS_V3):
        network.keys_to_in_proj = _stem_readers(network)  # type: ignore[assignment]
    return network


def _check_arguments(
    class_path: str,
    arguments: Mapping[str, Any],
    input_shape: Sequence[int],
) -> None:
    """Refuse missing arguments, and a shape that is not a multiple of the token size.

    Raises:
        PlanError: an argument is missing, or the shape does not fit.
    """
    missing = missing_arguments(class_path, arguments)
    if missing:
        raise PlanError(
            f"encoder.arguments: {', '.join(missing)} missing for {class_path}; take those of an "
            "encoder in model/sizes.py",
            code="plan-missing-argument",
        )
    grid_of_input(input_shape, token_size_of(class_path, arguments))


def _stem_readers(network: nn.Module) -> tuple[str, ...]:
    """Return the names of all convolutions of a convolutional tokenizer that read the image.

    The network's own list lacks the convolution that bypasses the first block of the stem.
    """
    state = network.state_dict()
    readers = []
    for way in ("conv1", "skip.0"):
        for alias in ("conv", "all_modules.0"):
            name = f"down_projection.stem.blocks.0.{way}.{alias}"
            if f"{name}.weight" in state:
                readers.append(name)
    return tuple(readers)


def build_sequence_encoder(
    encoder: EncoderPlan,
    crop_size: Size,
    block_tokens: Size,
    num_channels: int = 1,
    recompute: bool = False,
) -> SequenceEncoder:
    """Return a transformer encoder as pretraining runs it, with random weights.

    Args:
        crop_size: voxels (z, y, x), a multiple of the block.
        block_tokens: tokens of a block per axis.
        recompute: activation checkpointing.

    Raises:
        PlanError: as ``build_network``; or the encoder is a CNN, which reads no sequence of tokens.
    """
    family = family_of(encoder.class_path)
    if family == RESENC:
        raise PlanError(
            f"encoder.name={encoder.name}: a CNN has no tokens to attend to; it is pretrained by "
            "sequence.predictor=network",
            code="plan-cnn-has-no-tokens",
        )

    network = build_network(encoder.class_path, encoder.arguments, crop_size, num_channels, 1)
    token = encoder.token_size_vox
    block = multiplied(token, block_tokens)
    if family == VIT:
        return ViTEncoder(network, token, block, recompute)
    return PrimusEncoder(network, token, block, recompute)


def located(class_path: str) -> type:
    """Return the class of a dotted name.

    Raises:
        PlanError: there is none.
    """
    found = pydoc.locate(class_path)
    if not isinstance(found, type):
        raise PlanError(
            f"the network class '{class_path}' cannot be imported; is "
            "dynamic_network_architectures installed?",
            code="plan-no-such-class",
        )
    return found


def _imported_layers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes that a CNN's arguments name.

    Only layers of torch are accepted, since a plan or card may come from an untrusted source.

    Raises:
        PlanError: a name is not that of a layer of torch.
    """
    layers: dict[str, Any] = {}
    for key in IMPORTED_ARGUMENTS:
        name = arguments.get(key)
        if name is None:
            layers[key] = None
            continue

        # The name is checked before anything is imported: an import runs code.
        is_allowed = isinstance(name, str) and LAYER_NAME.fullmatch(name)
        layer = pydoc.locate(name) if is_allowed else None
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise PlanError(
                f"encoder.arguments.{key}='{name}' is not a layer of torch.nn",
                code="plan-not-a-layer",
            )
        layers[key] = layer
    return layers
