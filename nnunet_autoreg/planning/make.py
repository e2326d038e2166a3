"""Make a plan: numbers about scans and hardware in, planned values with their reasons out.

Pure functions, without torch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nnunet_autoreg.families import has_transformer, token_size_of
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.machine import GIB
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size, suited_to
from nnunet_autoreg.plan import (
    DataPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
    SpacingGroup,
)
from nnunet_autoreg.planning.encoder import (
    choose_encoder,
    choose_objective,
    choose_order,
    limit_by_pool,
)
from nnunet_autoreg.planning.layout import choose_layout
from nnunet_autoreg.planning.length import choose_compile, choose_length, with_length
from nnunet_autoreg.planning.pool import (
    BY_USER,
    MOSTLY_PADDING,
    Hardware,
    MemoryOf,
    Overrides,
    Pool,
    dimensions,
    unpadded_share,
    unpadded_voxels,
)
from nnunet_autoreg.planning.tokens import THICK_SLICES, with_tokens

BATCH_GPU, BATCH_ELSEWHERE = 32, 8
SPATIAL_SHARE, MAX_ROTATION_DEG, ZOOM = 0.2, 30.0, (0.7, 1.4)


def make_plan(
    name: str,
    pool: Pool,
    hardware: Hardware,
    overrides: Overrides,
    seed: int,
    request: dict[str, Any],
    memory_of: MemoryOf,
) -> Plan:
    """Return the plan that fits these scans and this hardware."""
    memory = _remembering(memory_of)
    encoder, why_encoder = plan_encoder(pool, hardware, overrides)

    # What a sequence is, and what is learned from it.
    layout = choose_layout(encoder, hardware, pool, memory)
    crop = layout.crop
    data, why_data = plan_data(pool, crop)
    order, predictor, why_order = choose_order(encoder)
    sequence = SequencePlan(
        crop,
        layout.block_tokens,
        order,
        predictor,
        spatial_share=SPATIAL_SHARE,
        max_rotation_deg=MAX_ROTATION_DEG,
        zoom=ZOOM,
    )
    objective, why_objective = choose_objective(encoder)

    # The batch, the length, and how much of a batch is on the device at once.
    batch, why_batch = choose_batch(hardware, overrides.batch_size)
    step_vox = unpadded_voxels(crop, pool.median_shape_vox) * batch
    steps, why_steps = plan_length(pool, step_vox, overrides)
    optim, why_optim = plan_optim(encoder, crop, batch, steps, hardware, memory)
    compiles, why_compile = choose_compile(steps, overrides.num_hours)

    reasons = {
        **why_data,
        "data.min_scans": why_min_scans(data.min_scans, pool.num_scans),
        **why_encoder,
        **why_objective,
        "sequence.crop_size_vox": layout.why_crop,
        "sequence.block_tokens": layout.why_block,
        "sequence.order": why_order,
        **why_varied(pool.spacing_mm),
        "optim.batch_size": why_batch,
        **why_optim,
        "run.compile": why_compile,
    }
    plan = Plan(
        name=name,
        data=data,
        encoder=encoder.encoder_plan(),
        sequence=sequence,
        objective=objective,
        optim=optim,
        run=RunPlan(seed, checkpoint_every=1, validate_every=1, compile=compiles),
        request=request,
        reasons=reasons,
    )
    # Warm-up, checkpoints and validation follow from the length.
    return with_length(plan, steps, why_steps)


def _remembering(memory_of: MemoryOf) -> MemoryOf:
    """Return a function that calls ``memory_of`` once for each combination.

    Counting takes seconds for a large encoder, and most combinations occur several times.
    """
    known: dict[tuple[str, Size, bool], tuple[float, float]] = {}

    def memory(encoder: EncoderSize, crop: Size, recompute: bool) -> tuple[float, float]:
        key = encoder.name, crop, recompute
        if key not in known:
            known[key] = memory_of(encoder, crop, recompute)
        return known[key]

    return memory


def plan_encoder(
    pool: Pool,
    hardware: Hardware,
    overrides: Overrides,
) -> tuple[EncoderSize, dict[str, str]]:
    """Return the encoder, with strides or tokens that suit the scans, and the reasons."""
    name, why_name = choose_encoder(overrides.encoder, hardware, pool, overrides.single_tokens)
    if why_name != BY_USER:
        name, why_name = limit_by_pool(name, why_name, pool)

    encoder = suited_to(encoder_size(name), pool.spacing_mm)
    if overrides.arguments is not None:
        token_size = token_size_of(encoder.class_path, overrides.arguments)
        encoder = replace(encoder, arguments=overrides.arguments, token_size=token_size)

    encoder, why_token = with_tokens(
        encoder,
        pool.spacing_mm,
        pool.median_shape_vox,
        overrides.token_size_vox,
    )
    if not has_transformer(encoder.family):
        why_token = "total stride; as nnU-Net plans strides by spacing"

    reasons = {"encoder.name": why_name}
    if why_token:
        reasons["encoder.token_size_vox"] = why_token
    return encoder, reasons


def plan_data(pool: Pool, crop: Size) -> tuple[DataPlan, dict[str, str]]:
    """Return target spacings and the reasons.

    Groups are written if their targets differ.
    """
    targets_mm = {group.spacing_mm for group in pool.groups}
    if len(targets_mm) < 2:
        reasons = []
        for group in pool.groups:
            suffix = f" ({group.modality})" if group.modality else ""
            reasons.append(f"{group.reason}{suffix}")
        reason = " and ".join(reasons) or f"median of {pool.num_scans} scans"
        data = DataPlan(pool.spacing_mm, pool.ct_window, salt_free=True)
        return data, {"data.spacing_mm": f"{reason}, coarsest axis first"}

    groups, described = [], []
    for group in pool.groups:
        groups.append(SpacingGroup(group.modality, group.native_mm, group.spacing_mm))
        text = f"{group.num_scans} {group.modality} to {dimensions(group.spacing_mm)} mm"
        text += f" ({group.reason})"
        # All crops have one size in voxels, regardless of the spacing.
        real = unpadded_share(crop, group.median_shape_vox)
        if real < MOSTLY_PADDING:
            text += (
                f", of whose crops only {100 * real:.0f} % is not padding: give these scans a run "
                "of their own if they matter"
            )
        described.append(text)

    largest = pool.groups[0]
    why_spacing = (
        f"that of the largest of {len(groups)} groups ({largest.modality}, {largest.reason})"
    )
    why_groups = "spacings within about a factor of 2 share a target: " + "; ".join(described)
    data = DataPlan(pool.spacing_mm, pool.ct_window, spacing_groups=tuple(groups), salt_free=True)
    return data, {"data.spacing_mm": why_spacing, "data.spacing_groups": why_groups}


def choose_batch(hardware: Hardware, fixed: int | None = None) -> tuple[int, str]:
    """Return crops per optimiser step and the reason.

    They are the same for every GPU, so that its memory does not change the result.

    Args:
        fixed: the number that the user set.
    """
    if fixed is not None:
        return fixed, BY_USER
    if hardware.device != "cuda":
        return BATCH_ELSEWHERE, f"device {hardware.device}: small steps"
    return BATCH_GPU, "the same on every GPU; what does not fit at once is accumulated"


def plan_optim(
    encoder: EncoderSize,
    crop: Size,
    batch_size: int,
    num_steps: int,
    hardware: Hardware,
    memory_of: MemoryOf,
) -> tuple[OptimPlan, dict[str, str]]:
    """Return how the weights are trained with batches of this size, and the reasons.

    The warm-up is planned later.
    """
    recompute, why_recompute = choose_checkpointing(encoder, crop, hardware, memory_of)
    fixed_bytes, bytes_per_crop = memory_of(encoder, crop, recompute)
    micro, why_micro = choose_micro_batch(batch_size, hardware, fixed_bytes, bytes_per_crop)
    rate, why_rate = choose_rate(encoder, batch_size)

    reasons = {"optim.micro_batch_size": why_micro}
    if recompute:
        reasons["optim.checkpoint_activations"] = why_recompute
    reasons["optim.lr"] = why_rate

    optim = OptimPlan(
        num_steps,
        batch_size,
        rate,
        warmup_steps=1,
        micro_batch_size=micro,
        checkpoint_activations=recompute,
    )
    return optim, reasons


def choose_checkpointing(
    encoder: EncoderSize,
    crop: Size,
    hardware: Hardware,
    memory_of: MemoryOf,
) -> tuple[bool, str]:
    """Return whether activations have to be checkpointed so that one crop fits, and the reason.

    The reason is "" if they need not be.
    """
    without = sum(memory_of(encoder, crop, False))
    if without <= hardware.usable_bytes:
        return False, ""

    # An encoder without repeated layers gains nothing by it.
    with_it = sum(memory_of(encoder, crop, True))
    if with_it >= without:
        return False, ""

    reason = (
        f"one crop takes about {with_it / GIB:.1f} GiB with it and {without / GIB:.1f} without, "
        f"more than the {hardware.usable_bytes / GIB:.1f} that may be used; a step takes about a "
        "third longer"
    )
    return True, reason


def choose_micro_batch(
    batch_size: int,
    hardware: Hardware,
    fixed_bytes: float,
    bytes_per_crop: float,
) -> tuple[int, str]:
    """Return crops on the device at once and the reason.

    They are as many as fit, in equal parts of the batch.

    Args:
        fixed_bytes, bytes_per_crop: estimated training memory of the encoder at the planned crop.
    """
    room: float = batch_size
    if bytes_per_crop:
        room = (hardware.usable_bytes - fixed_bytes) // bytes_per_crop

    at_once = min(max(room, 1), batch_size)
    num_parts = math.ceil(batch_size / at_once)
    micro = math.ceil(batch_size / num_parts)
    needed = (fixed_bytes + micro * bytes_per_crop) / GIB
    usable = f"{100 * hardware.usable_share:.0f} % of {hardware.memory_gib:.4g} GiB"
    if room < 1:
        return micro, f"about {needed:.1f} GiB, MORE than {usable}: even one crop does not fit"

    parts = "all at once" if num_parts == 1 else f"{num_parts} times a step"
    each = f"{bytes_per_crop / GIB:.2f} a crop"
    return micro, f"{parts}; about {needed:.1f} GiB ({each}), within {usable}"


def choose_rate(encoder: EncoderSize, batch_size: int) -> tuple[float, str]:
    """Return the peak rate and the reason.

    It is the encoder's usual rate at the usual batch, times the square root of the ratio of
    batches.

    Source: the square-root rule for adaptive optimisers - Malladi et al. 2022, arXiv 2205.10287.
    """
    usual_rate = encoder.pretrain_rate
    usual_batch = BATCH_ELSEWHERE if encoder.is_tiny else BATCH_GPU
    rate = usual_rate * math.sqrt(batch_size / usual_batch)
    reason = (
        f"the usual {usual_rate:g} of {encoder.name} at batch {usual_batch}, times the root of "
        f"{batch_size}/{usual_batch}"
    )
    # Three digits are enough, and are easier to read in the plan.
    return float(f"{rate:.3g}"), reason


def plan_length(pool: Pool, step_vox: int, overrides: Overrides) -> tuple[int, str]:
    """Return the number of steps of ``step_vox`` voxels each, and why."""
    if overrides.num_steps is not None:
        return overrides.num_steps, BY_USER

    steps, why_steps = choose_length(pool, step_vox, overrides.num_epochs)
    if overrides.num_hours is not None:
        why_steps = (
            "a placeholder until a step has been timed; then as many as "
            f"{overrides.num_hours:g} h allow"
        )
    return steps, why_steps


def why_varied(spacing_mm: Sequence[float]) -> dict[str, str]:
    """Return the reasons for rotating and zooming training crops."""
    source = "nnU-Net's and nnssl's"
    why_share = f"{source}: one training crop in five is rotated, and one in five zoomed"
    if max(spacing_mm) > THICK_SLICES * min(spacing_mm):
        why_share += (
            f", in the plane of the slices only: one spacing is over {THICK_SLICES:g} times another"
        )
    return {
        "sequence.spatial_share": why_share,
        "sequence.max_rotation_deg": source,
        "sequence.zoom": source,
    }


def why_min_scans(min_scans: int, num_scans: int) -> str:
    """Return the reason for the number of scans below which an encoder is used by name only."""
    if num_scans < min_scans:
        return f"{num_scans} scans are fewer, so fine-tuning uses this encoder only if it is named"
    return "encoders of very few scans are used only if they are named"
