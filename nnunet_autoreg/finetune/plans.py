"""Make plans from weights and a dataset.

This file decides the ``"autoreg"`` block, patch and batch size, intensities, and which
configurations of an earlier plans file are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import check_argument_types, token_size_of
from nnunet_autoreg.finetune.block import (
    BLOCK_KEY,
    AutoregBlock,
    PlannedWeights,
    Recipe,
    check_block,
)
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.finetune.families import (
    decoder_first,
    decoder_transfer,
    rate_reason,
    recipe_values,
    stem_change,
)
from nnunet_autoreg.finetune.network import build_network, own_arguments
from nnunet_autoreg.finetune.resolve import Choice, is_ct
from nnunet_autoreg.geometry import Size, as_size, as_spacing, grid_of, size_text, volume
from nnunet_autoreg.model.card import EncoderCard
from nnunet_autoreg.model.memory import GIB, TrainingMemory, training_memory
from nnunet_autoreg.model.sizes import ENCODERS, encoder_size
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.planning.encoder import choose_encoder
from nnunet_autoreg.planning.layout import plan_crop
from nnunet_autoreg.planning.pool import Hardware, Pool
from nnunet_autoreg.planning.tokens import with_tokens
from nnunet_autoreg.records import shown, to_jsonable

DEFAULT_TARGET_GIB = 8.0
OWN_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
FEW_CASES, EPOCHS_FEW, EPOCHS_MANY = 50, 150, 300
MIN_BATCH = 2
MAX_BATCH_TINY = 8
DEFAULT_MAX_VOX = 160**3
MAX_TOKENS = DEFAULT_MAX_VOX // 8**3
MAX_TOKENS_TINY = 2048
"""Largest number of tokens in a patch, however small they are. That of a tiny encoder is enough for
a whole scan of Hippocampus in tokens of 4^3 voxels.
"""
SPATIAL_AXES = 3


@dataclass(frozen=True)
class SegmentationTask:
    """Hold the facts about a labelled dataset that planning needs.

    Attributes:
        num_cases: number of labelled cases.
        median_shape_vox, spacing_mm: (z, y, x) after resampling and transposing.
        num_channels, num_classes: number of channels and classes of the network.
    """

    num_cases: int
    median_shape_vox: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    num_channels: int
    num_classes: int


@dataclass(frozen=True)
class Budget:
    """Hold the GPU memory to plan for; ``is_explicit`` if the user has given it."""

    gib: float
    is_explicit: bool


@dataclass(frozen=True)
class Fit:
    """Hold patch and batch size of a configuration, and the reason for both.

    Attributes:
        arguments: arguments of the configuration's network; None for those of the encoder.
    """

    patch_size: Size
    batch_size: int
    reason: str
    arguments: dict[str, Any] | None = None


def make_block(
    choice: Choice,
    task: SegmentationTask,
    budget: Budget,
    results: Path,
) -> AutoregBlock:
    """Return the ``"autoreg"`` block for the chosen weights.

    Raises:
        PlanError: the card of the weights names a network class or values that are not allowed.
    """
    card, file = choice.card, choice.file
    if card is not None:
        encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
        encoder_reason = f"the encoder of the weights '{card.name}'"
    else:
        # The rules of pretraining choose, for a GPU with the memory of the budget.
        shape = as_size([round(v) for v in task.median_shape_vox])
        pool = Pool(
            num_scans=task.num_cases,
            spacing_mm=as_spacing(task.spacing_mm),
            median_shape_vox=shape,
            total_vox=task.num_cases * volume(shape),
            ct_window=None,
        )
        hardware = Hardware("cuda", budget.gib)
        name, encoder_reason = choose_encoder("auto", hardware, pool)
        size, _ = with_tokens(encoder_size(name), task.spacing_mm, task.median_shape_vox)
        encoder = size.encoder_plan()

    num_epochs = EPOCHS_FEW if task.num_cases <= FEW_CASES else EPOCHS_MANY
    # The plans file has a reason for each value, for users who edit it.
    reasons = {
        "weights": choice.reason,
        "encoder": encoder_reason,
        "recipe.num_epochs": f"{task.num_cases} labelled cases: {EPOCHS_FEW} epochs for up to "
        f"{FEW_CASES} cases, {EPOCHS_MANY} for more",
        "recipe.pretrained_rate": rate_reason(encoder),
    }
    recipe = Recipe(num_epochs=num_epochs, **recipe_values(encoder))

    weights = None
    if card is not None and file is not None:
        # A path relative to the results stays valid when the whole folder is moved.
        home = results.resolve()
        if file.is_relative_to(home):
            file = file.relative_to(home)
        weights = PlannedWeights(card.name, file.as_posix(), card.sha256, card.has_decoder)
        if card.has_decoder:
            is_loaded, reason = decoder_transfer(card.num_steps)
            recipe = replace(recipe, transfer_decoder=is_loaded)
            reasons["recipe.transfer_decoder"] = reason
    return check_block(AutoregBlock(encoder, weights, recipe, reasons), BLOCK_KEY)


def memory_estimator(
    block: AutoregBlock,
    num_channels: int,
    num_classes: int,
) -> Callable[[Size], TrainingMemory]:
    """Return a function from patch size to training memory; it estimates each patch once."""

    @cache
    def estimate(patch: Size) -> TrainingMemory:
        return training_memory(
            lambda: build_network(block, patch, num_channels, num_classes),
            (num_channels, *patch),
        )

    return estimate


def fit_configuration(
    encoder: EncoderPlan,
    task: SegmentationTask,
    budget: Budget,
    memory_of: Callable[[Size], TrainingMemory],
    *,
    dataset_vox: float,
    max_share: float,
) -> Fit:
    """Return patch and batch size of a configuration of a transformer.

    Args:
        task: with the configuration's median shape and spacing.
        memory_of: training memory by patch size.
        dataset_vox: voxels of the whole dataset at that spacing.
        max_share: largest share of these voxels in one batch, as nnU-Net limits it.
    """
    is_capped = encoder.name.endswith("_tiny") and not budget.is_explicit
    patch, memory = _largest_patch(encoder, task, budget, is_capped, memory_of)

    # The smallest limit decides.
    fitting = memory.largest_batch(budget.gib * GIB)
    limits = {
        f"{budget.gib:g} GiB": fitting,
        f"{100 * max_share:g} % of the dataset": round(dataset_vox * max_share / volume(patch)),
    }
    if is_capped:
        limits["tiny encoder"] = MAX_BATCH_TINY
    limit = min(limits, key=lambda name: limits[name])
    batch = max(MIN_BATCH, limits[limit])

    batch_reason = f"limited by {limit}"
    if limits[limit] < MIN_BATCH:
        batch_reason = f"the smallest, {limit} would be {limits[limit]}"
    needed_gib = memory.total_bytes(batch) / GIB
    reason = (
        f"median {size_text(task.median_shape_vox, '.0f')} voxels; batch {batch_reason}; about "
        f"{needed_gib:.1f} GiB to train"
    )
    if fitting < MIN_BATCH:
        reason += (
            f", MORE than the target of {budget.gib:g} GiB: even the smallest patch does not fit"
        )
    return Fit(patch, batch, reason)


def _largest_patch(
    encoder: EncoderPlan,
    task: SegmentationTask,
    budget: Budget,
    is_capped: bool,
    memory_of: Callable[[Size], TrainingMemory],
) -> tuple[Size, TrainingMemory]:
    """Return the largest patch with which a batch of two fits, and its memory."""
    size = ENCODERS.get(encoder.name)
    token_vox = volume(encoder.token_size_vox)
    max_vox = DEFAULT_MAX_VOX
    if size and (is_capped or not size.is_tiny):
        max_vox = size.max_crop_vox
    # A transformer's cost grows with the number of tokens, however small they are.
    max_tokens = MAX_TOKENS_TINY if is_capped else MAX_TOKENS
    max_vox = min(max_vox, max_tokens * token_vox)

    while True:
        patch = plan_crop(task.median_shape_vox, task.spacing_mm, encoder.token_size_vox, max_vox)
        memory = memory_of(patch)
        available = budget.gib * GIB - memory.fixed_bytes
        needed = MIN_BATCH * memory.sample_bytes
        if available >= needed or patch == encoder.token_size_vox:
            return patch, memory

        # Memory is almost proportional to the voxels of the patch.
        max_vox = min(volume(patch) - 1, int(volume(patch) * available / needed))
        max_vox = max(max_vox, token_vox)


def with_ct_window(
    properties: Mapping[str, Any],
    channel_names: Sequence[str],
    card: EncoderCard | None,
) -> dict[str, Any]:
    """Return nnU-Net's intensity properties per channel, with pretraining's window for CT.

    Fine-tuning then clips CT exactly as pretraining did.
    """
    if card is None or card.ct_window is None:
        return {str(index): values for index, values in properties.items()}

    found = {}
    for index, values in properties.items():
        has_window = is_ct(channel_names[int(index)])
        found[str(index)] = to_jsonable(card.ct_window) if has_window else values
    return found


def with_fits(
    block: AutoregBlock,
    fits: Mapping[str, Fit],
    card: EncoderCard | None,
    num_cases: int,
    channel_names: Sequence[str],
) -> AutoregBlock:
    """Return ``block`` with the reasons for each patch and batch, and the decoder-first stage.

    Args:
        fits: by configuration. The decoder-first stage is the same for all of them; the first
            configuration that has its own network arguments decides.
        num_cases: number of labelled cases.
        channel_names: channel names of the dataset, in order.
    """
    # All configurations share one recipe, so one of them has to decide.
    arguments = block.encoder.arguments
    for fit in fits.values():
        if fit.arguments is not None:
            arguments = fit.arguments
            break

    channel_note = ""
    if card is not None:
        channels = map_channels(
            card.num_input_channels,
            card.channel_names,
            len(channel_names),
            channel_names,
        )
        channel_note = channels.note if channels else ""

    change = stem_change(block.encoder, arguments, channel_note)
    share, share_reason = decoder_first(
        block.encoder,
        num_cases,
        card is not None,
        change,
        block.transfers_decoder,
    )
    reasons = {**block.reasons, "recipe.decoder_first_fraction": share_reason}
    for name, fit in fits.items():
        reasons[name] = fit.reason

    recipe = replace(block.recipe, decoder_first_fraction=share)
    return replace(block, recipe=recipe, reasons=reasons)


def kept_configurations(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    class_path: str,
) -> tuple[dict[str, Any], list[str]]:
    """Return the user's own configurations of an earlier plans file that are still valid.

    The second value has one line for each configuration that is left out.

    Args:
        old, new: parsed plans; our own configurations in ``old`` are outdated and never kept.
        class_path: class of the new plans' encoder.
    """
    custom = {}
    left_out: list[str] = []
    configurations = old.get("configurations")
    for name, configuration in _as_object(configurations).items():
        if name in OWN_CONFIGURATIONS:
            continue
        if isinstance(configuration, dict):
            custom[name] = configuration
        else:
            left_out.append(
                f"configuration '{name}' was left out of the new plans: it is not an object",
            )

    # Others may inherit from a configuration that is left out, so check again until all are valid.
    while True:
        known = {**new["configurations"], **custom}
        reasons = {name: _reason_against(name, known, class_path) for name in custom}
        invalid = {name: reason for name, reason in reasons.items() if reason}
        if not invalid:
            return custom, left_out
        for name, reason in invalid.items():
            left_out.append(f"configuration '{name}' was left out of the new plans: {reason}")
            del custom[name]


def _as_object(value: Any) -> dict[str, Any]:
    """Return a value of a plans file that was edited by hand; empty if it is not an object."""
    return value if isinstance(value, dict) else {}


def _reason_against(name: str, known: Mapping[str, Any], class_path: str) -> str | None:
    """Return why a configuration is not valid any more, or None."""
    # Resolve inheritance; values of the child come before those of the parent.
    resolved: dict[str, Any] = {}
    seen: list[str] = []
    parent: str | None = name
    while parent is not None:
        if not isinstance(parent, str) or parent not in known:
            return f"it inherits from '{parent}', which no longer exists"
        if parent in seen:
            return f"it inherits from '{parent}', which leads back to itself"
        seen.append(parent)
        resolved = {**known[parent], **resolved}
        parent = known[parent].get("inherits_from")

    for key in ("patch_size", "batch_size", "spacing", "data_identifier", "architecture"):
        if key not in resolved:
            return f"it has no '{key}'"

    patch = resolved["patch_size"]
    is_size = isinstance(patch, list | tuple) and all(type(v) is int and v > 0 for v in patch)
    if not is_size or len(patch) != SPATIAL_AXES:
        return f"its patch size {shown(patch)} is not 3D"

    architecture = _as_object(resolved["architecture"])
    kwargs = _as_object(architecture.get("arch_kwargs"))
    if kwargs.get("class_path") != class_path:
        return "its network differs from that of the new plans"
    try:
        arguments = own_arguments(kwargs)
        check_argument_types(class_path, arguments, f"configuration '{name}'")
        grid_of(patch, token_size_of(class_path, arguments))
    except (PlanError, ValueError) as error:
        return f"patch size: {error}"

    stage = resolved.get("previous_stage")
    if stage is not None and (not isinstance(stage, str) or stage not in known):
        return f"its previous stage '{stage}' no longer exists"
    return None


def check_plans_name(name: str, old: Mapping[str, Any] | None) -> None:
    """Refuse names that would break nnU-Net's folder names or overwrite another planner's plans.

    Raises:
        PlanError: the name contains ``__`` (code "plan-name"), or an existing plans file of that
            name is not ours (code "plan-name-taken").
    """
    if "__" in name:
        raise PlanError(
            f"the plans name '{name}' contains '__', at which nnU-Net splits folder names; use a "
            "single '_'",
            code="plan-name",
        )
    if old is not None and BLOCK_KEY not in old:
        maker = old.get("experiment_planner_used", "another planner")
        raise PlanError(
            f"{name}.json exists and was made by {maker}, so it is not overwritten; choose another "
            "-overwrite_plans_name",
            code="plan-name-taken",
        )
