"""Joint 2D/3D clustering of slabs, volumes and 2D images. Registered here."""

from functools import partial
from typing import TYPE_CHECKING

from nnunet_autoreg.objective_kinds import CNN, TRANSFORMER, ObjectiveKind, register
from nnunet_autoreg.objectives.joint_plan import (
    JointPlan,
    check_joint,
    fit_to_scans,
    joint_figure,
    joint_of,
    planned_joint,
    with_views,
)
from nnunet_autoreg.plan import VIEW_KINDS, Plan

if TYPE_CHECKING:
    from nnunet_autoreg.objectives.base import Objective

NAME = "joint"


def summary(plan: Plan) -> str:
    """Return the description of a run for the card."""
    settings = joint_of(plan)
    material = "slabs and 2D images" if "images" in plan.sequence.weights else "slabs"
    return f"{NAME} ({material} in {settings.num_slab_clusters} clusters)"


def build(plan: Plan) -> "Objective":
    """Return the objective; its encoder is a transformer or a CNN."""
    from nnunet_autoreg.objectives.joint import Joint

    return Joint(plan)


register(
    ObjectiveKind(
        name=NAME,
        help="one 3D encoder clusters slabs of volumes, whole volumes and 2D images (PNG, JPEG, "
        "DICOM), and predicts hidden slabs",
        plan_type=JointPlan,
        settings=partial(planned_joint, NAME),
        adapt=with_views,
        check=check_joint,
        builders={TRANSFORMER: build, CNN: build},
        figure=joint_figure,
        summary=summary,
        sequence_kinds=VIEW_KINDS,
        takes_images=True,
        fit=fit_to_scans,
    ),
)
