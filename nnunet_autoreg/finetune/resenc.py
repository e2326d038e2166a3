"""Plan patch, batch, strides and kernels for a ResEnc encoder.

nnU-Net's own planner of that size makes the plan, which is then adapted to the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as stock_planners,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_autoreg.finetune.adapt import times
from nnunet_autoreg.finetune.families import rows
from nnunet_autoreg.finetune.plans import MAX_BATCH_TINY, MIN_BATCH, Budget, Fit, SegmentationTask
from nnunet_autoreg.geometry import as_size, size_text, volume
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.planning.layout import plan_crop

PRESETS = {
    "resenc_m": stock_planners.nnUNetPlannerResEncM,
    "resenc_l": stock_planners.nnUNetPlannerResEncL,
    "resenc_xl": stock_planners.nnUNetPlannerResEncXL,
}
NUM_STAGES = 14
"""Entries of nnU-Net's lists with one value per stage; more than any patch needs."""
SHRINK = 0.9
"""Factor by which the image is cut until the patch is small enough."""


def stock_planner(
    encoder: EncoderPlan,
    dataset_name: str,
    budget: Budget,
) -> stock_planners.ResEncUNetPlanner:
    """Return nnU-Net's planner for an encoder of this size, with the encoder's widths and depths.

    For sizes without their own planner it is that of ResEnc M. It plans for its default memory
    unless the user has given another.
    """
    planner_class = PRESETS.get(encoder.name, PRESETS["resenc_m"])
    planner = planner_class(dataset_name)
    features = encoder.arguments["features_per_stage"]
    planner.UNet_base_num_features = features[0]
    planner.UNet_max_features_3d = max(features)
    planner.UNet_blocks_per_stage_encoder = _extended(encoder.arguments["n_blocks_per_stage"])
    planner.UNet_blocks_per_stage_decoder = _extended(encoder.arguments["n_conv_per_stage_decoder"])
    if budget.is_explicit:
        planner.UNet_vram_target_GB = budget.gib
    planner.static_estimate_VRAM_usage = feature_map_size
    return planner


def feature_map_size(
    patch_size: Sequence[int],
    num_input_channels: int,
    num_classes: int,
    class_path: str,
    arguments: dict[str, Any],
    imported: Sequence[str],
) -> float:
    """Return the size of all feature maps, by which nnU-Net's planner estimates memory.

    It replaces nnU-Net's own function, which allocates the weights, and fails with
    ``nnUNet_n_proc_DA=0`` because it then asks torch for 0 threads.
    """
    with torch.device("meta"):
        network = get_network_from_plans(
            class_path,
            arguments,
            imported,
            num_input_channels,
            num_classes,
            allow_init=False,
        )
    return float(network.compute_conv_feature_map_size(patch_size))


def fit_resenc(
    planner: stock_planners.ResEncUNetPlanner,
    encoder: EncoderPlan,
    task: SegmentationTask,
    budget: Budget,
    cache: dict[str, Any],
    *,
    dataset_vox: float,
    max_share: float,
) -> Fit:
    """Return patch, batch and network arguments of a configuration.

    Args:
        planner: from ``stock_planner``.
        task: with the configuration's median shape and spacing.
        cache: nnU-Net's cache of memory by patch.
        dataset_vox: voxels of the whole dataset at that spacing.
        max_share: largest share of these voxels in one batch, for tiny encoders only. nnU-Net's
            ResEnc planners have no such limit.
    """
    size = ENCODERS.get(encoder.name)
    is_capped = size is not None and size.is_tiny and not budget.is_explicit
    planner.max_dataset_covered = max_share if is_capped else 1
    max_vox = size.max_crop_vox if size is not None and is_capped else None
    stock = _stock_plan(planner, encoder, task, cache, dataset_vox, max_vox)
    arguments, changes = reconciled(stock["architecture"]["arch_kwargs"], encoder)

    batch = int(stock["batch_size"])
    if is_capped:
        batch = max(MIN_BATCH, min(batch, MAX_BATCH_TINY))

    stock_name = f"nnU-Net's {type(planner).__name__} for {planner.UNet_vram_target_GB:g} GB"
    limit = f"as {stock_name}"
    if is_capped:
        limit += ", within the limits of tiny encoders"
    median = size_text(task.median_shape_vox, ".0f")
    reason = f"median {median} voxels; {limit}; {changes}"
    return Fit(as_size(stock["patch_size"]), batch, reason, arguments)


def _stock_plan(
    planner: stock_planners.ResEncUNetPlanner,
    encoder: EncoderPlan,
    task: SegmentationTask,
    cache: dict[str, Any],
    dataset_vox: float,
    max_vox: float | None,
) -> dict[str, Any]:
    """Return nnU-Net's plan of the configuration, with at most ``max_vox`` voxels per patch.

    nnU-Net's planner has no such limit, so the image that it is given is cut until the patch is
    small enough.
    """
    median = task.median_shape_vox
    shape: Sequence[float] = median
    limit = max_vox
    while True:
        if limit is not None:
            shape = plan_crop(median, task.spacing_mm, encoder.token_size_vox, int(limit))
        plan: dict[str, Any] = planner.get_plans_for_configuration(
            task.spacing_mm,
            shape,
            "",
            dataset_vox,
            cache,
        )
        if max_vox is None or limit is None or volume(plan["patch_size"]) <= max_vox:
            return plan
        if limit <= volume(encoder.token_size_vox):
            # The patch cannot be smaller than one token.
            return plan
        limit *= SHRINK


def reconciled(wanted: Mapping[str, Any], encoder: EncoderPlan) -> tuple[dict[str, Any], str]:
    """Return the network's arguments for the data, and a note about what the encoder changes.

    Stages, strides and kernels follow the data, but there are never more stages than the encoder
    has: deeper stages would start at random, and hold most of the parameters.

    Args:
        wanted: ``arch_kwargs`` of nnU-Net's planner.
    """
    # Widths and depths are those of the weights.
    own = encoder.arguments
    num_wanted, num_own = int(wanted["n_stages"]), int(own["n_stages"])
    num_stages = min(num_wanted, num_own)
    strides = rows(wanted["strides"])[:num_stages]
    kernels = rows(wanted["kernel_sizes"])[:num_stages]
    arguments = {
        **own,
        "n_stages": num_stages,
        "strides": strides,
        "kernel_sizes": kernels,
        "features_per_stage": list(own["features_per_stage"])[:num_stages],
        "n_blocks_per_stage": list(own["n_blocks_per_stage"])[:num_stages],
        "n_conv_per_stage_decoder": list(own["n_conv_per_stage_decoder"])[: num_stages - 1],
    }

    if num_wanted > num_own:
        notes = [f"{num_own} stages, all that the encoder has ({num_wanted} would fit the patch)"]
    elif num_wanted == num_own:
        notes = [f"{num_wanted} stages"]
    else:
        notes = [
            f"{num_wanted} stages fit the patch, but the encoder has {num_own}: the deepest are "
            "not used",
        ]

    # Kernels of another size are adapted when the weights are loaded.
    stages, shapes = [], set()
    own_kernels = rows(own["kernel_sizes"])
    for stage, (kernel, own_kernel) in enumerate(zip(kernels, own_kernels, strict=False)):
        if kernel != own_kernel:
            stages.append(str(stage))
            shapes.add(f"{times(own_kernel)} -> {times(kernel)}")

    if stages:
        changes = ", ".join(sorted(shapes))
        notes.append(f"the spacing needs other kernels in stages {', '.join(stages)}: {changes}")
    return arguments, "; ".join(notes)


def _extended(values: Sequence[int]) -> tuple[int, ...]:
    """Return one value for each of ``NUM_STAGES`` stages, the last one repeated."""
    num_missing = NUM_STAGES - len(values)
    return (*values, *[values[-1]] * num_missing)
