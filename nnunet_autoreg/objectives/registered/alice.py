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
    """Return the description of a run for the card."""
    return f"{NAME} (pairs of patients, attention as {alice_of(plan).casa})"


def build(plan: Plan) -> "Objective":
    """Return the objective; its parts differ for transformers and CNNs."""
    from nnunet_autoreg.objectives.alice import Alice

    return Alice(plan)


register(
    ObjectiveKind(
        name=NAME,
        help="two crops show the same anatomy in two patients. A student sees a quarter of each, "
        "reconstructs the rest, and learns from a momentum teacher that sees all of both",
        plan_type=AlicePlan,
        settings=partial(planned_alice, NAME),
        adapt=with_pairs,
        check=check_alice,
        builders={TRANSFORMER: build, CNN: build},
        figure=alice_figure,
        summary=summary,
        preview="The student sees the blocks with a solid blue frame and reconstructs those with a "
        "dashed orange frame, all at once.\nThe teacher sees both crops completely, and the "
        "student's features have to agree with the teacher's.",
    ),
)
