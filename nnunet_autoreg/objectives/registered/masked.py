"""Masked autoencoding, as a baseline of autoregression: it is registered here."""

from functools import partial
from typing import TYPE_CHECKING

from nnunet_autoreg.objective_kinds import CNN, TRANSFORMER, ObjectiveKind, register
from nnunet_autoreg.objectives.prediction_plan import (
    PredictionPlan,
    as_masked,
    check_is_masked,
    check_settings,
    figure_of,
    planned_settings,
)
from nnunet_autoreg.plan import Plan

if TYPE_CHECKING:
    from nnunet_autoreg.objectives.base import Objective

NAME = "masked"


def check(plan: Plan) -> None:
    """Refuse plans that are not masked autoencoding, and values that cannot be used."""
    check_settings(plan)
    check_is_masked(plan)


def build_for_transformer(plan: Plan) -> "Objective":
    """Return the objective whose encoder reads only the visible blocks."""
    from nnunet_autoreg.objectives.masked import Masked

    return Masked(plan)


def build_for_cnn(plan: Plan) -> "Objective":
    """Return whole-network prediction, which a fixed share of visible blocks makes masked."""
    from nnunet_autoreg.objectives.whole_network import WholeNetwork

    return WholeNetwork(plan)


register(
    ObjectiveKind(
        name=NAME,
        help="masked autoencoding with 75 %% of the blocks masked, as a baseline with the same "
        "encoder and training",
        plan_type=PredictionPlan,
        settings=partial(planned_settings, NAME),
        adapt=partial(as_masked, reason="what masked autoencoding is (--objective masked)"),
        check=check,
        builders={TRANSFORMER: build_for_transformer, CNN: build_for_cnn},
        figure=figure_of,
    ),
)
