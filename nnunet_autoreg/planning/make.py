"""The rules together: numbers about the data and the hardware in, plan values with their reasons
out. Pure, and torch-free.
"""

import math
from collections.abc import Sequence
from typing import Any

from nnunet_autoreg.corpus.fingerprint import GroupPrint
from nnunet_autoreg.families import has_transformer
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size, suited_to
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
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
    real_share,
    real_voxels,
    times,
)
from nnunet_autoreg.planning.tokens import with_tokens

BATCH_GPU, BATCH_ELSEWHERE = 32, 8
SPATIAL_SHARE, MAX_ROTATION_DEG, ZOOM = 0.2, 30.0, (0.7, 1.4)
THICK_SLICES = 3.0


def choose_batch(hardware: Hardware) -> tuple[int, str]:
    """Return crops per optimiser step and the reason.

    They are the same for every GPU, so that its memory does not change the result.
    """
    if hardware.device != "cuda":
        return BATCH_ELSEWHERE, f"device {hardware.device}: small steps"
    return BATCH_GPU, "the same on every GPU; what does not fit at once is accumulated"


def choose_checkpointing(
    encoder: EncoderSize, crop: Size, hardware: Hardware, memory_of: MemoryOf
) -> tuple[bool, str]:
    """Return whether activations have to be checkpointed so that one crop fits, and the reason.

    The reason is "" where they need not.
    """
    without = sum(memory_of(encoder, crop, False))
    if without <= hardware.usable_bytes:
        return False, ""
    with_it = sum(memory_of(encoder, crop, True))
    if with_it >= without:
        return False, ""
    return True, (
        f"one crop takes about {with_it / 2**30:.1f} GiB with it and {without / 2**30:.1f} "
        "without, more than the "
        f"{hardware.usable_bytes / 2**30:.1f} that may be used; a step takes about a third longer"
    )


def choose_micro_batch(
    batch_size: int, hardware: Hardware, fixed_bytes: float, bytes_per_crop: float
) -> tuple[int, str]:
    """Return crops on the device at once and the reason.

    As many as fit are taken, in equal parts of the batch.

    Args:
        fixed_bytes, bytes_per_crop: estimated training memory of the encoder at the planned crop.
    """
    room = (hardware.usable_bytes - fixed_bytes) // bytes_per_crop if bytes_per_crop else batch_size
    parts = math.ceil(batch_size / min(max(room, 1), batch_size))
    micro = math.ceil(batch_size / parts)
    needed = (fixed_bytes + micro * bytes_per_crop) / 2**30
    usable = f"{100 * hardware.usable_share:.0f} % of {hardware.memory_gib:.4g} GiB"
    if room < 1:
        return micro, f"about {needed:.1f} GiB, MORE than {usable}: even one crop does not fit"
    parts_text = "all at once" if parts == 1 else f"{parts} times a step"
    return (
        micro,
        f"{parts_text}; about {needed:.1f} GiB ({bytes_per_crop / 2**30:.2f} a crop), within "
        f"{usable}",
    )


def why_varied(spacing_mm: Sequence[float]) -> dict[str, str]:
    """Return the reasons for rotating and zooming training crops."""
    in_plane = max(spacing_mm) > THICK_SLICES * min(spacing_mm)
    where = (
        f", in the plane of the slices only: one spacing is over {THICK_SLICES:g} times another"
        if in_plane
        else ""
    )
    source = "nnU-Net's and nnssl's"
    return {
        "sequence.spatial_share": f"{source}: one training crop in five is rotated, and one in "
        f"five zoomed{where}",
        "sequence.max_rotation_deg": source,
        "sequence.zoom": source,
    }


def choose_rate(encoder: EncoderSize, batch_size: int) -> tuple[float, str]:
    """Return the peak rate and the reason.

    It is the encoder's usual one at its usual batch, times the root of the ratio of batches.

    Source: the square-root rule for adaptive optimisers - Malladi et al. 2022, arXiv 2205.10287.
    """
    usual = BATCH_ELSEWHERE if encoder.is_tiny else BATCH_GPU
    rate = float(f"{encoder.pretrain_rate * math.sqrt(batch_size / usual):.3g}")
    return (
        rate,
        f"the usual {encoder.pretrain_rate:g} of {encoder.name} at batch {usual}, times the root "
        f"of {batch_size}/{usual}",
    )


def _reasons_of_cnn(encoder: EncoderSize) -> dict[str, str]:
    """Return the reasons for values that only a CNN's plan has."""
    if has_transformer(encoder.family):
        return {}
    return {
        "encoder.token_size_vox": "total stride; as nnU-Net plans strides by spacing",
    }


def plan_data(pool: Pool, crop: Size) -> tuple[DataPlan, dict[str, str]]:
    """Return target spacings and the reasons.

    Groups are written where their targets differ.
    """
    if len({group.spacing_mm for group in pool.groups}) < 2:
        reasons = [
            f"{group.reason}{f' ({group.modality})' if group.modality else ''}"
            for group in pool.groups
        ]
        reason = " and ".join(reasons) or f"median of {pool.num_scans} scans"
        return DataPlan(pool.spacing_mm, pool.ct_window), {
            "data.spacing_mm": f"{reason}, coarsest axis first"
        }
    groups = tuple(SpacingGroup(g.modality, g.native_mm, g.spacing_mm) for g in pool.groups)
    listed = "; ".join(
        f"{g.num_scans} {g.modality} to {times(g.spacing_mm)} mm ({g.reason}){_padding(crop, g)}"
        for g in pool.groups
    )
    return DataPlan(pool.spacing_mm, pool.ct_window, spacing_groups=groups), {
        "data.spacing_mm": f"that of the largest of {len(groups)} groups "
        f"({pool.groups[0].modality}, {pool.groups[0].reason})",
        "data.spacing_groups": f"spacings within about a factor of 2 share a target: {listed}",
    }


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
    chosen, why_encoder = choose_encoder(overrides.encoder, hardware, pool, overrides.single_tokens)
    if why_encoder != BY_USER:
        chosen, why_encoder = limit_by_pool(chosen, why_encoder, pool)
    encoder = suited_to(encoder_size(chosen), pool.spacing_mm)
    encoder, why_token = with_tokens(
        encoder, pool.spacing_mm, pool.median_shape_vox, overrides.token_size_vox
    )
    memory_of = _remembered(memory_of)
    layout = choose_layout(encoder, hardware, pool, memory_of)
    crop = layout.crop
    order, predictor, why_order = choose_order(encoder)
    objective, why_objective = choose_objective(encoder)
    batch, why_batch = (
        choose_batch(hardware) if overrides.batch_size is None else (overrides.batch_size, BY_USER)
    )
    recompute, why_recompute = choose_checkpointing(encoder, crop, hardware, memory_of)
    micro, why_micro = choose_micro_batch(batch, hardware, *memory_of(encoder, crop, recompute))
    rate, why_rate = choose_rate(encoder, batch)
    planned = choose_length(
        pool, real_voxels(crop, pool.median_shape_vox) * batch, overrides.num_epochs
    )
    steps, why_steps = planned if overrides.num_steps is None else (overrides.num_steps, BY_USER)
    if overrides.num_hours is not None:
        why_steps = (
            "stands in until a step has been measured, before the first; then what "
            f"{overrides.num_hours:g} h allow"
        )
    data, why_data = plan_data(pool, crop)
    compiles, why_compile = choose_compile(steps, overrides.num_hours)
    plan = Plan(
        name=name,
        data=data,
        encoder=EncoderPlan(
            encoder.name, encoder.class_path, encoder.arguments, encoder.token_size
        ),
        sequence=SequencePlan(
            crop,
            layout.block_tokens,
            order,
            predictor,
            spatial_share=SPATIAL_SHARE,
            max_rotation_deg=MAX_ROTATION_DEG,
            zoom=ZOOM,
        ),
        objective=objective,
        optim=OptimPlan(
            steps,
            batch,
            rate,
            warmup_steps=1,
            micro_batch_size=micro,
            checkpoint_activations=recompute,
        ),
        run=RunPlan(seed, checkpoint_every=1, validate_every=1, compile=compiles),
        request=request,
        reasons={
            **why_data,
            "encoder.name": why_encoder,
            **_reasons_of_cnn(encoder),
            **({"encoder.token_size_vox": why_token} if why_token else {}),
            **why_objective,
            "sequence.crop_size_vox": layout.why_crop,
            "sequence.block_tokens": layout.why_block,
            "sequence.order": why_order,
            **why_varied(pool.spacing_mm),
            "optim.batch_size": why_batch,
            "optim.micro_batch_size": why_micro,
            **({"optim.checkpoint_activations": why_recompute} if recompute else {}),
            "optim.lr": why_rate,
            "run.compile": why_compile,
        },
    )
    return with_length(plan, steps, why_steps)


def _remembered(memory_of: MemoryOf) -> MemoryOf:
    """Return the same function, asked once of every combination.

    A count of a large encoder takes seconds.
    """
    known: dict[tuple[str, Size, bool], tuple[float, float]] = {}

    def remembered(encoder: EncoderSize, crop: Size, recompute: bool) -> tuple[float, float]:
        key = encoder.name, crop, recompute
        if key not in known:
            known[key] = memory_of(encoder, crop, recompute)
        return known[key]

    return remembered


def _padding(crop: Size, group: GroupPrint) -> str:
    real = real_share(crop, group.median_shape_vox)
    if real >= MOSTLY_PADDING:
        return ""
    return (
        f", of whose crops only {100 * real:.0f} % is not padding: give these scans a run of their "
        "own if they matter"
    )
