"""Whether an encoder has learnt anything in pretraining, and the words for it.

The report of a run, the card of its encoder and the commands all take the words from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nnunet_autoreg.objective_kinds import FigureOfMerit

LEARNT, NOT_LEARNT, UNKNOWN = "learnt", "not learnt", "unknown"
"""Outcomes of a ``Verdict``."""

HEADLINES = {
    LEARNT: "The encoder learns.",
    NOT_LEARNT: "The encoder has not learned to predict yet.",
    UNKNOWN: "Whether the encoder learns is not known.",
}
"""The report's sentence about an outcome, before the figures."""


@dataclass(frozen=True)
class Verdict:
    """What validation showed about a run.

    Attributes:
        outcome: "learnt", "not learnt" or "unknown".
        reason: the figures that decided, for the user.
        errors: validation error "error", and that of each trivial prediction by its name. Empty
            without validation scans.
        probe: balanced accuracy of predicting labels from "features", from raw "voxels", and by
            "chance". Empty without labels.
        num_validation_scans: scans that were kept out of training.
        min_scans: encoders of fewer scans are used by name only.
    """

    outcome: str
    reason: str
    errors: dict[str, float] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    num_validation_scans: int = 0
    min_scans: int = 0

    @property
    def message(self) -> str:
        """Return outcome and reason in one line."""
        return f"{self.outcome}: {self.reason}"


NO_VERDICT = Verdict(
    UNKNOWN,
    "its card has no verdict, because it was written before there was one",
)
"""The verdict on encoders from earlier releases."""


def judge(
    figure: FigureOfMerit,
    errors: Mapping[str, float],
    probe: Mapping[str, float] | None,
) -> tuple[str, str]:
    """Return whether something has been learnt, and the figures that decided.

    Nothing has been learnt if the error is not below that of every trivial prediction. If it is,
    but a classifier on the features is no better than one on raw voxels, the outcome is unknown.
    If the objective has no trivial prediction and ranks by the probe, only the probe decides.

    Args:
        errors, probe: as of ``Verdict``; None without labels.
    """
    beaten, not_beaten = compared(errors, figure)
    is_probe_better = probe is not None and probe["features"] > probe["voxels"]
    error = f"the validation {figure.name} {errors['error']:.4f}"

    if not_beaten:
        outcome, reason = NOT_LEARNT, f"{error} is not below {' and '.join(not_beaten)}"
    elif beaten:
        outcome, reason = LEARNT, f"{error} is below {' and '.join(beaten)}"
        if probe is not None and not is_probe_better:
            outcome, reason = UNKNOWN, f"{reason}, but the probe disagrees"
    else:
        outcome, reason = UNKNOWN, f"{error} has nothing to be compared with"
        if figure.ranks_by_probe and probe is not None:
            outcome = LEARNT if is_probe_better else NOT_LEARNT

    if probe is not None:
        reason += f"; {accuracies(probe)}"
    return outcome, reason


def compared(errors: Mapping[str, float], figure: FigureOfMerit) -> tuple[list[str], list[str]]:
    """Return the trivial predictions that are worse than the network, and the others."""
    beaten: list[str] = []
    not_beaten: list[str] = []
    for name, value in errors.items():
        if name == "error":
            continue
        described = f"'{figure.references.get(name, name)}' ({value:.4f})"
        # A NaN is not below anything.
        if errors["error"] < value:
            beaten.append(described)
        else:
            not_beaten.append(described)
    return beaten, not_beaten


def accuracies(probe: Mapping[str, float]) -> str:
    """Return how well the frozen probe predicts labels."""
    return (
        f"probe: balanced accuracy {probe['features']:.3f} from features, "
        f"{probe['voxels']:.3f} from raw voxels"
    )


def longer_training(num_steps: int) -> str:
    """Return what to do about an encoder that has learnt nothing in ``num_steps`` steps."""
    return (
        f"type the same line with more --steps than {num_steps}, or with a new --name and another "
        "rate"
    )
