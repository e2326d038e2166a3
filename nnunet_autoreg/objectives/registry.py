"""Objectives by name: one entry for each of ``plan.OBJECTIVES``, for each kind of encoder."""

from collections.abc import Callable

from nnunet_autoreg.families import family_of, has_transformer
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.masked import Masked
from nnunet_autoreg.objectives.whole_network import WholeNetwork
from nnunet_autoreg.plan import Plan

OF_TRANSFORMERS: dict[str, Callable[[Plan], Objective]] = {
    "autoregressive": Autoregressive,
    "masked": Masked,
}
OF_CNNS: dict[str, Callable[[Plan], Objective]] = {
    "autoregressive": WholeNetwork,
    "masked": WholeNetwork,
}


def build_objective(plan: Plan) -> Objective:
    """Return the objective that a checked plan names, for the kind of its encoder."""
    family = family_of(plan.encoder.class_path)
    builders = OF_TRANSFORMERS if has_transformer(family) else OF_CNNS
    return builders[plan.objective.name](plan)
