"""Networks from plans: ours rebuild from the plan alone, stock trainers are told which command to
type.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nnunet_autoreg.finetune.block import AutoregBlock, check_arguments, check_class
from nnunet_autoreg.model import encoders

GUARD_CLASS = f"{__name__}.PlannedForAutoregTrainers"
"""What ``network_class_name`` says in our plans."""
NOT_ARGUMENTS = ("class_path", "input_shape", "drop_path_rate")
"""What ``arch_kwargs`` holds beside the network's own arguments."""


def build_network(
    block: AutoregBlock,
    patch_size: Sequence[int],
    num_input_channels: int,
    num_classes: int,
    arguments: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
) -> nn.Module:
    """The segmentation network of a configuration, with random weights. Needs no weights file.

    Args:
        patch_size: (z, y, x) voxels, a multiple of the token size.
        arguments: the configuration's own (strides and kernels of a CNN follow its spacing and
            patch); the encoder's where None.
        deep_supervision: predictions at several resolutions, where the network has them.

    Raises:
        PlanError: the class cannot be found, or the patch does not fit the tokens.
    """
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
    block: AutoregBlock, patch_size: Sequence[int], arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``architecture`` of a configuration, as nnU-Net's plans spell it."""
    return {
        "network_class_name": GUARD_CLASS,
        "arch_kwargs": {
            "class_path": block.encoder.class_path,
            "input_shape": [int(p) for p in patch_size],
            "drop_path_rate": block.recipe.drop_path_rate,
            **(block.encoder.arguments if arguments is None else arguments),
        },
        "_kw_requires_import": [],
    }


def own_arguments(arch_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The network's arguments out of what ``architecture_entry`` wrote."""
    return {key: value for key, value in arch_kwargs.items() if key not in NOT_ARGUMENTS}


def encoder_prefixes(network: nn.Module) -> tuple[str, str]:
    """What the keys of a network's encoder and stem begin with."""
    return f"{network.key_to_encoder}.", f"{network.key_to_stem}."


class PlannedForAutoregTrainers:
    """Called with what ``architecture`` holds. nnU-Net's own trainers say whether they want deep
    supervision: they get one line with the right command. Anyone else gets the network.
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
            SystemExit: called by a trainer that speaks of deep supervision.
        """
        if "deep_supervision" in arguments:
            raise SystemExit(
                "error: these plans are for the autoreg trainers; add '-tr "
                "AutoregPretrainedTrainer' (or AutoregScratchTrainer) "
                "to the command, e.g.: nnUNetv2_train DATASET 3d_fullres FOLD -tr "
                "AutoregPretrainedTrainer -p AutoregPlans"
            )
        check_class(class_path, "architecture")
        check_arguments(arguments, "architecture")
        drop_path_rate = arguments.pop("drop_path_rate", 0.0)
        return encoders.build_network(
            class_path, arguments, input_shape, input_channels, num_classes, drop_path_rate
        )
