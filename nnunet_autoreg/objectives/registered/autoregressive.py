"""Register the objective ``autoregressive``: predict each block from the blocks before it.

It has the preset ``faithful``: the settings of AR-SSL4M, as far as an encoder supports them.
"""

from collections.abc import Container
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import family_of, has_start, has_transformer, is_convolutional
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.objective_kinds import CNN, TRANSFORMER, ObjectiveKind, Preset, register
from nnunet_autoreg.objectives.prediction_plan import (
    PredictionPlan,
    check_settings,
    figure_of,
    planned_settings,
    settings_of,
)
from nnunet_autoreg.plan import Plan

if TYPE_CHECKING:
    from nnunet_autoreg.objectives.base import Objective

NAME = "autoregressive"
BY_PRESET = "as AR-SSL4M has it (--preset faithful)"
PAPER_BATCH = 288
NEVER_CLIPS = 1e6
SUB_VOLUMES, STRIDE_VOX = 4, 8


def build_for_transformer(plan: Plan) -> "Objective":
    """Return next-block regression under a block-causal mask."""
    from nnunet_autoreg.objectives.autoregressive import Autoregressive

    return Autoregressive(plan)


def build_for_cnn(plan: Plan) -> "Objective":
    """Return whole-network prediction of unknown blocks from known ones, in any order."""
    from nnunet_autoreg.objectives.whole_network import WholeNetwork

    return WholeNetwork(plan)


def faithful(plan: Plan, kept: Container[str] = ()) -> Plan:
    """Return ``plan`` with AR-SSL4M's settings, as far as an encoder supports them.

    - A crop is cut into four overlapping sub-volumes in interleaved order, without augmentation.
    - Blocks are single tokens, predicted by ``next``. A START token predicts the first one
      (``vit_b16``); without START, at least one block is given.
    - The target has 1e-6 added under the root.
    - AdamW at 1e-4 with weight decay 0.01 on everything, no warm-up, no clipping, half a cosine,
      batch 288.

    Resampling, normalisation (nnU-Net's, instead of percentiles of each crop), the choice of crops
    and the length are not AR-SSL4M's, but those of all runs here.

    Args:
        kept: "sequence.weights" and "optim.batch_size" where the user chose them.

    Raises:
        PlanError: the encoder cannot be trained token by token.

    Source: AR-SSL4M's released code (github.com/serena9525/AR-SSL4M).
    """
    family = family_of(plan.encoder.class_path)
    if is_convolutional(family) or not has_transformer(family):
        raise PlanError(
            f"--preset faithful: {plan.encoder.name} has convolutions that see more than one "
            "token, but AR-SSL4M predicts token by token; use --encoder vit_b16 (AR-SSL4M's own) "
            "or a primus_* one",
            code="preset-encoder",
        )
    sequence = replace(
        plan.sequence,
        crop_size_vox=_crop(plan),
        block_tokens=(1, 1, 1),
        order="interleaved",
        predictor="next",
        prefix="uniform_from_0" if has_start(family) else "uniform",
        flip=False,
        swap_axes=False,
        spatial_share=0.0,
        num_subvolumes=SUB_VOLUMES,
        stride_vox=STRIDE_VOX,
        mask_seen=False,
        weights=plan.sequence.weights if "sequence.weights" in kept else {"strided": 1.0},
    )
    optim = replace(
        plan.optim,
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        decay_all=True,
        warmup_steps=0,
        clip_norm=NEVER_CLIPS,
        batch_size=plan.optim.batch_size if "optim.batch_size" in kept else PAPER_BATCH,
    )
    objective = replace(
        settings_of(plan),
        variance_floor=0.0,
        variance_epsilon=1e-6,
        target_smoothing=0.0,
        corruption=0.0,
        target="normalised",
        head="linear",
        query_attention=False,
    )
    made = replace(plan, sequence=sequence, optim=optim, objective=objective)
    by_preset = _changed(plan, made)
    if "optim.batch_size" not in kept:
        # It is planned with the preset already, because the length depends on it.
        by_preset.append("optim.batch_size")
    return replace(made, reasons={**plan.reasons, **dict.fromkeys(by_preset, BY_PRESET)})


def _crop(plan: Plan) -> Size:
    """Return the planned crop, along z cut to whole tokens of every sub-volume, at least one."""
    z, y, x = plan.sequence.crop_size_vox
    side = SUB_VOLUMES * plan.encoder.token_size_vox[0]
    return (max(z // side, 1) * side, y, x)


def _changed(before: Plan, after: Plan) -> list[str]:
    """Return the keys of the values that differ."""
    keys = []
    for part in ("sequence", "optim", "objective"):
        old, new = vars(getattr(before, part)), vars(getattr(after, part))
        keys += [f"{part}.{key}" for key, value in new.items() if old[key] != value]
    return keys


register(
    ObjectiveKind(
        name=NAME,
        help="predict each block from the blocks before it",
        plan_type=PredictionPlan,
        settings=partial(planned_settings, NAME),
        adapt=lambda plan: plan,
        check=check_settings,
        builders={TRANSFORMER: build_for_transformer, CNN: build_for_cnn},
        figure=figure_of,
        presets=(
            Preset(
                name="faithful",
                help="the settings of the AR-SSL4M paper, as far as the encoder supports them "
                "(--encoder vit_b16 supports all)",
                reason=BY_PRESET,
                apply=faithful,
                batch_size=PAPER_BATCH,
                single_tokens=True,
            ),
        ),
    ),
)
