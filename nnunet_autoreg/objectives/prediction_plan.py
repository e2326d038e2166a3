"""The plan of the objectives that predict blocks of voxels: their values, defaults and checks.

Light: it imports no torch.
"""

from dataclasses import dataclass, replace
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import family_of, has_transformer
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.plan import (
    EncoderPlan,
    ObjectivePlan,
    Plan,
    check_known,
    check_layers,
    check_not_negative,
    check_positive,
)

HEADS = ("linear", "mlp")
TARGETS = ("normalised", "normalised_with_statistics", "voxels")
UNKNOWN_MARKS = ("zero", "learned")
MAX_SEGMENTS = 1024
LEAST_QUERY_DEPTH, MOST_QUERY_DEPTH = 4, 8

EXPLANATIONS = {
    "normalised": "Voxels are normalised within each token. An error of 1 is therefore what "
    "predicting the mean of every token costs. Lower is better.",
    "normalised_with_statistics": "The error is a sum of three errors: of the voxels, normalised "
    "within each token; of the token's mean; and of the logarithm of the token's standard "
    "deviation. The mean, as a baseline, is that of the scan. Lower is better.",
    "voxels": "Voxels are compared as they are, in standard deviations of the scan. The mean, as a "
    "baseline, is that of the scan. Lower is better.",
}

BLOCK_AFTER_BLOCK = (
    "Every further block was predicted from the true blocks before it, not from earlier "
    "predictions."
)
AT_ONCE = "All other blocks were predicted from it at once."
PATTERN_ALONE = (
    "Only the pattern of a token is predicted: its mean and standard deviation are taken from the "
    'truth. The coarse look of a prediction is therefore not its own, and "nothing predicted" '
    'shows how much of it comes for free. Judge the detail that "predicted" adds.'
)
INTENSITIES = 'Intensities are predicted too; "nothing predicted" shows their mean instead.'


@dataclass(frozen=True)
class PredictionPlan(ObjectivePlan):
    """What is predicted of unknown blocks, and by which head.

    Attributes:
        name: "autoregressive": block after block. "masked": all unknown blocks at once from the
            known ones. It needs a fixed prefix, which is the visible share, random order, and the
            predictor "query" or "network".
        corruption: share of the training samples whose given part is shown with another gamma and
            contrast and with noise. Targets are always clean.
        target: what is predicted of every unknown token. "normalised": its voxels minus their mean,
            divided by their deviation: (v - mean) / sqrt(max(var, floor) + epsilon).
            "normalised_with_statistics": the same, and the token's mean and the logarithm of its
            deviation as two more outputs. "voxels": its voxels as nnU-Net normalises them.
        variance_floor: the floor, in squared normalised intensity units; 0 for none.
        variance_epsilon: added under the root, in the same units. AR-SSL4M adds 1e-6 and has no
            floor.
        target_smoothing: standard deviation in voxels of a Gaussian that smooths every token's
            target; 0 for none. It uses valid voxels of the same token only.
        query_depth: layers of the decoder of the predictor "query".
        query_attention: whether the decoder's queries of one block attend to each other. Queries of
            different blocks never do.
        head: last layers of the predictors "query" and "next". "linear": one matrix. "mlp": with a
            hidden layer.
        unknown_mark: how the predictor "network" recognises unknown voxels. "zero": they are 0 in
            the input. "learned": a learned vector is also added to their features after the stem.
        num_segments: classes of pseudo-segments that the predictor "network" predicts beside the
            voxels; 0 for none. They are clusters of local features over the pool.
        segment_weight: weight of the cross-entropy of the segments, relative to the squared error
            of the voxels.
        trunk: only in plans of version 1, for a CNN: the transformer over its features. Such a run
            cannot be continued.
    """

    target: str = "normalised"
    variance_floor: float = 1e-2
    variance_epsilon: float = 0.0
    target_smoothing: float = 0.0
    query_depth: int = 2
    query_attention: bool = False
    head: str = "linear"
    unknown_mark: str = "zero"
    num_segments: int = 0
    segment_weight: float = 1.0
    trunk: dict[str, Any] | None = None


def settings_of(plan: Plan) -> PredictionPlan:
    """Return the plan's values of an objective that predicts blocks."""
    assert isinstance(plan.objective, PredictionPlan), "the registry builds the plan's objective"
    return plan.objective


def planned_settings(name: str, encoder: EncoderPlan) -> tuple[PredictionPlan, dict[str, str]]:
    """Return target and decoder of the regression, and the reasons.

    Source: AIM (arXiv 2401.08541) and Pixio found that a deeper decoder and a head of several
        layers keep the encoder from spending its own last layers on voxels; a third of the
        encoder's depth is a rule of thumb.
    """
    if not has_transformer(family_of(encoder.class_path)):
        why = "as nnssl's masked CNNs: z-scored voxels, which keep intensities"
        return PredictionPlan(name, target="voxels"), {"objective.target": why}

    encoder_depth = int(encoder.arguments["eva_depth"])
    depth = min(max(encoder_depth // 3, LEAST_QUERY_DEPTH), MOST_QUERY_DEPTH)
    why = (
        f"a third of the encoder's {encoder_depth} layers, within {LEAST_QUERY_DEPTH} to "
        f"{MOST_QUERY_DEPTH}"
    )
    settings = PredictionPlan(name, query_depth=depth, query_attention=True, head="mlp")
    return settings, {"objective.query_depth": why}


def figure_of(plan: Plan) -> FigureOfMerit:
    """Return the figure of merit: the error of the predicted blocks of validation scans."""
    target = settings_of(plan).target
    is_pattern = target == "normalised"
    about_pictures = [
        "Each row is a slice of a validation scan. The blue part was given to the model.",
        AT_ONCE if plan.sequence.is_at_once else BLOCK_AFTER_BLOCK,
        PATTERN_ALONE if is_pattern else INTENSITIES,
        "Error: the absolute difference. Hatched: padding, or nothing to predict.",
    ]
    return FigureOfMerit(
        name="next-block error",
        unit="squared error",
        explanation=EXPLANATIONS[target],
        references={
            "copy": "copying the previous block",
            "mean": "predicting the mean",
        },
        hint="predicting nothing gives about 1" if is_pattern else "",
        pictures=" ".join(about_pictures),
    )


def check_settings(plan: Plan) -> None:
    """Refuse values that no network can be trained with.

    Raises:
        PlanError: the message says what to set instead.
    """
    settings = settings_of(plan)
    _check_values(settings)

    # The network must be able to predict the targets.
    if settings.trunk is not None:
        raise PlanError(
            "objective.trunk: this run began with nnunet-autoreg 0.1, which pretrained "
            f"{plan.encoder.name} block by block under a transformer. This version trains the "
            "whole network instead: finish the run with version 0.1, or start a new --name",
            code="plan-old-trunk",
        )
    predicts_voxels = plan.sequence.predictor == "network"
    if predicts_voxels and settings.target == "normalised_with_statistics":
        raise PlanError(
            "objective.target=normalised_with_statistics: a CNN predicts one value per voxel; use "
            "voxels or normalised",
            code="plan-cnn-target",
        )

    # Only some networks predict segments, and a single segment teaches nothing.
    num_segments = settings.num_segments
    if num_segments and plan.sequence.predictor != "network":
        raise PlanError(
            f"objective.num_segments={num_segments}: {plan.encoder.name} predicts tokens, and only "
            "a CNN predicts a segment of every voxel; use --encoder resenc_*, or "
            "objective.num_segments=0",
            code="plan-segments-need-cnn",
        )
    if num_segments == 1 or num_segments > MAX_SEGMENTS:
        raise PlanError(
            f"objective.num_segments={num_segments} must be 0 (none) or lie between 2 and "
            f"{MAX_SEGMENTS}; use 16",
            code="plan-num-segments",
        )


def check_is_masked(plan: Plan) -> None:
    """Refuse sequences that are not those of masked autoencoding.

    Raises:
        PlanError: the message says what to set instead.
    """
    s = plan.sequence
    # These predictors know where the blocks lie that they have to predict.
    knows_position = s.predictor in ("query", "network")
    if s.order == "random" and knows_position and s.prefix == "fixed":
        return
    raise PlanError(
        f"objective.name={plan.objective.name} with sequence.order={s.order}, "
        f"sequence.predictor={s.predictor} and sequence.prefix={s.prefix} is ill-posed: a fixed "
        "share of the blocks, chosen at random, is visible, and the others are predicted by their "
        f"positions; use --objective {plan.objective.name}, which sets order=random, prefix=fixed "
        "and a predictor that knows the position",
        code="plan-ill-posed",
    )


def as_masked(plan: Plan, reason: str) -> Plan:
    """Return the plan with a random quarter of the blocks visible and all others predicted."""
    is_transformer = has_transformer(family_of(plan.encoder.class_path))
    sequence = replace(
        plan.sequence,
        order="random",
        predictor="query" if is_transformer else "network",
        prefix="fixed",
        prefix_share=0.25,
    )
    reasons = dict(plan.reasons)
    for key in ("objective.name", "sequence.order", "sequence.predictor", "sequence.prefix"):
        reasons[key] = reason
    reasons["sequence.prefix_share"] = "a quarter is visible, as usual"
    return replace(plan, sequence=sequence, reasons=reasons)


def _check_values(settings: PredictionPlan) -> None:
    named = {
        "objective.head": (settings.head, HEADS),
        "objective.target": (settings.target, TARGETS),
        "objective.unknown_mark": (settings.unknown_mark, UNKNOWN_MARKS),
    }
    check_known(named)

    under_root = settings.variance_floor + settings.variance_epsilon
    positive = {
        "objective.segment_weight": settings.segment_weight,
        "objective.variance_floor + objective.variance_epsilon": under_root,
    }
    check_positive(positive)
    check_layers({"objective.query_depth": settings.query_depth})

    not_negative = {
        "objective.variance_floor": settings.variance_floor,
        "objective.variance_epsilon": settings.variance_epsilon,
        "objective.target_smoothing": settings.target_smoothing,
        "objective.num_segments": settings.num_segments,
    }
    check_not_negative(not_negative)
