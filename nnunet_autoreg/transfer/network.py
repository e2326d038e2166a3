"""Networks from plans: ours rebuild from the ``"autoreg"`` block alone, stock trainers are told which command to type."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from nnunet_autoreg.model.primus import build_primus
from nnunet_autoreg.transfer.block import AutoregBlock

GUARD_CLASS = f"{__name__}.PlannedForAutoregTrainers"
"""What ``network_class_name`` says in our plans."""


def build_network(block: AutoregBlock, patch_size: Sequence[int], num_input_channels: int, num_classes: int) -> nn.Module:
    """The segmentation network of a configuration, with random weights. Needs no weights file.

    Args:
        patch_size: (z, y, x) voxels, a multiple of the token size.

    Raises:
        PlanError: the class cannot be found, or the patch does not fit the tokens.
    """
    encoder = block.encoder
    return build_primus(
        encoder.class_path, encoder.arguments, patch_size, num_input_channels, num_classes, block.recipe.drop_path_rate
    )


def architecture_entry(block: AutoregBlock, patch_size: Sequence[int]) -> dict[str, Any]:
    """The ``architecture`` of a configuration, as nnU-Net's plans spell it."""
    return {
        "network_class_name": GUARD_CLASS,
        "arch_kwargs": {
            "class_path": block.encoder.class_path,
            "input_shape": [int(p) for p in patch_size],
            "drop_path_rate": block.recipe.drop_path_rate,
            **block.encoder.arguments,
        },
        "_kw_requires_import": [],
    }


class PlannedForAutoregTrainers:
    """Called with what ``architecture`` holds. nnU-Net's own trainers ask for deep supervision, which these networks do not
    have: they get one line with the right command. Anyone else gets the network."""

    def __new__(cls, input_channels: int, num_classes: int, class_path: str, input_shape: Sequence[int], **arguments: Any) -> Any:
        """Build the network, or stop a stock trainer.

        Raises:
            SystemExit: called by a trainer that wants deep supervision.
        """
        if "deep_supervision" in arguments:
            raise SystemExit(
                "error: these plans are for the autoreg trainers; add '-tr AutoregPretrainedTrainer' (or AutoregScratchTrainer) "
                "to the command, e.g.: nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregPretrainedTrainer -p AutoregPlans"
            )
        drop_path_rate = arguments.pop("drop_path_rate", 0.0)
        return build_primus(class_path, arguments, input_shape, input_channels, num_classes, drop_path_rate)
