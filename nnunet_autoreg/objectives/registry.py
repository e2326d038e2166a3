"""Objectives by name."""

from collections.abc import Callable

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan

OBJECTIVES: dict[str, Callable[[Plan], Objective]] = {"autoregressive": Autoregressive}


def build_objective(plan: Plan) -> Objective:
    """The objective that a plan names.

    Raises:
        PlanError: there is none of that name.
    """
    name = plan.objective.name
    if name not in OBJECTIVES:
        raise PlanError(f"objective.name: '{name}' does not exist; {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name](plan)
