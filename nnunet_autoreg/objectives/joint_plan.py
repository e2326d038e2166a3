"""The plan of joint 2D/3D clustering: its values, defaults and checks.

Light: it imports no torch.
"""

import math
from dataclasses import dataclass, replace

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import family_of, features_per_token, smallest_block
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.plan import (
    EncoderPlan,
    Plan,
    ViewPlan,
    check_layers,
    check_not_negative,
    check_positive,
    check_shares,
)

SMALL_ENCODER = 320
"""An encoder with fewer features per token gets a narrow head and few layers of attention."""
MOST_SLABS = 15
"""A crop is cut into at most this many slabs. Each is encoded by itself."""
ROWS_PER_CLUSTER = 8
"""Fewest embeddings in the bank for each cluster."""
MOST_CLUSTERS, FEWEST_CLUSTERS = 256, 4
MOST_BANK_CASES = 2**16
BANK_SLABS = 4
"""Slabs of one case that the bank holds."""
IMAGE_WEIGHT = 0.5
"""Steps on 2D images for each step on volumes, if there are images."""

REASON = "needed for --objective joint"


@dataclass(frozen=True)
class JointPlan(ViewPlan):
    """How slabs, 2D images and volumes are clustered.

    Attributes:
        name: "joint".
        corruption: stays 0, because each view has its own intensities (``intensity_share``).
        slab_vox: slices of a slab, a multiple of the token's depth. A 2D image is repeated to this
            number of slices.
        slab_step_vox: distance between the starts of slabs, in slices.
        intensity_share: share of the views that are shown with another gamma and contrast and with
            noise.
        slab_weight: weight of the loss between slabs of both views, and between views of images.
        volume_weight: weight of the loss between volumes, after attention over their slabs.
        hidden_weight: weight of the prediction of hidden slabs from the others.
        width: features of an embedding of a slab or a volume.
        depth: layers of the attention over slabs.
        num_heads: heads of the attention.
        key_every: number of slabs for each key of the attention.
        max_offset: largest shift of a key from its position, in slabs.
        hidden_share: share of a volume's slabs that are hidden.
        num_slab_clusters, num_volume_clusters: prototypes of slabs (with images) and of volumes.
        bank_cases: number of cases whose newest embeddings are in the bank. If there are more
            cases, several share an entry.
        temperature: softmax temperature of the scores that are learnt.
        sharpness: softmax temperature of the targets, before they are balanced.
        slabs_first: share of the run in which only slabs and images are clustered. After that, the
            weights of the other two losses rise over a part of the same length.
    """

    slab_weight: float = 1.0
    volume_weight: float = 1.0
    hidden_weight: float = 1.0
    width: int = 256
    depth: int = 4
    num_heads: int = 8
    key_every: int = 2
    max_offset: float = 2.0
    hidden_share: float = 0.2
    num_slab_clusters: int = 64
    num_volume_clusters: int = 16
    bank_cases: int = 1024
    temperature: float = 0.1
    sharpness: float = 0.05
    slabs_first: float = 0.1


def joint_of(plan: Plan) -> JointPlan:
    """Return the plan's values of joint clustering."""
    assert isinstance(plan.objective, JointPlan), "the registry builds the plan's objective"
    return plan.objective


def planned_joint(name: str, encoder: EncoderPlan) -> tuple[JointPlan, dict[str, str]]:
    """Return the values for an encoder, and the reasons."""
    features = features_per_token(encoder.class_path, encoder.arguments)
    if features >= SMALL_ENCODER:
        return JointPlan(name), {}

    why = f"half of what large encoders get, because the encoder has {features} features only"
    settings = JointPlan(name, width=128, depth=2)
    return settings, {"objective.width": why, "objective.depth": why}


def with_views(plan: Plan) -> Plan:
    """Return the plan with two views of each crop, cut into slabs."""
    slab_vox = choose_slab(plan)
    objective = replace(joint_of(plan), slab_vox=slab_vox, slab_step_vox=max(1, slab_vox // 2))
    # Views of a scan have to differ, else there is nothing to learn from their agreement.
    sequence = replace(plan.sequence, weights={"views": 1.0}, prefix="fixed", spatial_share=0.5)
    reasons = {
        **plan.reasons,
        "sequence.weights": REASON,
        "sequence.spatial_share": "each view is rotated, and independently zoomed, half the time",
        "objective.slab_vox": f"whole tokens, and at most {MOST_SLABS} slabs that overlap by half",
    }
    return replace(plan, sequence=sequence, objective=objective, reasons=reasons)


def choose_slab(plan: Plan) -> int:
    """Return the slices of a slab: the fewest whole tokens that give few enough slabs.

    Slabs overlap by half and cover the crop. Where that is impossible, a slab is a whole crop,
    which the check of the plan refuses.
    """
    depth = plan.sequence.crop_size_vox[0]
    token = plan.encoder.token_size_vox[0]
    least = smallest_block(family_of(plan.encoder.class_path), plan.encoder.token_size_vox)[0]
    for slab in range(token * least, depth, token):
        step = slab // 2
        is_even = slab % 2 == 0
        if is_even and (depth - slab) % step == 0 and (depth - slab) // step < MOST_SLABS:
            return slab
    return depth


def fit_to_scans(plan: Plan, num_volumes: int, num_images: int) -> Plan:
    """Return the plan with clusters and bank for this many training scans.

    Args:
        num_images: 2D images.
    """
    settings = joint_of(plan)
    # A bank of very many cases would take more memory than the network.
    bank_cases = min(num_volumes + num_images, MOST_BANK_CASES)
    num_rows = num_volumes * BANK_SLABS + num_images
    slab_clusters = clusters_for(num_rows)
    volume_clusters = clusters_for(num_volumes)
    objective = replace(
        settings,
        num_slab_clusters=slab_clusters,
        num_volume_clusters=volume_clusters,
        bank_cases=max(1, bank_cases),
    )
    reasons = {
        **plan.reasons,
        "objective.num_slab_clusters": f"one for each {ROWS_PER_CLUSTER} of {num_rows} slabs and "
        f"images in the bank, at most {MOST_CLUSTERS}",
        "objective.num_volume_clusters": f"one for each {ROWS_PER_CLUSTER} of {num_volumes} "
        f"volumes, from {FEWEST_CLUSTERS} to {MOST_CLUSTERS}",
        "objective.bank_cases": f"{num_volumes} volumes and {num_images} 2D images are trained on",
    }
    sequence = plan.sequence
    if num_images:
        sequence = replace(sequence, weights={"views": 1.0, "images": IMAGE_WEIGHT})
        reasons["sequence.weights"] = f"{REASON}; {num_images} 2D images"
    return replace(plan, objective=objective, sequence=sequence, reasons=reasons)


def clusters_for(num_rows: int) -> int:
    """Return the number of clusters for this many embeddings."""
    return max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, num_rows // ROWS_PER_CLUSTER))


NOTES = {
    "slabs": "Cross-entropy of the cluster of a slab in one view and its prediction from the "
    "other.",
    "volumes": "The same of whole volumes.",
    "hidden": "How well the representations of hidden slabs are predicted from the visible ones.",
    "cluster_entropy": "How evenly all slabs together use the clusters. Near 0, all are in one.",
    "code_entropy": "How undecided the assignment of one slab is. At 1 it says nothing.",
    "projection_spread": "Variance of the projections of slabs. Near 0, all slabs look alike to "
    "the network.",
    "slab_spread": "Variance of the embeddings of slabs. Near 0, all slabs look alike to the "
    "network.",
    "empty_clusters": "Share of the clusters that are the first choice of no slab.",
    "bank_filled": "Share of the scans whose slabs the network remembers for comparison.",
}
"""What the measures of joint clustering mean."""


def joint_figure(plan: Plan) -> FigureOfMerit:
    """Return the figure of merit.

    Clusters move during training, so that the loss ranks the states of a run only roughly. Where
    labels are there, the frozen probe ranks them.
    """
    return FigureOfMerit(
        name="disagreement of slabs",
        unit="nats",
        explanation="The error is the cross-entropy between the cluster of a slab in one view and "
        "what the network says of the same slab in the other view. Lower is better. It is one of "
        "three terms of the loss. Clusters move during training, so that values of different "
        "steps can only roughly be compared.",
        references={"uniform": "giving every cluster the same share"},
        hint=f"by chance {math.log(joint_of(plan).num_slab_clusters):.2f}",
        term="slabs",
        ranks_by_probe=True,
        pictures="Each row shows the middle slices of validation slabs and 2D images that lie "
        "nearest to one prototype, the centre of a cluster. Each is from another sample, the "
        "nearest first; a cosine of 1 is the prototype itself. What lies together should look "
        "alike.",
        notes=NOTES,
    )


def check_joint(plan: Plan) -> None:
    """Refuse values that joint clustering cannot be trained with.

    Raises:
        PlanError: the message says what to set instead.
    """
    settings, s = joint_of(plan), plan.sequence
    depth, token = s.crop_size_vox[0], plan.encoder.token_size_vox[0]
    slab, step = settings.slab_vox, settings.slab_step_vox
    if slab < 1 or slab % token or slab >= depth:
        raise PlanError(
            f"objective.slab_vox={slab} must be a multiple of {token}, the depth of a token, and "
            f"less than {depth}, the depth of a crop (sequence.crop_size_vox), so that a crop has "
            "several slabs; use deeper crops, or an --encoder with smaller tokens",
            code="plan-slabs",
        )
    if step < 1 or step > slab or (depth - slab) % step:
        raise PlanError(
            f"objective.slab_step_vox={step} must lie between 1 and objective.slab_vox={slab}, and "
            f"divide {depth - slab}, so that the slabs cover the crop",
            code="plan-slabs",
        )
    if settings.corruption > 0:
        raise PlanError(
            f"objective.corruption={settings.corruption}: views have their own intensities; use "
            "objective.intensity_share instead",
            code="plan-ill-posed",
        )
    if s.prefix != "fixed":
        raise PlanError(
            f"sequence.prefix={s.prefix}: nothing is given or predicted block by block; use "
            "sequence.prefix=fixed",
            code="plan-ill-posed",
        )
    _check_numbers(settings)


def _check_numbers(settings: JointPlan) -> None:
    positive = {
        "objective.num_heads": settings.num_heads,
        "objective.key_every": settings.key_every,
        "objective.bank_cases": settings.bank_cases,
        "objective.temperature": settings.temperature,
        "objective.sharpness": settings.sharpness,
        "objective.slab_weight": settings.slab_weight,
    }
    check_positive(positive)
    check_layers({"objective.depth": settings.depth})
    not_negative = {
        "objective.volume_weight": settings.volume_weight,
        "objective.hidden_weight": settings.hidden_weight,
        "objective.max_offset": settings.max_offset,
    }
    check_not_negative(not_negative)
    shares = {
        "objective.intensity_share": settings.intensity_share,
        "objective.slabs_first": settings.slabs_first,
    }
    check_shares(shares)
    if not 0 < settings.hidden_share < 1:
        raise PlanError(
            f"objective.hidden_share={settings.hidden_share} must lie between 0 and 1; to predict "
            "no slabs, use objective.hidden_weight=0",
            code="plan-out-of-range",
        )
    clusters = {
        "num_slab_clusters": settings.num_slab_clusters,
        "num_volume_clusters": settings.num_volume_clusters,
    }
    for key, number in clusters.items():
        if number < 2:
            raise PlanError(
                f"objective.{key}={number} must be at least 2: one cluster distinguishes nothing",
                code="plan-out-of-range",
            )
    if settings.width < 1 or settings.width % settings.num_heads:
        raise PlanError(
            f"objective.width={settings.width} must be a multiple of "
            f"objective.num_heads={settings.num_heads}",
            code="plan-out-of-range",
        )
