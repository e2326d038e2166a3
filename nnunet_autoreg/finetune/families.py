"""What fine-tuning does differently from one family of encoders to the next. Torch-free.

Source of the values: design, fine-tuning recipe, which rests on arXiv 2412.17041 and on nnU-Net's
    own trainers.
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
"""As nnU-Net's own trainer; transformers take the defaults of ``Recipe``."""
TRANSFORMER_RATES, CNN_RATES = (1e-4, 3e-4), (1e-3, 1e-2)
"""Peak rates, pretrained and scratch, of an encoder that is none of ours."""
DECODER_FIRST = 0.1
"""Share of a run."""
VERY_FEW_CASES = 10


def is_cnn(encoder: EncoderPlan) -> bool:
    """Whether the encoder is a CNN: strides and kernels follow the data, and there is deep
    supervision.

    Raises:
        PlanError: its class is of no known family.
    """
    return family_of(encoder.class_path) == RESENC


def recipe_values(encoder: EncoderPlan) -> dict[str, Any]:
    """Where the recipe of this encoder's family differs from the defaults, peak rates included."""
    size = ENCODERS.get(encoder.name)
    usual = CNN_RATES if is_cnn(encoder) else TRANSFORMER_RATES
    pretrained, scratch = (size.pretrained_rate, size.scratch_rate) if size else usual
    values = {"pretrained_rate": pretrained, "scratch_rate": scratch}

    if is_cnn(encoder):
        values |= CNN_RECIPE
    elif size is not None and size.is_tiny:
        # Six narrow layers leave nothing to spare.
        values["drop_path_rate"] = 0.0
    return values


def decoder_first(
    encoder: EncoderPlan,
    num_cases: int,
    is_pretrained: bool,
    stem_change: str,
    has_decoder: bool = False,
) -> tuple[float, str]:
    """Share of the run in which only the decoder learns, and why.

    Args:
        num_cases: labelled cases.
        is_pretrained: whether the plan names weights.
        stem_change: how the stem is adapted to the data, "" if it is not.
        has_decoder: whether the decoder starts from pretrained weights too.
    """
    if not is_cnn(encoder):
        return 0.0, "off for transformers"
    if not is_pretrained:
        return 0.0, "off: nothing is pretrained"
    if has_decoder:
        return 0.0, "off: the decoder is pretrained too"
    if stem_change:
        return DECODER_FIRST, f"on, the stem is adapted: {stem_change}"
    if num_cases <= VERY_FEW_CASES:
        return DECODER_FIRST, f"on, {num_cases} labelled cases: up to {VERY_FEW_CASES} are very few"
    return (
        0.0,
        f"off: the stem is as it was, and {num_cases} labelled cases are more than "
        f"{VERY_FEW_CASES}",
    )


def stem_change(encoder: EncoderPlan, arguments: Mapping[str, Any], channel_note: str) -> str:
    """How the stem that reads the image differs from the pretrained one, "" if it does not.

    Args:
        arguments: the configuration's network arguments.
        channel_note: what ``map_channels`` did.
    """
    if not is_cnn(encoder):
        return channel_note
    old, new = rows(encoder.arguments["kernel_sizes"])[0], rows(arguments["kernel_sizes"])[0]
    return ", ".join(
        [
            *([channel_note] if channel_note else []),
            *([f"kernel {old} -> {new}"] if old != new else []),
        ]
    )


def rows(values: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """Strides or kernels of the stages, each as three numbers."""
    return [[int(row)] * 3 if isinstance(row, int) else [int(v) for v in row] for row in values]
