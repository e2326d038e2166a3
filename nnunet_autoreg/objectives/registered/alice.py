"""Alice: a student and a momentum teacher on two anatomically matched crops. Registered here."""

from functools import partial
from typing import TYPE_CHECKING

from nnunet_autoreg.objective_kinds import CNN, TRANSFORMER, ObjectiveKind, register
from nnunet_autoreg.objectives.alice_plan import (
    AlicePlan,
    alice_figure,
    alice_of,
    check_alice,
    planned_alice,
    with_pairs,
)
from nnunet_autoreg.plan import Plan

if TYPE_CHECKING:
    from nnunet_autoreg.objectives.base import Objective

NAME = "alice"


def summary(plan: Plan) -> str:
    """Return what the card says of a run."""
    return f"{NAME} (pairs of patients, attention as {alice_of(plan).casa})"


def build(plan: Plan) -> "Objective":
    """Return the objective; its parts differ for transformers and CNNs."""
    from nnunet_autoreg.objectives.alice import Alice

    return Alice(plan)


register(
    ObjectiveKind(
        name=NAME,
        help="a student that sees a quarter of two matched crops of two patients learns from a "
        "momentum teacher that sees them whole, and reconstructs what is hidden",
        plan_type=AlicePlan,
        settings=partial(planned_alice, NAME),
        adapt=with_pairs,
        check=check_alice,
        builders={TRANSFORMER: build, CNN: build},
        figure=alice_figure,
        summary=summary,
        preview="The student sees the blocks with a solid blue frame and reconstructs those with a "
        "dashed orange frame, all at once.\nThe teacher sees both crops whole, and the student's "
        "features have to agree with the teacher's.",
    )
)
