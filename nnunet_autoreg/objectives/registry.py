"""From a plan to the objective that it names."""

from nnunet_autoreg.objective_kinds import builder_of
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan


def build_objective(plan: Plan) -> Objective:
    """Return the objective that a checked plan names, for the kind of its encoder.

    Raises:
        PlanError: it cannot train such an encoder.
    """
    objective: Objective = builder_of(plan)(plan)
    return objective
