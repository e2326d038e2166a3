"""Patch, batch, strides and kernels of a ResEnc encoder: asked of nnU-Net's own planner of that
size, then brought to the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (  # noqa: E501
    ResEncUNetPlanner,
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_autoreg.finetune.adapt import times
from nnunet_autoreg.finetune.families import rows
from nnunet_autoreg.finetune.plans import MAX_BATCH_TINY, MIN_BATCH, Budget, Fit, Task
from nnunet_autoreg.geometry import as_size, size_text, volume
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.planning.layout import plan_crop

PRESETS = {
    "resenc_m": nnUNetPlannerResEncM,
    "resenc_l": nnUNetPlannerResEncL,
    "resenc_xl": nnUNetPlannerResEncXL,
}
NUM_STAGES = 14
"""More than any patch has."""
SHRINK = 0.9


def stock_planner(encoder: EncoderPlan, dataset_name: str, budget: Budget) -> ResEncUNetPlanner:
    """nnU-Net's planner of this encoder's size (M's where it has none of that name), for this
    encoder's widths and depths.

    The memory it plans for is that planner's own unless the user gave another.
    """
    planner = PRESETS.get(encoder.name, nnUNetPlannerResEncM)(dataset_name)
    features = encoder.arguments["features_per_stage"]
    planner.UNet_base_num_features, planner.UNet_max_features_3d = features[0], max(features)
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
    """What nnU-Net's planner measures memory by, as it does itself - but without weights, and with
    ``nnUNet_n_proc_DA=0`` too, with which nnU-Net asks torch for no threads at all.
    """
    with torch.device("meta"):
        network = get_network_from_plans(
            class_path, arguments, imported, num_input_channels, num_classes, allow_init=False
        )
    return float(network.compute_conv_feature_map_size(patch_size))


def fit_resenc(
    planner: ResEncUNetPlanner,
    encoder: EncoderPlan,
    task: Task,
    budget: Budget,
    cache: dict[str, Any],
    *,
    dataset_vox: float,
    max_share: float,
) -> Fit:
    """Patch, batch and network arguments of a configuration.

    Args:
        planner: from ``stock_planner``.
        task: with the configuration's median shape and spacing.
        cache: nnU-Net's, of memory by patch.
        dataset_vox: voxels of the whole dataset at that spacing.
        max_share: of a tiny encoder: the largest share of those in one batch. nnU-Net's ResEnc
            planners have no such cap.
    """
    size = ENCODERS.get(encoder.name)
    is_capped = size is not None and size.is_tiny and not budget.is_explicit
    planner.max_dataset_covered = max_share if is_capped else 1
    max_vox = size.max_crop_vox if size is not None and is_capped else None
    stock = _ask(planner, encoder, task, cache, dataset_vox, max_vox)
    arguments, told = reconciled(stock["architecture"]["arch_kwargs"], encoder)
    batch = int(stock["batch_size"])
    if is_capped:
        batch = max(MIN_BATCH, min(batch, MAX_BATCH_TINY))
    stock_name = f"nnU-Net's {type(planner).__name__} for {planner.UNet_vram_target_GB:g} GB"
    limit = f"as {stock_name}, within what tiny encoders get" if is_capped else f"as {stock_name}"
    median = size_text(task.median_shape_vox, ".0f")
    return Fit(
        as_size(stock["patch_size"]), batch, f"median {median} voxels; {limit}; {told}", arguments
    )


def _ask(
    planner: ResEncUNetPlanner,
    encoder: EncoderPlan,
    task: Task,
    cache: dict[str, Any],
    dataset_vox: float,
    max_vox: float | None,
) -> dict[str, Any]:
    """nnU-Net's plan of the configuration, of at most ``max_vox`` voxels a patch: the image it sees
    is cut until that holds.
    """
    shape: Sequence[float] = task.median_shape_vox
    limit = max_vox
    while True:
        if limit is not None:
            shape = plan_crop(
                task.median_shape_vox, task.spacing_mm, encoder.token_size_vox, int(limit)
            )
        plan: dict[str, Any] = planner.get_plans_for_configuration(
            task.spacing_mm, shape, "", dataset_vox, cache
        )
        if (
            max_vox is None
            or limit is None
            or volume(plan["patch_size"]) <= max_vox
            or limit <= volume(encoder.token_size_vox)
        ):
            return plan
        limit *= SHRINK


def reconciled(wanted: Mapping[str, Any], encoder: EncoderPlan) -> tuple[dict[str, Any], str]:
    """The network's arguments: stages, strides and kernels that the data asks for, as far as the
    encoder goes; and what was done.

    Deeper stages than the encoder has would start at random and hold most of the parameters: there
    are never more of them.

    Args:
        wanted: ``arch_kwargs`` of nnU-Net's planner.
    """
    own = encoder.arguments
    num_stages = min(int(wanted["n_stages"]), int(own["n_stages"]))
    strides, kernels = (rows(wanted[key])[:num_stages] for key in ("strides", "kernel_sizes"))
    arguments = {
        **own,
        "n_stages": num_stages,
        "strides": strides,
        "kernel_sizes": kernels,
        "features_per_stage": list(own["features_per_stage"])[:num_stages],
        "n_blocks_per_stage": list(own["n_blocks_per_stage"])[:num_stages],
        "n_conv_per_stage_decoder": list(own["n_conv_per_stage_decoder"])[: num_stages - 1],
    }
    told = [
        _told_stages(int(wanted["n_stages"]), int(own["n_stages"])),
        *_told_kernels(kernels, rows(own["kernel_sizes"])),
    ]
    return arguments, "; ".join(told)


def _told_stages(wanted: int, own: int) -> str:
    if wanted > own:
        return f"{own} stages, all that the encoder has ({wanted} would fit the patch)"
    return (
        f"{wanted} stages"
        if wanted == own
        else f"{wanted} stages fit the patch, {own} has the encoder: the deepest are not used"
    )


def _told_kernels(kernels: list[list[int]], own: list[list[int]]) -> list[str]:
    changed = [i for i, (new, old) in enumerate(zip(kernels, own, strict=False)) if new != old]
    if not changed:
        return []
    shapes = sorted({f"{times(own[i])} -> {times(kernels[i])}" for i in changed})
    return [
        f"the spacing asks for other kernels in stages {', '.join(map(str, changed))}: "
        f"{', '.join(shapes)}"
    ]


def _extended(values: Sequence[int]) -> tuple[int, ...]:
    return (*values, *[values[-1]] * (NUM_STAGES - len(values)))
