"""Validation on the same data every time: next-block errors, health of the features, probe.

File 10 of 11 in reading order.

Features are healthy if they depend on the image and spread over many directions.

Shape suffixes: N tokens, V width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnunet_autoreg.downstream.probe import MAX_TOKENS, LabelledCrop, Probe, evenly_spread
from nnunet_autoreg.model.card import LEARNT, NOT_LEARNT, UNKNOWN, Verdict
from nnunet_autoreg.model.compilation import autocast
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.objectives.base import LossTerms, Objective, TokenFeatures
from nnunet_autoreg.plan import RunPlan
from nnunet_autoreg.pretrain.training_step import StepStatistics
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.wording import counted

PLAIN_FIGURE = FigureOfMerit("error", "squared error", "Lower is better.", {})
"""Of measurements without an objective."""


@dataclass(frozen=True)
class Health:
    """The measurements on validation scans.

    Attributes:
        errors: the objective's figure of merit as "error", and that of each trivial prediction by
            name.
        token_variance, effective_rank: results of the functions of these names; None without
            features.
        probe: balanced accuracy of predicting labels from "features" and from raw "voxels", and of
            "chance"; None without labels.
        kinds: "error" by kind of sequences; empty if there is one kind.
        parts: the means of the terms of the loss; empty if there is one term.
        figure: the figure of merit that the error is, with its texts.
        own: the objective's own health values, name -> (value, unit).
        own_signs: signs of collapse that the objective found in ``own``.
    """

    errors: Mapping[str, float]
    token_variance: float | None = None
    effective_rank: float | None = None
    probe: Mapping[str, float] | None = None
    kinds: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    figure: FigureOfMerit = PLAIN_FIGURE
    own: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    own_signs: Sequence[str] = ()

    @property
    def merit(self) -> float:
        """The number by which states of a run are ranked; lower is better."""
        if self.figure.ranks_by_probe and self.probe is not None:
            return -self.probe["features"]
        return self.errors["error"]

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Return name -> (value, unit) for ``metrics.jsonl``, whose keys say "heldout"."""
        metrics: dict[str, tuple[float, str]] = {}
        for name, value in self.errors.items():
            metrics[f"heldout_{name}"] = (value, self.figure.unit)
        for kind, value in self.kinds.items():
            metrics[f"heldout_error_{kind}"] = (value, self.figure.unit)
        for name, value in self.parts.items():
            metrics[f"heldout_{name}"] = (value, "term of the loss")
        if self.token_variance is not None:
            metrics["token_variance"] = (self.token_variance, "share of mean square")
        if self.effective_rank is not None:
            metrics["effective_rank"] = (self.effective_rank, "directions")
        for name, value in (self.probe or {}).items():
            metrics[f"probe_{name}"] = (value, "balanced accuracy")
        return {**metrics, **self.own}

    def message(self) -> str:
        """Return one line for the log."""
        baselines = ", ".join(
            f"{name} {value:.4f}" for name, value in self.errors.items() if name != "error"
        )
        message = f"validation {self.figure.name} {self.errors['error']:.4f}"
        if baselines:
            message += f" (baselines: {baselines})"
        if self.parts:
            parts = " and ".join(f"{value:.4f} of {name}" for name, value in self.parts.items())
            message += f", from {parts}"
        if self.kinds:
            kinds = " and ".join(f"{value:.4f} of {kind}" for kind, value in self.kinds.items())
            message += f", {kinds} sequences"
        if self.token_variance is not None and self.effective_rank is not None:
            message += (
                f"; features: token variance {self.token_variance:.3f}, effective rank "
                f"{self.effective_rank:.1f}"
            )
        if self.own:
            values = [f"{name} {value:.3g}" for name, (value, _) in self.own.items()]
            # The names are those of metrics.jsonl.
            message += f"; {', '.join(values).replace('_', ' ')}"
        if self.probe is not None:
            message += (
                f"; probe: balanced accuracy {self.probe['features']:.3f} from features, "
                f"{self.probe['voxels']:.3f} from raw voxels, "
                f"{self.probe['chance']:.3f} by chance"
            )
        return message


@dataclass(frozen=True)
class LossSums:
    """The loss over some samples, as sums.

    Attributes:
        terms: name -> (sum, count, weight).
        references: losses of trivial predictors, name -> sum.
        statistics: as of ``LossTerms``.
    """

    terms: Mapping[str, tuple[float, float, float]]
    references: Mapping[str, float]
    statistics: Mapping[str, Tensor]

    def means(self) -> dict[str, float]:
        """Return the mean of each term."""
        means = {}
        for name, (total, count, _) in self.terms.items():
            means[name] = total / max(count, 1.0)
        return means

    def error(self, figure: FigureOfMerit) -> float:
        """Return the figure of merit: the mean of its term, or the weighted mean of all."""
        means = self.means()
        if figure.term:
            return means[figure.term]
        return sum(weight * means[name] for name, (_, _, weight) in self.terms.items())

    def reference_errors(self, figure: FigureOfMerit) -> dict[str, float]:
        """Return the figure of merit of each trivial predictor."""
        first_term = next(iter(self.terms))
        _, count, _ = self.terms[figure.term or first_term]
        return {name: total / max(count, 1.0) for name, total in self.references.items()}


def sums_of(loss: LossTerms) -> LossSums:
    """Return a loss as plain numbers."""
    terms = {}
    for name, term in loss.terms.items():
        terms[name] = (float(term.total), float(term.count), term.weight)
    references = {name: float(total) for name, total in loss.references.items()}
    statistics = {name: value.float().cpu() for name, value in loss.statistics.items()}
    return LossSums(terms, references, statistics)


def added(parts: Sequence[LossSums]) -> LossSums:
    """Return the sum of some sums."""
    terms: dict[str, tuple[float, float, float]] = {}
    references: dict[str, float] = {}
    statistics: dict[str, Tensor] = {}
    for part in parts:
        for name, (total, count, weight) in part.terms.items():
            # Not every kind of sequence need have every term.
            before = terms.get(name, (0.0, 0.0, weight))
            terms[name] = (before[0] + total, before[1] + count, weight)
        for name, total in part.references.items():
            references[name] = references.get(name, 0.0) + total
        for name, value in part.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
    return LossSums(terms, references, statistics)


class Validation:
    """Validate on the same data every time.

    Weights are not changed, and nothing is drawn at random.

    Args:
        batches: validation batches on the CPU, by their kind of sequences; may be empty.
        crops: labelled crops for the probe; may be empty.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Mapping[str, Sequence[Batch]],
        crops: Sequence[LabelledCrop],
        device: torch.device,
    ):
        self.objective = objective
        self.batches = batches
        self.device = device
        self.probe = Probe(crops)
        self.voxel_score: float | None = None

    @torch.no_grad()
    def measure(self) -> Health | None:
        """Return the measurements; None without validation batches.

        The module is left in evaluation mode.
        """
        if not self.batches:
            return None
        self.objective.module.eval()
        by_kind: dict[str, LossSums] = {}
        for kind, batches in self.batches.items():
            of_kind = []
            for batch in batches:
                with autocast(self.device):
                    terms = self.objective.loss(batch.to(self.device), references=True)
                of_kind.append(sums_of(terms))
            by_kind[kind] = added(of_kind)

        total = added(list(by_kind.values()))
        figure = self.objective.figure
        kinds = {}
        if len(by_kind) > 1:
            kinds = {kind: sums.error(figure) for kind, sums in by_kind.items()}

        features_NV, content_NV = self._features()
        scores = None
        if self.probe.works:
            # Voxels do not change in training, so that their score is computed once.
            if self.voxel_score is None:
                self.voxel_score = self.probe.score(
                    lambda batch: self._describe(batch).voxels[0].float().cpu()
                )
            feature_score = self.probe.score(
                lambda batch: self._describe(batch).features[0].float().cpu()
            )
            scores = {
                "features": feature_score,
                "voxels": self.voxel_score,
                "chance": self.probe.chance,
            }

        own = self.objective.health(total.statistics)
        return Health(
            errors={"error": total.error(figure), **total.reference_errors(figure)},
            token_variance=token_variance(content_NV, features_NV),
            effective_rank=effective_rank(content_NV),
            probe=scores,
            kinds=kinds,
            parts=total.means() if len(total.terms) > 1 else {},
            figure=figure,
            own=own,
            own_signs=self.objective.collapse_signs(own),
        )

    def _describe(self, batch: Batch) -> TokenFeatures:
        with autocast(self.device):
            return self.objective.describe(batch.to(self.device))

    def _features(self) -> tuple[Tensor, Tensor]:
        """Return features of valid tokens, and their part that depends on the image.

        Both are (N, V).
        """
        features, positions = [], []
        for batches in self.batches.values():
            for batch in batches:
                tokens = self._describe(batch)
                features.append(tokens.features[tokens.valid].float().cpu())
                positions.append(tokens.positions[tokens.valid].cpu())

        features_NV = torch.cat(features)
        content_NV = content_part(features_NV, torch.cat(positions))
        chosen = evenly_spread(len(content_NV), MAX_TOKENS)
        return features_NV[chosen], content_NV[chosen]


def content_part(features_NV: Tensor, position_N: Tensor) -> Tensor:
    """Return the part of the features that depends on the image, not on the position, (N, V).

    The mean of all tokens at the same position of the grid is subtracted.
    """
    num_positions = int(position_N.max()) + 1 if len(position_N) else 0
    sums = torch.zeros(
        num_positions, features_NV.shape[1], dtype=features_NV.dtype, device=features_NV.device
    )
    sums.index_add_(0, position_N, features_NV)
    count = torch.bincount(position_N, minlength=num_positions).clamp(min=1).to(features_NV.dtype)
    return features_NV - (sums / count[:, None])[position_N]


def token_variance(content_NV: Tensor, features_NV: Tensor) -> float:
    """Return the share of the features' mean square that depends on the image, 0 to 1.

    It is 0 if features do not depend on the image, if all features are 0, or if some are NaN.
    """
    total = features_NV.double().square().sum()
    # NaN fails both comparisons.
    if not 0 < total < math.inf:
        return 0.0
    return float(content_NV.double().square().sum() / total)


def effective_rank(content_NV: Tensor) -> float:
    """Return the effective number of directions over which the features spread.

    It is exp of the entropy of the singular values, taken as shares; 0 if all features are 0 or
    some are not finite.

    Source: RankMe, arXiv 2210.02885, equation 1 (there without subtracting a mean).
    """
    # In float32 the rounding noise of many small singular values would pass for rank.
    content = content_NV.double().cpu()
    if not bool(torch.isfinite(content).all()):
        return 0.0
    # The smaller of the two products has the same singular values.
    gram = content.T @ content if content.shape[0] >= content.shape[1] else content @ content.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not singular.max() > 0:
        return 0.0

    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def health_warnings(health: Health, run: RunPlan, warm: bool) -> list[str]:
    """Return a message for each problem of the features; none if there is none.

    Args:
        warm: the warm-up is over; before, nothing need have been learnt.
    """
    warnings = [
        f"collapse: {message}; lower the rate, or start a new --name with another seed"
        for message in collapse_messages(health, run)
    ]
    if not warm:
        return warnings

    error = health.errors["error"]
    _, not_beaten = compared(health)
    if not_beaten or not math.isfinite(error):
        warnings.append(
            f"nothing learnt yet: the validation error {error:.4f} is not below "
            f"{' and '.join(not_beaten) or 'anything'}; it should fall within the next few hundred "
            "steps, else change the rate"
        )
    if health.probe is not None and health.probe["features"] <= health.probe["voxels"]:
        warnings.append(
            "the features predict labels no better than raw voxels "
            f"({health.probe['features']:.3f} against {health.probe['voxels']:.3f} balanced "
            "accuracy): train longer"
        )
    return warnings


def compared(health: Health) -> tuple[list[str], list[str]]:
    """Return the trivial predictions that are worse than the network, and the others."""
    beaten: list[str] = []
    not_beaten: list[str] = []
    for name, value in health.errors.items():
        if name == "error":
            continue
        what = f"'{health.figure.references.get(name, name)}' ({value:.4f})"
        # A NaN is not below anything.
        (beaten if health.errors["error"] < value else not_beaten).append(what)
    return beaten, not_beaten


def verdict_of(
    health: Health | None, num_scans: int, num_validation_scans: int, min_scans: int
) -> Verdict:
    """Return whether a finished run has learnt something, with the figures.

    A run has not learnt if its error is not below that of every trivial prediction. If it is, but a
    classifier on the features is no better than one on raw voxels, the outcome is unknown. If the
    objective has no trivial prediction and ranks by the probe, only the probe decides.

    Args:
        health: after the last step; None where the validation scans give no sequence.
        num_scans: number of scans of the run, including validation scans.
        min_scans: ``data.min_scans`` of the plan.
    """
    if health is None:
        reason = "no scan was left for validation"
        if num_validation_scans:
            reason = (
                f"no sequence can be made of the {counted(num_validation_scans, 'scan')} left for "
                "validation (2D images alone, or too few patients)"
            )
        return Verdict(UNKNOWN, f"{reason}; {num_scans} scans", min_scans=min_scans)

    beaten, not_beaten = compared(health)
    probe = health.probe
    is_probe_better = probe is not None and probe["features"] > probe["voxels"]
    error = f"the validation {health.figure.name} {health.errors['error']:.4f}"
    if not_beaten:
        outcome, reason = NOT_LEARNT, f"{error} is not below {' and '.join(not_beaten)}"
    elif beaten:
        outcome, reason = LEARNT, f"{error} is below {' and '.join(beaten)}"
        if probe is not None and not is_probe_better:
            outcome, reason = UNKNOWN, f"{reason}, but the probe disagrees"
    else:
        outcome, reason = UNKNOWN, f"{error} has nothing to be compared with"
        if health.figure.ranks_by_probe and probe is not None:
            outcome = LEARNT if is_probe_better else NOT_LEARNT

    if probe is not None:
        reason += (
            f"; probe: balanced accuracy {probe['features']:.3f} from features, "
            f"{probe['voxels']:.3f} from raw voxels"
        )
    return Verdict(
        outcome,
        f"{reason}; {num_scans} scans, {num_validation_scans} of them for validation",
        dict(health.errors),
        dict(probe or {}),
        num_validation_scans,
        min_scans,
    )


def collapse_messages(health: Health, run: RunPlan) -> list[str]:
    """Return a message for each sign that the features are collapsed."""
    messages = []
    variance, rank = health.token_variance, health.effective_rank
    if variance is not None and not variance >= run.min_token_variance:
        messages.append(
            f"the features hardly depend on the image (token variance {variance:.2g}, limit "
            f"{run.min_token_variance:g})"
        )
    if rank is not None and not rank >= run.min_effective_rank:
        messages.append(
            f"the features spread over {rank:.1f} directions only (limit "
            f"{run.min_effective_rank:g})"
        )
    return [*messages, *health.own_signs]


def failure_messages(
    health: Health | None,
    run: RunPlan,
    weights_are_finite: bool,
    statistics: StepStatistics,
    num_steps: int,
) -> list[str]:
    """Return a message for each reason why a run that did all its steps has failed.

    Args:
        health: after the last step; None without validation scans.
        statistics: statistics of all steps.
        num_steps: number of finished steps, including skipped ones.
    """
    messages = []
    if not weights_are_finite:
        messages.append("weights hold NaN or infinity")
    if statistics.skipped >= num_steps:
        messages.append(f"none of the {num_steps} steps was good enough to change the weights")
    elif health is None and statistics.in_row:
        messages.append(
            f"the last {statistics.in_row} steps were bad, and there is no validation scan that "
            "could show that all is well"
        )
    if health is None:
        return messages

    error = health.errors["error"]
    if not math.isfinite(error):
        messages.append(f"the validation error is {error}")
    return [*messages, *collapse_messages(health, run)]
