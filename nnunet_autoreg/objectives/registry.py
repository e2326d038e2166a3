"""Objectives by name: one entry for each of ``plan.OBJECTIVES``."""

from collections.abc import Callable

from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.masked import Masked
from nnunet_autoreg.plan import Plan

BUILDERS: dict[str, Callable[[Plan], Objective]] = {"autoregressive": Autoregressive, "masked": Masked}


def build_objective(plan: Plan) -> Objective:
    """The objective that a checked plan names."""
    return BUILDERS[plan.objective.name](plan)
