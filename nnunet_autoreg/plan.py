"""The plan of a pretraining run: every value that can be chosen, written before work begins."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import MOST_LAYERS
from nnunet_autoreg.geometry import Size, Spacing, size_text
from nnunet_autoreg.records import from_jsonable, parse_json, to_jsonable

PLAN_VERSION = 2
DEFAULT_OBJECTIVE = "autoregressive"


@dataclass(frozen=True)
class IntensityWindow:
    """CT intensities inside the body over the pretraining pool, in HU.

    The fields are named after nnU-Net's foreground properties.

    Attributes:
        mean, std, median, min, max: statistics of the intensities of all CT scans.
        percentile_00_5, percentile_99_5: percentiles 0.5 and 99.5. Intensities are clipped to the
            range between them.
    """

    mean: float
    std: float
    median: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True, repr=False)
class SpacingGroup:
    """Scans of one modality and similar spacing, which share a target spacing.

    Spacings are in the order (z, y, x), with the coarsest axis first.

    Attributes:
        modality: modality of all scans in the group, such as "CT" or "MR".
        native_mm: median of the scans' original spacings. A scan belongs to the group of its
            modality whose median is nearest.
        spacing_mm: target spacing.
    """

    modality: str
    native_mm: Spacing
    spacing_mm: Spacing

    def __repr__(self) -> str:
        native = size_text(self.native_mm, ".4g")
        target = size_text(self.spacing_mm, ".4g")
        return f"{self.modality} of {native} to {target} mm"


@dataclass(frozen=True)
class DataPlan:
    """The scans: spacing, intensities, validation share.

    Attributes:
        spacing_mm: target spacing, (z, y, x), of every scan that belongs to no group. With groups
            it is the target of the largest group.
        ct_window: intensities of the CT scans inside the body; None without CT.
        holdout_fraction: share of the cases that are kept out of training for validation.
        spacing_groups: target spacings by modality and original spacing. Empty if all scans have
            the target ``spacing_mm``.
        min_scans: the fine-tuning planner uses encoders of fewer scans only if the user names them.
        salt_free: whether scans and subjects are ordered by content and index, not by their salted
            hashes. Random choices then do not depend on the folder ``nnUNet_preprocessed``. False
            in plans of earlier versions, whose runs continue unchanged.
    """

    spacing_mm: Spacing
    ct_window: IntensityWindow | None = None
    holdout_fraction: float = 0.05
    spacing_groups: tuple[SpacingGroup, ...] = ()
    min_scans: int = 10
    salt_free: bool = False


@dataclass(frozen=True)
class EncoderPlan:
    """The network class, its arguments and its token size, as in ``model.sizes``.

    Attributes:
        name: value of ``--encoder``.
        class_path: module and class of the network that fine-tuning builds.
        arguments: arguments of that class, without channels, classes and input shape.
        token_size_vox: voxels of a token, (z, y, x).
    """

    name: str
    class_path: str
    arguments: dict[str, Any]
    token_size_vox: Size


@dataclass(frozen=True)
class SequencePlan:
    """How a crop becomes a sequence of blocks.

    Attributes:
        crop_size_vox: size of a crop, (z, y, x), a multiple of block_tokens x token size.
        block_tokens: tokens of a block along each axis; (1, 1, 1) is a block of one token.
        order: order of the blocks. "raster": image after image, each along x, then y, then z.
            "interleaved": at each position in the plane, along z through all images or sub-volumes,
            as in AR-SSL4M. "random": needs the predictor "query" or "network".
        predictor: how a block is predicted. "next": token j of block b predicts token j of block
            b + 1. "query": a small decoder is given the position of the block and attends to
            earlier blocks only. "network": a whole CNN predicts all unknown voxels of a crop.
        prefix: distribution of the number of given blocks, out of K. "uniform": 1 to K-1. "long":
            the larger of two such numbers. "fixed": always the share ``prefix_share``.
            "uniform_from_0": 0 to K-1, for encoders with a START token, which then predicts the
            first block, as in AR-SSL4M.
        prefix_share: share of given blocks for the prefix "fixed".
        flip: whether crops are flipped at random along each axis.
        swap_axes: whether axes of equal length and spacing are swapped at random.
        spatial_share: probability that a training crop is rotated, and independently that it is
            zoomed. Sequences of kind "strided" never are, because their slices overlap along the
            axis z of the scan. If one spacing is over 3 times another, crops are rotated and zoomed
            only in the plane of the small spacings.
        max_rotation_deg: largest angle of a rotation. Angles are drawn uniformly between minus and
            plus this value, about a random axis.
        zoom: smallest and largest factor of a zoom; above 1, structures become larger.
        max_source: largest extent, along an axis, of the region from which a rotated or zoomed crop
            is resampled, as a multiple of the crop's size. Voxels outside of it are padding.
        weights: how often each kind of sequence is drawn, relative to the others. A batch has one
            kind. "spatial": one crop. "strided": sub-volumes of one crop that overlap, one after
            another along z, as in AR-SSL4M. "contrast": one position in several contrasts of a
            patient. "semantic": one structure in several patients. "views" and "images": two views
            of a crop or of a 2D image, for objectives that compare views.
        contrasts: contrasts of a contrast sequence, in their fixed order.
        contrast_members: number of images of a contrast sequence. Their crops are smaller, so that
            the number of tokens does not grow.
        semantic_members: number of images of a semantic sequence.
        member_crop_vox: size of the crop of one such image. None: it is planned from
            crop_size_vox and the number of members.
        num_subvolumes: number of sub-volumes of a "strided" sequence, along z.
        stride_vox: distance between the starts of sub-volumes. They overlap if it is smaller than
            their depth.
        mask_seen: whether voxels of a "strided" sequence that an earlier sub-volume contains have
            no loss.
    """

    crop_size_vox: Size
    block_tokens: Size = (1, 1, 1)
    order: str = "raster"
    predictor: str = "next"
    prefix: str = "uniform"
    prefix_share: float = 0.25
    flip: bool = True
    swap_axes: bool = True
    spatial_share: float = 0.0
    max_rotation_deg: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    max_source: float = 1.6
    weights: dict[str, float] = field(default_factory=lambda: {"spatial": 1.0})
    contrasts: tuple[str, ...] = ()
    contrast_members: int = 0
    semantic_members: int = 4
    member_crop_vox: Size | None = None
    num_subvolumes: int = 4
    stride_vox: int = 8
    mask_seen: bool = False

    @property
    def is_at_once(self) -> bool:
        """Whether all unknown blocks are predicted at once, so that their order means nothing.

        This is so for a whole CNN, and if a fixed share of the blocks is known.
        """
        return self.predictor == "network" or self.prefix == "fixed"


@dataclass(frozen=True)
class ObjectivePlan:
    """What every objective has; each one adds its own values in its own record.

    Which record that is follows from ``name``, when a plan is read.

    Attributes:
        name: the objective, as typed after ``--objective``.
        corruption: share of the training samples whose given part is shown with another gamma and
            contrast and with noise. Targets are always clean.
    """

    name: str = DEFAULT_OBJECTIVE
    corruption: float = 0.0

    @classmethod
    def record_type(cls, data: Any, where: str) -> "type[ObjectivePlan]":
        """Return the record of the objective that parsed JSON names.

        Raises:
            PlanError: there is no such objective.
        """
        known = objective_plans()
        name = data.get("name", DEFAULT_OBJECTIVE) if isinstance(data, dict) else DEFAULT_OBJECTIVE
        if not isinstance(name, str):
            # The record's own check names the wrong type.
            return known[DEFAULT_OBJECTIVE]
        if name not in known:
            raise PlanError(
                f"{where}.name: the objective '{name}' does not exist; {did_you_mean(name, known)}",
                code="plan-unknown-name",
            )
        return known[name]


@dataclass(frozen=True)
class ViewPlan(ObjectivePlan):
    """What objectives have in common that learn from two views of each crop, slab by slab.

    Attributes:
        slab_vox: slices of a slab, a multiple of the token's depth. A 2D image is repeated to as
            many slices.
        slab_step_vox: slices from the start of one slab to that of the next.
        intensity_share: share of the views that are shown with another gamma and contrast and with
            noise, in training and validation.
    """

    slab_vox: int = 16
    slab_step_vox: int = 8
    intensity_share: float = 0.8


OBJECTIVE_PLANS: dict[str, type[ObjectivePlan]] = {}
"""The plan of every registered objective by its name. ``objective_kinds.register`` fills it."""


def objective_plans() -> dict[str, type[ObjectivePlan]]:
    """Return the plan of every objective by its name, after all of them have been registered."""
    load_objectives()
    return OBJECTIVE_PLANS


@cache
def load_objectives() -> None:
    """Import every file of ``objectives/registered``, each of which registers an objective.

    They are found by looking into the folder, so that an objective is added without a change here.
    """
    folder = Path(__file__).with_name("objectives") / "registered"
    for module in sorted(found.name for found in iter_modules([str(folder)])):
        import_module(f"nnunet_autoreg.objectives.registered.{module}")


@dataclass(frozen=True)
class OptimPlan:
    """AdamW with linear warm-up and half-cosine decay to zero.

    Attributes:
        num_steps: optimiser steps of the whole run.
        batch_size: crops per optimiser step.
        lr: highest learning rate, reached at the end of the warm-up.
        warmup_steps: steps in which the learning rate rises from zero.
        betas: decay rates of AdamW's running averages.
        weight_decay: weight decay of AdamW.
        clip_norm: the gradient is scaled down to this norm if its own is larger.
        decay_all: whether norms, biases, positions and scales have weight decay too, as in
            AR-SSL4M.
        micro_batch_size: crops on the device at once; gradients are accumulated over the batch.
            None: the whole batch.
        checkpoint_activations: whether only the inputs of the transformer's blocks are kept for the
            backward pass and the rest is computed twice. The numbers stay the same, with less
            memory, and a step takes about a third longer.
    """

    num_steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    decay_all: bool = False
    micro_batch_size: int | None = None
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class RunPlan:
    """How often things happen, in steps, and how the run is computed.

    Attributes:
        seed: random seed. Every random draw derives from it.
        checkpoint_every: steps from one checkpoint to the next.
        validate_every: steps from one validation to the next.
        log_every: steps from one line of the log to the next.
        seconds_per_step: measured once, if the length was given in hours.
        spike_sigmas: a step is skipped if its loss lies this many standard deviations above the
            running mean, and above twice that mean.
        max_bad_steps: after this many skipped steps in a row, the weights return to the last
            checkpoint. Training continues with the data of the steps that follow.
        max_rollbacks: the run ends if the weights return to a checkpoint more often than this.
        min_token_variance, min_effective_rank: features below either value count as collapsed.
        max_collapsed: training stops without an export if this many validations in a row find the
            features collapsed. The first tenth of the run and twice its warm-up do not count. 0:
            never.
        sharding: how parameters, gradients and moments are distributed over processes. "none": each
            holds all (DDP). "full": each holds a part (FSDP2). "auto": "full" if they would leave a
            GPU no room for activations. It changes no loss.
        compile: whether a GPU compiles the transformer's layers. Elsewhere, and with sharded
            weights, nothing is compiled.
        peak_memory_gib: measured once in a dry step before the first step.
        flex_attention: whether compiled layers use FlexAttention. Otherwise they use torch's own
            attention with a dense mask.
        dry_step_seconds: time of an optimiser step of the whole batch on one device, without
            loading, measured in the dry step. With ``loader_seconds_per_crop`` it decides how many
            processes load. It does not decide the length of the run.
        loader_seconds_per_crop: time in which one process reads and collates a crop, measured
            beside the dry step.
        self_check: whether a compiled layer of each kind is compared with a dense mask in float32
            after the dry step.
    """

    seed: int
    checkpoint_every: int
    validate_every: int
    log_every: int = 10
    seconds_per_step: float | None = None
    spike_sigmas: float = 8.0
    max_bad_steps: int = 10
    max_rollbacks: int = 3
    min_token_variance: float = 0.01
    min_effective_rank: float = 3.0
    max_collapsed: int = 3
    sharding: str = "auto"
    compile: bool = True
    peak_memory_gib: float | None = None
    flex_attention: bool = True
    dry_step_seconds: float | None = None
    loader_seconds_per_crop: float | None = None
    self_check: bool = True


@dataclass(frozen=True)
class Plan:
    """Every value of one run.

    Attributes:
        request: what the user typed; the same request typed again continues the run.
        reasons: per chosen value, why it was chosen.
    """

    name: str
    data: DataPlan
    encoder: EncoderPlan
    sequence: SequencePlan
    objective: ObjectivePlan
    optim: OptimPlan
    run: RunPlan
    request: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    version: int = PLAN_VERSION


ORDERS = ("raster", "interleaved", "random")
KINDS = ("spatial", "strided", "contrast", "semantic")
VIEW_KINDS = ("views", "images")
"""Kinds that only objectives with a ``ViewPlan`` draw: two views of a crop, or of a 2D image."""
SHARDINGS = ("auto", "none", "full")
PREDICTORS = ("next", "query", "network")
PREFIXES = ("uniform", "long", "fixed", "uniform_from_0")


def override(plan: Plan, settings: list[str]) -> Plan:
    """Return the plan with ``key=value`` settings such as ``optim.lr=3e-4`` applied.

    Each overridden key gets the reason "set by the user".

    Raises:
        PlanError: an unknown key (with a close match) or a value of the wrong type.
    """
    data = to_jsonable(plan)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise PlanError(
                f"--set {setting}: write it as key=value, e.g. optim.lr=3e-4",
                code="plan-setting",
            )
        key, value = key.strip(), literal(text.strip())

        # Only --objective plans the values that another objective needs.
        is_objective = key == "objective.name" and isinstance(value, str)
        objective = objective_plans().get(value) if is_objective else None
        if objective is not None and objective is not type(plan.objective):
            raise PlanError(
                f"--set objective.name={value}: this plan was made for --objective "
                f"{plan.objective.name}, whose values {value} does not have; type --objective "
                f"{value} instead",
                code="plan-other-objective",
            )

        *path, leaf = key.split(".")
        node: Any = data
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        exists = bool(path) and isinstance(node, dict) and leaf in node
        if not exists or path[0] in ("reasons", "request"):
            known = _known_keys()
            # "lr" is most likely meant as "optim.lr".
            same_leaf = [name for name in known if name.endswith(f".{key}")]
            suggestion = did_you_mean((same_leaf or [key])[0], known)
            raise PlanError(
                f"--set {key}: there is no such setting; {suggestion}",
                code="plan-unknown-key",
            )
        node[leaf] = value
        data["reasons"][key] = "set by the user"
    return from_jsonable(Plan, data, "--set")


def _known_keys() -> list[str]:
    keys = []
    for part in dataclasses.fields(Plan):
        if not dataclasses.is_dataclass(part.type):
            continue
        records: list[Any] = [part.type]
        if part.type is ObjectivePlan:
            records = list(objective_plans().values())
        for record in records:
            keys += [f"{part.name}.{field.name}" for field in dataclasses.fields(record)]
    return list(dict.fromkeys(keys))


def literal(text: str) -> Any:
    """Return the value that a user typed.

    It is JSON, a number as Python writes it, a list by commas, or true or false in any case; else
    the text itself.
    """
    try:
        return parse_json(text)
    except ValueError:
        parts = text.split(",")
        if len(parts) > 1:
            return [literal(p) for p in parts]
        lowered = text.lower()
        if lowered in ("true", "false"):
            return lowered == "true"
        try:
            return float(text)
        except ValueError:
            return text


def check_positive(values: Mapping[str, float]) -> None:
    """Refuse numbers that are not finite and greater than 0.

    Args:
        values: new values, by key of the plan.

    Raises:
        PlanError: the message names key and number (code "plan-out-of-range").
    """
    for key, number in values.items():
        if not 0 < number < float("inf"):
            raise PlanError(
                f"{key}={number} must be a number greater than 0",
                code="plan-out-of-range",
            )


def check_known(values: Mapping[str, tuple[str, Collection[str]]]) -> None:
    """Refuse names that do not exist.

    Args:
        values: new value and known ones, by key of the plan.

    Raises:
        PlanError: the message names key, value and the closest name (code "plan-unknown-name").
    """
    for key, (value, known) in values.items():
        if value not in known:
            raise PlanError(
                f"{key}: '{value}' does not exist; {did_you_mean(value, known)}",
                code="plan-unknown-name",
            )


def check_layers(values: Mapping[str, int]) -> None:
    """Refuse numbers of layers outside 1 to ``MOST_LAYERS``, as ``check_positive`` does."""
    for key, number in values.items():
        if not 1 <= number <= MOST_LAYERS:
            raise PlanError(
                f"{key}={number} must lie between 1 and {MOST_LAYERS}",
                code="plan-out-of-range",
            )


def check_not_negative(values: Mapping[str, float]) -> None:
    """Refuse negative and infinite numbers, as ``check_positive`` does."""
    for key, number in values.items():
        if not 0 <= number < float("inf"):
            raise PlanError(f"{key}={number} must not be negative", code="plan-out-of-range")


def check_shares(values: Mapping[str, float]) -> None:
    """Refuse numbers outside 0 to 1, as ``check_positive`` does."""
    for key, number in values.items():
        if not 0 <= number <= 1:
            raise PlanError(f"{key}={number} must lie between 0 and 1", code="plan-out-of-range")
