"""The plan of Alice: its values, defaults and checks.

Light: it imports no torch.
"""

from dataclasses import dataclass, replace

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import features_per_token
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.plan import (
    EncoderPlan,
    ObjectivePlan,
    Plan,
    check_known,
    check_layers,
    check_not_negative,
    check_positive,
    check_shares,
)

CASA_FORMS = ("figure", "released")
EXPORTS = ("student", "teacher")
HEADS_OF_CASA = 8
SMALL_ENCODER = 320
"""An encoder with fewer features per token gets narrow heads."""

REASON = "what Alice is (--objective alice)"


@dataclass(frozen=True)
class AlicePlan(ObjectivePlan):
    """How student and teacher are compared.

    The share of visible blocks is ``sequence.prefix_share``, and the images of a pair are the
    members of a semantic sequence.

    Attributes:
        name: "alice".
        corruption: share of the training samples whose visible part the student is shown with
            another gamma and contrast and with noise. The teacher and the targets are clean.
        class_weight: weight of the loss between the two images of a pair.
        patch_weight: weight of the loss between tokens of one image, after attention (CASA).
        reconstruction_weight: weight of the squared error of the voxels.
        all_voxels: whether visible voxels count in the squared error too, as in the released code.
        casa: "figure": the attention of the paper's figure, where the teacher's tokens come from
            its encoder and the teacher's side has its own weights. "released": that of the released
            code, where one block serves both sides, tokens are the scores of the prototypes, and
            the teacher's come from its decoder.
        width: features of a token in the attention.
        hidden: hidden features of the projection heads.
        num_prototypes: outputs of the projection heads.
        decoder_depth: layers of the decoder of a transformer. A CNN has its own decoder.
        student_temperature: softmax temperature of the student's scores.
        teacher_temperature: temperature of the teacher's scores at the first step, and after a
            tenth of the run.
        momentum: momentum of the teacher's running mean at the first step. It rises to 1 as half a
            cosine.
        centre_momentum: momentum of the running mean of the teacher's scores, which is subtracted
            from them.
        export: whose encoder is exported, "student" or "teacher".
    """

    class_weight: float = 1.0
    patch_weight: float = 1.0
    reconstruction_weight: float = 10.0
    all_voxels: bool = False
    casa: str = "figure"
    width: int = 512
    hidden: int = 2048
    num_prototypes: int = 512
    decoder_depth: int = 2
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    momentum: float = 0.996
    centre_momentum: float = 0.9
    export: str = "student"


def alice_of(plan: Plan) -> AlicePlan:
    """Return the plan's values of Alice."""
    assert isinstance(plan.objective, AlicePlan), "the registry builds the plan's objective"
    return plan.objective


def planned_alice(name: str, encoder: EncoderPlan) -> tuple[AlicePlan, dict[str, str]]:
    """Return the values for an encoder, and the reasons."""
    features = features_per_token(encoder.class_path, encoder.arguments)
    if features >= SMALL_ENCODER:
        why = "as published"
        return AlicePlan(name), {"objective.width": why, "objective.hidden": why}

    why = f"half of what was published, because the encoder has {features} features only"
    settings = AlicePlan(name, width=256, hidden=512)
    return settings, {"objective.width": why, "objective.hidden": why}


def with_pairs(plan: Plan) -> Plan:
    """Return the plan with pairs of crops around one structure in two patients.

    A random quarter of the blocks of each crop is visible to the student.
    """
    sequence = replace(
        plan.sequence,
        order="random",
        prefix="fixed",
        prefix_share=0.25,
        weights={"semantic": 1.0},
        semantic_members=2,
        member_crop_vox=plan.sequence.crop_size_vox,
    )
    reasons = dict(plan.reasons)
    for key in ("order", "prefix", "weights", "semantic_members"):
        reasons[f"sequence.{key}"] = REASON
    reasons["sequence.prefix_share"] = "three quarters are hidden from the student, as published"
    reasons["sequence.member_crop_vox"] = "each image of a pair is a whole crop"
    return replace(plan, sequence=sequence, reasons=reasons)


NOTES = {
    "classes": "How far the student's answer about a crop is from the teacher's about the matched "
    "crop of the other patient.",
    "patches": "How far the student's answer about a visible token is from the teacher's about "
    "the same token.",
    "reconstruction": "Squared error of the voxels that were hidden from the student.",
    "teacher_entropy_classes": "How undecided the teacher is between prototypes, for a crop. 1: "
    "all prototypes alike.",
    "teacher_entropy_patches": "The same for a token. At 1 the teacher says nothing, and the run "
    "has collapsed.",
    "prototype_entropy": "How evenly all tokens together use the prototypes. Near 0, all get the "
    "same one, and the run has collapsed.",
    "centre_norm_classes": "Length of the running mean of the teacher's scores of crops, which is "
    "taken off them.",
    "centre_norm_patches": "The same of tokens.",
    "inlier_rate": "Share of the matches of tokens between two patients that agree with their "
    "neighbours.",
}
"""What the terms of the loss and Alice's own measures mean."""


def alice_figure(plan: Plan) -> FigureOfMerit:
    """Return the figure of merit.

    The teacher moves, so that the losses against it rank nothing. Where labels are there, the
    frozen probe ranks the states; elsewhere the error of the hidden voxels does.
    """
    return FigureOfMerit(
        name="error of hidden voxels",
        unit="squared error",
        explanation="The error is that of the voxels that were hidden from the student, in "
        "standard deviations of the scan. Lower is better. It is only one of three terms of the "
        "loss: the teacher of the other two changes during training, so that their values cannot "
        "be compared from one step to another.",
        references={"mean": "predicting the mean of the visible voxels"},
        term="reconstruction",
        ranks_by_probe=True,
        pictures="Each row is a slice of a validation scan. The blue part was visible to the "
        'student, which predicted the rest. "Nothing predicted" is the mean of the visible part. '
        "Error: the absolute difference. Hatched: padding.",
        notes=NOTES,
    )


def check_alice(plan: Plan) -> None:
    """Refuse values that Alice cannot be trained with.

    Raises:
        PlanError: the message says what to set instead.
    """
    settings, s = alice_of(plan), plan.sequence
    named = {
        "objective.casa": (settings.casa, CASA_FORMS),
        "objective.export": (settings.export, EXPORTS),
    }
    check_known(named)

    if s.order != "random" or s.prefix != "fixed":
        raise PlanError(
            f"objective.name={plan.objective.name} with sequence.order={s.order} and "
            f"sequence.prefix={s.prefix} is ill-posed: a fixed share of the blocks, chosen at "
            "random, is visible; use sequence.order=random and sequence.prefix=fixed",
            code="plan-ill-posed",
        )
    if s.weights.get("strided", 0) > 0:
        raise PlanError(
            "sequence.weights.strided: overlapping sub-volumes would show the student the voxels "
            "that are hidden from it; leave strided out",
            code="plan-ill-posed",
        )
    _check_alice_numbers(settings)


def _check_alice_numbers(settings: AlicePlan) -> None:
    start, end = settings.teacher_temperature
    positive = {
        "objective.width": settings.width,
        "objective.hidden": settings.hidden,
        "objective.student_temperature": settings.student_temperature,
        "objective.teacher_temperature[0]": start,
        "objective.teacher_temperature[1]": end,
        "objective.reconstruction_weight": settings.reconstruction_weight,
    }
    check_positive(positive)
    check_layers({"objective.decoder_depth": settings.decoder_depth})
    not_negative = {
        "objective.class_weight": settings.class_weight,
        "objective.patch_weight": settings.patch_weight,
    }
    check_not_negative(not_negative)
    shares = {
        "objective.momentum": settings.momentum,
        "objective.centre_momentum": settings.centre_momentum,
    }
    check_shares(shares)

    # Attention has several heads, and a softmax over fewer than two prototypes is constant.
    width = settings.width if settings.casa == "figure" else settings.num_prototypes
    if width % HEADS_OF_CASA or settings.num_prototypes < 2:
        key = "objective.width" if settings.casa == "figure" else "objective.num_prototypes"
        raise PlanError(
            f"{key}={width} must be a multiple of {HEADS_OF_CASA}, the number of heads of the "
            f"attention, and objective.num_prototypes={settings.num_prototypes} at least 2",
            code="plan-out-of-range",
        )
