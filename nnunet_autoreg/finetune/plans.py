"""From weights and a dataset to plans: the ``"autoreg"`` block, patch and batch size, intensities,
kept configurations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import token_size_of
from nnunet_autoreg.finetune.block import (
    BLOCK_KEY,
    AutoregBlock,
    PlannedWeights,
    Recipe,
    check_block,
)
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.finetune.families import decoder_first, recipe_values, stem_change
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
from nnunet_autoreg.records import to_jsonable

DEFAULT_TARGET_GIB = 8.0
OWN_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
FEW_CASES, EPOCHS_FEW, EPOCHS_MANY = 50, 150, 300
MIN_BATCH = 2
MAX_BATCH_TINY = 8
DEFAULT_MAX_VOX = 160**3
MAX_TOKENS = DEFAULT_MAX_VOX // 8**3
MAX_TOKENS_TINY = 2048
"""Most tokens of a patch, however small they are; those of a tiny encoder are enough for a whole
scan of Hippocampus in tokens of 4^3.
"""
SPATIAL_AXES = 3


@dataclass(frozen=True)
class Task:
    """What planning needs to know of a labelled dataset.

    Attributes:
        num_cases: labelled cases.
        median_shape_vox, spacing_mm: (z, y, x) after resampling and transposing.
        num_channels, num_classes: of the network.
    """

    num_cases: int
    median_shape_vox: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    num_channels: int
    num_classes: int


@dataclass(frozen=True)
class Budget:
    """GPU memory to plan for; ``is_explicit`` when the user gave it."""

    gib: float
    is_explicit: bool


@dataclass(frozen=True)
class Fit:
    """Patch and batch of a configuration, with the reason for both; ``arguments`` of its network
    where they are its own.
    """

    patch_size: Size
    batch_size: int
    reason: str
    arguments: dict[str, Any] | None = None


def make_block(choice: Choice, task: Task, budget: Budget, results: Path) -> AutoregBlock:
    """The ``"autoreg"`` block for the chosen weights.

    Raises:
        PlanError: the weights' card names a class or values that cannot be carried out.
    """
    encoder, why_encoder = _planned_encoder(choice.card, task, budget)
    num_epochs = EPOCHS_FEW if task.num_cases <= FEW_CASES else EPOCHS_MANY
    reasons = {
        "weights": choice.reason,
        "encoder": why_encoder,
        "recipe.num_epochs": f"{task.num_cases} labelled cases: {EPOCHS_FEW} epochs up to "
        f"{FEW_CASES}, else {EPOCHS_MANY}",
        "recipe.pretrained_rate": f"the usual rates of {encoder.name}",
    }
    recipe = Recipe(num_epochs=num_epochs, **recipe_values(encoder))
    return check_block(
        AutoregBlock(encoder, _planned_weights(choice, results), recipe, reasons), BLOCK_KEY
    )


def _planned_encoder(
    card: EncoderCard | None, task: Task, budget: Budget
) -> tuple[EncoderPlan, str]:
    if card is not None:
        encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
        return encoder, f"that of the weights '{card.name}'"
    shape = as_size([round(v) for v in task.median_shape_vox])
    pool = Pool(
        num_scans=task.num_cases,
        spacing_mm=as_spacing(task.spacing_mm),
        median_shape_vox=shape,
        total_vox=task.num_cases * volume(shape),
        ct_window=None,
    )
    name, reason = choose_encoder("auto", Hardware("cuda", budget.gib), pool)
    size, _ = with_tokens(encoder_size(name), task.spacing_mm, task.median_shape_vox)
    return EncoderPlan(size.name, size.class_path, size.arguments, size.token_size), reason


def _planned_weights(choice: Choice, results: Path) -> PlannedWeights | None:
    if choice.card is None or choice.file is None:
        return None
    home = results.resolve()
    file = choice.file.relative_to(home) if choice.file.is_relative_to(home) else choice.file
    return PlannedWeights(
        choice.card.name, file.as_posix(), choice.card.sha256, choice.card.has_decoder
    )


def memory_estimator(
    block: AutoregBlock, num_channels: int, num_classes: int
) -> Callable[[Size], TrainingMemory]:
    """Patch size -> training memory of the block's network, each patch estimated once."""

    @cache
    def estimate(patch: Size) -> TrainingMemory:
        return training_memory(
            lambda: build_network(block, patch, num_channels, num_classes), (num_channels, *patch)
        )

    return estimate


def fit_configuration(
    encoder: EncoderPlan,
    task: Task,
    budget: Budget,
    memory_of: Callable[[Size], TrainingMemory],
    *,
    dataset_vox: float,
    max_share: float,
) -> Fit:
    """Patch and batch size of a configuration.

    Args:
        task: with the configuration's median shape and spacing.
        dataset_vox: voxels of the whole dataset at that spacing.
        max_share: nnU-Net's cap, the largest share of those in one batch.
    """
    is_capped = encoder.name.endswith("_tiny") and not budget.is_explicit
    patch, memory = _largest_patch(encoder, task, budget, is_capped, memory_of)
    room = memory.largest_batch(budget.gib * GIB)
    share = round(dataset_vox * max_share / volume(patch))
    limits = {f"{budget.gib:g} GiB": room, f"{100 * max_share:g} % of the dataset": share}
    if is_capped:
        limits["tiny encoder"] = MAX_BATCH_TINY
    limit = min(limits, key=lambda name: limits[name])
    batch = max(MIN_BATCH, limits[limit])
    needed = memory.total_bytes(batch) / GIB
    why_batch = (
        f"the smallest, {limit} would be {limits[limit]}"
        if limits[limit] < MIN_BATCH
        else f"limited by {limit}"
    )
    reason = (
        f"median {size_text(task.median_shape_vox, '.0f')} voxels; batch {why_batch}; about "
        f"{needed:.1f} GiB to train"
    )
    if room < MIN_BATCH:
        reason += (
            f", MORE than the target of {budget.gib:g} GiB: even the smallest patch does not fit"
        )
    return Fit(patch, batch, reason)


def _largest_patch(
    encoder: EncoderPlan,
    task: Task,
    budget: Budget,
    is_capped: bool,
    memory_of: Callable[[Size], TrainingMemory],
) -> tuple[Size, TrainingMemory]:
    """The wanted patch, shrunk until a batch of two fits (memory is close to proportional to the
    patch's voxels).
    """
    size = ENCODERS.get(encoder.name)
    max_vox = size.max_crop_vox if size and (is_capped or not size.is_tiny) else DEFAULT_MAX_VOX
    max_vox = min(
        max_vox, (MAX_TOKENS_TINY if is_capped else MAX_TOKENS) * volume(encoder.token_size_vox)
    )
    while True:
        patch = plan_crop(task.median_shape_vox, task.spacing_mm, encoder.token_size_vox, max_vox)
        memory = memory_of(patch)
        room = budget.gib * GIB - memory.fixed_bytes
        wanted = MIN_BATCH * memory.sample_bytes
        if room >= wanted or patch == encoder.token_size_vox:
            return patch, memory
        max_vox = max(
            min(volume(patch) - 1, int(volume(patch) * room / wanted)),
            volume(encoder.token_size_vox),
        )


def with_ct_window(
    properties: Mapping[str, Any], channel_names: Sequence[str], card: EncoderCard | None
) -> dict[str, Any]:
    """nnU-Net's intensity properties per channel, CT channels taken from pretraining so that both
    see the same window.
    """
    window = (
        to_jsonable(card.ct_window) if card is not None and card.ct_window is not None else None
    )
    return {
        str(index): dict(window) if window and is_ct(channel_names[int(index)]) else values
        for index, values in properties.items()
    }


def with_fits(
    block: AutoregBlock,
    fits: Mapping[str, Fit],
    card: EncoderCard | None,
    num_cases: int,
    channel_names: Sequence[str],
) -> AutoregBlock:
    """``block`` with the reasons for each configuration's patch and batch, and the decoder-first
    stage that they call for.

    Args:
        fits: by configuration; the stage is for all of them, and looks at the first.
        num_cases: labelled cases.
        channel_names: of the dataset, in order.
    """
    arguments = next(
        (fit.arguments for fit in fits.values() if fit.arguments is not None),
        block.encoder.arguments,
    )
    channels = (
        map_channels(card.num_input_channels, card.channel_names, len(channel_names), channel_names)
        if card
        else None
    )
    change = stem_change(block.encoder, arguments, channels.note if channels else "")
    share, why = decoder_first(
        block.encoder, num_cases, card is not None, change, block.transfers_decoder
    )
    reasons = {
        **block.reasons,
        "recipe.decoder_first_fraction": why,
        **{name: fit.reason for name, fit in fits.items()},
    }
    return replace(
        block, recipe=replace(block.recipe, decoder_first_fraction=share), reasons=reasons
    )


def kept_configurations(
    old: Mapping[str, Any], new: Mapping[str, Any], class_path: str
) -> tuple[dict[str, Any], list[str]]:
    """The user's own configurations of an earlier plans file that still work, and one line per
    dropped one.

    Args:
        old, new: parsed plans; configurations of ours in ``old`` are stale and never kept.
        class_path: of the new plans' encoder.
    """
    custom = {
        name: c
        for name, c in old.get("configurations", {}).items()
        if name not in OWN_CONFIGURATIONS
    }
    dropped: list[str] = []
    while True:
        known = {**new["configurations"], **custom}
        wrong = {name: why for name in custom if (why := _why_invalid(name, known, class_path))}
        if not wrong:
            return custom, dropped
        dropped += [
            f"configuration '{name}' was left out of the new plans: {why}"
            for name, why in wrong.items()
        ]
        custom = {name: c for name, c in custom.items() if name not in wrong}


def _why_invalid(name: str, known: Mapping[str, Any], class_path: str) -> str | None:
    resolved: dict[str, Any] = {}
    seen: list[str] = []
    parent: str | None = name
    while parent is not None:
        if parent not in known or parent in seen:
            return (
                f"it inherits from '{parent}', which "
                f"{'leads back to itself' if parent in seen else 'no longer exists'}"
            )
        seen.append(parent)
        resolved = {**known[parent], **resolved}
        parent = known[parent].get("inherits_from")
    for key in ("patch_size", "batch_size", "spacing", "data_identifier", "architecture"):
        if key not in resolved:
            return f"it has no '{key}'"
    if len(resolved["patch_size"]) != SPATIAL_AXES:
        return f"its patch size {resolved['patch_size']} is not 3D"
    kwargs = resolved["architecture"].get("arch_kwargs", {})
    if kwargs.get("class_path") != class_path:
        return "its network is another than the new plans'"
    try:
        grid_of(resolved["patch_size"], token_size_of(class_path, own_arguments(kwargs)))
    except ValueError as error:
        return f"patch size: {error}"
    stage = resolved.get("previous_stage")
    return (
        f"its previous stage '{stage}' no longer exists"
        if stage is not None and stage not in known
        else None
    )


def check_plans_name(name: str, old: Mapping[str, Any] | None) -> None:
    """Refuse names that would break nnU-Net's folder names or overwrite another planner's work.

    Raises:
        PlanError: the name holds ``__``, or an existing plans file of that name is not ours.
    """
    if "__" in name:
        raise PlanError(
            f"plans name '{name}' holds '__', by which nnU-Net splits folder names; use a single "
            "'_'"
        )
    if old is not None and BLOCK_KEY not in old:
        maker = old.get("experiment_planner_used", "another planner")
        raise PlanError(
            f"{name}.json exists, made by {maker}, and is not overwritten: choose another "
            "-overwrite_plans_name"
        )
