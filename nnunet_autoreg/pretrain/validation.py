"""Validation on the same data every time: next-block errors, health of the features, probe.

File 10 of 11 in reading order.

Features are healthy if they depend on the image and spread over many directions.

Shape suffixes: N tokens, V width.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nnunet_autoreg.downstream.probe import MAX_TOKENS, LabelledCrop, Probe, evenly_spread
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.model.compilation import autocast
from nnunet_autoreg.model.verdict import UNKNOWN, Verdict, accuracies, compared, judge
from nnunet_autoreg.objective_kinds import FigureOfMerit
from nnunet_autoreg.objectives.base import LossTerms, Objective, TokenFeatures
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan, RunPlan
from nnunet_autoreg.pretrain.checkpointing import Checkpoints
from nnunet_autoreg.pretrain.distributed import gathered
from nnunet_autoreg.pretrain.training_step import StepStatistics, TrainingStep, add_to
from nnunet_autoreg.report.metrics import MetricsFile
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.wording import counted

log = logging.getLogger(__name__)

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
        message = f"validation {self.figure.name} {self.errors['error']:.4f}"
        trivial = {name: value for name, value in self.errors.items() if name != "error"}
        if trivial:
            baselines = ", ".join(f"{name} {value:.4f}" for name, value in trivial.items())
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
            message += f"; {accuracies(self.probe)}, {self.probe['chance']:.3f} by chance"
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
            total_before, count_before, _ = terms.get(name, (0.0, 0.0, weight))
            terms[name] = (total_before + total, count_before + count, weight)
        for name, total in part.references.items():
            references[name] = references.get(name, 0.0) + total
        add_to(statistics, part.statistics)
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
                    lambda batch: self._describe(batch).voxels[0].float().cpu(),
                )
            feature_score = self.probe.score(
                lambda batch: self._describe(batch).features[0].float().cpu(),
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


class HealthWatch:
    """Validates a run while it trains; keeps its best state, and ends it where it has failed.

    All processes call the methods together. The main process decides for all.

    Args:
        has_validation: there are validation scans. Processes that do not validate themselves have
            no batches of them.
        train_step: what trains the module that is validated.

    Attributes:
        health: the newest validation of this process; None in processes that do not validate.
    """

    def __init__(
        self,
        plan: Plan,
        validation: Validation,
        has_validation: bool,
        train_step: TrainingStep,
        checkpoints: Checkpoints,
    ):
        self.plan = plan
        self.validation = validation
        self.has_validation = has_validation
        self.train_step = train_step
        self.checkpoints = checkpoints
        self.world = checkpoints.world
        self.health: Health | None = None

    def validate(self, step: int, metrics: MetricsFile) -> None:
        """Validate after a step, and keep the state if it is the best so far.

        Raises:
            AutoregError: the features have been collapsed for several validations in a row.
        """
        if not self.has_validation:
            return
        is_best = False
        with gathered(self.train_step.loss_of), phase("measuring the validation error"):
            self.health = self.validation.measure()
            if self.health is not None and self.world.is_main:
                is_best = self._log(self.health, step, metrics)

        progress = self.checkpoints.progress
        progress.best_error = self.world.share(progress.best_error)
        progress.collapsed = self.world.share(progress.collapsed)
        if self.world.share(is_best):
            self.checkpoints.save_best()

        # More steps would only cost time: a collapsed network hardly ever recovers, and its encoder
        # would be refused at the end. All processes end together. 0 switches this off.
        if not 0 < self.plan.run.max_collapsed <= progress.collapsed:
            return
        signs = [] if self.health is None else collapse_messages(self.health, self.plan.run)
        signs = self.world.share(signs)
        kept = "There was no checkpoint before the collapse"
        if self.checkpoints.saved_step:
            saved_step = self.checkpoints.saved_step
            kept = f"The checkpoint of step {saved_step}, before the collapse, is kept"
        raise AutoregError(
            f"after step {progress.step} the features were collapsed in {progress.collapsed} "
            "validations in a row, so training stops and no encoder is exported: "
            f"{'; '.join(signs)}. {kept}. Start a new --name with a lower rate, e.g. --set "
            f"optim.lr={self.plan.optim.lr / 3:.1e}, or with another --seed. If you accept such "
            f"features, set run.max_collapsed to 0 in {self.checkpoints.folder / 'plan.json'}, and "
            "type the same line again",
            code="training-collapsed",
        )

    def _log(self, health: Health, step: int, metrics: MetricsFile) -> bool:
        """Log a validation; return whether the state is the best so far, by its figure of merit."""
        self.checkpoints.require_folder()
        for name, (value, unit) in health.metrics().items():
            metrics.log(step, name, value, unit)
        log.info("step %d: %s", step + 1, health.message())

        optim = self.plan.optim
        # Before a tenth of the run, even good runs have often learnt nothing that can be measured.
        is_warm = step >= max(2 * optim.warmup_steps, optim.num_steps / 10)
        for warning in health_warnings(health, self.plan.run, is_warm):
            log.warning("step %d: %s", step + 1, warning)
            metrics.note(step, "health_warning", warning)

        progress = self.checkpoints.progress
        is_collapsed = is_warm and bool(collapse_messages(health, self.plan.run))
        progress.collapsed = progress.collapsed + 1 if is_collapsed else 0

        is_best = health.merit < progress.best_error and not is_collapsed
        if is_best:
            progress.best_error = health.merit
        return is_best

    def refuse_failure(self) -> None:
        """End a run that did all its steps, but whose encoder must not be used, in all processes.

        Raises:
            AutoregError: weights or validation error are not finite, the features are collapsed,
                or no step was good.
        """
        # It is None if the run was continued after its last step.
        if self.health is None and self.validation.batches:
            with gathered(self.train_step.loss_of), phase("measuring the validation error"):
                self.health = self.validation.measure()

        objective = self.validation.objective
        are_finite = is_finite(objective.module) and is_finite(objective.extra)
        are_all_finite = not self.world.any(not are_finite)
        statistics = self.train_step.guard.statistics()
        num_steps = self.checkpoints.progress.step
        messages = failure_messages(
            self.health,
            self.plan.run,
            are_all_finite,
            statistics,
            num_steps,
        )
        # Only the main process has validated, and what it found counts for all.
        messages = self.world.share(messages)
        if not messages:
            return
        raise AutoregError(
            f"after {num_steps} steps the run has failed, and no encoder is exported: "
            f"{'; '.join(messages)}. The last good checkpoint is kept. Start a new --name with a "
            f"lower rate, e.g. --set optim.lr={self.plan.optim.lr / 3:.1e}, or with another "
            "--seed. If you accept such features, lower run.min_token_variance or "
            f"run.min_effective_rank in {self.checkpoints.folder / 'plan.json'}, and type the same "
            "line again",
            code="training-failed",
        )


def is_finite(module: torch.nn.Module) -> bool:
    """Return whether all weights of this process are finite; of sharded weights, its own part."""
    for tensor in module.state_dict().values():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return False
    return True


def content_part(features_NV: Tensor, position_N: Tensor) -> Tensor:
    """Return the part of the features that depends on the image, not on the position, (N, V).

    The mean of all tokens at the same position of the grid is subtracted.
    """
    num_positions = int(position_N.max()) + 1 if len(position_N) else 0
    # One row for each position of the grid.
    sum_PV = features_NV.new_zeros(num_positions, features_NV.shape[1])
    sum_PV.index_add_(0, position_N, features_NV)
    count_P = torch.bincount(position_N, minlength=num_positions).clamp(min=1)
    mean_PV = sum_PV / count_P.to(features_NV.dtype)[:, None]
    return features_NV - mean_PV[position_N]


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
    _, not_beaten = compared(health.errors, health.figure)
    if not_beaten or not math.isfinite(error):
        warnings.append(
            f"nothing learnt yet: the validation error {error:.4f} is not below "
            f"{' and '.join(not_beaten) or 'anything'}; it should fall within the next few hundred "
            "steps, else change the rate",
        )
    if health.probe is not None and health.probe["features"] <= health.probe["voxels"]:
        warnings.append(
            "the features predict labels no better than raw voxels "
            f"({health.probe['features']:.3f} against {health.probe['voxels']:.3f} balanced "
            "accuracy): train longer",
        )
    return warnings


def verdict_of(
    health: Health | None,
    num_scans: int,
    num_validation_scans: int,
    min_scans: int,
) -> Verdict:
    """Return whether a finished run has learnt something, with the figures.

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
                "validation (only 2D images, or too few patients)"
            )
        return Verdict(UNKNOWN, f"{reason}; {num_scans} scans", min_scans=min_scans)

    outcome, reason = judge(health.figure, health.errors, health.probe)
    return Verdict(
        outcome,
        f"{reason}; {num_scans} scans, {num_validation_scans} of them for validation",
        dict(health.errors),
        dict(health.probe or {}),
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
            f"{run.min_token_variance:g})",
        )
    if rank is not None and not rank >= run.min_effective_rank:
        messages.append(
            f"the features spread over {rank:.1f} directions only (limit "
            f"{run.min_effective_rank:g})",
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
            "could show that all is well",
        )
    if health is None:
        return messages

    error = health.errors["error"]
    if not math.isfinite(error):
        messages.append(f"the validation error is {error}")
    return [*messages, *collapse_messages(health, run)]
