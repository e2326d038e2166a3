"""Define how fine-tuning differs between families of encoders. Torch-free.

Source of the values: arXiv 2412.17041 and nnU-Net's own trainers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.finetune.block import SGD
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

CNN_RECIPE: dict[str, Any] = {
    "optimizer": SGD,
    "weight_decay": 3e-5,
    "clip_norm": 12.0,
    "drop_path_rate": 0.0,
    "deep_supervision": True,
}
"""As in nnU-Net's own trainer. Transformers use the defaults of ``Recipe``."""
TRANSFORMER_RATES, CNN_RATES = (1e-4, 3e-4), (1e-3, 1e-2)
"""Peak learning rates (pretrained, scratch) of an encoder that is not one of ours."""
DECODER_FIRST = 0.1
"""Share of a run in which only the decoder is trained, if it is trained first."""
VERY_FEW_CASES = 10


def is_cnn(encoder: EncoderPlan) -> bool:
    """Return whether the encoder is a CNN.

    A CNN's strides and kernels depend on the data, and it can have deep supervision.

    Raises:
        PlanError: its class belongs to no known family.
    """
    return family_of(encoder.class_path) == RESENC


def recipe_values(encoder: EncoderPlan) -> dict[str, Any]:
    """Return the values of the recipe that differ from the defaults, and the peak rates."""
    # An imported encoder may have a size that is none of ours.
    size = ENCODERS.get(encoder.name)
    pretrained, scratch = CNN_RATES if is_cnn(encoder) else TRANSFORMER_RATES
    if size is not None:
        pretrained, scratch = size.pretrained_rate, size.scratch_rate
    values = {"pretrained_rate": pretrained, "scratch_rate": scratch}

    if is_cnn(encoder):
        values |= CNN_RECIPE
    elif size is not None and size.is_tiny:
        # Six narrow layers are too few to drop any.
        values["drop_path_rate"] = 0.0
    return values


def rate_reason(encoder: EncoderPlan) -> str:
    """Return the reason of the planned learning rates.

    Source: docs/explanation/measured_segmentation.md, fine-tuning by SGD on 5 labelled patients.
    """
    if not is_cnn(encoder):
        return f"the usual rates of {encoder.name}"
    if encoder.name in ENCODERS and ENCODERS[encoder.name].is_tiny:
        return (
            "the rate for random weights, which was better than a tenth of it in the one comparison"
        )
    return "a tenth of the rate for random weights, as published for large CNNs; not measured here"


def decoder_first(
    encoder: EncoderPlan,
    num_cases: int,
    is_pretrained: bool,
    stem_change: str,
    has_decoder: bool = False,
) -> tuple[float, str]:
    """Return the share of the run in which only the decoder is trained, and the reason.

    Args:
        num_cases: labelled cases.
        is_pretrained: whether the plan names weights.
        stem_change: how the stem is adapted to the data; "" if it is not adapted.
        has_decoder: whether the decoder starts from pretrained weights as well.
    """
    if not is_cnn(encoder):
        return 0.0, "off for transformers"
    if not is_pretrained:
        return 0.0, "off: no pretrained weights"
    if has_decoder:
        return 0.0, "off: the decoder is pretrained as well"
    if stem_change:
        return DECODER_FIRST, f"on, the stem is adapted: {stem_change}"
    if num_cases <= VERY_FEW_CASES:
        return DECODER_FIRST, f"on, {num_cases} labelled cases: up to {VERY_FEW_CASES} are very few"
    reason = (
        f"off: the stem is not adapted, and {num_cases} labelled cases are more than "
        f"{VERY_FEW_CASES}"
    )
    return 0.0, reason


def decoder_transfer(num_steps: int) -> tuple[bool, str]:
    """Return whether the decoder of the weights is loaded, and the reason.

    Source: docs/explanation/measured.md, fine-tuning on 5 labelled patients.

    Args:
        num_steps: number of steps of the pretraining that the weights come from; 0 for a trained
            model that was imported.
    """
    if num_steps == 0:
        return True, "loaded with the encoder: it was trained for segmentation"
    return False, "random: after pretraining, only the encoder was measured to help"


def stem_change(encoder: EncoderPlan, arguments: Mapping[str, Any], channel_note: str) -> str:
    """Return how the stem differs from the pretrained one, or "" if it does not.

    Args:
        arguments: the configuration's network arguments.
        channel_note: the note of ``map_channels``.
    """
    if not is_cnn(encoder):
        return channel_note

    changes = [channel_note] if channel_note else []
    old = rows(encoder.arguments["kernel_sizes"])[0]
    new = rows(arguments["kernel_sizes"])[0]
    if old != new:
        changes.append(f"kernel {old} -> {new}")
    return ", ".join(changes)


def rows(values: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """Return the strides or kernels of the stages, three numbers for each."""
    found = []
    for row in values:
        of_axes = [row] * 3 if isinstance(row, int) else row
        found.append([int(value) for value in of_axes])
    return found
