"""The plan of a pretraining run: every value that can be chosen, written before work begins."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.geometry import Size, Spacing, size_text
from nnunet_autoreg.records import from_jsonable, to_jsonable

PLAN_VERSION = 2


@dataclass(frozen=True)
class IntensityWindow:
    """CT intensities inside the body over the pretraining pool, in HU.

    The fields are named after nnU-Net's foreground properties.

    Attributes:
        mean, std, median, min, max: of the intensities of all CT scans.
        percentile_00_5, percentile_99_5: intensities are clipped to the range between them.
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

    Spacings are (z, y, x), the coarsest axis first.

    Attributes:
        modality: of all scans in the group, such as "CT" or "MR".
        native_mm: median of their own spacings; a scan belongs to the group of its modality whose
            median is nearest.
        spacing_mm: what they are resampled to.
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
    """How scans are preprocessed, and how many are kept for validation.

    Attributes:
        spacing_mm: every scan that belongs to no group is resampled to this, (z, y, x); with
            groups, that of the largest.
        ct_window: Hounsfield statistics inside the body over the pool's CT scans; None without CT.
        holdout_fraction: share of the cases kept for validation (never trained on).
        spacing_groups: target spacings by modality and own spacing; empty where all scans share
            ``spacing_mm``.
    """

    spacing_mm: Spacing
    ct_window: IntensityWindow | None = None
    holdout_fraction: float = 0.05
    spacing_groups: tuple[SpacingGroup, ...] = ()


@dataclass(frozen=True)
class EncoderPlan:
    """The network class, its arguments and its token size, as in ``model.sizes``.

    Attributes:
        name: what is typed after ``--encoder``.
        class_path: module and class of the network that fine-tuning builds.
        arguments: of that class, without channels, classes and input shape.
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
        crop_size_vox: (z, y, x), a multiple of block_tokens x token size.
        block_tokens: tokens per block and axis; (1, 1, 1) is a block of one token.
        order: "raster" - image after image, each along x, then y, then z; "interleaved" - at each
            place in the plane along z through all images or sub-volumes (AR-SSL4M's own); "random"
            (needs predictor "query" or "network").
        predictor: "next" - token j of block b predicts token j of block b + 1; "query" - a light
            decoder knows where the target lies and attends to earlier blocks only; "network" - a
            CNN as a whole predicts all unknown voxels of a crop.
        prefix: distribution of the number p of given blocks: "uniform" over 1..K-1; "long" - the
            larger of two such numbers, so that most blocks are given; "fixed" - always
            ``prefix_share`` of the K blocks; "uniform_from_0" over 0..K-1, for encoders with a
            START token, which then predicts the first block (AR-SSL4M's own).
        prefix_share: of prefix "fixed".
        flip: random flips of the data per axis.
        swap_axes: random swaps of axes of equal length and spacing.
        spatial_share: how often a training crop is rotated, and independently how often it is
            zoomed (0 to 1). Sequences of kind "strided" never are, since their slices overlap along
            the axis z of the scan. Where one spacing is over 3 times another, both stay in the
            plane of the small spacings.
        max_rotation_deg: rotations are drawn evenly between minus and plus this angle, about a
            random axis.
        zoom: smallest and largest factor by which things become larger.
        max_source: most voxels, along an axis, that are read for a rotated or zoomed crop, as a
            multiple of the crop's own. What a turn brings in from beyond them is padding, as it is
            beyond the scan.
        weights: how often each kind of sequence is drawn, relative to the others; one kind per
            batch. "spatial" - one crop; "strided" - sub-volumes of one crop that overlap, one after
            another along z (AR-SSL4M's own); "contrast" - one place in several contrasts of a
            subject; "semantic" - one structure in several subjects.
        contrasts: the contrasts that contrast sequences are made of, in their fixed order.
        contrast_members, semantic_members: images of a sequence. Their crops are smaller, so that
            the tokens stay as many.
        member_crop_vox: the crop of one such image; None has it planned from crop_size_vox and the
            number of members.
        num_subvolumes, stride_vox: of "strided" sequences, along z; a stride below the sub-volume's
            depth makes them overlap.
        mask_seen: in "strided" sequences, voxels that an earlier sub-volume has shown already carry
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


@dataclass(frozen=True)
class ObjectivePlan:
    """What is predicted, and by which head.

    Attributes:
        name: the objective's file in ``objectives/``: "autoregressive" - block after block;
            "masked" - the blocks that are not given, all at once from those that are (needs a fixed
            prefix, which is the visible share, random order and predictor "query").
        target: what is regressed of every unknown token. "normalised" - its voxels with their own
            mean and deviation taken out, (v - mean) / sqrt(max(var, floor) + epsilon);
            "normalised_with_statistics" - the same, and the token's mean and the logarithm of its
            deviation as two more outputs; "voxels" - its voxels as they are, which nnU-Net's
            normalisation has brought to mean 0 and deviation 1 over the scan.
        variance_floor: the floor, in squared normalised intensity units; 0 for none.
        variance_epsilon: what is added under the root, in the same units; AR-SSL4M adds 1e-6 and
            has no floor.
        target_smoothing: standard deviation in voxels of a Gaussian low-pass of every token's
            target, 0 for none. It stays inside the token and takes real voxels alone, so that a
            target depends on its own token only.
        query_depth: layers of the decoder of predictor "query".
        corruption: share of the training samples whose given part is shown with another gamma and
            contrast and with noise. Targets are always clean.
        query_attention: whether the decoder's queries of one block see each other, where a block
            has several tokens. Those of different blocks never do.
        head: of the predictors "query" and "next": "linear" - one matrix makes voxels of features;
            "mlp" - with a hidden layer.
        unknown_mark: how the predictor "network" recognises unknown voxels: "zero" - they
            are 0 in the input; "learned" - a learned vector is also added to their features after
            the stem.
        num_segments: of the predictor "network": classes of pseudo-segments, which it predicts
            beside the voxels; 0 for none. They are clusters of local features over the pool.
        segment_weight: how much the cross-entropy of the segments counts beside the squared error
            of the voxels.
        trunk: only in plans of version 1, for a CNN: the transformer over its features. Such a run
            cannot be continued.
    """

    name: str = "autoregressive"
    target: str = "normalised"
    variance_floor: float = 1e-2
    variance_epsilon: float = 0.0
    target_smoothing: float = 0.0
    query_depth: int = 2
    corruption: float = 0.0
    query_attention: bool = False
    head: str = "linear"
    unknown_mark: str = "zero"
    num_segments: int = 0
    segment_weight: float = 1.0
    trunk: dict[str, Any] | None = None


@dataclass(frozen=True)
class OptimPlan:
    """AdamW with linear warm-up and half-cosine decay to zero.

    Attributes:
        num_steps: optimiser steps of the whole run.
        batch_size: crops per optimiser step.
        lr: the highest learning rate, reached at the end of the warm-up.
        warmup_steps: steps in which the learning rate rises from zero.
        betas: decay rates of AdamW's running averages.
        weight_decay: of AdamW.
        clip_norm: the gradient is scaled down to this norm where its own is larger.
        decay_all: weight decay also on norms, biases, positions and scales (AR-SSL4M's own), which
            are left out otherwise.
        micro_batch_size: crops on the device at once; a step accumulates as many as it takes. None:
            the whole batch.
        checkpoint_activations: keep only the inputs of the transformer's blocks for the backward
            pass and compute their insides twice: the same numbers in less memory, about a third
            slower.
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
    """How often things happen, in steps.

    Attributes:
        seed: random seed. Every random draw derives from it.
        checkpoint_every: steps from one checkpoint to the next.
        validate_every: steps from one validation to the next.
        log_every: steps from one line of the log to the next.
        seconds_per_step: measured once, where the length was given in hours; None where it was not.
        spike_sigmas: a step whose loss lies this many standard deviations above the running mean,
            and above twice that mean, is skipped.
        max_bad_steps: after so many skipped steps in a row the weights go back to the last
            checkpoint, and training goes on from there with the data of the steps that follow.
        max_rollbacks: going back more often than this ends the run.
        min_token_variance, min_effective_rank: features below either are reported as collapsed.
        compile: compile the transformer's layers on a GPU; elsewhere, and where weights are
            sharded, nothing is compiled.
        flex_attention: compiled layers use FlexAttention on a GPU; false for torch's own attention
            with a dense mask.
        self_check: after the dry step, compare a compiled layer of each kind with a dense mask in
            float32.
        peak_memory_gib: measured in a dry step, once, before the first; None until then.
        dry_step_seconds: of an optimiser step of the whole batch on one device, without loading,
            measured in the same dry step. Unlike ``seconds_per_step`` it decides no length:
            together with ``loader_seconds_per_crop`` it decides how many processes load.
        loader_seconds_per_crop: in which one process draws and collates a crop, measured beside the
            dry step.
        sharding: of parameters, gradients and moments over processes that train together: "none" -
            each holds all (DDP); "full" - each holds a part (FSDP2); "auto" - "full" where they
            would not leave a GPU room for activations. It changes no loss.
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
SHARDINGS = ("auto", "none", "full")
PREDICTORS = ("next", "query", "network")
UNKNOWN_MARKS = ("zero", "learned")
PREFIXES = ("uniform", "long", "fixed", "uniform_from_0")
OBJECTIVES = ("autoregressive", "masked")
HEADS = ("linear", "mlp")
TARGETS = ("normalised", "normalised_with_statistics", "voxels")


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
        _assign(data, key.strip(), literal(text.strip()))
        data["reasons"][key.strip()] = "set by the user"
    return from_jsonable(Plan, data, "--set")


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key, in place."""
    *path, leaf = key.split(".")
    node: Any = data
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None

    exists = bool(path) and isinstance(node, dict) and leaf in node
    if not exists or path[0] in ("reasons", "request"):
        known = _known_keys()
        # "lr" alone is most likely meant as "optim.lr".
        same_leaf = [name for name in known if name.endswith(f".{key}")]
        suggestion = did_you_mean((same_leaf or [key])[0], known)
        raise PlanError(
            f"--set {key}: there is no such setting; {suggestion}", code="plan-unknown-key"
        )
    node[leaf] = value


def _known_keys() -> list[str]:
    keys = []
    for part in dataclasses.fields(Plan):
        if dataclasses.is_dataclass(part.type):
            keys += [f"{part.name}.{field.name}" for field in dataclasses.fields(part.type)]
    return keys


def literal(text: str) -> Any:
    """Return the value that a user typed.

    It is JSON, a number as Python writes it, a list by commas, or true or false in any case; else
    the text itself.
    """
    try:
        return json.loads(text)
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
