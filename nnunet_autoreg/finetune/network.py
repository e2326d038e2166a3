"""Build networks from plans.

Our trainers build the network from the plan, without the weights. nnU-Net's stock trainers stop
with one line that names the right command.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nnunet_autoreg.finetune.block import AutoregBlock, check_arguments, check_class
from nnunet_autoreg.model import encoders

GUARD_NAME = "PlannedForAutoregTrainers"
GUARD_CLASS = f"nnunet_autoreg.finetune.network.{GUARD_NAME}"
"""The value of ``network_class_name`` in our plans.

Plans outlive code, so this name must never change: the class stays importable from here.
"""
NOT_ARGUMENTS = ("class_path", "input_shape", "drop_path_rate")
"""Keys of ``arch_kwargs`` that are not arguments of the network itself."""


def build_network(
    block: AutoregBlock,
    patch_size: Sequence[int],
    num_input_channels: int,
    num_classes: int,
    arguments: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
) -> nn.Module:
    """Return the segmentation network of a configuration with random weights.

    Args:
        patch_size: (z, y, x) voxels, a multiple of the token size.
        arguments: those of the configuration, because the strides and kernels of a CNN depend on
            spacing and patch; None for those of the encoder.
        deep_supervision: whether a CNN predicts at several resolutions.

    Raises:
        PlanError: the class cannot be found, or the patch does not fit the tokens.
    """
    # Arguments of a configuration were not checked with the block.
    chosen = block.encoder.arguments if arguments is None else arguments
    check_arguments(chosen, "architecture")
    return encoders.build_network(
        block.encoder.class_path,
        chosen,
        patch_size,
        num_input_channels,
        num_classes,
        block.recipe.drop_path_rate,
        deep_supervision,
    )


def architecture_entry(
    block: AutoregBlock,
    patch_size: Sequence[int],
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the ``architecture`` of a configuration in the form of nnU-Net's plans."""
    chosen = block.encoder.arguments if arguments is None else arguments
    return {
        "network_class_name": GUARD_CLASS,
        "arch_kwargs": {
            "class_path": block.encoder.class_path,
            "input_shape": [int(p) for p in patch_size],
            "drop_path_rate": block.recipe.drop_path_rate,
            **chosen,
        },
        "_kw_requires_import": [],
    }


def own_arguments(arch_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network itself from the ``arch_kwargs`` of an architecture."""
    arguments = dict(arch_kwargs)
    for key in NOT_ARGUMENTS:
        arguments.pop(key, None)
    return arguments


def encoder_prefixes(network: nn.Module) -> tuple[str, str]:
    """Return the prefixes of the keys of a network's encoder and stem."""
    return f"{network.key_to_encoder}.", f"{network.key_to_stem}."


class PlannedForAutoregTrainers:
    """Build the network that ``architecture`` describes, but not for nnU-Net's own trainers.

    These pass ``deep_supervision``, and get one line with the right command instead.
    """

    def __new__(
        cls,
        input_channels: int,
        num_classes: int,
        class_path: str,
        input_shape: Sequence[int],
        **arguments: Any,
    ) -> Any:
        """Build the network, or stop a stock trainer.

        Raises:
            SystemExit: called with ``deep_supervision``, so by a stock trainer.
        """
        if "deep_supervision" in arguments:
            raise SystemExit(
                "error: these plans are for the autoreg trainers; add '-tr "
                "AutoregPretrainedTrainer' (or AutoregScratchTrainer) to the command, e.g.: "
                "nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregPretrainedTrainer -p "
                "AutoregPlans",
            )

        check_class(class_path, "architecture")
        check_arguments(arguments, "architecture")
        drop_path_rate = arguments.pop("drop_path_rate", 0.0)
        return encoders.build_network(
            class_path,
            arguments,
            input_shape,
            input_channels,
            num_classes,
            drop_path_rate,
        )
