"""The description and the registry of objectives, without torch.

An objective is registered by one file in ``objectives/registered``. That file does not import
torch, so that ``--help`` and planning can read it. The rest of the project uses objectives only
through this file, and never compares their names.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import family_of, has_transformer
from nnunet_autoreg.plan import (
    DEFAULT_OBJECTIVE,
    OBJECTIVE_PLANS,
    EncoderPlan,
    ObjectivePlan,
    Plan,
    load_objectives,
)
from nnunet_autoreg.plan import KINDS as SEQUENCE_KINDS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRANSFORMER, CNN = "transformer", "cnn"
"""The two kinds of networks that an objective may train."""

NETWORK_WORDS = {TRANSFORMER: "transformers", CNN: "CNNs"}


@dataclass(frozen=True)
class FigureOfMerit:
    """The number by which the states of a run are ranked, and the texts about it.

    Attributes:
        name: its name in messages and charts.
        unit: unit of the number in ``metrics.jsonl``.
        explanation: sentences about the meaning of its values, for the report.
        references: trivial predictors that are measured beside it, name -> description, such as
            "copying the previous block". A trained encoder has to be better than each of them.
        hint: value of a useless encoder, in a few words; "" if it is unknown.
        term: the term of the loss whose mean it is; "" for the whole loss.
        ranks_by_probe: if there are labels, the frozen probe ranks the states instead, the higher
            the better. With a moving teacher the loss ranks nothing.
        pictures: how to read the pictures of validation samples; "" if there are none.
        notes: sentences below charts, by the name of a term of the loss or of a value of the
            objective.
    """

    name: str
    unit: str
    explanation: str
    references: Mapping[str, str]
    hint: str = ""
    pictures: str = ""
    term: str = ""
    ranks_by_probe: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A named set of values for one objective: a value of ``--preset``.

    Attributes:
        help: one line for the help of the option.
        reason: the reason of its values in the plan.
        apply: returns the plan with the preset's values; the second argument has the keys that the
            user set, which are kept.
        batch_size: planned with the preset, because the length depends on it; None to have it
            planned as usual.
        single_tokens: blocks have one token, which excludes some encoders.
    """

    name: str
    help: str
    reason: str
    apply: Callable[[Plan, Container[str]], Plan]
    batch_size: int | None = None
    single_tokens: bool = False


def plain_summary(plan: Plan) -> str:
    """Return the objective's name with order and predictor of its sequences."""
    s = plan.sequence
    return f"{plan.objective.name} ({s.order} order, {s.predictor}-block predictor)"


def unchanged(plan: Plan, num_volumes: int, num_images: int) -> Plan:
    """Return the plan of an objective that does not depend on the number of scans."""
    return plan


@dataclass(frozen=True)
class SliceGroup:
    """Slices that an objective groups, for pictures.

    Attributes:
        title: title of the group.
        slices: caption and intensities (Y, X) of each.
    """

    title: str
    slices: "tuple[tuple[str, NDArray[np.float32]], ...]"


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective as the command line, the planner and the reports know it.

    Attributes:
        name: value of ``--objective``.
        help: one line for the help of the option.
        plan_type: the record of the objective's values in the plan.
        settings: returns these values as planned for an encoder, and the reasons for them.
        adapt: returns a planned run with the sequences and other values that the objective needs.
        check: raises PlanError if a plan is impossible.
        builders: network kind -> function that builds the objective (``objectives.base``). Only
            the kinds of networks that it can train are listed.
        figure: returns the figure of merit of a plan.
        summary: returns the description of the objective for the encoder's card.
        presets: the presets of this objective.
        sequence_kinds: kinds of sequences that it can be trained on.
        takes_images: it learns from 2D images as well.
        fit: returns the plan with the values that depend on the numbers of training volumes and 2D
            images.
        preview: sentences about the blocks in ``sequences.png``; "" if blocks are predicted from
            other blocks only.
    """

    name: str
    help: str
    plan_type: type[ObjectivePlan]
    settings: Callable[[EncoderPlan], tuple[ObjectivePlan, dict[str, str]]]
    adapt: Callable[[Plan], Plan]
    check: Callable[[Plan], None]
    builders: Mapping[str, Callable[[Plan], Any]]
    figure: Callable[[Plan], FigureOfMerit]
    summary: Callable[[Plan], str] = plain_summary
    presets: tuple[Preset, ...] = ()
    sequence_kinds: tuple[str, ...] = SEQUENCE_KINDS
    takes_images: bool = False
    fit: Callable[[Plan, int, int], Plan] = unchanged
    preview: str = ""


KINDS: dict[str, ObjectiveKind] = {}


def register(kind: ObjectiveKind) -> None:
    """Add an objective. Its name, and those of its presets, must be new."""
    assert kind.name not in KINDS, f"two objectives are called {kind.name}"
    KINDS[kind.name] = kind
    OBJECTIVE_PLANS[kind.name] = kind.plan_type


def unregister(name: str) -> None:
    """Remove an objective again, as a test does with its own."""
    del KINDS[name], OBJECTIVE_PLANS[name]


def objective_kinds() -> dict[str, ObjectiveKind]:
    """Return all objectives by name, the default one first."""
    load_objectives()
    names = sorted(KINDS, key=lambda name: (name != DEFAULT_OBJECTIVE, name))
    return {name: KINDS[name] for name in names}


def kind_of(name: str) -> ObjectiveKind:
    """Return the objective of this name.

    Raises:
        PlanError: there is none.
    """
    kinds = objective_kinds()
    if name not in kinds:
        raise PlanError(
            f"objective.name: '{name}' does not exist; {did_you_mean(name, kinds)}",
            code="plan-unknown-name",
        )
    return kinds[name]


def figure_of_merit(plan: Plan) -> FigureOfMerit:
    """Return the figure of merit that the plan's objective names."""
    return kind_of(plan.objective.name).figure(plan)


def network_kind(class_path: str) -> str:
    """Return whether a network class is a transformer or a CNN."""
    return TRANSFORMER if has_transformer(family_of(class_path)) else CNN


def builder_of(plan: Plan) -> Callable[[Plan], Any]:
    """Return the function that builds the plan's objective for the plan's encoder.

    Raises:
        PlanError: the objective cannot train such an encoder.
    """
    kind = kind_of(plan.objective.name)
    network = network_kind(plan.encoder.class_path)
    if network not in kind.builders:
        trained = " and ".join(NETWORK_WORDS[known] for known in kind.builders)
        raise PlanError(
            f"--objective {kind.name} trains {trained} only, and {plan.encoder.name} is none of "
            "them; name another --encoder or another --objective",
            code="plan-objective-encoder",
        )
    return kind.builders[network]


def with_objective(plan: Plan, name: str) -> Plan:
    """Return a planned run with this objective and all the values that the objective needs."""
    kind = kind_of(name)
    settings, why = kind.settings(plan.encoder)
    kept = {}
    for key, reason in plan.reasons.items():
        # Reasons for values of another objective would be about nothing.
        if key in why or not key.startswith("objective."):
            kept[key] = reason
    return kind.adapt(replace(plan, objective=settings, reasons={**kept, **why}))


def presets() -> dict[str, tuple[ObjectiveKind, Preset]]:
    """Return all presets by name, each with the objective that it belongs to."""
    found = {}
    for kind in objective_kinds().values():
        for preset in kind.presets:
            found[preset.name] = (kind, preset)
    return found
